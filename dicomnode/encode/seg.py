"""Segmentation (PS3.3 A.51), BINARY: what viewers and archives take today."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import highdicom as hd
import numpy as np
import numpy.typing as npt
from highdicom.seg import SegmentationTypeValues
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DS, format_number_as_ds

from dicomnode.encode.common import (
    ARTIFICIAL_INTELLIGENCE,
    LONG_TEXT,
    NONE,
    Context,
    Provenance,
    concept,
    creator_name,
    finish,
    long_string,
    refuse_what_the_library_refuses,
)
from dicomnode.encode.frames import (
    PER_FRAME,
    PIXEL_DATA,
    Plane,
    element,
    element_head,
    frame_group,
    make_frames,
    references,
)
from dicomnode.encode.headers import with_empty_patient
from dicomnode.encode.multiframe import name_frames
from dicomnode.errors import NodeError
from dicomnode.identity import derived_uid
from dicomnode.orders import LABELMAP
from dicomnode.records import EncodedObject, ResultIdentity, SegmentDefinition

SERIES_NUMBER_BASE = 1000
LABELMAP_SERIES_NUMBER = 3000


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
    images = context.headers.slices
    fitting = _renumbered(labels, found)
    with refuse_what_the_library_refuses("encode SEG"):
        order = _growing_positions(images)
        if order is None or context.headers.frames or labels.shape[1] * labels.shape[2] < len(found):
            return _finished(_build(fitting, images, found, context), context)
        return _in_bytes(fitting, images, order, found, context)


def encode_labelmap(
    labels: npt.NDArray[np.uint8], found: Sequence[SegmentDefinition], context: Context
) -> EncodedObject:
    """The same segments as a Label Map Segmentation (PS3.3 A.90): one value per voxel, none for the background.

    For viewers and archives that take it; where one does not, the binary SEG goes there.
    """
    images = context.headers.slices
    identity = replace(
        context.identity,
        seg_uid=derived_uid(context.identity.seg_uid, LABELMAP),
        seg_series_uid=derived_uid(context.identity.seg_series_uid, LABELMAP),
    )
    context = replace(context, identity=identity)
    with refuse_what_the_library_refuses("encode label map"):
        seg = _build(
            _renumbered(labels, found), images, found, context, SegmentationTypeValues.LABELMAP, LABELMAP_SERIES_NUMBER
        )
    return _finished(seg, context, kind=LABELMAP)


def _build(
    labels: npt.NDArray[np.uint8],
    images: Sequence[Dataset],
    found: Sequence[SegmentDefinition],
    context: Context,
    form: SegmentationTypeValues = SegmentationTypeValues.BINARY,
    series_number: int = SERIES_NUMBER_BASE,
) -> hd.seg.Segmentation:
    """The object as the library makes it; ``labels`` are numbered as ``found``."""
    identity, provenance = context.identity, context.provenance
    headers, station = context.headers, context.station
    return hd.seg.Segmentation(
        source_images=[with_empty_patient(images[0]), *images[1:]],
        pixel_array=labels,
        segmentation_type=form,
        segment_descriptions=[
            _description(number, segment, identity, provenance) for number, segment in enumerate(found, start=1)
        ],
        series_instance_uid=identity.seg_series_uid,
        series_number=series_number + max(headers.series_number, 0),
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


def _finished(
    seg: Dataset, context: Context, encoded: Mapping[int, Sequence[bytes]] = NONE, kind: str = "SEG"
) -> EncodedObject:
    headers, identity = context.headers, context.identity
    seg.ContentCreatorName = creator_name(context.provenance)
    if "FrameOfReferenceUID" not in headers.slices[0]:  # Type 2C without geometry (PS3.3 C.7.6.1)
        seg.PatientOrientation = headers.slices[0].get("PatientOrientation", "")
    _fix_dimension_uid(seg, identity)
    _segment_number_per_frame(seg)
    name_frames(seg, headers.frames)
    return finish(seg, kind, context, encoded)


def _in_bytes(
    labels: npt.NDArray[np.uint8],
    images: Sequence[Dataset],
    order: Sequence[int],
    found: Sequence[SegmentDefinition],
    context: Context,
) -> EncodedObject:
    """The same object, with all that comes once made by the library and the frames by :mod:`frames`.

    The library sees two slices on which every segment has a voxel. What depends on all slices
    is put in: references, spacing, the frames and their number.
    """
    first = order.index(0)  # the library takes what is of the series, such as lossy compression, from its first image
    two = order[first : first + 2] if first + 1 < len(order) else order[first - 1 :]
    sample = np.zeros((2, *labels.shape[1:]), np.uint8)
    sample.reshape(2, -1)[:, : len(found)] = np.arange(1, len(found) + 1, dtype=np.uint8)
    seg = _build(sample, [images[index] for index in sorted(two)], found, context)
    planes = [
        Plane(str(i.SOPClassUID), str(i.SOPInstanceUID), "\\".join(_decimal(v) for v in i.ImagePositionPatient))
        for i in images
    ]
    frames = make_frames(labels, len(found), planes, order)
    seg.NumberOfFrames = frames.count
    _describe_spacing(seg, images, frames.planes, len(found))
    _segment_number_per_frame(seg)
    _check_form(seg, [planes[index] for index in sorted(two)], [planes[index] for index in two], len(found))
    del seg.PerFrameFunctionalGroupsSequence, seg.PixelData, seg.ReferencedSeriesSequence, seg.SourceImageSequence
    encoded: dict[int, Sequence[bytes]] = {t: [e] for t, e in references(planes, context.headers.series_uid).items()}
    encoded[PER_FRAME] = [element_head(PER_FRAME, b"SQ", len(frames.groups)), frames.groups]
    encoded[PIXEL_DATA] = [element_head(PIXEL_DATA, b"OB", len(frames.pixels)), frames.pixels]
    return _finished(seg, context, encoded)


def _growing_positions(images: Sequence[Dataset]) -> list[int] | None:
    """Indices of the slices from the lowest position along the normal; None where that says nothing.

    The direction is the library's: slices, rows and columns as right-handed axes
    (highdicom.spatial, "VOLUME_INDEX_CONVENTION").
    """
    if len(images) < 2 or any("ImagePositionPatient" not in image for image in images):
        return None
    orientation = [float(v) for v in images[0].ImageOrientationPatient]
    if any([float(v) for v in image.ImageOrientationPatient] != orientation for image in images[1:]):
        return None
    normal = np.cross(orientation[3:], orientation[:3])
    places = np.array([[float(v) for v in image.ImagePositionPatient] for image in images]) @ normal
    _, order = np.unique(places, return_index=True)
    return [int(index) for index in order] if len(order) == len(images) else None


def _decimal(value: object) -> str:
    """A number as the library writes it: the source's text where there is one."""
    return str(DS(value, auto_format=True))


def _describe_spacing(seg: Dataset, images: Sequence[Dataset], planes: Sequence[int], segments: int) -> None:
    """Spacing Between Slices of the source, and whether the frames alone make a regular stack."""
    positions = [[float(v) for v in image.ImagePositionPatient] for image in images]
    orientation = [float(v) for v in images[0].ImageOrientationPatient]
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.pop("SpacingBetweenSlices", None)
    spacing, _ = hd.spatial.get_volume_positions(image_positions=positions, image_orientation=orientation)
    if spacing is not None:
        measures.SpacingBetweenSlices = format_number_as_ds(spacing)
    seg.pop("DimensionOrganizationType", None)
    if segments == 1 and len(planes) > 1:
        of_frames = [positions[index] for index in planes]
        apart, _ = hd.spatial.get_volume_positions(image_positions=of_frames, image_orientation=orientation, sort=False)
        if apart is not None and apart > 0.0:
            seg.DimensionOrganizationType = "3D"


def _check_form(seg: Dataset, given: Sequence[Plane], planes: Sequence[Plane], segments: int) -> None:
    """The library's own frames and references in the form of :mod:`frames`; another version may have another.

    ``given``: its two images as it got them, ``planes``: by position.
    """
    groups = [
        frame_group(segment, number, plane)
        for segment in range(1, segments + 1)
        for number, plane in enumerate(planes, start=1)
    ]
    own = {**references(given, str(seg.ReferencedSeriesSequence[0].SeriesInstanceUID))}
    own[PER_FRAME] = element(PER_FRAME, b"SQ", b"".join(groups))
    for tag, wanted in own.items():
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_data_element(buffer, seg[tag])
        if buffer.getvalue() != wanted:
            raise NodeError(
                "encode SEG",
                f"highdicom writes {seg[tag].keyword} in another form than dicomnode.encode.frames",
                "Report this",
            )


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
    description.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters = "; ".join(provenance.facts)[
        :LONG_TEXT
    ]
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
