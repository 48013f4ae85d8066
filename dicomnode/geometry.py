"""Geometry of a series of slices (PS3.3 C.7.6.2): pure functions on numbers.

Positions are millimetres in the patient coordinate system (LPS: x to the left, y to the
back, z to the head). ``orientation`` is ImageOrientationPatient: the unit vector along a
row (towards growing column index) followed by the one along a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference of a direction cosine within one stack; scanners round to 6 digits."""

SPACING_TOLERANCE = 0.05
"""Largest deviation of one slice step, as a share of the median step."""

SPACING_FLOOR_MM = 0.02
"""Steps that differ by less than this are equal: positions are rounded to 0.01 mm by some."""


DIRECTION_LETTERS = (("L", "R"), ("P", "A"), ("H", "F"))
"""Of Patient Orientation: towards growing and falling x, y, z (LPS)."""


@dataclass(frozen=True, slots=True)
class SlicePlane:
    """Where one image lies: its UID, position (3 mm values) and orientation (6 cosines)."""

    uid: str
    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class StackReport:
    """What a set of planes amounts to.

    ``order`` holds UIDs sorted along the slice normal (row x column direction).
    ``spacing`` is the median step in mm (0.0 with fewer than two slices). ``problems`` maps
    a stable code to a sentence: ``MIXED_ORIENTATION``, ``DUPLICATE_POSITION``, ``GAP``,
    ``NON_UNIFORM``. Empty means: a contiguous, regular stack.
    """

    order: tuple[str, ...]
    normal: tuple[float, float, float]
    spacing: float
    problems: dict[str, str]

    @property
    def contiguous(self) -> bool:
        return not self.problems and len(self.order) >= 2


def slice_normal(orientation: Sequence[float]) -> tuple[float, float, float]:
    """Unit vector row x column; for axial head-first supine it points to the head."""
    normal = np.cross(np.asarray(orientation[:3], float), np.asarray(orientation[3:6], float))
    length = float(np.linalg.norm(normal))
    if length == 0.0:
        return (0.0, 0.0, 0.0)
    normal = normal / length
    return (float(normal[0]), float(normal[1]), float(normal[2]))


def frames_note(count: int) -> str:
    """Real series exist in which every slice names a frame of reference of its own (STANDARDS.md)."""
    return (
        f"The source images name {count} different frames of reference within one series; "
        "their positions were taken as one coordinate system, and the results use the first slice's."
    )


def _most_common(orientations: npt.NDArray[np.float64]) -> int:
    """Index of a row that most others equal, to three digits."""
    _, first, counts = np.unique(np.round(orientations, 3), axis=0, return_index=True, return_counts=True)
    return int(first[int(counts.argmax())])


def analyse_stack(planes: Sequence[SlicePlane]) -> StackReport:
    """Sort planes along their common normal and say what keeps them from being a volume."""
    if not planes:
        return StackReport((), (0.0, 0.0, 0.0), 0.0, {})
    orientations = np.array([p.orientation for p in planes], float)
    reference = orientations[_most_common(orientations)]
    normal = slice_normal(reference.tolist())
    problems: dict[str, str] = {}
    deviating = int(np.sum(np.abs(orientations - reference).max(axis=1) > ORIENTATION_TOLERANCE))
    if deviating or normal == (0.0, 0.0, 0.0):
        problems["MIXED_ORIENTATION"] = (
            f"{deviating} of {len(planes)} slices are oriented differently from the others"
            if deviating
            else "row and column direction are parallel"
        )
    distances = np.array([p.position for p in planes], float) @ np.array(normal)
    by_distance = sorted(range(len(planes)), key=lambda i: (distances[i], planes[i].uid))
    order = tuple(planes[i].uid for i in by_distance)
    if len(planes) < 2 or "MIXED_ORIENTATION" in problems:
        return StackReport(order, normal, 0.0, problems)
    steps = np.diff(distances[by_distance])
    duplicates = int(np.sum(steps < SPACING_FLOOR_MM))
    spacing = float(np.median(steps[steps >= SPACING_FLOOR_MM])) if duplicates < len(steps) else 0.0
    if duplicates:
        problems["DUPLICATE_POSITION"] = f"{duplicates} slices lie at the position of another slice"
    if spacing > 0.0:
        gaps = steps[steps > 1.5 * spacing]
        if gaps.size:
            missing = int(np.sum(np.maximum(np.rint(gaps / spacing) - 1, 1)))
            problems["GAP"] = (
                f"{gaps.size} gap(s) between slices, about {missing} slice(s) missing; "
                f"the largest step is {gaps.max():.2f} mm where {spacing:.2f} mm is usual"
            )
        uneven = np.abs(steps - spacing) > max(SPACING_TOLERANCE * spacing, SPACING_FLOOR_MM)
        uneven &= (steps >= SPACING_FLOOR_MM) & (steps <= 1.5 * spacing)
        if uneven.any():
            problems["NON_UNIFORM"] = (
                f"{int(uneven.sum())} slice step(s) differ from the usual {spacing:.2f} mm "
                f"by more than {SPACING_TOLERANCE:.0%}"
            )
    return StackReport(order, normal, spacing, problems)


def orientation_of(letters: Sequence[str] | None) -> list[float] | None:
    """Direction cosines from Patient Orientation (PS3.3 C.7.6.1.1.1), by its main letters; None without."""
    if not letters or len(letters) != 2:
        return None
    out: list[float] = []
    for text in letters:
        axis = next((i for i, pair in enumerate(DIRECTION_LETTERS) if str(text)[:1] in pair and str(text)), None)
        if axis is None:
            return None
        vector = [0.0, 0.0, 0.0]
        vector[axis] = 1.0 if str(text)[:1] == DIRECTION_LETTERS[axis][0] else -1.0
        out += vector
    return out if np.any(np.cross(out[:3], out[3:])) else None
