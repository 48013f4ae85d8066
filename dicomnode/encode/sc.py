"""Key images as Secondary Capture (PS3.3 A.8.1), for archives and viewers without SEG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.burned_in import Shows, shows
from dicomnode.critical import Hit
from dicomnode.encode.common import (
    Context,
    clean_text,
    finish,
    long_string,
    refuse_what_the_library_refuses,
    say_laterality,
)
from dicomnode.encode.picture import MARK, Caption, render
from dicomnode.encode.pixels import Pixels, display_of, read_display_header, spacing_of
from dicomnode.encode.upright import letters_of, turn_for
from dicomnode.geometry import orientation_of
from dicomnode.identity import derived_uid
from dicomnode.records import Analysis, EncodedObject, Finding, SegmentDefinition

SERIES_NUMBER = 5000
_SOURCE = hd.sr.CodedConcept("121322", "DCM", "Source image for image processing operation")
_MOST_LINES = 12


def encode_key_images(
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    keys: Sequence[int],
    context: Context,
    pixels: Pixels,
    hits: Sequence[Hit] = (),
) -> list[EncodedObject]:
    """One RGB image for each slice of ``keys``; the mark is burned in above and within the picture.

    Raises ``InputError`` where a slice cannot be decoded or is not greyscale.
    """
    return [
        _encode(number, slice_index, analysis, found, context, pixels, hits)
        for number, slice_index in enumerate(keys, start=1)
    ]


def _encode(
    number: int,
    index: int,
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    context: Context,
    pixels: Pixels,
    hits: Sequence[Hit],
) -> EncodedObject:
    provenance, headers, station = context.provenance, context.headers, context.station
    image = headers.slices[index]
    uid, frame = headers.place(index)
    source = next(s for s in context.sources if s.sop_instance_uid == uid)
    shown = read_display_header(source, frame)
    spacing, in_patient = spacing_of(shown)
    orientation = [float(v) for v in shown.get("ImageOrientationPatient") or ()]
    turn = turn_for(orientation or orientation_of(shown.get("PatientOrientation")))
    labels = None if analysis.labels is None else analysis.labels[index, : int(image.Rows), : int(image.Columns)]
    present = [s for s in found if labels is not None and bool(np.any(labels == s.number))]
    caption = Caption(
        lines=[
            clean_text(f"{provenance.name} {provenance.version}, {provenance.manufacturer}"),
            f"Image {index + 1} of {len(headers.slices)}"
            + (f", series {headers.series_number}" if headers.series_number else ""),
            *[clean_text(finding_line(f)) for f in analysis.findings if f.image in (None, index)][:_MOST_LINES],
        ],
        legend=[(clean_text(s.label), s.rgb) for s in present[:_MOST_LINES]],
        alarm=[clean_text(f"CRITICAL: {hit.text}") for hit in hits[:_MOST_LINES]],
    )
    picture, mm = render(
        pixels(source, frame, int(image.Rows), int(image.Columns)),
        labels,
        display=display_of(shown),
        spacing=spacing,
        turn=turn,
        colours={s.number: s.rgb for s in present},
        caption=caption,
    )
    with refuse_what_the_library_refuses("encode SC"):
        sc = _build(picture, number, context)
    sc.PatientOrientation = [letters_of(turn.right), letters_of(turn.down)] if turn.right else ""
    if in_patient:
        sc.PixelSpacing = [f"{mm:.6g}", f"{mm:.6g}"]
    sc.ImageType = ["DERIVED", "SECONDARY"]
    # It means the patient's identity (PS3.3 C.7.6.1.1.3): nothing of it is drawn, but the source may show it
    may_show = shows(shown)
    if frame and may_show is Shows.primary:  # a frame stands in for a slice here
        may_show = Shows.unsaid
    if may_show in (Shows.yes, Shows.no):
        sc.BurnedInAnnotation = str(may_show)
    elif "BurnedInAnnotation" in sc:
        del sc.BurnedInAnnotation
    sc.SeriesDescription = long_string(f"{MARK}: {provenance.name} key images")
    sc.ImageComments = f"{MARK}. Outlines as drawn by {provenance.name} {provenance.version}."
    sc.DerivationDescription = "Windowed, scaled and turned upright, with outlines and text; not for measurement"
    sc.SourceImageSequence = [_reference(source.sop_class_uid, uid, frame)]
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if keyword in image:
            sc[keyword] = image[keyword]
    sc.ContentDate, sc.ContentTime = provenance.date, provenance.time
    for keyword in ("DateOfSecondaryCapture", "TimeOfSecondaryCapture"):
        setattr(sc, keyword, provenance.date if keyword.startswith("Date") else provenance.time)
    sc.SecondaryCaptureDeviceManufacturer = long_string(station.manufacturer)
    sc.SecondaryCaptureDeviceManufacturerModelName = long_string(station.model_name)
    sc.SecondaryCaptureDeviceSoftwareVersions = long_string(station.software_versions)
    say_laterality(sc, context)
    return replace(finish(sc, "SC", context), shows=str(may_show))


def _build(picture: npt.NDArray[np.uint8], number: int, context: Context) -> Dataset:
    identity, headers, station = context.identity, context.headers, context.station
    return hd.sc.SCImage(
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=headers.study_uid,
        series_instance_uid=derived_uid(identity.sr_uid, "SC-series"),
        series_number=SERIES_NUMBER + max(headers.series_number, 0),
        sop_instance_uid=key_image_uid(context, number),
        instance_number=number,
        manufacturer=long_string(station.manufacturer),
        patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


def key_image_uid(context: Context, number: int) -> str:
    """SOP Instance UID of a key image, numbered from 1."""
    return derived_uid(context.identity.sr_uid, "SC", str(number))


def finding_line(finding: Finding) -> str:
    """One finding in words."""
    parts = [finding.value.meaning] if finding.value else []
    if finding.probability is not None:
        against = f" (threshold {finding.threshold:.3g})" if finding.threshold is not None else ""
        parts.append(f"probability {finding.probability:.3g}{against}")
    return f"{finding.name.meaning}: {', '.join(parts) or finding.text}"


def _reference(sop_class: str, uid: str, frame: int) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    if frame:
        item.ReferencedFrameNumber = frame
    item.PurposeOfReferenceCodeSequence = [_SOURCE]
    return item
