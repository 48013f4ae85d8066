"""How a chest lies in its image: tilt and sideways place of what is bright between the lungs. Pure.

Works on a grid of square cells, ``GRID`` of them along the lung fields' longer side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull

Array = npt.NDArray[Any]
GRID = 128
MOST_TILT = 30.0
ROUNDS = 3
LEAST_ROWS = 16
"""Rows of the grid that must show both lung fields for a statement about their symmetry."""


def tilt_and_offset(
    labels: npt.NDArray[np.uint8], values: Array, mm: tuple[float, float], columns: slice, right: int, left: int
) -> tuple[float, float] | None:
    """Tilt in degrees, positive where the head leans to the patient's left; and how far the bright strip between
    the lung fields (spine and mediastinum) lies from the middle of the chest, in percent of its width, positive
    to the patient's left; None where nothing can be said. That the patient was turned does not follow from it:
    heart and spine move to opposite sides then (see ``chest_rotation``).

    The tilt is that of the line (Theil-Sen) through the strip's middle in each row, found ROUNDS times, each time
    in the image turned upright by the former. The chest is the convex hull of both lung fields: it stays where a
    part of a lung is not seen.

    ``labels``, ``values``: (rows, columns) upright, ``mm`` between them; ``columns``: of the field. None where
    not both lung fields are there, or where one is cut: its lateral border is the field's in half of the rows.
    """
    found = upright(labels, values, mm, columns, right, left)
    if found is None:
        return None
    strip = _strip(found.chest, found.grey)
    return None if strip is None else (found.tilt, _offset(*strip, hull(found.chest > 0)))


@dataclass(frozen=True, slots=True)
class Upright:
    """Labels (1 right, 2 left) and grey values on square cells, turned by ``tilt`` degrees so that the strip stands."""

    tilt: float
    chest: npt.NDArray[np.uint8]
    grey: Array


def upright(
    labels: npt.NDArray[np.uint8], values: Array, mm: tuple[float, float], columns: slice, right: int, left: int
) -> Upright | None:
    """Arguments, and when there is none, as of :func:`tilt_and_offset`."""
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
    tilt = 0.0
    turned, bright = chest, grey
    for _ in range(ROUNDS):
        strip = _strip(turned, bright)
        if strip is None:
            return None
        tilt = float(np.clip(tilt - math.degrees(math.atan(_slope(*strip))), -MOST_TILT, MOST_TILT))
        turned = ndimage.rotate(chest, tilt, order=0, reshape=False)
        bright = ndimage.rotate(grey, tilt, order=1, reshape=False, mode="nearest")
    return Upright(tilt, turned, bright)


def _on_grid(labels: Array, values: Array, mm: tuple[float, float], numbers: tuple[int, int]) -> tuple[Array, Array]:
    """Labels 1 right, 2 left and grey values around the lung fields, on square cells, with room to turn."""
    own = np.where(labels == numbers[0], 1, np.where(labels == numbers[1], 2, 0)).astype(np.uint8)
    rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    size = max((b.stop - b.start) * step for b, step in zip(box, mm, strict=True)) / GRID
    at = [_cells(b.stop - b.start, size / step) for b, step in zip(box, mm, strict=True)]
    blur = [max(1, round(size / step)) | 1 for step in mm]  # odd: else it moves the picture by half a pixel
    grey = ndimage.uniform_filter(values[box].astype(np.float32), blur, mode="nearest")
    pad = GRID // 4
    return np.pad(own[box][np.ix_(*at)], pad), np.pad(grey[np.ix_(*at)], pad, mode="edge")


def _cells(pixels: int, per_cell: float) -> Array:
    """Index of the pixel in the middle of each cell."""
    middles = (np.arange(max(1, round(pixels / per_cell))) + 0.5) * per_cell
    return np.asarray(np.minimum(middles.astype(int), pixels - 1))


def _strip(chest: Array, grey: Array) -> tuple[Array, Array] | None:
    """Row and column of the strip's middle: of what is brighter than the median between the medial borders."""
    found = []
    for row, (labels, values) in enumerate(zip(chest, ndimage.uniform_filter1d(grey, 5, axis=0), strict=True)):
        right, left = np.flatnonzero(labels == 1), np.flatnonzero(labels == 2)
        if not (right.size and left.size) or left[0] - right[-1] < 2:
            continue
        between = values[right[-1] : left[0] + 1].astype(np.float64)
        weight = np.maximum(between - np.median(between), 0.0)
        if weight.sum() > 0:
            found.append((row, right[-1] + float(weight @ np.arange(len(weight))) / float(weight.sum())))
    if len(found) < LEAST_ROWS:
        return None
    rows, columns = np.array(found, np.float64).T
    return rows, columns


def _slope(rows: Array, columns: Array) -> float:
    """Theil-Sen: the median of the slopes between all pairs of rows."""
    first, second = np.triu_indices(len(rows), 1)
    return float(np.median((columns[second] - columns[first]) / (rows[second] - rows[first])))


def hull(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The convex hull of a mask."""
    equations = ConvexHull(np.argwhere(mask)).equations
    inside = (equations[:, :2] @ np.indices(mask.shape).reshape(2, -1) + equations[:, 2:] <= 1e-9).all(axis=0)
    return np.asarray(inside.reshape(mask.shape))


def _offset(rows: Array, columns: Array, chest: npt.NDArray[np.bool_]) -> float:
    """Of the upper half of the rows, where the heart does not count: the median."""
    found = []
    for row, column in list(zip(rows.astype(int), columns, strict=True))[: max(LEAST_ROWS, len(rows) // 2)]:
        across = np.flatnonzero(chest[row])
        found.append((column - (across[0] + across[-1]) / 2) / max(1, across[-1] - across[0]))
    return 100.0 * float(np.median(found))
