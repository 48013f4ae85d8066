"""Another spacing or another size, and back: separable, in float32, without float64 copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import ndimage

from dicomnode.infer.stages.frame import MAX_VOXELS, Array, Frame, Kind, StageStep, check_size

Order = Literal["nearest", "linear", "bspline"]
Align = Literal["centres", "edges"]
Spacing = Annotated[float, Field(gt=0, le=1000)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]


@dataclass(frozen=True, slots=True)
class AxisMap:
    """Where the voxels of one axis come from: target ``i`` lies at source index ``offset + i * step``."""

    source: int
    target: int
    step: float
    offset: float

    @property
    def same(self) -> bool:
        return self.source == self.target and self.step == 1.0 and self.offset == 0.0

    def back(self) -> AxisMap:
        return AxisMap(self.target, self.source, 1.0 / self.step, -self.offset / self.step)


def axis_to_spacing(size: int, spacing: float, target: float, align: Align) -> AxisMap:
    """``centres``: the first voxels share their centre and the size is round((n - 1) s / t) + 1
    (MONAI's Spacing; SimpleITK with the origin kept). ``edges``: the outer edges coincide and
    the size is round(n s / t) (nnU-Net); the spacing then is what divides the extent evenly.
    """
    if abs(spacing - target) <= 1e-5 * target:
        return AxisMap(size, size, 1.0, 0.0)
    if align == "centres":
        return AxisMap(size, int(np.floor((size - 1) * spacing / target + 0.5)) + 1, target / spacing, 0.0)
    return axis_to_size(size, max(1, int(np.floor(size * spacing / target + 0.5))))


def axis_to_size(size: int, target: int) -> AxisMap:
    """``target`` voxels over the same extent, edge to edge."""
    step = size / target
    return AxisMap(size, target, step, (step - 1.0) / 2.0)


def memory_order(values: Array) -> tuple[int, ...]:
    """Axes from the one of the largest stride to the smallest: how the array lies in memory."""
    return tuple(int(i) for i in np.argsort([-abs(s) for s in values.strides], kind="stable"))


def resample_array(
    values: Array, maps: tuple[AxisMap, ...], order: Order, layout: tuple[int, ...] | None = None
) -> Array:
    """``values`` on the grid that ``maps`` gives; beyond the outer centres the edge value.

    Integer labels with ``nearest`` keep their dtype; else float32. Works plane by plane in
    the order in which the array lies in memory; the result lies in the order ``layout``
    (axes from the largest stride), by default the same.
    """
    layout = memory_order(values) if layout is None else layout
    laid = values.transpose(layout)
    ordered = tuple(maps[i] for i in layout)
    method = {"nearest": _nearest, "linear": _linear, "bspline": _bspline}[order]
    return method(laid, ordered).transpose(np.argsort(layout))


def _nearest(values: Array, maps: tuple[AxisMap, ...]) -> Array:
    """Half-way points go up, as ITK's nearest neighbour does."""
    picks = [
        np.clip(np.floor(m.offset + np.arange(m.target) * m.step + 0.5 + 1e-9).astype(np.intp), 0, m.source - 1)
        for m in maps
    ]
    out = np.empty(tuple(m.target for m in maps), values.dtype)
    inner = np.ix_(picks[1], picks[2])
    done: dict[int, int] = {}
    for index, pick in enumerate(picks[0].tolist()):
        if pick in done:
            out[index] = out[done[pick]]
        else:
            out[index] = values[pick][inner]
            done = {pick: index}  # picks are sorted: only the last can come again
    return out


def _weights(m: AxisMap) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    at = np.clip(m.offset + np.arange(m.target) * m.step, 0, m.source - 1)
    low = np.minimum(np.floor(at + 1e-9).astype(np.intp), m.source - 1)
    return low, np.minimum(low + 1, m.source - 1), np.clip(at - low, 0.0, 1.0).astype(np.float32)


def _linear(values: Array, maps: tuple[AxisMap, ...]) -> Array:
    lows, highs, weight = _weights(maps[0])
    out = np.empty(tuple(m.target for m in maps), np.float32)
    rows, columns = (None if m.same else _weights(m) for m in maps[1:])
    planes: dict[int, Array] = {}

    def plane(index: int) -> Array:
        if index not in planes:
            planes[index] = _plane(values[index], rows, columns)
        return planes[index]

    for index, (low, high) in enumerate(zip(lows.tolist(), highs.tolist(), strict=True)):
        w = float(weight[index])
        for old in [k for k in planes if k < low]:
            del planes[old]
        if w == 0.0:
            out[index] = plane(low)
        else:
            np.subtract(plane(high), plane(low), out=out[index])
            out[index] *= w
            out[index] += plane(low)
    return out


def _plane(values: Array, rows: Any, columns: Any) -> Array:
    out = values.astype(np.float32)
    if rows is not None:
        low, high, w = rows
        first = out[low]
        out = first + w[:, None] * (out[high] - first)
    if columns is not None:
        low, high, w = columns
        first = np.take(out, low, axis=1)
        out = first + w * (np.take(out, high, axis=1) - first)
    return out


def _bspline(values: Array, maps: tuple[AxisMap, ...]) -> Array:
    """Cubic B-spline with mirrored edges (Unser 1999), the filter that ITK's BSpline uses too.

    Axis by axis, the one that shrinks most first: coefficients, then four of them per voxel.
    """
    out = values.astype(np.float32, copy=False)
    for axis in sorted(range(3), key=lambda i: maps[i].target / maps[i].source):
        if not maps[axis].same:
            out = _bspline_axis(out, axis, maps[axis])
    return np.ascontiguousarray(out)


def _bspline_axis(values: Array, axis: int, m: AxisMap) -> Array:
    if m.source == 1:
        return np.repeat(values, m.target, axis=axis)
    coefficients = ndimage.spline_filter1d(values, 3, axis, output=np.float32, mode="mirror")
    at = m.offset + np.arange(m.target) * m.step
    low = np.floor(at).astype(np.intp)
    t = at - low
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    shape = tuple(m.target if i == axis else n for i, n in enumerate(values.shape))
    out = np.zeros(shape, np.float32)
    period = 2 * (m.source - 1)
    for k, weight in enumerate(weights):
        index = (low + k - 1) % period
        index = np.where(index < m.source, index, period - index)  # mirrored about the outer centres
        part = np.take(coefficients, index, axis=axis)
        part *= (weight / 6).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        out += part
    return out


@dataclass(frozen=True, slots=True)
class _Resampled:
    """``layout``: how the array before lay in memory; the way back makes the same, or turning
    the axes back would cost a transposition of the whole volume."""

    maps: tuple[AxisMap, ...]
    layout: tuple[int, ...]

    def __call__(self, values: Array, kind: Kind) -> Array:
        return resample_array(values, tuple(m.back() for m in self.maps), kind, self.layout)


def _apply(frame: Frame, name: str, maps: tuple[AxisMap, ...], order: Order, limit: int) -> Frame:
    if all(m.same for m in maps):
        return frame
    check_size(name, tuple(m.target for m in maps), limit)
    affine = frame.affine.copy()
    affine[:3, 3] += frame.affine[:3, :3] @ np.array([m.offset for m in maps])
    affine[:3, :3] *= [m.step for m in maps]
    undo = _Resampled(maps, memory_order(frame.values))
    return frame.moved(resample_array(frame.values, maps, order), affine, undo, owned=True)


class Resample(StageStep):
    """To ``spacing_mm`` along the axes as they lie at this step; null keeps an axis.

    Matches SimpleITK's Resample on the same grid within 1e-3 of the value range (linear,
    nearest) and 5e-3 (bspline). ``max_voxels`` bounds memory: a larger grid is refused.
    """

    step: Literal["resample"]
    spacing_mm: tuple[Spacing | None, Spacing | None, Spacing | None]
    order: Order = "linear"
    align: Align = "centres"
    max_voxels: int = Field(default=MAX_VOXELS, ge=1, le=1 << 30)

    def apply(self, frame: Frame) -> Frame:
        maps = tuple(
            axis_to_spacing(size, mm, mm if target is None else target, self.align)
            for size, mm, target in zip(frame.shape, frame.spacing, self.spacing_mm, strict=True)
        )
        return _apply(frame, "resample", maps, self.order, self.max_voxels)


class Resize(StageStep):
    """To ``size`` voxels per axis over the same extent, edge to edge; null keeps an axis."""

    step: Literal["resize"]
    size: tuple[Size | None, Size | None, Size | None]
    order: Order = "linear"
    max_voxels: int = Field(default=MAX_VOXELS, ge=1, le=1 << 30)

    def apply(self, frame: Frame) -> Frame:
        maps = tuple(axis_to_size(n, n if m is None else m) for n, m in zip(frame.shape, self.size, strict=True))
        return _apply(frame, "resize", maps, self.order, self.max_voxels)
