"""The field of a single image: what shows something, without a collimator's cover and empty borders."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dicomnode.errors import BundleError
from dicomnode.infer.stages.extent import crop
from dicomnode.infer.stages.frame import Frame, StageStep
from dicomnode.infer.volume import Projection

Array = npt.NDArray[Any]
Box = tuple[slice, slice]
UNIFORM = 0.02
"""Rows and columns whose grey values differ by less than this share of the range are no part of the picture."""


class CropToField(StageStep):
    """Cut to the field: the collimator's where the header states a rectangular one, else what remains when
    padding, and uniform rows and columns at the borders, are left out.
    """

    step: Literal["crop_to_field"]

    def apply(self, frame: Frame) -> Frame:
        if frame.about is None:
            raise BundleError("prepare image", "crop_to_field is for single images")
        rows, columns = field_box(frame.values[0], frame.about)
        return crop(frame, (slice(0, 1), rows, columns))


def allowed(shape: tuple[int, int], about: Projection) -> npt.NDArray[np.bool_]:
    """Where neither a stated collimator nor padding lies."""
    out = np.ones(shape, bool)
    if about.field is not None:
        top, bottom, left, right = about.field
        out[:] = False
        out[top:bottom, left:right] = True
    return out if about.valid is None else out & about.valid


def field_box(values: Array, about: Projection) -> Box:
    """First to last row and column of the field; the whole image where nothing is left."""
    inside = allowed((values.shape[0], values.shape[1]), about)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not rows.size:
        return slice(0, values.shape[0]), slice(0, values.shape[1])
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    if about.field is not None:
        return box
    part = values[box]
    alive = [np.flatnonzero(_spread(part, axis) > UNIFORM * about.white) for axis in (1, 0)]
    if not (alive[0].size and alive[1].size):
        return box
    first, second = (slice(b.start + int(a[0]), b.start + int(a[-1]) + 1) for a, b in zip(alive, box, strict=True))
    return first, second


def _spread(values: Array, axis: int) -> Array:
    """Difference of the 98th and the 2nd percentile along ``axis``, of 512 to 1,023 pixels of a long line."""
    step = max(1, values.shape[axis] // 512)
    low, high = np.percentile(values[:, ::step] if axis == 1 else values[::step], (2, 98), axis=axis)
    return np.asarray(high - low)
