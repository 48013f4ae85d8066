"""Connected pieces and holes of segments. Pure functions on label maps (slices, rows, columns)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicomnode.infer.grid import IN_PLANE

Labels = npt.NDArray[np.uint8]
Box = tuple[slice, ...]


def segments_in(labels: Labels, wanted: tuple[int, ...] | None) -> Iterator[tuple[int, Box]]:
    """Number and bounding box of each segment that occurs, in ascending order."""
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None and (wanted is None or number in wanted):
            yield number, box


def keep_largest(
    labels: Labels, keep: int | None, least: int, connectivity: int, wanted: tuple[int, ...] | None
) -> Labels:
    """``labels`` without the pieces beyond the ``keep`` largest and those below ``least`` voxels.

    Of two pieces of the same size the one first in scan order counts as larger.
    """
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    out = labels.copy()
    for number, box in segments_in(labels, wanted):
        view = out[box]
        pieces, found = ndimage.label(view == number, structure)
        if found == 0:
            continue
        counts = np.bincount(pieces.ravel(), minlength=found + 1)
        order = np.argsort(-counts[1:], kind="stable") + 1
        drop = np.ones(found + 1, bool)
        drop[0] = False
        drop[[n for n in order[:keep] if counts[n] >= least]] = False
        if drop.any():
            view[drop[pieces]] = 0
    return out


def fill_holes(labels: Labels, in_plane: bool, most: float | None, wanted: tuple[int, ...] | None) -> Labels:
    """``labels`` with enclosed background filled, holes of at most ``most`` voxels each.

    Enclosed means without a way of faces (in the slice: of edges) to the border of the
    segment's box; only background is changed, a segment inside another one stays.
    """
    out = labels.copy()
    for number, box in segments_in(labels, wanted):
        view = out[box]
        holes, found = ndimage.label(view != number, IN_PLANE if in_plane else None)
        if found == 0:
            continue
        enclosed = np.ones(found + 1, bool)
        enclosed[0] = False
        for axis in (1, 2) if in_plane else (0, 1, 2):
            edges = np.moveaxis(holes, axis, 0)
            enclosed[np.unique(edges[0])] = False
            enclosed[np.unique(edges[-1])] = False
        if most is not None:
            enclosed &= np.bincount(holes.ravel(), minlength=found + 1) <= most
        view[enclosed[holes] & (view == 0)] = number
    return out
