"""Outlines of a mask as closed polygons along the edges of its pixels. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Polygon = npt.NDArray[np.float32]
"""(points, 2): column and row, in pixels from the top left corner of the image; the last point is the first."""


def outlines(mask: npt.NDArray[np.bool_], most: int = 64) -> list[Polygon]:
    """Outer and inner outlines of the 4-connected parts of ``mask`` (rows, columns), the longest first.

    Only the points at which an outline turns. At most ``most`` of them: what is left out is the
    smallest, such as single pixels of a noisy mask.

    Each corner of a pixel region ends one horizontal and one vertical edge, so sorting the
    corners by row and by column pairs them; where two pixels touch by a corner, two corners lie
    on one point and are kept apart so that the pixels are.
    """
    inside_rows, inside_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not inside_rows.size:
        return []
    top, left = int(inside_rows[0]), int(inside_columns[0])
    padded = np.pad(mask[top : inside_rows[-1] + 1, left : inside_columns[-1] + 1], 1).astype(np.uint8)
    a, b = padded[:-1, :-1], padded[:-1, 1:]
    c, d = padded[1:, :-1], padded[1:, 1:]
    total = a + b + c + d
    saddle = (total == 2) & (a == d)
    single = (total == 1) | (total == 3)
    rows, columns = np.nonzero(single | saddle)
    twice = saddle[rows, columns]
    falling = a[rows, columns].astype(bool)  # the pixels of a saddle lie top left and bottom right
    y = np.concatenate([rows, rows[twice]])
    x = np.concatenate([columns, columns[twice]])
    half = np.concatenate([np.zeros(len(rows), np.int8), np.ones(int(twice.sum()), np.int8)])
    # At a saddle the left half (0) goes up where the pixels fall, else down.
    rank = np.where(np.concatenate([falling, falling[twice]]), half, 1 - half)
    across = _pairs(np.lexsort((half, x, y)))
    down = _pairs(np.lexsort((rank, y, x)))
    return _follow(x + left, y + top, across.tolist(), down.tolist())[:most]


def _pairs(order: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    partner = np.empty_like(order)
    partner[order[0::2]] = order[1::2]
    partner[order[1::2]] = order[0::2]
    return partner


def _follow(x: npt.NDArray[np.intp], y: npt.NDArray[np.intp], across: list[int], down: list[int]) -> list[Polygon]:
    seen = bytearray(len(across))
    found: list[list[int]] = []
    for start in range(len(across)):
        if seen[start]:
            continue
        loop, at = [], start
        while not seen[at]:
            other = across[at]
            seen[at] = seen[other] = 1
            loop += [at, other]
            at = down[other]
        found.append([*loop, start])
    found.sort(key=lambda loop: -len(loop))
    return [np.stack([x[loop], y[loop]], axis=1).astype(np.float32) for loop in found]
