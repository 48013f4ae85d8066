"""Stored values of plain single-frame images, without making a data set of the file.

What a CT or MR sends is nearly always one of two: uncompressed little endian, or one JPEG
Lossless fragment. Both are read here from the bytes: libjpeg-turbo (imagecodecs) decodes the
latter four times faster than GDCM, and no header is parsed twice. Whatever is not plain is
None, and pydicom with its decoders takes it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLossless, JPEGLosslessSV1

from dicomnode.header import Wanted, find_pixel_data
from dicomnode.part10 import data_set_begin

Pixels = npt.NDArray[np.integer[Any]]

_WANTED = Wanted(
    [
        "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit",
        "PixelRepresentation", "PhotometricInterpretation",
    ]
)  # fmt: skip
_NATIVE = frozenset({str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian)})
_LOSSLESS = frozenset({str(JPEGLossless), str(JPEGLosslessSV1)})
_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
_END_OF_IMAGE = b"\xff\xd9"


def quick_frame(part10: bytes, rows: int, columns: int) -> Pixels | None:
    """uint16 or int16 (rows, columns), rescale not applied; None where this is not a plain image.

    Equal to what pydicom gives. A JPEG stream without its end marker is not plain: a decoder
    would fill up what is missing.
    """
    begin = data_set_begin(part10)
    if begin is None or begin[0] not in _NATIVE | _LOSSLESS:
        return None
    syntax, start = begin
    with memoryview(part10) as whole:
        data_set = whole[start:]
        found = find_pixel_data(data_set, syntax, _WANTED)
        if found is None or not _plain(found.texts, rows, columns):
            return None
        value = data_set[found.start : found.stop]
        if syntax in _NATIVE:
            if len(value) not in (rows * columns * 2, rows * columns * 2 + rows * columns * 2 % 2):
                return None
            frame: Pixels = np.frombuffer(value[: rows * columns * 2], "<u2").reshape(rows, columns).copy()
        else:
            stream = _one_fragment(value)
            decode = _lossless_decoder()
            if stream is None or decode is None:
                return None
            try:
                frame = decode(bytes(stream))
            except Exception:  # noqa: BLE001 pydicom's decoders say what is wrong with it
                return None
    if frame.shape != (rows, columns) or frame.dtype != np.uint16:
        return None
    return _signed(frame, found.texts)


def _plain(texts: dict[str, str], rows: int, columns: int) -> bool:
    """Greyscale, one frame, sixteen bits allocated, the stored ones at the bottom."""
    stored = texts.get("BitsStored", "")
    return (
        texts.get("Rows") == str(rows)
        and texts.get("Columns") == str(columns)
        and texts.get("NumberOfFrames", "1") == "1"
        and texts.get("SamplesPerPixel") == "1"
        and texts.get("BitsAllocated") == "16"
        and stored.isdigit()
        and 8 < int(stored) <= 16
        and texts.get("HighBit") == str(int(stored) - 1)
        and texts.get("PixelRepresentation") in ("0", "1")
        and texts.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    )


def _signed(frame: Pixels, texts: dict[str, str]) -> Pixels | None:
    """As PixelRepresentation (0028,0103) says; None where bits above the stored ones are used."""
    stored = int(texts["BitsStored"])
    if stored == 16:
        return frame.view(np.int16) if texts["PixelRepresentation"] == "1" else frame
    if texts["PixelRepresentation"] == "1" or int(frame.max()) >> stored:
        return None
    return frame


def _one_fragment(value: memoryview) -> memoryview | None:
    """The stream in encapsulated pixel data of one fragment behind its offset table (PS3.5 A.4)."""
    at = 0
    items: list[memoryview] = []
    while at + 8 <= len(value) and len(items) < 3:
        group, element, length = struct.unpack_from("<HHI", value, at)
        tag, at = group << 16 | element, at + 8
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM or length > len(value) - at:
            return None
        items.append(value[at : at + length])
        at += length
    if len(items) != 2 or bytes(items[1][-3:]).rstrip(b"\0")[-2:] != _END_OF_IMAGE:
        return None
    return items[1]


def _lossless_decoder() -> Callable[[bytes], Pixels] | None:
    try:
        from imagecodecs import jpeg8_decode
    except ImportError:
        return None
    decode: Callable[[bytes], Pixels] = jpeg8_decode
    return decode
