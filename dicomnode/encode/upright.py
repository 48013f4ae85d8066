"""How an image is turned so that it is shown as radiologists look at it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.geometry import DIRECTION_LETTERS

_OBLIQUE = 0.25
"""Share of a direction below which a letter is not named."""


@dataclass(frozen=True, slots=True)
class Turn:
    """``right`` and ``down``: unit vectors (LPS) of the turned image's row and column directions."""

    transpose: bool
    flip_columns: bool
    flip_rows: bool
    right: tuple[float, float, float] | None = None
    down: tuple[float, float, float] | None = None

    def apply(self, plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The turned image; (rows, columns, ...)."""
        if self.transpose:
            plane = plane.swapaxes(0, 1)
        if self.flip_columns:
            plane = plane[:, ::-1]
        return plane[::-1] if self.flip_rows else plane


AS_IT_IS = Turn(False, False, False)


def turn_for(orientation: Sequence[float] | None) -> Turn:
    """From ImageOrientationPatient: head up, else front up; the patient's right at the left of the picture.

    Axial: columns grow to the left of the patient, rows to the back. Coronal: left, feet.
    Sagittal: back, feet. An oblique image is treated as the plane that it is nearest to.
    """
    if orientation is None or len(orientation) != 6:
        return AS_IT_IS
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.abs(np.cross(along_row, along_column))
    if not np.isfinite(normal).all() or not normal.any():
        return AS_IT_IS
    plane = int(np.argmax(normal))
    right = np.array([0.0, 1.0, 0.0] if plane == 0 else [1.0, 0.0, 0.0])
    down = np.array([0.0, 1.0, 0.0] if plane == 2 else [0.0, 0.0, -1.0])
    transpose = bool(abs(along_column @ right) > abs(along_row @ right))
    if transpose:
        along_row, along_column = along_column, along_row
    flip_columns, flip_rows = bool(along_row @ right < 0), bool(along_column @ down < 0)
    return Turn(
        transpose,
        flip_columns,
        flip_rows,
        _three(-along_row if flip_columns else along_row),
        _three(-along_column if flip_rows else along_column),
    )


def letters_of(direction: Sequence[float] | None) -> str:
    """Patient Orientation of one direction, the main letter first; "" where it is not known."""
    if direction is None:
        return ""
    order = sorted(range(3), key=lambda axis: -abs(direction[axis]))
    return "".join(DIRECTION_LETTERS[axis][direction[axis] < 0] for axis in order if abs(direction[axis]) >= _OBLIQUE)


def opposite(letters: str) -> str:
    """Letters of the other direction."""
    return letters.translate(str.maketrans("LRPAHF", "RLAPFH"))


def _three(vector: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in vector)
    return (x, y, z)
