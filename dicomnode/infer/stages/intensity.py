"""Values: clip, window, scale, normalise. Float32 in place; no step makes a float64 copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from dicomnode.infer.stages.extent import find_body
from dicomnode.infer.stages.frame import Array, Frame, StageStep


def _changed(frame: Frame, values: Array) -> Frame:
    return replace(frame, values=values, owned=True)


def _scaled(values: Array, factor: float, offset: float) -> Array:
    """``values * factor + offset`` in place."""
    np.multiply(values, np.float32(factor), out=values)
    np.add(values, np.float32(offset), out=values)
    return values


class ClipValues(StageStep):
    """Limit the values to ``low``..``high`` (both kept); removes padding and metal."""

    step: Literal["clip"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> ClipValues:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self

    def apply(self, frame: Frame) -> Frame:
        whole = self.low.is_integer() and self.high.is_integer()
        if frame.values.dtype == np.int16 and whole:
            low, high = (int(min(max(v, -32768), 32767)) for v in (self.low, self.high))
            return _changed(frame, np.clip(frame.values, np.int16(low), np.int16(high)))
        frame = frame.floats()
        np.clip(frame.values, np.float32(self.low), np.float32(self.high), out=frame.values)
        return frame


class Window(StageStep):
    """A display window to ``out_low``..``out_high``: PS3.3 C.11.2.1.3.2, LINEAR_EXACT."""

    step: Literal["window"]
    center: float
    width: float = Field(gt=0)
    out_low: float = 0.0
    out_high: float = 1.0

    def apply(self, frame: Frame) -> Frame:
        half = self.width / 2
        return ScaleRange(
            step="scale_range",
            low=self.center - half,
            high=self.center + half,
            out_low=self.out_low,
            out_high=self.out_high,
            clip=True,
        ).apply(frame)


class ScaleRange(StageStep):
    """``low``..``high`` to ``out_low``..``out_high`` linearly (MONAI's ScaleIntensityRange)."""

    step: Literal["scale_range"]
    low: float
    high: float
    out_low: float = 0.0
    out_high: float = 1.0
    clip: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> ScaleRange:
        if self.low >= self.high or self.out_low >= self.out_high:
            raise ValueError("low must be below high, and out_low below out_high")
        return self

    def apply(self, frame: Frame) -> Frame:
        frame = frame.floats()
        factor = (self.out_high - self.out_low) / (self.high - self.low)
        _scaled(frame.values, factor, self.out_low - self.low * factor)
        if self.clip:
            np.clip(frame.values, np.float32(self.out_low), np.float32(self.out_high), out=frame.values)
        return frame


class MeanStd(StageStep):
    """``(value - mean) / std`` with numbers of the training data (nnU-Net's CT scheme after a clip)."""

    step: Literal["mean_std"]
    mean: float
    std: float = Field(gt=0)

    def apply(self, frame: Frame) -> Frame:
        frame = frame.floats()
        _scaled(frame.values, 1.0 / self.std, -self.mean / self.std)
        return frame


class ZScore(StageStep):
    """``(value - mean) / std`` with mean and population standard deviation of this volume.

    ``over``: ``whole`` all voxels; ``body`` the largest body above ``above`` with its
    cavities; ``nonzero`` voxels that are not 0, the others stay 0 (MONAI's nonzero=True).
    A region without contrast is divided by 1.
    """

    step: Literal["zscore"]
    over: Literal["whole", "body", "nonzero"] = "whole"
    above: float = -500.0

    def apply(self, frame: Frame) -> Frame:
        mask = None
        if self.over == "body":
            mask = find_body(frame, self.above)
        elif self.over == "nonzero":
            mask = frame.values != 0
        mean, std = mean_and_std(frame.values, mask)
        frame = frame.floats()
        factor = 1.0 / std if std > 0 else 1.0
        _scaled(frame.values, factor, -mean * factor)
        if self.over == "nonzero" and mask is not None:
            frame.values[~mask] = 0
        return frame


class MinMax(StageStep):
    """Smallest and largest value of this volume to ``out_low`` and ``out_high``; a constant becomes ``out_low``."""

    step: Literal["min_max"]
    out_low: float = 0.0
    out_high: float = 1.0

    def apply(self, frame: Frame) -> Frame:
        low, high = float(frame.values.min()), float(frame.values.max())
        return _between(frame, (low, high), (self.out_low, self.out_high), clip=False)


class Percentiles(StageStep):
    """The percentiles ``lower`` and ``upper`` of this volume to ``out_low`` and ``out_high``.

    Percentiles as numpy's default (linear interpolation; Hyndman and Fan 1996, type 7).
    """

    step: Literal["percentiles"]
    lower: float = Field(ge=0, le=100)
    upper: float = Field(ge=0, le=100)
    out_low: float = 0.0
    out_high: float = 1.0
    clip: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Percentiles:
        if self.lower >= self.upper:
            raise ValueError("lower must be below upper")
        return self

    def apply(self, frame: Frame) -> Frame:
        found = percentiles(frame.values, (self.lower, self.upper))
        return _between(frame, (found[0], found[1]), (self.out_low, self.out_high), clip=self.clip)


def _between(frame: Frame, old: tuple[float, float], new: tuple[float, float], *, clip: bool) -> Frame:
    frame = frame.floats()
    span = old[1] - old[0]
    factor = (new[1] - new[0]) / span if span > 0 else 0.0
    _scaled(frame.values, factor, new[0] - old[0] * factor)
    if clip:
        np.clip(frame.values, np.float32(new[0]), np.float32(new[1]), out=frame.values)
    return frame


def mean_and_std(values: Array, mask: Array | None = None) -> tuple[float, float]:
    """Mean and population standard deviation in float64; (0, 0) of nothing.

    16-bit integers through a histogram. Others in two passes, so large offsets cost no
    digits, with memory for one plane.
    """
    if values.dtype == np.int16:
        counts = _histogram(values, mask)
        if not (size := int(counts.sum())):
            return 0.0, 0.0
        levels = np.arange(-32768.0, 32768.0)
        centre = float(counts @ levels) / size
        return centre, float(np.sqrt(counts @ (levels - centre) ** 2 / size))
    planes = _planes(values)
    masks = None if mask is None else _planes_like(mask, values)
    count, total = 0, 0.0
    for index, plane in enumerate(planes):
        part = plane if masks is None else plane[masks[index]]
        count += part.size
        total += float(part.sum(dtype=np.float64))
    if count == 0:
        return 0.0, 0.0
    mean, squares = total / count, 0.0
    for index, plane in enumerate(planes):
        part = (plane if masks is None else plane[masks[index]]).astype(np.float64).ravel()
        part -= mean
        squares += float(part @ part)
    return mean, float(np.sqrt(squares / count))


def _planes(values: Array) -> Array:
    """``values`` with the axis of the largest stride first: its planes are compact in memory."""
    return np.moveaxis(values, int(np.argmax(np.abs(values.strides))), 0)


def _planes_like(mask: Array, values: Array) -> Array:
    return np.moveaxis(mask, int(np.argmax(np.abs(values.strides))), 0)


def percentiles(values: Array, wanted: tuple[float, ...]) -> tuple[float, ...]:
    """As ``numpy.percentile``; integers of 16 bits through a histogram, without a sorted copy."""
    if values.dtype != np.int16:
        return tuple(float(v) for v in np.percentile(values, wanted))
    counts = _histogram(values, None)
    cumulated = np.cumsum(counts)
    result = []
    for share in wanted:
        at = share / 100.0 * (values.size - 1)
        low, high = (int(np.searchsorted(cumulated, int(k), side="right")) - 32768 for k in (at, np.ceil(at)))
        result.append(low + (high - low) * (at - int(at)))
    return tuple(result)


def _histogram(values: Array, mask: Array | None) -> Array:
    """How often each value from -32768 up to 32767 occurs, int64 (65536,)."""
    counts = np.zeros(65536, np.int64)
    masks = None if mask is None else _planes_like(mask, values)
    for index, plane in enumerate(_planes(values)):
        part = plane.ravel() if masks is None else plane[masks[index]]
        counts += np.bincount(part.view(np.uint16), minlength=65536)
    return np.concatenate([counts[32768:], counts[:32768]])
