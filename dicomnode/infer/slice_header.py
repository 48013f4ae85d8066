"""What the geometry and the limits need of each image of a series, as read."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicomnode.errors import MalformedDataSet, UnsuitableSeries
from dicomnode.geometry import SlicePlane
from dicomnode.header import Wanted, inflates_within_limit
from dicomnode.infer.contract import InputContract
from dicomnode.infer.multiframe import GROUP_TAGS, SINGLE_FRAME_CLASS, flatten
from dicomnode.part10 import HEAD_BYTES, begun_header

_TAGS = [
    "SpecificCharacterSet", "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient",
    "RescaleSlope", "RescaleIntercept", "RescaleType",
    "BitsAllocated", "PixelPaddingValue", "PixelPaddingRangeLimit",
]  # fmt: skip

_WANTED = Wanted(_TAGS)
_LISTS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """What the geometry and the pixel bomb check need of one instance, as read."""

    uid: str
    series_uid: str
    frame_uid: str
    sop_class_uid: str
    modality: str
    localizer: bool
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    pixel_spacing: tuple[float, float] | None
    plane: SlicePlane | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    bytes_per_pixel: int = 4
    padding: tuple[int, int] | None = None
    """Pixel Padding Value and Pixel Padding Range Limit, the value twice without one (PS3.3 C.7.5.1.1.2):
    their 16 bits, since one VR or the other is read where the file states none."""


def refuse(code: str, cause: str, hint: str = "") -> UnsuitableSeries:
    return UnsuitableSeries("read series", code, cause, hint)


def read_headers(part10: bytes, contract: InputContract) -> list[SliceHeader]:
    """One header, or one for each frame of an enhanced multi-frame image of a class that the model takes."""
    from pydicom import dcmread

    header = read_header(part10)
    if header.sop_class_uid in SINGLE_FRAME_CLASS and (
        {header.sop_class_uid, SINGLE_FRAME_CLASS[header.sop_class_uid]} & set(contract.sop_classes)
    ):
        ds = dcmread(io.BytesIO(part10), stop_before_pixels=True, specific_tags=[*_TAGS, *GROUP_TAGS])
        if len(ds.get("PerFrameFunctionalGroupsSequence") or []) > contract.max_slices:
            raise refuse("TOO_LARGE", f"a multi-frame image has more than {contract.max_slices} frames")
        return [header_of(frame) for frame in flatten(ds, contract.sop_classes)]
    return [header]


def read_header(part10: bytes) -> SliceHeader:
    """Parse the attributes of one Part 10 file that matter here; missing ones are tolerated."""
    from pydicom import dcmread

    texts = begun_header(part10 if len(part10) <= HEAD_BYTES else memoryview(part10)[:HEAD_BYTES], _WANTED)
    if texts is not None:
        with suppress(ValueError, OverflowError):  # something odd: pydicom may know better, or says what it is
            return _header_of(texts)
    if not inflates_within_limit(part10):
        raise refuse("TOO_LARGE", "a deflated file becomes too large", "Send it in another transfer syntax")
    try:
        ds = dcmread(io.BytesIO(part10), stop_before_pixels=True, specific_tags=list(_TAGS))
    except Exception as cause:
        raise MalformedDataSet("read series", f"a file is no readable DICOM file ({type(cause).__name__})") from cause
    return header_of(ds)


def header_of(ds: Any) -> SliceHeader:
    """The attributes of one image as read; raises MalformedDataSet where one is no number."""
    try:
        uid = str(ds.get("SOPInstanceUID", ""))
        position = _numbers(ds.get("ImagePositionPatient"), 3)
        orientation = _numbers(ds.get("ImageOrientationPatient"), 6)
        spacing = _numbers(ds.get("PixelSpacing"), 2)
        image_type = [str(v) for v in _several(ds.get("ImageType"))]
        plane = None
        if position and orientation:
            plane = SlicePlane(uid, (position[0], position[1], position[2]), _six(orientation))
        header = SliceHeader(
            uid=uid,
            series_uid=str(ds.get("SeriesInstanceUID", "") or ""),
            frame_uid=str(ds.get("FrameOfReferenceUID", "") or ""),
            sop_class_uid=str(ds.get("SOPClassUID", "") or ""),
            modality=str(ds.get("Modality", "") or ""),
            localizer="LOCALIZER" in image_type[2:3],
            rows=int(ds.get("Rows") or 0),
            columns=int(ds.get("Columns") or 0),
            frames=int(ds.get("NumberOfFrames") or 1),
            samples=int(ds.get("SamplesPerPixel") or 1),
            photometric=str(ds.get("PhotometricInterpretation", "") or ""),
            pixel_spacing=(spacing[0], spacing[1]) if spacing else None,
            plane=plane,
            slope=_number(ds.get("RescaleSlope")),
            intercept=_number(ds.get("RescaleIntercept")),
            rescale_type=str(ds.get("RescaleType", "") or ""),
            bytes_per_pixel=_bytes(ds.get("BitsAllocated")),
            padding=_padding(ds.get("PixelPaddingValue"), ds.get("PixelPaddingRangeLimit")),
        )
    except Exception as cause:
        raise MalformedDataSet("read series", f"a file is no readable DICOM file ({type(cause).__name__})") from cause
    if not uid:
        raise MalformedDataSet("read series", "a file has no SOP Instance UID")
    return header


def _header_of(texts: Mapping[str, str]) -> SliceHeader:
    """The same from the texts that the bounded reader found. Raises ValueError for a number that is none."""
    uid = texts.get("SOPInstanceUID", "")
    if not uid:
        raise ValueError("no SOP Instance UID")
    values = {key: [float(v) if v else math.nan for v in texts.get(key, "").split("\\")] for key in _LISTS}
    position, orientation, spacing = (
        tuple(v) if len(v) == count and all(map(math.isfinite, v)) else None
        for v, count in ((values[key], _LISTS[key]) for key in _LISTS)
    )
    plane = None
    if position and orientation:
        plane = SlicePlane(uid, (position[0], position[1], position[2]), _six(orientation))
    return SliceHeader(
        uid=uid,
        series_uid=texts.get("SeriesInstanceUID", ""),
        frame_uid=texts.get("FrameOfReferenceUID", ""),
        sop_class_uid=texts.get("SOPClassUID", ""),
        modality=texts.get("Modality", ""),
        localizer="LOCALIZER" in texts.get("ImageType", "").split("\\")[2:3],
        rows=int(texts.get("Rows") or 0),
        columns=int(texts.get("Columns") or 0),
        frames=int(texts.get("NumberOfFrames") or 1),
        samples=int(texts.get("SamplesPerPixel") or 1),
        photometric=texts.get("PhotometricInterpretation", ""),
        pixel_spacing=(spacing[0], spacing[1]) if spacing else None,
        plane=plane,
        slope=_number(texts.get("RescaleSlope")),
        intercept=_number(texts.get("RescaleIntercept")),
        rescale_type=texts.get("RescaleType", ""),
        bytes_per_pixel=_bytes(texts.get("BitsAllocated")),
        padding=_padding(texts.get("PixelPaddingValue"), texts.get("PixelPaddingRangeLimit")),
    )


def _several(value: Any) -> Sequence[Any]:
    if value is None or isinstance(value, str):
        return [] if not value else [value]
    return list(value)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    numbers = tuple(float(v) for v in _several(value))
    return numbers if len(numbers) == count and all(np.isfinite(numbers)) else None


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    number = float(value)
    return number if np.isfinite(number) else None


def _six(values: Sequence[float]) -> tuple[float, float, float, float, float, float]:
    a, b, c, d, e, f = values
    return (a, b, c, d, e, f)


def _bytes(bits_allocated: Any) -> int:
    """Of one decoded value; 4 where the header does not say."""
    bits = int(bits_allocated or 0)
    return -(-bits // 8) if 0 < bits <= 32 else 4


def _padding(value: Any, limit: Any) -> tuple[int, int] | None:
    """Tolerant: a padding that is no number is none. Two bytes of a VR that nobody knew are little endian."""
    first = whole(value)
    last = whole(limit)
    return None if first is None else (first, first if last is None else last)


def whole(value: Any) -> int | None:
    """16 bits of a padding value: US or SS, also where the file states no VR."""
    if isinstance(value, bytes) and len(value) == 2:
        return int.from_bytes(value, "little")
    try:
        return int(value) & 0xFFFF
    except (TypeError, ValueError):
        return None
