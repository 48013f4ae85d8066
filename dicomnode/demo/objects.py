"""Reading a SEG and an SR as a stranger would: from their own attributes, with pydicom alone.

The demo judges what came back, so nothing here shares code with the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage, SegmentationStorage

from dicomnode.errors import NodeError

SEG_CLASS = str(SegmentationStorage)
SR_CLASS = str(Comprehensive3DSRStorage)
_ON_GRID = 0.02
"""How far from a voxel centre a frame may lie, in voxels: positions are decimal strings."""

Affine = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Segment:
    """One entry of the Segment Sequence (PS3.3 C.8.20.4), ``rgb`` 0..255."""

    number: int
    label: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Placed:
    """A segmentation in the grid of a volume: ``labels`` (slices, rows, columns), 0 background."""

    labels: npt.NDArray[np.uint8]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Number:
    """One NUM item of a report; ``segment`` is the SegmentNumber or None for the series.

    ``code`` is the concept's value with scheme, ``unit`` a UCUM code.
    """

    segment: int | None
    code: str
    meaning: str
    value: float
    unit: str


def volume_affine(origin: Any, orientation: Any, spacing: tuple[float, float, float]) -> Affine:
    """(slice, row, column, 1) -> LPS mm of a stack along its normal (PS3.3 C.7.6.2.1.1)."""
    along_row, along_column = np.reshape(np.asarray(orientation, np.float64), (2, 3))
    affine = np.eye(4)
    affine[:3, 0] = np.cross(along_row, along_column) * spacing[0]
    affine[:3, 1] = along_column * spacing[1]
    affine[:3, 2] = along_row * spacing[2]
    affine[:3, 3] = np.asarray(origin, np.float64)
    return affine


def place_seg(seg: Dataset, affine: Affine, shape: tuple[int, ...]) -> Placed:
    """Put the frames of a binary SEG where its own geometry says, into a grid.

    ``affine``: (slice, row, column, 1) -> LPS mm of the grid. Raises NodeError when a frame
    does not fall on it; references to source images are not looked at.
    """
    labels = np.zeros(shape, np.uint8)
    frames = seg.pixel_array.reshape(-1, int(seg.Rows), int(seg.Columns))
    inverse = np.linalg.inv(affine)
    shared = seg.SharedFunctionalGroupsSequence[0]
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        first = _index(inverse, _group(groups, shared, "PlanePositionSequence").ImagePositionPatient)
        _same_axes(affine, groups, shared)
        if not all(0 <= n < limit for n, limit in zip(first, shape, strict=True)):
            raise _misplaced("a frame lies outside of the images")
        z, y, x = first
        number = int(_group(groups, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        target = labels[z, y : y + frame.shape[0], x : x + frame.shape[1]]
        if target.shape != frame.shape:
            raise _misplaced("a frame reaches beyond the images")
        target[frame > 0] = number
    segments = tuple(
        Segment(int(s.SegmentNumber), str(s.SegmentLabel), _rgb(s.get("RecommendedDisplayCIELabValue")))
        for s in seg.SegmentSequence
    )
    return Placed(labels, segments)


def _misplaced(cause: str) -> NodeError:
    return NodeError("place the SEG", cause, "Its geometry is not that of the series")


def _group(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """A functional group, from the frame or else from what all frames share."""
    source = frame if keyword in frame else shared
    if keyword not in source:
        raise _misplaced(f"{keyword} is missing")
    found: Dataset = source[keyword].value[0]
    return found


def _index(inverse: Affine, position: Any) -> tuple[int, int, int]:
    exact = (inverse @ np.array([*map(float, position), 1.0]))[:3]
    nearest = np.rint(exact)
    if np.abs(exact - nearest).max() > _ON_GRID:
        raise _misplaced("a frame lies between the slices or pixels of the series")
    z, y, x = (int(n) for n in nearest)
    return z, y, x


def _same_axes(affine: Affine, frame: Dataset, shared: Dataset) -> None:
    orientation = _group(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient
    spacing = _group(frame, shared, "PixelMeasuresSequence").PixelSpacing
    along_row, along_column = np.reshape(np.asarray(orientation, np.float64), (2, 3))
    rows, columns = along_column * float(spacing[0]), along_row * float(spacing[1])
    if not (np.allclose(rows, affine[:3, 1], atol=1e-3) and np.allclose(columns, affine[:3, 2], atol=1e-3)):
        raise _misplaced("a frame has another direction or pixel spacing than the series")


def _rgb(cielab: Any) -> tuple[int, int, int]:
    """Display colour from the scaled CIELab of PS3.3 C.10.7.1.1 (D50); red without one."""
    if cielab is None:
        return (230, 80, 70)
    light, a, b = (float(v) / 65535 for v in cielab)
    fy = (light * 100 + 16) / 116
    fx, fz = fy + (a * 255 - 128) / 500, fy - (b * 255 - 128) / 200
    white = (0.96422, 1.0, 0.82521)
    xyz = [
        w * (f**3 if f > 6 / 29 else (f - 16 / 116) * 3 * (6 / 29) ** 2)
        for f, w in zip((fx, fy, fz), white, strict=True)
    ]
    to_srgb = np.array(  # from D50, Bradford-adapted
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(to_srgb @ np.array(xyz), 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (int(v) for v in np.rint(encoded * 255))
    return red, green, blue


def read_numbers(sr: Dataset) -> list[Number]:
    """All measurements in the Measurement Groups (TID 1411, 1501) of a report."""
    return [number for group in _groups(sr) for number in _group_numbers(group)]


def _groups(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence", []):
        if child.ValueType == "CONTAINER" and _code(child) == "125007 DCM":
            yield child
        else:
            yield from _groups(child)


def _group_numbers(group: Dataset) -> Iterator[Number]:
    segment: int | None = None
    for child in group.ContentSequence:
        for reference in child.get("ReferencedSOPSequence", []):
            if str(reference.ReferencedSOPClassUID) == SEG_CLASS:
                named = reference.get("ReferencedSegmentNumber") or reference.get("ReferencedFrameNumber")
                segment = int(pydicom.multival.MultiValue(int, _several(named))[0])  # of one image: a frame each
    for child in group.ContentSequence:
        if child.ValueType == "NUM" and child.MeasuredValueSequence:
            measured = child.MeasuredValueSequence[0]
            unit = str(measured.MeasurementUnitsCodeSequence[0].CodeValue)
            meaning = str(child.ConceptNameCodeSequence[0].CodeMeaning)
            yield Number(segment, _code(child), meaning, float(measured.NumericValue), unit)


def _several(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _code(item: Dataset) -> str:
    name = item.ConceptNameCodeSequence[0]
    return f"{name.CodeValue} {name.CodingSchemeDesignator}"
