"""How a chest lies in its image: tilt by mirror symmetry, rotation by where the spine lies. Pure.

Works on a grid of square cells, ``GRID`` of them along the lung fields' longer side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[Any]
GRID = 128
MOST_TILT = 20.0
LEAST_ROWS = 16
"""Rows of the grid that must show both lung fields for a statement about their symmetry."""


def tilt_and_offset(
    labels: npt.NDArray[np.uint8], values: Array, mm: tuple[float, float], columns: slice, right: int, left: int
) -> tuple[float, float] | None:
    """Tilt in degrees, positive where the head leans to the patient's left; and how far the spine lies from
    the middle between the lateral borders, in percent of the chest's width, positive to the patient's left.

    ``labels``, ``values``: (rows, columns) upright, ``mm`` between them; ``columns``: of the field. None where
    not both lung fields are there, or where one is cut: its lateral border is the field's in half of the rows.
    """
    both = [labels == right, labels == left]
    shared = np.flatnonzero(both[0].any(axis=1) & both[1].any(axis=1))
    if not shared.size:
        return None
    first = both[0][shared].argmax(axis=1)
    last = labels.shape[1] - 1 - both[1][shared, ::-1].argmax(axis=1)
    cut = (first <= columns.start) | (last >= columns.stop - 1)
    if np.count_nonzero(cut) > len(cut) / 2:
        return None
    chest, grey = _on_grid(labels, values, mm, (right, left))
    tilt = _tilt(chest > 0)
    chest = ndimage.rotate(chest, tilt, order=0, reshape=False)
    grey = ndimage.rotate(grey, tilt, order=1, reshape=False, mode="nearest")
    offset = _offset(chest, ndimage.uniform_filter1d(grey, 5, axis=0, mode="nearest"))
    return None if offset is None else (tilt, offset)


def _on_grid(labels: Array, values: Array, mm: tuple[float, float], numbers: tuple[int, int]) -> tuple[Array, Array]:
    """Labels 1 right, 2 left and grey values around the lung fields, on square cells, with room to turn."""
    own = np.where(labels == numbers[0], 1, np.where(labels == numbers[1], 2, 0)).astype(np.uint8)
    rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    size = max((b.stop - b.start) * step for b, step in zip(box, mm, strict=True)) / GRID
    at = [_cells(b.stop - b.start, size / step) for b, step in zip(box, mm, strict=True)]
    blur = [max(1, round(size / step)) for step in mm]
    grey = ndimage.uniform_filter(values[box].astype(np.float32), blur, mode="nearest")
    pad = GRID // 4
    return np.pad(own[box][np.ix_(*at)], pad), np.pad(grey[np.ix_(*at)], pad, mode="edge")


def _cells(pixels: int, per_cell: float) -> Array:
    """Index of the pixel in the middle of each cell."""
    middles = (np.arange(max(1, round(pixels / per_cell))) + 0.5) * per_cell
    return np.asarray(np.minimum(middles.astype(int), pixels - 1))


def _tilt(mask: npt.NDArray[np.bool_]) -> float:
    """The angle by which the mask must be turned to be most like its mirror image: steps of 2, then 0.25 degrees."""
    best = 0.0
    for reach, step in ((MOST_TILT, 2.0), (2.0, 0.25)):
        angles = best + np.arange(-reach, reach + step / 2, step)
        scores = [_mirrored(ndimage.rotate(mask.view(np.uint8), float(a), order=0, reshape=False)) for a in angles]
        best = float(angles[int(np.argmax(scores))])
    return best


def _mirrored(mask: Array) -> float:
    """Greatest share of the mask that its mirror image covers, over all vertical axes: an autoconvolution."""
    width = 2 * mask.shape[1]
    spectrum = np.fft.rfft(mask.astype(np.float64), width, axis=1)
    overlap = np.fft.irfft((spectrum * spectrum).sum(axis=0), width)
    return round(float(overlap.max()) / max(1, int(mask.sum())), 6)


def _offset(chest: Array, grey: Array) -> float | None:
    """Of the upper half of the rows that show both: the middle of what is brighter than the median between the
    medial borders, which is the spine, against the middle of the lateral ones.
    """
    found = []
    for labels, values in zip(chest, grey, strict=True):
        right, left = np.flatnonzero(labels == 1), np.flatnonzero(labels == 2)
        if not (right.size and left.size) or left[0] - right[-1] < 2:
            continue
        between = values[right[-1] : left[0] + 1].astype(np.float64)
        weight = np.maximum(between - np.median(between), 0.0)
        if weight.sum() <= 0:
            continue
        spine = right[-1] + float(weight @ np.arange(len(weight))) / float(weight.sum())
        found.append((spine - (right[0] + left[-1]) / 2) / (left[-1] - right[0]))
    if len(found) < LEAST_ROWS:
        return None
    return 100.0 * float(np.median(found[: max(LEAST_ROWS, len(found) // 2)]))
