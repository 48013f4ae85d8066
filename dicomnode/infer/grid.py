"""Small helpers for masks on voxel grids: decimation, boxes, in-plane components.

Arrays are (slices, rows, columns). "In-plane" means within a slice: two voxels are
neighbours when they share an edge in the same slice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicomnode.infer.bits import Bits

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]
Box = tuple[slice, slice, slice]

IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)
IN_PLANE_BOX = np.zeros((3, 3, 3), bool)
IN_PLANE_BOX[1] = True


def step_for(spacing: tuple[float, float, float], target_mm: float) -> int:
    """In-plane decimation step that brings the pixel size close to, and not far above, target."""
    return max(1, int(target_mm / max(spacing[1], spacing[2]) + 0.25))


def enlarge(small: npt.NDArray[Any], step: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Undo ``[:, ::step, ::step]`` by repetition, cut to ``shape``."""
    if step == 1:
        return small
    big = np.repeat(np.repeat(small, step, axis=1), step, axis=2)
    return big[:, : shape[1], : shape[2]]


def block_mean(values: npt.NDArray[Any], step: int) -> npt.NDArray[np.float32]:
    """Mean over ``step`` x ``step`` in-plane blocks; blocks at the far edge may be partial."""
    shape = (values.shape[0], -(-values.shape[1] // step), -(-values.shape[2] // step))
    total = np.zeros(shape, np.float32)
    count = np.zeros(shape[1:], np.float32)
    for row in range(step):
        for column in range(step):
            part = values[:, row::step, column::step]
            total[:, : part.shape[1], : part.shape[2]] += part
            count[: part.shape[1], : part.shape[2]] += 1.0
    total /= count
    return total


def bounding_box(mask: Mask, margin: int = 0) -> Box | None:
    """Smallest box around the True voxels, widened in-plane by ``margin``; None when empty."""
    return box_around(mask, (0, margin, margin))


def box_around(mask: Mask, margins: tuple[int, int, int]) -> Box | None:
    """Smallest box around the True voxels, widened by ``margins`` within the array; None when empty."""
    ranges = []
    for axis, (others, margin) in enumerate(zip(((1, 2), (0, 2), (0, 1)), margins, strict=True)):
        hits = np.flatnonzero(mask.any(axis=others))
        if hits.size == 0:
            return None
        ranges.append(slice(max(0, int(hits[0]) - margin), min(mask.shape[axis], int(hits[-1]) + 1 + margin)))
    return (ranges[0], ranges[1], ranges[2])


def label(mask: Mask, structure: npt.NDArray[np.bool_] | None = None) -> tuple[Labels, npt.NDArray[np.int64]]:
    """Connected components (6-neighbourhood by default) and the voxel count of each.

    Returns int32 labels from 1 in scan order and ``counts`` with ``counts[0] == 0``.
    """
    labels = np.empty(mask.shape, np.int32)
    found = int(ndimage.label(mask, structure=structure, output=labels))
    counts = np.zeros(found + 1, np.int64)
    for part in labels:  # slice by slice: numpy counts in 64 bits and would make a copy of all in them
        last = int(part.max())
        counts[: last + 1] += np.bincount(part.ravel(), minlength=last + 1)
    counts[0] = 0
    return labels, counts


def enclosed(mask: Mask, max_area: float = float("inf")) -> Mask:
    """In-plane holes of ``mask`` of at most ``max_area`` voxels: background without a way to the edge."""
    labels, counts = label(~mask, IN_PLANE)
    hole = counts <= max_area
    hole[0] = False
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        hole[np.unique(edge)] = False
    result: Mask = hole[labels]
    return result


def close_in_plane(mask: Mask, radius: int) -> Mask:
    """In-plane closing with an octagon of about ``radius`` voxels (cross and square steps in turn).

    The mask is padded first: an array that is cut close to the structure must not close
    against its own edge.
    """
    if radius <= 0:
        return mask
    squares = radius * 2 // 5
    crosses = radius - squares
    rim = radius + 1
    bits = Bits.of(np.pad(mask, ((0, 0), (rim, rim), (rim, rim))))
    closed = bits.dilated(crosses=crosses, squares=squares).eroded(crosses=crosses, squares=squares).mask()
    result: Mask = closed[:, rim:-rim, rim:-rim] | mask
    return result
