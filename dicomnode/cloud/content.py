"""What an object says, for people: the text of a report, the segments of a segmentation, a picture. Pure.

Objects come from outside: what cannot be read is told as that, and nothing here is larger than the page needs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 64 << 20
MAX_LINES, MAX_DEPTH, MAX_TEXT = 500, 12, 1024
_HEAD = (
    "SOPClassUID", "Modality", "SeriesDescription", "PatientName", "PatientID", "PatientIdentityRemoved",
    "StudyDate", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "ContentDate", "ContentTime",
    "Manufacturer", "ManufacturerModelName", "SoftwareVersions",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Content:
    """``head``: attribute -> text. ``lines``: (depth, name, value) of a report. ``segments``: rows of text."""

    head: Mapping[str, str]
    lines: list[tuple[int, str, str]] = field(default_factory=list)
    segments: list[tuple[str, ...]] = field(default_factory=list)
    picture: bool = False
    fault: str = ""


def describe(data: bytes) -> Content:
    """``fault`` tells why something is not shown; never raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
            head = {pydicom.datadict.dictionary_description(k): _text(ds.get(k)) for k in _HEAD if ds.get(k)}
            lines = list(_lines(ds, 0)) if ds.get("Modality") == "SR" else []
            return Content(head, lines[:MAX_LINES], list(_segments(ds)), _has_picture(ds))
    except Exception as error:  # noqa: BLE001 what a library meets in a foreign file must not end the page
        return Content({}, fault=f"the object cannot be read ({type(error).__name__})")


def _has_picture(ds: Dataset) -> bool:
    rows, columns, frames = (int(ds.get(k) or 1) for k in ("Rows", "Columns", "NumberOfFrames"))
    return "Rows" in ds and rows * columns * frames * int(ds.get("SamplesPerPixel") or 1) <= MAX_PIXELS


def _segments(ds: Dataset) -> Iterator[tuple[str, ...]]:
    for segment in ds.get("SegmentSequence") or ():
        kinds = segment.get("SegmentedPropertyTypeCodeSequence") or [Dataset()]
        meaning, algorithm = _text(kinds[0].get("CodeMeaning")), _text(segment.get("SegmentAlgorithmName"))
        yield _text(segment.get("SegmentNumber")), _text(segment.get("SegmentLabel")), meaning, algorithm


def _lines(item: Dataset, depth: int) -> Iterator[tuple[int, str, str]]:
    """Content items in their order (PS3.3 C.17.3), those that contain others in front of them."""
    if depth > MAX_DEPTH:
        return
    for child in item.get("ContentSequence") or ():
        names = child.get("ConceptNameCodeSequence") or [Dataset()]
        yield depth, _text(names[0].get("CodeMeaning")), _value(child)
        yield from _lines(child, depth + 1)


def _value(item: Dataset) -> str:
    kind = str(item.get("ValueType") or "")
    if kind == "NUM":
        values = item.get("MeasuredValueSequence") or [Dataset()]
        units = values[0].get("MeasurementUnitsCodeSequence") or [Dataset()]
        return f"{_text(values[0].get('NumericValue'))} {_text(units[0].get('CodeValue'))}".strip()
    if kind == "CODE":
        codes = item.get("ConceptCodeSequence") or [Dataset()]
        return _text(codes[0].get("CodeMeaning"))
    if kind in ("IMAGE", "COMPOSITE", "WAVEFORM"):
        references = item.get("ReferencedSOPSequence") or [Dataset()]
        return f"refers to {_text(references[0].get('ReferencedSOPInstanceUID'))}"
    keyword = {"TEXT": "TextValue", "UIDREF": "UID", "DATETIME": "DateTime", "DATE": "Date", "TIME": "Time"}.get(kind)
    keyword = "PersonName" if kind == "PNAME" else keyword
    return _text(item.get(keyword)) if keyword else ""


def _text(value: Any) -> str:
    if value is None or isinstance(value, bytes | Sequence):
        return ""
    return str(value)[:MAX_TEXT]


def picture(data: bytes) -> bytes | None:
    """PNG: a greyscale or colour image, its middle frame, or a segmentation as seen through all of its frames."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(io.BytesIO(data))
            if not _has_picture(ds):
                return None
            frames = ds.pixel_array
        buffer = io.BytesIO()
        Image.fromarray(_flat(ds, frames)).save(buffer, "PNG")
        return buffer.getvalue()
    except Exception:  # noqa: BLE001 a foreign file: the page says that there is no picture
        return None


def _flat(ds: Dataset, frames: Any) -> Any:
    colour = int(ds.get("SamplesPerPixel") or 1) == 3
    many = frames.ndim == (4 if colour else 3)
    if ds.get("Modality") == "SEG":
        frames = frames.max(axis=0) if many else frames
        return (frames > 0).astype(np.uint8) * 255
    one = frames[len(frames) // 2] if many else frames
    if one.dtype == np.uint8:
        return np.ascontiguousarray(one)
    low, high = float(np.min(one)), float(np.max(one))
    return ((one.astype(np.float32) - low) * (255.0 / max(high - low, 1e-9))).astype(np.uint8)
