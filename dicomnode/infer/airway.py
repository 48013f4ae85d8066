"""Find trachea and central bronchi in a chest CT: seed by shape, growth by threshold.

The trachea is looked for from the head end as a chain of round, dark, central cross
sections. It is then grown in 3-D at the highest threshold at which it does not leak into
the lung, the usual explosion control of threshold-based airway growing (the airway step of
Hu, Hoffman, Reinhardt, IEEE TMI 2001;20(6):490-498 is a growing from the trachea as well).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicomnode.infer.grid import IN_PLANE, Labels, Mask, label

SEED_HU = -850.0


@dataclass(frozen=True, slots=True)
class AirwaySize:
    """Plausible sizes: cross section of the trachea in mm2, whole tree in ml, lengths in mm."""

    min_area_mm2: float = 50.0
    max_area_mm2: float = 800.0
    chain_mm: float = 20.0
    off_midline_mm: float = 45.0
    max_tree_ml: float = 90.0


def find_airway(
    hu: npt.NDArray[np.float32],
    candidates: Mask,
    spacing: tuple[float, float, float],
    columns_from_midline_mm: npt.NDArray[np.float64],
    *,
    head_last: bool,
    size: AirwaySize,
) -> Mask | None:
    """Mask of the airway lumen, or None when no trachea is found.

    ``hu`` and ``candidates``: (slices, rows, columns), air inside the body. ``spacing`` in
    mm. ``columns_from_midline_mm``: signed distance of each column. ``head_last``: the last
    slice is nearest to the head.
    """
    labels, counts = label(candidates & (hu < SEED_HU), IN_PLANE)
    pixel_mm2 = spacing[1] * spacing[2]
    round_ones = _round_sections(labels, counts, pixel_mm2, columns_from_midline_mm, size)
    seed = _first_chain(labels, round_ones, spacing[0], head_last=head_last, chain_mm=size.chain_mm)
    if seed is None:
        return None
    voxel_ml = pixel_mm2 * spacing[0] / 1000.0
    thresholds = np.arange(-990.0, SEED_HU + 1.0, 10.0)
    low, high = 0, len(thresholds)  # grown volume rises with the threshold: bisect for the last that fits
    best: Mask | None = None
    while low < high:
        middle = (low + high) // 2
        grown = _component_at(candidates & (hu < thresholds[middle]), labels == seed)
        if grown is None or np.count_nonzero(grown) * voxel_ml <= size.max_tree_ml:
            best, low = (grown if grown is not None else best), middle + 1
        else:
            high = middle
    return best


def _round_sections(
    labels: Labels,
    counts: npt.NDArray[np.int64],
    pixel_mm2: float,
    from_midline: npt.NDArray[np.float64],
    size: AirwaySize,
) -> dict[int, list[int]]:
    """Labels of trachea-like in-plane sections by slice index."""
    boxes = ndimage.find_objects(labels)
    fits = (counts * pixel_mm2 >= size.min_area_mm2) & (counts * pixel_mm2 <= size.max_area_mm2)
    result: dict[int, list[int]] = {}
    for number in np.flatnonzero(fits):
        box = boxes[number - 1]
        height, width = box[1].stop - box[1].start, box[2].stop - box[2].start
        if not 0.4 <= height / width <= 2.5 or counts[number] < 0.5 * height * width:
            continue
        if np.abs(from_midline[box[2]]).mean() > size.off_midline_mm:
            continue
        result.setdefault(box[0].start, []).append(int(number))
    return result


def _first_chain(
    labels: Labels, sections: dict[int, list[int]], slice_mm: float, *, head_last: bool, chain_mm: float
) -> int | None:
    """Label at the foot end of the first chain of overlapping sections that is long enough."""
    order = sorted(sections, reverse=head_last)
    step = -1 if head_last else 1
    needed = max(2, int(np.ceil(chain_mm / slice_mm)))
    length: dict[int, int] = {}
    for index in order:
        previous = labels[index - step] if 0 <= index - step < labels.shape[0] else None
        for number in sections[index]:
            length[number] = 1
            if previous is not None:
                above = np.unique(previous[labels[index] == number])
                length[number] = 1 + max((length.get(int(n), 0) for n in above if n), default=0)
            if length[number] >= needed:
                return number
    return None


def _component_at(mask: Mask, seed: Mask) -> Mask | None:
    """The 3-D component of ``mask`` that holds most of ``seed``."""
    labels, _ = label(mask)
    hits = np.bincount(labels[seed])
    hits[:1] = 0
    if hits.sum() == 0:
        return None
    result: Mask = labels == int(hits.argmax())
    return result
