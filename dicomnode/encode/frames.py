"""Frames of a binary SEG as bytes: bit-packed pixels and Per-Frame Functional Groups.

A lung in 248 slices makes 490 frames of a dozen data sets each. As objects they cost the
library and its writer most of a second; their bytes, which differ in five values from frame to
frame, cost a few milliseconds. The form is that of highdicom (PS3.3 C.7.6.16, C.8.20.3):
derivation image, frame content, plane position and segment identification. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8]

_LONG = struct.Struct("<HH2sHI").pack
_SHORT = struct.Struct("<HH2sH").pack
_ITEM = struct.Struct("<HHI").pack
_LONG_FORMS = frozenset({b"SQ", b"OB", b"OW", b"UT"})

REFERENCED_SERIES = 0x00081115
SOURCE_IMAGES = 0x00082112
PER_FRAME = 0x52009230
PIXEL_DATA = 0x7FE00010


@dataclass(frozen=True, slots=True)
class Plane:
    """A source image: its class and instance, and Image Position (Patient) as DS text."""

    sop_class_uid: str
    sop_instance_uid: str
    position: str


@dataclass(frozen=True, slots=True)
class Frames:
    """``groups`` and ``pixels``: the two elements' values; ``count``: the number of frames.

    ``planes``: indices of the planes that have a voxel of any segment, in the order of the frames.
    """

    count: int
    groups: bytes
    pixels: bytes
    planes: tuple[int, ...]


def make_frames(labels: Labels, segments: int, planes: Sequence[Plane], order: Sequence[int]) -> Frames:
    """Frames by segment, then by position; a plane without a voxel of the segment has none.

    ``labels``: uint8 (slices, rows, columns), 1 to ``segments``, slice axis as ``planes``;
    ``order``: their indices in the order of growing position. The second dimension index
    counts the planes with any voxel, from 1.
    """
    filled = [index for index in order if labels[index].any()]
    groups: list[bytes] = []
    pixels: list[bytes] = []
    whole_bytes = labels.shape[1] * labels.shape[2] % 8 == 0
    rest = np.empty(0, bool)
    for segment in range(1, segments + 1):
        for number, index in enumerate(filled, start=1):
            mask = labels[index] == segment
            if not mask.any():
                continue
            groups.append(frame_group(segment, number, planes[index]))
            bits = mask.reshape(-1)
            if not whole_bytes:  # frames follow each other without a gap (PS3.5 8.1.1)
                bits = np.concatenate([rest, bits])
                cut = bits.size // 8 * 8
                bits, rest = bits[:cut], bits[cut:]
            pixels.append(np.packbits(bits, bitorder="little").tobytes())
    pixels.append(np.packbits(rest, bitorder="little").tobytes())
    data = b"".join(pixels)
    return Frames(len(groups), b"".join(groups), data + b"\0" * (len(data) % 2), tuple(filled))


def frame_group(segment: int, number: int, plane: Plane) -> bytes:
    """Item of the Per-Frame Functional Groups Sequence; ``number``: second dimension index, from 1."""
    source = text_element(0x00081150, b"UI", plane.sop_class_uid) + text_element(
        0x00081155, b"UI", plane.sop_instance_uid
    )
    return item(
        element(0x00089124, b"SQ", item(element(0x00082112, b"SQ", item(source + _SAME_PLACE)) + _DERIVED))
        + element(0x00209111, b"SQ", item(element(0x00209157, b"UL", struct.pack("<II", segment, number))))
        + element(0x00209113, b"SQ", item(text_element(0x00200032, b"DS", plane.position)))
        + element(0x0062000A, b"SQ", item(element(0x0062000B, b"US", struct.pack("<H", segment))))
    )


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    """A data element in Explicit VR Little Endian (PS3.5 7.1.2) with a value of even length."""
    return element_head(tag, vr, len(value)) + value


def element_head(tag: int, vr: bytes, length: int) -> bytes:
    """What stands before an element's value."""
    if vr in _LONG_FORMS:
        return _LONG(tag >> 16, tag & 0xFFFF, vr, 0, length)
    return _SHORT(tag >> 16, tag & 0xFFFF, vr, length)


def text_element(tag: int, vr: bytes, text: str) -> bytes:
    """A data element of text in UTF-8, padded to an even length (PS3.5 6.2)."""
    value = text.encode()
    return element(tag, vr, value + (b"\0" if vr == b"UI" else b" ") * (len(value) % 2))


def reference(sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """Item that names an instance (PS3.3 Table 10-11)."""
    return item(text_element(0x00081150, b"UI", sop_class_uid) + text_element(0x00081155, b"UI", sop_instance_uid))


def references(planes: Sequence[Plane], series_uid: str) -> dict[int, bytes]:
    """The elements of a SEG that name every source image: Referenced Series and Source Image Sequence, by tag."""
    each = b"".join(reference(plane.sop_class_uid, plane.sop_instance_uid) for plane in planes)
    series = item(element(0x0008114A, b"SQ", each) + text_element(0x0020000E, b"UI", series_uid))
    return {
        REFERENCED_SERIES: element(REFERENCED_SERIES, b"SQ", series),
        SOURCE_IMAGES: element(SOURCE_IMAGES, b"SQ", each),
    }


def item(content: bytes) -> bytes:
    """An item of a sequence, its length stated (PS3.5 7.5)."""
    return _ITEM(0xFFFE, 0xE000, len(content)) + content


def _code(value: str, meaning: str) -> bytes:
    return item(
        text_element(0x00080100, b"SH", value)
        + text_element(0x00080102, b"SH", "DCM")
        + text_element(0x00080104, b"LO", meaning)
    )


_SAME_PLACE = text_element(0x0028135A, b"CS", "YES") + element(
    0x0040A170, b"SQ", _code("121322", "Source image for image processing operation")
)
_DERIVED = element(0x00089215, b"SQ", _code("113076", "Segmentation"))
