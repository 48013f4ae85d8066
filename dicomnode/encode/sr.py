"""Measurement report: Comprehensive 3D SR with TID 1500 (PS3.16)."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage

from dicomnode.encode.common import (
    ANATOMICAL_STRUCTURE,
    ARTIFICIAL_INTELLIGENCE,
    Context,
    Provenance,
    clean_text,
    concept,
    finish,
    long_string,
    refuse_what_the_library_refuses,
)
from dicomnode.encode.headers import with_empty_patient
from dicomnode.encode.procedures import procedure_reported
from dicomnode.encode.seg import SERIES_NUMBER_BASE, tracking_id
from dicomnode.errors import NodeError
from dicomnode.identity import derived_uid
from dicomnode.records import (
    Analysis,
    EncodedObject,
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
SIGNIFICANT_DIGITS = 8


def encode_sr(
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    context: Context,
) -> EncodedObject:
    """SR with a group per segment and one for what concerns the whole series.

    ``found``: the segments that have voxels, in the order in which the SEG numbers them.
    Every instance of ``context.sources`` is listed as evidence, and so is the SEG.
    Measured numbers are written with 8 significant digits and, unrounded, as FD.
    """
    identity, provenance, headers = context.identity, context.provenance, context.headers
    numbers = {segment.number: position for position, segment in enumerate(found, start=1)}
    groups: list[Dataset] = []
    for segment in analysis.segments:
        measured = [m for m in analysis.measurements if m.segment == segment.number]
        reference = numbers.get(segment.number)
        groups += _segment_group(segment, reference, measured, context)
    series_wide = [m for m in analysis.measurements if m.segment is None]
    if series_wide:
        groups += _series_group(series_wide, identity, provenance)
    unknown = {m.segment for m in analysis.measurements} - {None, *(s.number for s in analysis.segments)}
    if unknown:
        raise NodeError("encode SR", f"measurements name undefined segments {sorted(map(str, unknown))}")

    content = [*hd.sr.LanguageOfContentItemAndDescendants(CodedConcept("en-US", "RFC5646", "English (United States)"))]
    content += _observer(provenance)
    content.append(
        CodeContentItem(
            CodedConcept("121058", "DCM", "Procedure reported"),
            procedure_reported(headers),
            RelationshipTypeValues.HAS_CONCEPT_MOD,
        )
    )
    if groups:
        content.append(_container(CodedConcept("126010", "DCM", "Imaging Measurements"), groups))
    remarks = _evaluations(analysis, found, context)
    content.append(_container(CodedConcept("C0034375", "UMLS", "Qualitative Evaluations"), remarks))
    root = ContainerContentItem(CodedConcept("126000", "DCM", "Imaging Measurement Report"), template_id="1500")
    root.ContentSequence = ContentSequence(content)
    with refuse_what_the_library_refuses("encode SR"):
        sr = hd.sr.Comprehensive3DSR(
            evidence=_evidence(context, identity.seg_uid if found else None),
            content=root,
            series_instance_uid=identity.sr_series_uid,
            series_number=2 * SERIES_NUMBER_BASE + max(headers.series_number, 0),
            sop_instance_uid=identity.sr_uid,
            instance_number=identity.revision,
            manufacturer=long_string(context.station.manufacturer),
            series_description=long_string(f"AI {provenance.name} {provenance.version} report"),
            is_complete=True,
            is_verified=False,
            previous_versions=_predecessor(identity),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            specific_character_set=None,
        )
    _without_false_values(sr)
    return finish(sr, "SR", context)


def _container(name: CodedConcept, items: Sequence[Dataset]) -> ContainerContentItem:
    container = ContainerContentItem(name, relationship_type=_CONTAINS)
    container.ContentSequence = ContentSequence(items)
    return container


def _observer(provenance: Provenance) -> list[Dataset]:
    """TID 1001 with the model as device observer (TID 1004); no person has looked at it."""
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=provenance.device_uid,
        name=f"{provenance.name} {provenance.version}",
        manufacturer_name=provenance.manufacturer,
        model_name=provenance.name,
    )
    observer = hd.sr.ObserverContext(CodedConcept("121007", "DCM", "Device"), device)
    return list(hd.sr.ObservationContext(observer_device_context=observer))


def _algorithm(provenance: Provenance) -> hd.sr.AlgorithmIdentification:
    """TID 4019; name, version and manufacturer equal Contributing Equipment, the parameters say how it was run."""
    return hd.sr.AlgorithmIdentification(
        name=provenance.name,
        version=provenance.version,
        family=ARTIFICIAL_INTELLIGENCE,
        manufacturer=provenance.manufacturer,
        parameters=list(provenance.facts) or None,
    )


def _segment_group(
    segment: SegmentDefinition,
    number: int | None,
    measured: Sequence[Measurement],
    context: Context,
) -> list[Dataset]:
    """TID 1411 for a segment of the SEG (its ``number`` there), else TID 1501: looked for, not found."""
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
    if number is not None:
        reference = hd.sr.ReferencedSegment(
            sop_class_uid=SegmentationStorage,
            sop_instance_uid=identity.seg_uid,
            segment_number=number,
            source_series=hd.sr.SourceSeriesForSegmentation(context.headers.series_uid),
        )
        return list(hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=reference, **common))
    group = hd.sr.MeasurementsAndQualitativeEvaluations(**common)
    if (segment.category.value, segment.category.scheme) != ANATOMICAL_STRUCTURE:
        group[0].ContentSequence.append(CodeContentItem(_PRESENCE, _ABSENT, _CONTAINS))
    text = f"Not found: the model marked no voxel as {clean_text(segment.label)}."
    group[0].ContentSequence.append(TextContentItem(_COMMENT, text, _CONTAINS))
    return list(group)


def _series_group(measured: Sequence[Measurement], identity: ResultIdentity, provenance: Provenance) -> list[Dataset]:
    """TID 1501 for measurements of the whole series."""
    return list(
        hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(
                derived_uid(identity.sr_uid, "tracking", "series"),
                long_string(f"{provenance.name}: whole series"),
            ),
            algorithm_id=_algorithm(provenance),
            measurements=[_measurement(m) for m in measured],
        )
    )


def _sites(segment: SegmentDefinition) -> list[hd.sr.FindingSite] | None:
    """Finding Site: the region, or the structure itself when that is what was segmented."""
    anatomical = (segment.category.value, segment.category.scheme) == ANATOMICAL_STRUCTURE
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
) -> list[Dataset]:
    """Rows 12 to 14 of TID 1500: the outcome in a code, then remarks for the reader."""
    items: list[Dataset] = []
    if analysis.segments:
        items.append(CodeContentItem(_SUMMARY, _WITH_FINDINGS if found else _NO_FINDINGS, _CONTAINS))
    remarks = [] if found or not analysis.segments else ["No finding: the model marked no voxel in this series."]
    remarks += [*analysis.notes, *context.headers.notes]
    if context.model.intended_use:
        remarks.append(f"Intended use of {context.provenance.name}: {context.model.intended_use}")
    remarks.append("Made by software and not verified by a person.")
    items += [TextContentItem(_COMMENT, clean_text(remark), _CONTAINS) for remark in remarks if remark.strip()]
    return items


def _evidence(context: Context, seg_uid: str | None) -> list[Dataset]:
    """Every source instance and the SEG, for Current Requested Procedure Evidence."""
    study, series = context.headers.study_uid, context.headers.series_uid
    evidence = [_reference(study, series, s.sop_class_uid, s.sop_instance_uid) for s in context.sources]
    if seg_uid:
        evidence.append(_reference(study, context.identity.seg_series_uid, str(SegmentationStorage), seg_uid))
    evidence[0] = with_empty_patient(evidence[0])
    return evidence


def _predecessor(identity: ResultIdentity) -> list[Dataset] | None:
    return [_reference(*identity.predecessor_sr)] if identity.predecessor_sr else None


def _reference(study: str, series: str, sop_class: str, sop_instance: str) -> Dataset:
    ds = Dataset()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, sop_instance
    return ds
