"""How much of the volume the network sees: crop to the body or foreground, pad. Undone exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy import ndimage

from dicomnode.infer.grid import Box, Mask, box_around
from dicomnode.infer.stages.frame import Array, Frame, Kind, StageStep, check_size

_COARSE_MM = 4.0


@dataclass(frozen=True, slots=True)
class _Cropped:
    """Puts the box back; outside it 0: background for labels, no probability for maps."""

    shape: tuple[int, int, int]
    box: Box

    def __call__(self, values: Array, kind: Kind) -> Array:
        del kind
        out = np.zeros(self.shape, values.dtype)
        out[self.box] = values
        return out


@dataclass(frozen=True, slots=True)
class _Padded:
    box: Box

    def __call__(self, values: Array, kind: Kind) -> Array:
        del kind
        return values[self.box]


def crop(frame: Frame, box: Box) -> Frame:
    """The part of the frame inside ``box`` (a view)."""
    if all(b.start == 0 and b.stop == n for b, n in zip(box, frame.shape, strict=True)):
        return frame
    affine = frame.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array([b.start for b in box], float)
    return frame.moved(frame.values[box], affine, _Cropped(frame.shape, box), owned=frame.owned)


def find_body(frame: Frame, above: float) -> Mask:
    """The largest connected piece above ``above`` with everything it encloses; full size.

    Decided on about every fourth millimetre: tissue is opened once so that the table comes
    off, holes are filled slice by slice along each axis. In the outermost coarse voxel the
    value of each voxel itself decides. All False when there is no tissue.
    """
    steps = tuple(max(1, int(_COARSE_MM / mm + 0.25)) for mm in frame.spacing)
    coarse = frame.values[tuple(slice(None, None, s) for s in steps)] > above
    opened = ndimage.binary_opening(coarse)
    labels, found = ndimage.label(opened if opened.any() else coarse)
    if not found:
        return np.zeros(frame.shape, bool)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    body: npt.NDArray[np.bool_] = ndimage.binary_dilation(labels == int(counts.argmax()))
    for axis in range(3):
        for plane in np.moveaxis(body, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    core = _enlarged(ndimage.binary_erosion(body, iterations=2, border_value=1), steps, frame.shape)
    return core | (_enlarged(body, steps, frame.shape) & (frame.values > above))


def _enlarged(mask: npt.NDArray[np.bool_], steps: tuple[int, ...], shape: tuple[int, int, int]) -> Mask:
    for axis, s in enumerate(steps):
        if s > 1:
            mask = np.repeat(mask, s, axis=axis)
    n, r, c = shape
    return mask[:n, :r, :c]


class CropToBody(StageStep):
    """Cut to the body (largest piece above ``above``) with ``margin_mm`` around it."""

    step: Literal["crop_to_body"]
    above: float = -500.0
    margin_mm: float = Field(default=10.0, ge=0, le=200)

    def apply(self, frame: Frame) -> Frame:
        a, b, c = (int(np.ceil(self.margin_mm / mm)) for mm in frame.spacing)
        box = box_around(find_body(frame, self.above), (a, b, c))
        if box is None:
            return replace(frame, notes=(*frame.notes, "No body was found in the images"))
        return crop(frame, box)


class CropForeground(StageStep):
    """Cut to the voxels above ``above`` with ``margin`` voxels around (MONAI's CropForeground)."""

    step: Literal["crop_foreground"]
    above: float = 0.0
    margin: int = Field(default=0, ge=0, le=256)

    def apply(self, frame: Frame) -> Frame:
        box = box_around(frame.values > self.above, (self.margin,) * 3)
        return frame if box is None else crop(frame, box)


class Pad(StageStep):
    """Enlarge to at least ``size`` voxels and to a multiple of ``multiple``, per axis.

    Half of it goes before (rounded down), as MONAI's SpatialPad and DivisiblePad do.
    ``mode`` ``constant`` fills with ``value``, ``edge`` repeats the outermost voxel.
    """

    step: Literal["pad"]
    size: tuple[int, int, int] = (1, 1, 1)
    multiple: tuple[int, int, int] = (1, 1, 1)
    mode: Literal["constant", "edge"] = "constant"
    value: float = 0.0

    @model_validator(mode="after")
    def _positive(self) -> Pad:
        if min(*self.size, *self.multiple) < 1:
            raise ValueError("size and multiple count voxels: 1 or more")
        return self

    def apply(self, frame: Frame) -> Frame:
        target = [-(-max(n, s) // m) * m for n, s, m in zip(frame.shape, self.size, self.multiple, strict=True)]
        before = [(t - n) // 2 for t, n in zip(target, frame.shape, strict=True)]
        return padded(frame, before, target, self.mode, self.value)


def padded(frame: Frame, before: list[int], target: list[int], mode: str, value: float) -> Frame:
    """``frame`` on ``target`` voxels per axis, its first voxel at ``before``."""
    if target == list(frame.shape):
        return frame
    check_size("pad", tuple(target))
    widths = [(b, t - n - b) for b, t, n in zip(before, target, frame.shape, strict=True)]
    if mode == "edge":
        values = np.pad(frame.values, widths, mode="edge")
    else:
        fits = np.can_cast(np.min_scalar_type(int(value)), frame.values.dtype) if value.is_integer() else False
        kind = frame.values.dtype if frame.values.dtype == np.float32 or fits else np.dtype(np.float32)
        values = np.pad(frame.values.astype(kind, copy=False), widths, constant_values=value)
    affine = frame.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(before, float)
    box = tuple(slice(b, b + n) for b, n in zip(before, frame.shape, strict=True))
    return frame.moved(values, affine, _Padded((box[0], box[1], box[2])), owned=True)
