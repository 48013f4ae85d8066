"""Measurement report: Comprehensive 3D SR with TID 1500 (PS3.16)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import highdicom as hd
from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    ContainerContentItem,
    ContentSequence,
    RelationshipTypeValues,
    TextContentItem,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.critical import Hit, is_positive
from dicomnode.encode.common import (
    ARTIFICIAL_INTELLIGENCE,
    Context,
    Provenance,
    clean_text,
    concept,
    finish,
    is_anatomical,
    long_string,
    refuse_what_the_library_refuses,
)
from dicomnode.encode.comparison import SCHEME, add_changes, image_library
from dicomnode.encode.comparison import remarks as prior_remarks
from dicomnode.encode.evidence import CURRENT_EVIDENCE, Reference, for_the_library, take_over
from dicomnode.encode.headers import with_empty_patient
from dicomnode.encode.procedures import procedure_reported
from dicomnode.encode.seg import SERIES_NUMBER_BASE, tracking_id
from dicomnode.errors import NodeError
from dicomnode.identity import derived_uid
from dicomnode.orders import LABELMAP, LABELMAP_SR
from dicomnode.records import (
    Analysis,
    Code,
    EncodedObject,
    Finding,
    Measurement,
    ResultIdentity,
    SegmentDefinition,
)

_CONTAINS = RelationshipTypeValues.CONTAINS
_COMMENT = CodedConcept("121106", "DCM", "Comment")
_SUMMARY = CodedConcept("111017", "DCM", "CAD Processing and Findings Summary")
_WITH_FINDINGS = CodedConcept("111242", "DCM", "All algorithms succeeded; with findings")  # CID 6047
_NO_FINDINGS = CodedConcept("111241", "DCM", "All algorithms succeeded; without findings")
_PRESENCE = CodedConcept("121052", "DCM", "Presence of property")
_ABSENT = CodedConcept("2667000", "SCT", "Absent")  # CID 240
_LATERALITIES = {("7771000", "SCT"), ("24028007", "SCT"), ("51440002", "SCT"), ("66459002", "SCT")}  # CID 244
_NOT_A_NUMBER = CodedConcept("114000", "DCM", "Not a number")  # CID 42
_POSITIVE_INFINITY = CodedConcept("114002", "DCM", "Positive Infinity")
_NEGATIVE_INFINITY = CodedConcept("114001", "DCM", "Negative Infinity")
_FINDING = CodedConcept("121071", "DCM", "Finding")
_ACTIONABLE = CodedConcept("RID49480", "RADLEX", "ACR Category 1 Actionable Finding")  # CID 7035
_PROBABILITY = Code("122157", "DCM", "Probability")
_NO_UNITS = Code("1", "UCUM", "no units")
SIGNIFICANT_DIGITS = 8
LABELMAP_SR_SERIES_NUMBER = 8000


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A SEG that a report refers to; ``numbers``: segment of the analysis -> Segment Number in it.

    ``one_frame``: of a single image it has one frame for all segments (label map), else one for each.
    """

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    numbers: Mapping[int, int]
    one_frame: bool = False


def encode_sr(
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    context: Context,
    *,
    segmentations: Sequence[Segmentation],
    variant: str = "",
    hits: Sequence[Hit] = (),
    remarks: Sequence[str] = (),
) -> EncodedObject:
    """SR with a group per segment, one per finding, and one for measurements of the series or each image.

    ``found``: the segments that have voxels. ``segmentations``: the SEGs that hold them, one for a
    volume, one for each image of its own, none where none is made. ``variant``: "" for the report beside
    the binary SEG, else what sets its UIDs apart (``plain``: without one, ``LABELMAP``).
    Every instance of ``context.sources`` is listed as evidence, and so is each SEG.
    Measured numbers are written with 8 significant digits and, unrounded, as FD.
    """
    provenance = context.provenance
    groups: list[Dataset] = []
    for segment in analysis.segments:
        measured = [m for m in analysis.measurements if m.segment == segment.number]
        in_it = next((s for s in segmentations if segment.number in s.numbers), None)
        group = _segment_group(segment, segment in found, measured, context, in_it)
        add_changes(group, analysis.prior, segment.number)
        groups += group
    for finding in analysis.findings:
        groups += _finding_group(finding, context)
    for image in dict.fromkeys(m.image for m in analysis.measurements if m.segment is None):
        of_it = [m for m in analysis.measurements if m.segment is None and m.image == image]
        group = _whole_group(of_it, image, context)
        add_changes(group, analysis.prior, None, image)
        groups += group
    unknown = {m.segment for m in analysis.measurements} - {None, *(s.number for s in analysis.segments)}
    if unknown:
        raise NodeError("encode SR", f"measurements name undefined segments {sorted(map(str, unknown))}")

    content = [*report_head(context), *image_library(analysis.prior)]
    if groups:
        content.append(_container(CodedConcept("126010", "DCM", "Imaging Measurements"), groups))
    evaluations = _critical(hits) + _evaluations(analysis, found, context, [*prior_remarks(analysis), *remarks])
    content.append(_container(CodedConcept("C0034375", "UMLS", "Qualitative Evaluations"), evaluations))
    title = f"AI {provenance.name} {provenance.version} report"
    return build_report(
        content,
        evidence=_evidence(analysis, context, segmentations),
        description=f"CRITICAL: {title}" if hits else title,
        context=context,
        variant=variant,
    )


def build_report(
    content: Sequence[Dataset], *, evidence: Sequence[Reference], description: str, context: Context, variant: str = ""
) -> EncodedObject:
    """Comprehensive 3D SR with root TID 1500 around ``content``; ``variant`` as in :func:`encode_sr`."""
    identity, headers = context.identity, context.headers
    labelmap = variant == LABELMAP
    root = ContainerContentItem(CodedConcept("126000", "DCM", "Imaging Measurement Report"), template_id="1500")
    root.ContentSequence = ContentSequence(content)
    seen = for_the_library(evidence, content)
    with refuse_what_the_library_refuses("encode SR"):
        sr = hd.sr.Comprehensive3DSR(
            evidence=[with_empty_patient(seen[0].data_set()), *(r.data_set() for r in seen[1:])],
            content=root,
            series_instance_uid=_varied(identity.sr_series_uid, variant),
            series_number=(LABELMAP_SR_SERIES_NUMBER if labelmap else 2 * SERIES_NUMBER_BASE)
            + max(headers.series_number, 0),
            sop_instance_uid=_varied(identity.sr_uid, variant),
            instance_number=identity.revision,
            manufacturer=long_string(context.station.manufacturer),
            series_description=long_string(description),
            is_complete=True,
            is_verified=False,
            previous_versions=_predecessor(identity, labelmap=labelmap),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            specific_character_set=None,
        )
    _without_false_values(sr)
    private = sorted({s for s in schemes_of(sr) if s.startswith("99")})
    if private:
        sr.CodingSchemeIdentificationSequence = [_scheme(name) for name in private]
    kind = LABELMAP_SR if labelmap else "SR"
    return finish(sr, kind, context, {CURRENT_EVIDENCE: [take_over(sr, seen, evidence)]})


def schemes_of(item: Dataset) -> Iterator[str]:
    """Coding Scheme Designator of every code in ``item``."""
    for element in item:
        if element.VR == "SQ":
            for child in element.value:
                yield from schemes_of(child)
        elif element.keyword == "CodingSchemeDesignator":
            yield str(element.value)


def _scheme(designator: str) -> Dataset:
    """Who is behind a private coding scheme (PS3.3 C.12.1, SOP Common); those of others have their name alone."""
    item = Dataset()
    item.CodingSchemeDesignator = designator
    if designator == SCHEME:
        item.CodingSchemeName = "Codes of the dicomnode project for which no standard scheme has one"
        item.CodingSchemeResponsibleOrganization = "dicomnode project"
    return item


def report_head(context: Context) -> list[Dataset]:
    """Language, observer and procedure: what every report begins with (TID 1500)."""
    return [
        *hd.sr.LanguageOfContentItemAndDescendants(CodedConcept("en-US", "RFC5646", "English (United States)")),
        *_observer(context.provenance),
        CodeContentItem(
            CodedConcept("121058", "DCM", "Procedure reported"),
            procedure_reported(context.headers),
            RelationshipTypeValues.HAS_CONCEPT_MOD,
        ),
    ]


def _varied(uid: str, variant: str) -> str:
    return derived_uid(uid, variant) if variant else uid


def _container(name: CodedConcept, items: Sequence[Dataset]) -> ContainerContentItem:
    container = ContainerContentItem(name, relationship_type=_CONTAINS)
    container.ContentSequence = ContentSequence(items)
    return container


def _observer(provenance: Provenance) -> list[Dataset]:
    """TID 1001 with the model as device observer; no person has looked at it."""
    return list(hd.sr.ObservationContext(observer_device_context=observer_device(provenance)))


def observer_device(provenance: Provenance) -> hd.sr.ObserverContext:
    """TID 1004."""
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=provenance.device_uid,
        name=f"{provenance.name} {provenance.version}",
        manufacturer_name=provenance.manufacturer,
        model_name=provenance.name,
    )
    return hd.sr.ObserverContext(CodedConcept("121007", "DCM", "Device"), device)


def _algorithm(provenance: Provenance, parameters: Sequence[str] | None = None) -> hd.sr.AlgorithmIdentification:
    """TID 4019; name, version and manufacturer equal Contributing Equipment, the parameters say how it was run."""
    return hd.sr.AlgorithmIdentification(
        name=provenance.name,
        version=provenance.version,
        family=ARTIFICIAL_INTELLIGENCE,
        manufacturer=provenance.manufacturer,
        parameters=[*provenance.facts, *(parameters or ())] or None,
    )


def _segment_group(
    segment: SegmentDefinition,
    found: bool,
    measured: Sequence[Measurement],
    context: Context,
    segmentation: Segmentation | None,
) -> list[Dataset]:
    """TID 1411 for a segment of the SEG, TID 1410 on an image of its own, TID 1501 without SEG or when not found."""
    identity, provenance = context.identity, context.provenance
    common = {
        "tracking_identifier": hd.sr.TrackingIdentifier(
            identity.tracking_uids[segment.number], tracking_id(provenance, segment)
        ),
        "finding_type": concept(segment.type),
        "finding_category": concept(segment.category),
        "finding_sites": _sites(segment),
        "algorithm_id": _algorithm(provenance),
        "measurements": [_measurement(m) for m in measured],
    }
    if found and segmentation is None:
        return list(
            hd.sr.MeasurementsAndQualitativeEvaluations(source_images=_images(segment.image, context), **common)
        )
    if found and segmentation is not None and segment.image is not None:
        source = context.headers.slices[segment.image]
        on_image = hd.sr.ReferencedSegmentationFrame(
            sop_class_uid=segmentation.sop_class_uid,
            sop_instance_uid=segmentation.sop_instance_uid,
            frame_number=1 if segmentation.one_frame else segmentation.numbers[segment.number],
            segment_number=segmentation.numbers[segment.number],
            source_image=hd.sr.SourceImageForSegmentation(str(source.SOPClassUID), str(source.SOPInstanceUID)),
        )
        # Only one of the two may be there (PS3.3 Table 10-3): a frame of a label map has several segments.
        del on_image[0].ReferencedSOPSequence[0][
            "ReferencedFrameNumber" if segmentation.one_frame else "ReferencedSegmentNumber"
        ]
        return list(hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=on_image, **common))
    if found and segmentation is not None:
        reference = hd.sr.ReferencedSegment(
            sop_class_uid=segmentation.sop_class_uid,
            sop_instance_uid=segmentation.sop_instance_uid,
            segment_number=segmentation.numbers[segment.number],
            source_series=hd.sr.SourceSeriesForSegmentation(context.headers.series_uid),
        )
        return list(hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=reference, **common))
    group = hd.sr.MeasurementsAndQualitativeEvaluations(source_images=_images(segment.image, context), **common)
    if not is_anatomical(segment.category):
        group[0].ContentSequence.append(CodeContentItem(_PRESENCE, _ABSENT, _CONTAINS))
    text = f"Not found: the model marked no voxel as {clean_text(segment.label)}."
    group[0].ContentSequence.append(TextContentItem(_COMMENT, text, _CONTAINS))
    return list(group)


def _finding_group(finding: Finding, context: Context) -> list[Dataset]:
    """TID 1501 for an answer about the whole series or an image: the finding, its value, its probability."""
    identity, provenance = context.identity, context.provenance
    threshold = [f"threshold of {finding.key}: {finding.threshold:.6g}"] if finding.threshold is not None else None
    measurements = []
    if finding.probability is not None:
        measurements.append(Measurement(finding.key, _PROBABILITY, finding.probability, _NO_UNITS))
    evaluations = []
    if finding.value is not None:
        evaluations.append(hd.sr.QualitativeEvaluation(_PRESENCE, concept(finding.value)))
    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            derived_uid(identity.sr_uid, "tracking", "finding", finding.key, *_number_of(finding.image)),
            long_string(f"{provenance.name}: {finding.key}{_image_name(finding.image)}"),
        ),
        finding_type=concept(finding.name),
        algorithm_id=_algorithm(provenance, threshold),
        measurements=[_measurement(m) for m in measurements] or None,
        qualitative_evaluations=evaluations or None,
        source_images=_images(finding.image, context),
    )
    if finding.text.strip():
        group[0].ContentSequence.append(TextContentItem(_COMMENT, clean_text(finding.text), _CONTAINS))
    return list(group)


def _critical(hits: Sequence[Hit]) -> list[Dataset]:
    """The mark of a critical result: a finding of CID 7035 and what met the site's conditions."""
    if not hits:
        return []
    texts = [f"CRITICAL by the rules of this site: {clean_text(hit.text)}." for hit in hits]
    return [
        CodeContentItem(_FINDING, _ACTIONABLE, _CONTAINS),
        *[TextContentItem(_COMMENT, text, _CONTAINS) for text in texts],
    ]


def _whole_group(measured: Sequence[Measurement], image: int | None, context: Context) -> list[Dataset]:
    """TID 1501 for measurements of the whole series, or of the image ``image``."""
    identity, provenance = context.identity, context.provenance
    return list(
        hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(
                derived_uid(identity.sr_uid, "tracking", "series", *_number_of(image)),
                long_string(
                    f"{provenance.name}: whole series" if image is None else f"{provenance.name}:{_image_name(image)}"
                ),
            ),
            algorithm_id=_algorithm(provenance),
            measurements=[_measurement(m) for m in measured],
            source_images=_images(image, context),
        )
    )


def _images(image: int | None, context: Context) -> list[hd.sr.SourceImageForMeasurementGroup] | None:
    """The image that a group is about; the library takes None for no one in particular."""
    if image is None:
        return None
    source = context.headers.slices[image]
    return [hd.sr.SourceImageForMeasurementGroup(str(source.SOPClassUID), str(source.SOPInstanceUID))]


def _number_of(image: int | None) -> tuple[str, ...]:
    return () if image is None else (str(image),)


def _image_name(image: int | None) -> str:
    return "" if image is None else f" image {image + 1}"


def _sites(segment: SegmentDefinition) -> list[hd.sr.FindingSite] | None:
    """Finding Site: the region, or the structure itself when that is what was segmented."""
    anatomical = is_anatomical(segment.category)
    site = segment.anatomic_region or (segment.type if anatomical else None)
    if site is None:
        return None
    modifier = segment.type_modifier
    if modifier and (modifier.value, modifier.scheme) in _LATERALITIES:
        return [hd.sr.FindingSite(concept(site), laterality=concept(modifier))]
    if modifier and anatomical:
        return [hd.sr.FindingSite(concept(site), topographical_modifier=concept(modifier))]
    return [hd.sr.FindingSite(concept(site))]


def _measurement(measurement: Measurement) -> hd.sr.Measurement:
    """TID 300; what is no finite number carries a qualifier (PS3.3 C.18.1, CID 42).

    Its value, which the library insists on, is taken away by ``_without_false_values``.
    """
    value = float(measurement.value)
    finite = math.isfinite(value)
    out = hd.sr.Measurement(
        name=concept(measurement.name),
        value=value if finite else 0.0,
        unit=concept(measurement.unit),
        derivation=concept(measurement.derivation) if measurement.derivation else None,
    )
    if finite:
        out[0].MeasuredValueSequence[0].NumericValue = f"{value:.{SIGNIFICANT_DIGITS}g}"
    else:
        infinity = _POSITIVE_INFINITY if value > 0 else _NEGATIVE_INFINITY
        out[0].NumericValueQualifierCodeSequence = [_NOT_A_NUMBER if math.isnan(value) else infinity]
    return out


def _without_false_values(item: Dataset) -> None:
    for child in item.get("ContentSequence", []):
        if "NumericValueQualifierCodeSequence" in child:
            child.MeasuredValueSequence = []
        _without_false_values(child)


def _evaluations(
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    context: Context,
    more: Sequence[str] = (),
) -> list[Dataset]:
    """Rows 12 to 14 of TID 1500: the outcome in a code, then remarks for the reader."""
    items: list[Dataset] = []
    positive = [f for f in analysis.findings if is_positive(f)]
    remarks: list[str] = []
    if analysis.segments or analysis.findings:
        items.append(CodeContentItem(_SUMMARY, _WITH_FINDINGS if found or positive else _NO_FINDINGS, _CONTAINS))
    if analysis.segments and not found:
        remarks.append("No finding: the model marked no voxel in this series.")
    elif analysis.findings and not positive and not found:
        remarks.append("No finding: no answer of the model is positive.")
    remarks += [*analysis.notes, *context.headers.notes, *more]
    if context.model.intended_use:
        remarks.append(f"Intended use of {context.provenance.name}: {context.model.intended_use}")
    remarks.append("Made by software and not verified by a person.")
    items += [
        TextContentItem(_COMMENT, clean_text(remark), _CONTAINS) for remark in dict.fromkeys(remarks) if remark.strip()
    ]
    return items


def source_evidence(context: Context) -> list[Reference]:
    """Every source instance, for Current Requested Procedure Evidence."""
    study, series = context.headers.study_uid, context.headers.series_uid
    return [Reference(study, series, s.sop_class_uid, s.sop_instance_uid) for s in context.sources]


def _evidence(analysis: Analysis, context: Context, segmentations: Sequence[Segmentation]) -> list[Reference]:
    """Every source instance, each SEG, images of further series, and for Pertinent Other Evidence those of the
    earlier study."""
    study, prior = context.headers.study_uid, analysis.prior
    evidence = source_evidence(context)
    evidence += [Reference(study, s.series_instance_uid, s.sop_class_uid, s.sop_instance_uid) for s in segmentations]
    evidence += [Reference(study, *one) for one in analysis.others]
    if prior:
        evidence += [Reference(prior.study_uid, prior.series_uid, *one) for one in prior.instances]
    return evidence


def _predecessor(identity: ResultIdentity, *, labelmap: bool) -> list[Dataset] | None:
    before = identity.predecessor_sr
    if labelmap:
        before = identity.predecessor_labelmap_sr or before
    return [Reference(*before).data_set()] if before else None
