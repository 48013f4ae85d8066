"""Split two lungs that touch at the anterior or posterior junction.

The mask is eroded by growing distances until it falls into two large parts on either side
of the midline; these grow back within the mask, each voxel going to the part that reaches
it first. Hu et al. (2001) find the junction line with dynamic programming instead; erosion
needs no search region and is exact to about one voxel of the working grid (3 mm).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicomnode.infer.bits import Bits
from dicomnode.infer.grid import Labels, Mask, label

WORK_MM = 3.0
MAX_EROSION_MM = 20.0
MIN_SHARE = 0.15
"""Least share of the eroded mask that each of the two parts must hold."""


def split_in_two(
    mask: Mask, spacing: tuple[float, float, float], side: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8] | None:
    """Labels 1 and 2 for the two parts of ``mask``, or None when it does not fall apart.

    ``side``: signed distance in mm of each column from the midline, used only to require
    that the parts lie on different sides.
    """
    steps = tuple(max(1, int(WORK_MM / mm + 0.25)) for mm in spacing)
    small: Mask = mask[:: steps[0], :: steps[1], :: steps[2]]
    sampling = tuple(mm * step for mm, step in zip(spacing, steps, strict=True))
    depth: npt.NDArray[Any] = ndimage.distance_transform_edt(small, sampling=sampling)
    markers = _markers(depth, side[:: steps[2]])
    if markers is None:
        return None
    grown = _grow_back(markers, small)
    # Voxels of the fine mask whose coarse cell is empty take the nearest coarse label.
    nearest = ndimage.distance_transform_edt(grown == 0, sampling=sampling, return_distances=False, return_indices=True)
    filled = grown[tuple(nearest)].astype(np.uint8)
    for axis, step in enumerate(steps):
        filled = np.repeat(filled, step, axis=axis)
    fine = filled[: mask.shape[0], : mask.shape[1], : mask.shape[2]]
    return np.where(mask, fine, np.uint8(0))


def _markers(depth: npt.NDArray[Any], side: npt.NDArray[np.float64]) -> Labels | None:
    for distance in np.arange(1.0, MAX_EROSION_MM, 1.0):
        labels, counts = label(depth > distance)
        if counts.sum() == 0:
            return None
        order = np.argsort(-counts, kind="stable")[:2]
        if len(counts) < 3 or counts[order[1]] < MIN_SHARE * counts.sum():
            continue
        means = [float(side[np.nonzero(labels == n)[2]].mean()) for n in order]
        if means[0] * means[1] < 0:
            return np.where(labels == order[0], 1, np.where(labels == order[1], 2, 0)).astype(np.int32)
    return None


def _grow_back(markers: Labels, mask: Mask) -> Labels:
    """Dilate both markers by one voxel in turn within ``mask`` until nothing changes."""
    within = Bits.of(mask).words
    parts = [Bits.of(markers == n) for n in (1, 2)]
    while True:
        free = within & ~(parts[0].words | parts[1].words)
        first, second = (part.spread().words & free for part in parts)
        second &= ~first
        if not first.any() and not second.any():
            break
        parts = [Bits(part.words | new, part.columns) for part, new in zip(parts, (first, second), strict=True)]
    return np.where(parts[0].mask(), 1, np.where(parts[1].mask(), 2, 0)).astype(np.int32)
