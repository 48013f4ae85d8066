"""A volume on its way to the network, and the way back.

Every step that changes the grid (orientation, resampling, crop, pad) appends an ``Undo``;
``restore`` walks them backwards, so what the network gives on the last grid arrives on the
grid of the source without any step in the manifest that says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.volume import Projection, Volume

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]
Kind = Literal["nearest", "linear"]
"""How values between voxels are found on the way back: ``nearest`` for labels, ``linear`` for probabilities."""

MAX_VOXELS = 1 << 28
"""Largest grid that a step may make: 1 GiB as float32."""


class StageStep(BaseModel):
    """A step is its parameters; unknown ones are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Undo(Protocol):
    """Takes an array of the grid after a step to the grid before it."""

    def __call__(self, values: Array, kind: Kind) -> Array: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """Values on a grid in the patient.

    ``values``: 3-D array, any axis order. ``affine``: float64 (4, 4) from (index along axis
    0, 1, 2, 1) to LPS millimetres (PS3.3 C.7.6.2.1.1). ``owned``: the array belongs to this
    frame alone, a step may change it in place. ``undo``: the way back, first step first.
    """

    values: Array
    affine: Affine
    owned: bool = False
    undo: tuple[Undo, ...] = ()
    notes: tuple[str, ...] = ()
    about: Projection | None = None
    """Of a single image, before a step has changed its grid."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between neighbours along each axis: lengths of the affine's columns."""
        a, b, c = (float(n) for n in np.linalg.norm(self.affine[:3, :3], axis=0))
        return (a, b, c)

    @property
    def shape(self) -> tuple[int, int, int]:
        a, b, c = self.values.shape
        return (a, b, c)

    def floats(self) -> Frame:
        """The same with float32 values that may be changed in place; copies at most once."""
        if self.owned and self.values.dtype == np.float32:
            return self
        return replace(self, values=self.values.astype(np.float32), owned=True)

    def moved(self, values: Array, affine: Affine, undo: Undo, *, owned: bool) -> Frame:
        """The frame after a step that changed the grid."""
        return replace(self, values=values, affine=affine, owned=owned, undo=(*self.undo, undo), about=None)


def frame_of(volume: Volume) -> Frame:
    """The frame before the first step: a view on the volume."""
    return Frame(volume.values, volume.affine, about=volume.projection)


def restore(undo: tuple[Undo, ...], values: Array, kind: Kind) -> Array:
    """``values`` of the network's grid on the grid of the source; the array itself if nothing moved."""
    for step in reversed(undo):
        values = step(values, kind)
    return values


def check_size(step: str, shape: tuple[int, ...], limit: int = MAX_VOXELS) -> None:
    """Refuse a grid before it is allocated; integers of any size."""
    voxels = 1
    for size in shape:
        voxels *= int(size)
    if voxels > limit:
        raise UnsuitableSeries(
            "prepare volume",
            "TOO_LARGE",
            f"{step} would make {' x '.join(map(str, shape))} = {voxels} voxels; the limit is {limit}",
            "Send a shorter part of the body or a thicker reconstruction",
        )
