"""Grayscale Softcopy Presentation State (PS3.3 A.33.1): outlines of the segments on the source images."""

from __future__ import annotations

import re
from collections.abc import Sequence

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode.common import Context, finish, long_string, refuse_what_the_library_refuses, say_laterality
from dicomnode.encode.contours import Polygon, outlines
from dicomnode.encode.headers import with_empty_patient
from dicomnode.encode.multiframe import name_frames
from dicomnode.encode.pixels import display_of, read_display_header
from dicomnode.encode.seg import tracking_id
from dicomnode.errors import NodeError
from dicomnode.identity import derived_uid
from dicomnode.records import Analysis, EncodedObject, SegmentDefinition

SERIES_NUMBER = 4000


def encode_gsps(
    analysis: Analysis, found: Sequence[SegmentDefinition], key: int, context: Context, variant: str = ""
) -> EncodedObject:
    """Every outline as a closed polyline on the slice that it was found on, a named layer for each segment.

    Window and rescale are those of slice ``key``. Graphic data are in pixels, 0.0\\0.0 being the
    top left corner of the top left pixel (PS3.3 C.10.5). ``variant`` sets the UID apart from that of
    another image. Raises ``InputError`` where a source header cannot be read.
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
    annotations: list[Dataset] = []
    by_library: hd.pr.GraphicAnnotation | None = None
    with refuse_what_the_library_refuses("encode GSPS"):
        for image, plane in zip(headers.slices, analysis.labels, strict=True):
            present = [s for s in found if bool(np.any(plane == s.number))]
            if not present:
                continue
            used.append(image)
            for segment in present:
                polygons = outlines(plane == segment.number)
                annotations.append(_annotation(image, polygons, segment, context))
                if by_library is None:
                    by_library = _by_library(image, polygons, segment, layers[segment.number], context)
        assert by_library is not None
        first = with_empty_patient(used[0])
        first.SamplesPerPixel = 1  # else it had not been shown at all
        state = _build([first], [by_library], list(layers.values()), shown, context)
    _check_form(annotations[0], by_library)
    state.GraphicAnnotationSequence = annotations
    state.ReferencedSeriesSequence[0].ReferencedImageSequence = [_reference(image) for image in used]
    _true_proportions(state, used[0])
    if variant:
        state.SOPInstanceUID = state.file_meta.MediaStorageSOPInstanceUID = derived_uid(
            context.identity.sr_uid, "GSPS", variant
        )
    state.SeriesDescription = long_string(f"AI {provenance.name} {provenance.version} outlines")
    state.PresentationCreationDate, state.PresentationCreationTime = provenance.date, provenance.time
    state.ContentCreatorName = re.sub(r"[\^=]", " ", provenance.name)[:60] + "^AI"
    name_frames(state, headers.frames)
    say_laterality(state, context)
    return finish(state, "GSPS", context)


def layer_name(segment: SegmentDefinition) -> str:
    """Graphic Layer (CS, 16 characters): ``AI``, the segment's number and label."""
    return re.sub(r"[^A-Z0-9]+", "_", f"AI {segment.number} {segment.label}".upper())[:16].strip("_")


def _annotation(image: Dataset, polygons: Sequence[Polygon], segment: SegmentDefinition, context: Context) -> Dataset:
    """As the library makes it, which takes a hundredth of a second for each to look up what an image is."""
    item = Dataset()
    item.ReferencedImageSequence = [_reference(image)]
    item.GraphicLayer = layer_name(segment)
    objects = []
    for polygon in polygons:
        graphic = Dataset()
        graphic.TrackingID, graphic.TrackingUID = _tracking(segment, context)
        graphic.GraphicAnnotationUnits, graphic.GraphicDimensions = "PIXEL", 2
        graphic.NumberOfGraphicPoints = len(polygon)
        graphic.GraphicData = polygon.reshape(-1).tolist()
        graphic.GraphicType, graphic.GraphicFilled = "POLYLINE", "N"
        objects.append(graphic)
    item.GraphicObjectSequence = objects
    return item


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
                graphic_data=polygon,
                units=hd.pr.AnnotationUnitsValues.PIXEL,
                is_filled=False,
                tracking_id=tracking_id,
                tracking_uid=tracking_uid,
            )
            for polygon in polygons
        ],
    )


def _check_form(own: Dataset, library: Dataset) -> None:
    """Another version of the library may have another form."""
    if own.to_json() != Dataset(library).to_json():
        raise NodeError("encode GSPS", "highdicom writes annotations in another form than this program", "Report this")


def _tracking(segment: SegmentDefinition, context: Context) -> tuple[str, str]:
    return tracking_id(context.provenance, segment), context.identity.tracking_uids[segment.number]


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
    context: Context,
) -> hd.pr.GrayscaleSoftcopyPresentationState:
    headers, station, identity = context.headers, context.station, context.identity
    display = display_of(shown)
    modality = None
    if "RescaleSlope" in shown and "RescaleIntercept" in shown:
        modality = hd.ModalityLUTTransformation(
            rescale_intercept=display.intercept,
            rescale_slope=display.slope,
            rescale_type=str(shown.get("RescaleType") or ("HU" if headers.modality == "CT" else "US")),
        )
    voi = None
    if display.window:
        voi = [hd.pr.SoftcopyVOILUTTransformation(window_center=display.window[0], window_width=display.window[1])]
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
        voi_lut_transformations=voi,
        presentation_lut_transformation=hd.PresentationLUTTransformation(
            presentation_lut_shape="INVERSE" if display.inverted else "IDENTITY"
        ),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


def _true_proportions(state: Dataset, image: Dataset) -> None:
    """Presentation Pixel Spacing instead of the library's square pixels (PS3.3 C.10.4)."""
    for item in state.DisplayedAreaSelectionSequence:
        if "PixelSpacing" in image:
            item.PresentationPixelSpacing = [f"{float(v):.8g}" for v in image.PixelSpacing]
            del item.PresentationPixelAspectRatio
