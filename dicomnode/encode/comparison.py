"""An earlier study in a report: its images, the former values, and what has changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    ContainerContentItem,
    ContentSequence,
    DateContentItem,
    ImageContentItem,
    NumContentItem,
    RelationshipTypeValues,
    UIDRefContentItem,
)
from pydicom.dataset import Dataset

from dicomnode.encode.common import clean_text, concept
from dicomnode.identity import derived_uid
from dicomnode.records import Analysis, Change, Code, Prior

SCHEME = "99DICOMNODE"
SIGNIFICANT_DIGITS = 8
_CONTAINS = RelationshipTypeValues.CONTAINS
_INFERRED = RelationshipTypeValues.INFERRED_FROM
_OBSERVED = RelationshipTypeValues.HAS_OBS_CONTEXT
_ACQUIRED = RelationshipTypeValues.HAS_ACQ_CONTEXT
_STUDY_DATE = CodedConcept("111060", "DCM", "Study Date")
_STUDY_UID = CodedConcept("121018", "DCM", "Procedure Study Instance UID")


def change_concept(name: Code) -> Code:
    """The concept of a change; DICOM has none, and a difference must not be read as the value itself."""
    value = f"CHG-{name.value}"
    if len(value) > 16:  # SH, PS3.3 8.8
        value = f"CHG-{derived_uid(name.scheme, name.value)[-12:]}"
    return Code(value, SCHEME, f"Change of {name.meaning} since prior study")


def add_changes(group: Sequence[Dataset], prior: Prior | None, segment: int | None, image: int | None = None) -> None:
    """Append to a measurement group the changes of its segment: each inferred from the former value (TID 300).

    ``image``: without a segment, the image that the group is of.
    """
    for change in prior.changes if prior and group else ():
        one = change.measurement
        if (
            one.segment == segment
            and (segment is not None or one.image == image)
            and math.isfinite(change.before + change.measurement.value)
        ):
            group[0].ContentSequence.append(_change(change, prior))  # type: ignore[arg-type]  # there is one


def _change(change: Change, prior: Prior) -> NumContentItem:
    now = change.measurement
    unit = concept(now.unit)
    item = NumContentItem(
        concept(change_concept(now.name)), now.value - change.before, unit, relationship_type=_CONTAINS
    )
    former = NumContentItem(concept(now.name), change.before, unit, relationship_type=_INFERRED)
    for number, value in ((item, now.value - change.before), (former, change.before)):
        number.MeasuredValueSequence[0].NumericValue = f"{value:.{SIGNIFICANT_DIGITS}g}"
    context: list[Dataset] = [UIDRefContentItem(_STUDY_UID, prior.study_uid, _OBSERVED)]
    if is_date(prior.study_date):
        context.append(DateContentItem(_STUDY_DATE, prior.study_date, _OBSERVED))
    former.ContentSequence = ContentSequence(context)
    item.ContentSequence = ContentSequence([former])
    return item


def image_library(prior: Prior | None) -> list[Dataset]:
    """TID 1600 with the images of the earlier study as one group."""
    if prior is None or not prior.instances:
        return []
    modality = clean_text(prior.modality)[:16]
    items: list[Dataset] = []
    if modality:
        items.append(
            CodeContentItem(
                CodedConcept("121139", "DCM", "Modality"), CodedConcept(modality, "DCM", modality), _ACQUIRED
            )
        )
    if is_date(prior.study_date):
        items.append(DateContentItem(_STUDY_DATE, prior.study_date, _ACQUIRED))
    items += [
        ImageContentItem(
            CodedConcept("260753009", "SCT", "Source"), sop_class, sop_instance, relationship_type=_CONTAINS
        )
        for sop_class, sop_instance in prior.instances
    ]
    group = ContainerContentItem(CodedConcept("126200", "DCM", "Image Library Group"), relationship_type=_CONTAINS)
    group.ContentSequence = ContentSequence(items)
    library = ContainerContentItem(
        CodedConcept("111028", "DCM", "Image Library"), template_id="1600", relationship_type=_CONTAINS
    )
    library.ContentSequence = ContentSequence([group])
    return [library]


def remarks(analysis: Analysis) -> list[str]:
    """The comparison in words."""
    prior = analysis.prior
    if prior is None:
        return []
    when = (
        f" of {prior.study_date[:4]}-{prior.study_date[4:6]}-{prior.study_date[6:]}"
        if is_date(prior.study_date)
        else ""
    )
    if not prior.changes:
        return [f"There is an earlier study{when}; no value of it could be compared."]
    labels = {s.number: s.label for s in analysis.segments}
    told = [f"Compared with the study{when}, analysed by version {prior.model_version}."]
    for change in prior.changes:
        now = change.measurement
        told.append(
            f"{now.name.meaning} of {labels.get(now.segment or 0, 'the series')}: {change.before:.6g} then,"
            f" {now.value:.6g} now, change {now.value - change.before:+.6g} {now.unit.value}."
        )
    return told


def is_date(text: str) -> bool:
    return len(text) == 8 and text.isascii() and text.isdigit()
