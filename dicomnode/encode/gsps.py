"""Grayscale Softcopy Presentation State (PS3.3 A.33.1): outlines of the segments on the source images."""

from __future__ import annotations

import re
from collections.abc import Sequence

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from dicomnode.encode.annotations import GRAPHIC_ANNOTATIONS, Place, annotation, shortened
from dicomnode.encode.common import (
    Context,
    creator_name,
    finish,
    long_string,
    refuse_what_the_library_refuses,
    say_laterality,
)
from dicomnode.encode.contours import Polygon, outlines
from dicomnode.encode.frames import element
from dicomnode.encode.headers import DISPLAY, with_empty_patient
from dicomnode.encode.multiframe import name_frames
from dicomnode.encode.pixels import display_of, read_display_header
from dicomnode.encode.seg import tracking_id
from dicomnode.encode.softcopy import Transformation, Window, transformation_of
from dicomnode.errors import NodeError
from dicomnode.identity import derived_uid
from dicomnode.records import Analysis, EncodedObject, SegmentDefinition

SERIES_NUMBER = 4000


def encode_gsps(
    analysis: Analysis, found: Sequence[SegmentDefinition], key: int, context: Context, variant: str = ""
) -> EncodedObject:
    """Every outline as a closed polyline on the slice that it was found on, a named layer for each segment.

    Polarity is that of slice ``key``, each slice has its own window. Graphic data are in pixels,
    0.0\\0.0 being the top left corner of the top left pixel (PS3.3 C.10.5). ``variant`` sets the UID
    apart from that of another image. Raises ``InputError`` where a source header cannot be read, or
    slices with different rescale slopes have no positive one.
    """
    assert analysis.labels is not None
    provenance, headers = context.provenance, context.headers
    shown = _display(key, context)
    layers = {
        s.number: hd.pr.GraphicLayer(
            layer_name=layer_name(s),
            order=order,
            description=long_string(f"AI, not for diagnosis: {s.label}"),
            display_color=hd.color.CIELabColor.from_rgb(*s.rgb),
        )
        for order, s in enumerate(found, start=1)
    }
    used: list[Dataset] = []
    annotations: list[bytes] = []
    by_library: hd.pr.GraphicAnnotation | None = None
    with refuse_what_the_library_refuses("encode GSPS"):
        for index, (image, plane) in enumerate(zip(headers.slices, analysis.labels, strict=True)):
            drawn = [(s, polygons) for s in found if (polygons := outlines(plane == s.number))]
            if not drawn:
                continue
            used.append(image)
            place = Place(_class_of(image, context), *headers.place(index))
            for segment, polygons in drawn:
                annotations.append(annotation(place, layer_name(segment), *_tracking(segment, context), polygons))
            if by_library is None:
                segment, polygons = drawn[0]
                by_library = _by_library(image, polygons, segment, layers[segment.number], context)
        assert by_library is not None
        first = with_empty_patient(used[0])
        first.SamplesPerPixel = 1  # else it had not been shown at all
        for keyword in DISPLAY:  # the library would copy one slice's for all
            first.pop(keyword, None)
        transformation = transformation_of([display_of(image) for image in used])
        state = _build([first], [by_library], list(layers.values()), shown, transformation, context)
    state.ReferencedSeriesSequence[0].ReferencedImageSequence = [_reference(image) for image in used]
    if len(transformation.windows) > 1 or (transformation.windows and None in transformation.of_image):
        state.SoftcopyVOILUTSequence = [
            _window(window, [u for u, of_it in zip(used, transformation.of_image, strict=True) if of_it == number])
            for number, window in enumerate(transformation.windows)
        ]
    _true_proportions(state, used[0])
    if variant:
        state.SOPInstanceUID = state.file_meta.MediaStorageSOPInstanceUID = derived_uid(
            context.identity.sr_uid, "GSPS", variant
        )
    state.SeriesDescription = long_string(f"AI {provenance.name} {provenance.version} outlines")
    state.PresentationCreationDate, state.PresentationCreationTime = provenance.date, provenance.time
    state.ContentCreatorName = creator_name(provenance)
    name_frames(state, headers.frames)
    say_laterality(state, context)
    _check_form(annotations[0], state)
    del state.GraphicAnnotationSequence
    encoded = element(GRAPHIC_ANNOTATIONS, b"SQ", b"".join(annotations))
    return finish(state, "GSPS", context, {GRAPHIC_ANNOTATIONS: [encoded]})


def layer_name(segment: SegmentDefinition) -> str:
    """Graphic Layer (CS, 16 characters): ``AI``, the segment's number and label."""
    return re.sub(r"[^A-Z0-9]+", "_", f"AI {segment.number} {segment.label}".upper())[:16].strip("_")


def _by_library(
    image: Dataset,
    polygons: Sequence[Polygon],
    segment: SegmentDefinition,
    layer: hd.pr.GraphicLayer,
    context: Context,
) -> hd.pr.GraphicAnnotation:
    tracking_id, tracking_uid = _tracking(segment, context)
    return hd.pr.GraphicAnnotation(
        referenced_images=[image],
        graphic_layer=layer,
        graphic_objects=[
            hd.pr.GraphicObject(
                graphic_type=hd.pr.GraphicTypeValues.POLYLINE,
                graphic_data=shortened(polygon),
                units=hd.pr.AnnotationUnitsValues.PIXEL,
                is_filled=False,
                tracking_id=tracking_id,
                tracking_uid=tracking_uid,
            )
            for polygon in polygons
        ],
    )


def _check_form(own: bytes, state: Dataset) -> None:
    """The library's annotation in the form of :mod:`annotations`; another version may have another."""
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_data_element(buffer, state["GraphicAnnotationSequence"], ["utf-8"])
    if buffer.getvalue() != element(GRAPHIC_ANNOTATIONS, b"SQ", own):
        raise NodeError("encode GSPS", "highdicom writes annotations in another form than this program", "Report this")


def _tracking(segment: SegmentDefinition, context: Context) -> tuple[str, str]:
    return tracking_id(context.provenance, segment), context.identity.tracking_uids[segment.number]


def _class_of(image: Dataset, context: Context) -> str:
    known = context.headers.frames.get(str(image.SOPInstanceUID))
    return known[2] if known else str(image.SOPClassUID)


def _window(window: Window, images: Sequence[Dataset]) -> Dataset:
    """Item of the Softcopy VOI LUT Sequence for some of the images (PS3.3 C.11.8)."""
    item = Dataset()
    item.ReferencedImageSequence = [_reference(image) for image in images]
    item.WindowCenter, item.WindowWidth = (format_number_as_ds(v) for v in window)
    return item


def _reference(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item


def _display(key: int, context: Context) -> Dataset:
    uid, frame = context.headers.place(key)
    return read_display_header(next(s for s in context.sources if s.sop_instance_uid == uid), frame)


def _build(
    used: Sequence[Dataset],
    annotations: Sequence[Dataset],
    layers: Sequence[hd.pr.GraphicLayer],
    shown: Dataset,
    transformation: Transformation,
    context: Context,
) -> hd.pr.GrayscaleSoftcopyPresentationState:
    headers, station, identity = context.headers, context.station, context.identity
    modality = None
    if transformation.rescale and "RescaleSlope" in shown and "RescaleIntercept" in shown:
        modality = hd.ModalityLUTTransformation(
            rescale_slope=transformation.rescale[0],
            rescale_intercept=transformation.rescale[1],
            rescale_type=str(shown.get("RescaleType") or ("HU" if headers.modality == "CT" else "US")),
        )
    voi = [
        hd.pr.SoftcopyVOILUTTransformation(window_center=centre, window_width=width)
        for centre, width in transformation.windows[:1]
    ]
    return hd.pr.GrayscaleSoftcopyPresentationState(
        referenced_images=used,
        series_instance_uid=derived_uid(identity.sr_uid, "GSPS-series"),
        series_number=SERIES_NUMBER + max(headers.series_number, 0),
        sop_instance_uid=derived_uid(identity.sr_uid, "GSPS"),
        instance_number=identity.revision,
        manufacturer=long_string(station.manufacturer),
        manufacturer_model_name=long_string(station.model_name),
        software_versions=long_string(station.software_versions),
        device_serial_number=long_string(station.serial_number),
        content_label="AI_OUTLINES",
        content_description=long_string(f"AI, not for diagnosis: {context.provenance.name}"),
        graphic_annotations=annotations,
        graphic_layers=layers,
        modality_lut_transformation=modality,
        voi_lut_transformations=voi or None,
        presentation_lut_transformation=hd.PresentationLUTTransformation(
            presentation_lut_shape="INVERSE" if display_of(shown).inverted else "IDENTITY"
        ),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


def _true_proportions(state: Dataset, image: Dataset) -> None:
    """Presentation Pixel Spacing instead of the library's square pixels (PS3.3 C.10.4)."""
    for item in state.DisplayedAreaSelectionSequence:
        if "PixelSpacing" in image:
            item.PresentationPixelSpacing = [f"{float(v):.8g}" for v in image.PixelSpacing]
            del item.PresentationPixelAspectRatio
