"""Whether a patient was turned about the axis of the body for a frontal radiograph, and to which side. Pure.

No landmark that a radiologist goes by (spinous processes, ends of the clavicles) is looked for. Two estimates
with nothing in common must say the same:

- *Borders*: above the heart, the strip between the lung fields goes with the spine, which lies at the back. With
  the left side to the front it moves to the patient's left against the middle of the chest.
- *Brightness*: the lateral third of the lung field on the side that is turned to the back becomes darker, since
  the beam then leaves more of the chest wall aside.

Either has its own disturbances (heart and aorta, scoliosis; opacities, breast, scatter), so that one alone has the
wrong sign at times. Where they disagree, are small, or where the lung fields are too unlike each other for any
statement about symmetry, the answer is that it is not determined, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dicomnode.infer.stages.chest_position import hull, upright

Array = npt.NDArray[Any]
Side = Literal["left", "right"]

LEAST_BORDER = 1.25
"""Percent of the chest's width by which the strip must lie aside."""

LEAST_BRIGHTNESS = 1.0
"""Percent of the chest's contrast by which the lung fields must differ."""

MOST_BRIGHTNESS = 8.0
"""More than this is no turn: something in or before one lung absorbs."""

MOST_SPREAD = 9.5
"""By which that difference may vary between quarters of the chest's height: an opacity is in one place."""

MOST_SHARE = 2.5
"""Times the border's percent that the brightness may have: a turn moves both, an opacity the brightness above all."""

MOST_HEIGHT = 0.05
"""Share of the chest's height by which the upper ends of the lung fields may differ: else an apex is not seen."""

MOST_RATIO = 1.4
"""Of the areas of the lung fields."""

APEX = 0.25
"""Share of the chest's height, from above, in which the heart does not count."""

QUARTERS = (0.1, 0.3, 0.5, 0.7, 0.9)
LEAST_ROWS = 6
LEAST_CELLS = 9
EDGE = 2
"""Cells at the lateral border of a lung field, where the chest wall begins, that are left out."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """``forward``: the side that is turned to the front; None where it is not determined. ``reason``: in words."""

    forward: Side | None
    reason: str


def rotation(
    labels: npt.NDArray[np.uint8], values: Array, mm: tuple[float, float], columns: slice, right: int, left: int
) -> Rotation:
    """Arguments as of :func:`dicomnode.infer.stages.chest_position.tilt_and_offset`."""
    found = upright(labels, values, mm, columns, right, left)
    if found is None:
        return _open("not both lung fields are seen whole")
    chest, grey = found.chest, found.grey
    whole = hull(chest > 0)
    rows = np.flatnonzero(whole.any(axis=1))
    top, height = int(rows[0]), int(rows[-1] - rows[0]) + 1
    areas = [int(np.count_nonzero(chest == n)) for n in (1, 2)]
    if max(areas) > MOST_RATIO * min(areas):
        return _open("one lung field is much larger than the other")
    tops = [int(np.flatnonzero((chest == n).any(axis=1))[0]) for n in (1, 2)]
    if abs(tops[0] - tops[1]) > MOST_HEIGHT * height:
        return _open("the lung fields do not reach equally high")
    border, quarters = _border(chest, whole, top, height), _brightness(chest, grey, whole, top, height)
    if border is None or quarters is None:
        return _open("too little of the lung fields is seen")
    bright = (quarters[0] + quarters[1]) / 2  # above the heart
    if abs(bright) > MOST_BRIGHTNESS:
        return _open("one lung field is much brighter than the other")
    seen = (
        f"the strip between the lungs lies {abs(border):.1f} % of the chest's width to the {_side(border)}, and the "
        f"{_side(bright)} lung field is brighter by {abs(bright):.1f} % of the contrast"
    )
    if abs(border) < LEAST_BORDER or abs(bright) < LEAST_BRIGHTNESS:
        return _open(f"{seen}: too little for a statement")
    if (border > 0) != (bright > 0):
        return _open(f"{seen}: they contradict each other")
    if max(quarters) - min(quarters) > MOST_SPREAD or quarters[0] * quarters[1] < 0:
        return _open(f"{seen}, but not everywhere")
    if abs(bright) > MOST_SHARE * abs(border):
        return _open(f"{seen}, which is more than a turn does")
    return Rotation(_side(border), f"Rotation: {_side(border)} side to the front; {seen}")


def _open(reason: str) -> Rotation:
    return Rotation(None, f"Rotation: not determined; {reason}")


def _side(value: float) -> Side:
    return "left" if value > 0 else "right"


def _border(chest: Array, whole: npt.NDArray[np.bool_], top: int, height: int) -> float | None:
    """How far the middle between the medial borders lies from that of the chest, percent of its width, to the left."""
    offsets, widths = [], []
    for row in range(top, top + height):
        across = np.flatnonzero(whole[row])
        widths.append(across[-1] - across[0])
        right, left = np.flatnonzero(chest[row] == 1), np.flatnonzero(chest[row] == 2)
        if row < top + APEX * height and right.size and left.size and left[0] - right[-1] >= 2:
            offsets.append((right[-1] + left[0]) / 2 - (across[0] + across[-1]) / 2)
    return 100.0 * float(np.median(offsets) / np.median(widths)) if len(offsets) >= LEAST_ROWS else None


def _brightness(chest: Array, grey: Array, whole: npt.NDArray[np.bool_], top: int, height: int) -> list[float] | None:
    """How much darker the lateral third of the right lung field is than that of the left one, percent of contrast:
    of each row whose QUARTERS are named, from above, the median."""
    low, high = np.percentile(grey[whole], (5, 95))
    rows: list[list[float]] = [[] for _ in QUARTERS[1:]]
    for row in range(top, top + height):
        right, left = np.flatnonzero(chest[row] == 1), np.flatnonzero(chest[row] == 2)
        quarter = int(np.searchsorted(QUARTERS, (row - top) / height, side="right")) - 1
        if 0 <= quarter < len(rows) and min(right.size, left.size) >= LEAST_CELLS:
            third = max(1, left.size // 3), max(1, right.size // 3)
            outer = grey[row, left[-third[0] - EDGE : -EDGE]].mean() - grey[row, right[EDGE : third[1] + EDGE]].mean()
            rows[quarter].append(float(outer))
    if min(map(len, rows)) < LEAST_ROWS or high <= low:
        return None
    return [100.0 * float(np.median(found)) / float(high - low) for found in rows]
