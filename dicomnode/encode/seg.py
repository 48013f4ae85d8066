"""Segmentation (PS3.3 A.51), BINARY: what viewers and archives take today."""

from __future__ import annotations

import re
from collections.abc import Sequence

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode.common import (
    ARTIFICIAL_INTELLIGENCE,
    Context,
    Provenance,
    concept,
    finish,
    long_string,
    refuse_what_the_library_refuses,
)
from dicomnode.encode.headers import with_empty_patient
from dicomnode.identity import derived_uid
from dicomnode.records import EncodedObject, ResultIdentity, SegmentDefinition

SERIES_NUMBER_BASE = 1000


def tracking_id(provenance: Provenance, segment: SegmentDefinition) -> str:
    """Tracking Identifier of a segment, the same in SEG and SR."""
    return long_string(f"{provenance.name}: {segment.label}")


def encode_seg(
    labels: npt.NDArray[np.uint8],
    found: Sequence[SegmentDefinition],
    context: Context,
) -> EncodedObject:
    """SEG of the segments in ``found``, at least one, each with at least one voxel.

    ``labels``: uint8 (slices, rows, columns), slice axis as ``context.headers.slices``. Segments are
    numbered from 1 without holes (PS3.3 C.8.20.2), so their numbers are the positions in
    ``found``; the frames are ordered by segment, then by position; empty ones are left out.
    """
    identity, provenance = context.identity, context.provenance
    headers, station = context.headers, context.station
    images = [with_empty_patient(headers.slices[0]), *headers.slices[1:]]
    with refuse_what_the_library_refuses("encode SEG"):
        seg = hd.seg.Segmentation(
            source_images=images,
            pixel_array=_renumbered(labels, found),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _description(number, segment, identity, provenance) for number, segment in enumerate(found, start=1)
            ],
            series_instance_uid=identity.seg_series_uid,
            series_number=SERIES_NUMBER_BASE + max(headers.series_number, 0),
            sop_instance_uid=identity.seg_uid,
            instance_number=identity.revision,
            manufacturer=long_string(station.manufacturer),
            manufacturer_model_name=long_string(station.model_name),
            software_versions=long_string(station.software_versions),
            device_serial_number=long_string(station.serial_number),
            content_label=_content_label(provenance.name),
            content_description=long_string(context.model.description) or "AI segmentation",
            series_description=long_string(f"AI {provenance.name} {provenance.version} segmentation"),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            specific_character_set=None,
        )
    seg.ContentCreatorName = re.sub(r"[\^=]", " ", provenance.name)[:60] + "^AI"  # a person name (PN) with a given name
    if "FrameOfReferenceUID" not in headers.slices[0]:  # Type 2C without geometry (PS3.3 C.7.6.1)
        seg.PatientOrientation = headers.slices[0].get("PatientOrientation", "")
    _fix_dimension_uid(seg, identity)
    _segment_number_per_frame(seg)
    return finish(seg, "SEG", context)


def _renumbered(labels: npt.NDArray[np.uint8], found: Sequence[SegmentDefinition]) -> npt.NDArray[np.uint8]:
    """Labels as positions in ``found``; the array itself where they are that already."""
    if all(number == segment.number for number, segment in enumerate(found, start=1)):
        return labels
    table = np.zeros(256, np.uint8)
    for number, segment in enumerate(found, start=1):
        table[segment.number] = number
    return table[labels]


def _description(
    number: int, segment: SegmentDefinition, identity: ResultIdentity, provenance: Provenance
) -> hd.seg.SegmentDescription:
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=long_string(segment.label),
        segmented_property_category=concept(segment.category),
        segmented_property_type=concept(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=provenance.name,
            family=ARTIFICIAL_INTELLIGENCE,
            version=provenance.version,
            source=provenance.manufacturer,
            parameters=None,
        ),
        tracking_uid=identity.tracking_uids[segment.number],
        tracking_id=tracking_id(provenance, segment),
        anatomic_regions=[concept(segment.anatomic_region)] if segment.anatomic_region else None,
        display_color=hd.color.CIELabColor.from_rgb(*segment.rgb),
    )
    description.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters = provenance.description
    if segment.type_modifier:
        type_item = description.SegmentedPropertyTypeCodeSequence[0]
        type_item.SegmentedPropertyTypeModifierCodeSequence = [concept(segment.type_modifier)]
    return description


def _content_label(name: str) -> str:
    """ContentLabel (CS: 16 of A-Z, 0-9, space, underscore) from the model's name."""
    return re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")[:16].strip("_") or "AI_SEG"


def _fix_dimension_uid(seg: Dataset, identity: ResultIdentity) -> None:
    uid = derived_uid(identity.seg_uid, "DimensionOrganizationUID")
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _segment_number_per_frame(seg: Dataset) -> None:
    """Move the segment number of a one-segment SEG from the shared group into each frame.

    Both are allowed (PS3.3 C.8.20.3), but the dimension index points into the frame's own
    group and older viewers look only there.
    """
    shared = seg.SharedFunctionalGroupsSequence[0]
    if "SegmentIdentificationSequence" not in shared:
        return
    element = shared["SegmentIdentificationSequence"]
    del shared.SegmentIdentificationSequence
    for frame in seg.PerFrameFunctionalGroupsSequence:
        frame[element.tag] = element
