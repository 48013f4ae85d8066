"""How the volume reaches the network and its answers come back onto the grid; bounded in memory.

A network's dense output has one vector of channels per voxel, a score output one per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from dicomnode.errors import EngineError, UnsuitableSeries
from dicomnode.infer.contract import Strict
from dicomnode.infer.engine import Session
from dicomnode.infer.stages.blending import Placing, starts, weight_map
from dicomnode.infer.stages.frame import Array

Report = Callable[[str, float], None]
MAX_ANSWER_BYTES = 8 << 30
"""Largest dense answer of one output (channels x voxels x bytes) that is put together."""


class Slices(Strict):
    """2-D slices along ``axis``, ``batch`` of them at a time: (slices, 1, a, b)."""

    kind: Literal["slices"]
    axis: int = Field(default=0, ge=0, le=2)
    batch: int = Field(default=16, ge=1, le=512)


class Neighbours(Strict):
    """2.5-D: each slice with its neighbours as channels: (slices, ``channels``, a, b).

    ``channels`` is odd, the slice itself in the middle; at the ends the last slice repeats.
    """

    kind: Literal["neighbours"]
    channels: int = Field(ge=1, le=31)
    axis: int = Field(default=0, ge=0, le=2)
    batch: int = Field(default=8, ge=1, le=512)

    @model_validator(mode="after")
    def _odd(self) -> Neighbours:
        if self.channels % 2 == 0:
            raise ValueError("channels must be odd: the slice and as many neighbours on either side")
        return self


class Patches(Strict):
    """3-D windows of ``size`` voxels, ``batch`` at a time: (windows, 1, a, b, c).

    A volume smaller than a window is padded with ``pad_value``, half of it before. ``blend``
    and ``placing``: see ``blending``. ``max_patches`` bounds the time.
    """

    kind: Literal["patches"]
    size: tuple[int, int, int]
    overlap: float = Field(default=0.5, ge=0, lt=1)
    blend: Literal["gaussian", "constant"] = "gaussian"
    sigma_scale: float = Field(default=0.125, gt=0, le=1)
    placing: Placing = "monai"
    batch: int = Field(default=1, ge=1, le=64)
    pad_value: float = 0.0
    max_patches: int = Field(default=4096, ge=1, le=1 << 20)

    @model_validator(mode="after")
    def _positive(self) -> Patches:
        if min(self.size) < 1 or max(self.size) > 2048:
            raise ValueError("size counts voxels: 1 to 2048 per axis")
        return self


class Whole(Strict):
    """The whole volume at once: (1, 1, a, b, c), padded at the far end to a multiple of ``multiple``."""

    kind: Literal["whole"]
    multiple: int = Field(default=1, ge=1, le=512)
    pad_value: float = 0.0


Reach = Annotated[Slices | Neighbours | Patches | Whole, Field(discriminator="kind")]
Axis = Annotated[int, Field(ge=0, le=2)]


class Network(Strict):
    """The network of a bundle and how it is called.

    ``outputs``: dense outputs (windows, channels, spatial); ``scores``: outputs (calls,
    classes). Scores of several slices are put together by ``aggregate``. ``flips``: axes of
    the grid along which the input is mirrored at test time, in every combination; answers
    are mirrored back and averaged as the network gives them, before any activation.
    Further series (``more_inputs`` of the manifest) are channels behind the first one's, or with
    ``inputs`` the network has an input for each series, in that order, the first one first.
    """

    model: str
    input: str = Field(min_length=1)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    dtype: Literal["float32", "float16"] = "float32"
    reach: Reach
    flips: tuple[Axis, ...] = ()
    aggregate: Literal["mean", "max"] = "mean"

    @model_validator(mode="after")
    def _consistent(self) -> Network:
        names = [*self.outputs, *self.scores]
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one output, each once")
        if self.scores and self.reach.kind == "patches":
            raise ValueError("scores of overlapping patches mean nothing; use whole, slices or neighbours")
        if self.inputs and (self.inputs[0] != self.input or len(set(self.inputs)) != len(self.inputs)):
            raise ValueError("inputs: begins with input, each name once; leave it out where series are channels")
        if len(set(self.flips)) != len(self.flips):
            raise ValueError("each axis of flips once")
        if self.reach.kind in ("slices", "neighbours") and self.reach.axis in self.flips:
            raise ValueError("a 2-D network does not see the axis of the slices; flip the others")
        return self


@dataclass(slots=True)
class Answers:
    """What the network said. ``dense``: (channels, grid) by output; ``scores``: float64 (classes,)."""

    dense: dict[str, Array] = field(default_factory=dict)
    scores: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def run_network(spec: Network, session: Session, values: Array, report: Report, more: Sequence[Array] = ()) -> Answers:
    """The answers for a 3-D ``values`` and further series ``more`` on its grid.

    Raises EngineError for an output of another shape or not finite.
    """
    series = [values, *more]
    caller = _Caller(spec, session)
    if isinstance(spec.reach, Patches):
        return _patches(spec.reach, caller, series, report)
    if isinstance(spec.reach, Whole):
        return _whole(spec.reach, caller, series, report)
    return _slices(spec.reach, caller, series, report)


class _Caller:
    """One call of the network with its test-time flips."""

    def __init__(self, spec: Network, session: Session) -> None:
        self.spec = spec
        self._session = session

    def __call__(self, batch: Array, axes: tuple[int, ...]) -> tuple[dict[str, Array], dict[str, Array]]:
        """``batch``: (calls, channels, spatial). ``axes``: position in ``batch`` of each grid axis."""
        flips = [f for n in range(len(self.spec.flips) + 1) for f in combinations(self.spec.flips, n)]
        dense: dict[str, Array] = {}
        scores: dict[str, Array] = {}
        for chosen in flips:
            at = tuple(axes[axis] for axis in chosen)
            result = self._run(np.flip(batch, at) if at else batch)
            for name in self.spec.outputs:
                part = self._checked(result, name)
                if part.ndim != batch.ndim or part.shape[0] != len(batch) or part.shape[2:] != batch.shape[2:]:
                    raise EngineError("run model", "BUILD_FAILED", f"output {name} has shape {part.shape}")
                _add(dense, name, np.flip(part, at) if at else part, len(flips))
            for name in self.spec.scores:
                part = self._checked(result, name)
                if part.shape[0] != len(batch):
                    raise EngineError("run model", "BUILD_FAILED", f"output {name} has shape {part.shape}")
                _add(scores, name, part.reshape(len(batch), -1), len(flips))
        return dense, scores

    def _run(self, batch: Array) -> Mapping[str, Array]:
        names = self.spec.inputs or (self.spec.input,)
        parts = np.split(batch, len(names), axis=1) if len(names) > 1 else [batch]
        return self._session.run(
            {name: np.ascontiguousarray(p, self.spec.dtype) for name, p in zip(names, parts, strict=True)}
        )

    @staticmethod
    def _checked(result: Mapping[str, Array], name: str) -> Array:
        if name not in result:
            raise EngineError("run model", "BUILD_FAILED", f"the model gave no output {name}")
        part = result[name]
        if part.ndim == 0:
            raise EngineError("run model", "BUILD_FAILED", f"output {name} is a single number")
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise EngineError("run model", "GOLDEN_MISMATCH", f"output {name} is not finite")
        return part


def _add(into: dict[str, Array], name: str, part: Array, count: int) -> None:
    if count == 1:
        into[name] = part
        return
    share = part.astype(np.float32) / np.float32(count)
    into[name] = into[name] + share if name in into else share


def _slices(reach: Slices | Neighbours, caller: _Caller, series: Sequence[Array], report: Report) -> Answers:
    stacks = [np.moveaxis(values, reach.axis, 0) for values in series]
    stack, voxels = stacks[0], series[0].size
    axes = {0: (0, 2, 3), 1: (2, 0, 3), 2: (2, 3, 0)}[reach.axis]
    answers = Answers()
    scores: dict[str, list[Array]] = {}
    for first in range(0, len(stack), reach.batch):
        report("inference", first / len(stack))
        rows = np.arange(first, min(first + reach.batch, len(stack)))
        if isinstance(reach, Neighbours):
            half = reach.channels // 2
            around = np.clip(rows[:, None] + np.arange(-half, half + 1), 0, len(stack) - 1)
            batch = _joined([s[around] for s in stacks])
        else:
            batch = _joined([s[rows[0] : rows[-1] + 1][:, np.newaxis] for s in stacks])
        dense, some = caller(batch, axes)
        for name, part in dense.items():
            if name not in answers.dense:
                _check_answer(name, part.shape[1], voxels, part.dtype)
                answers.dense[name] = np.empty((part.shape[1], *stack.shape), part.dtype)
            answers.dense[name][:, rows[0] : rows[-1] + 1] = part.swapaxes(0, 1)
        for name, part in some.items():
            scores.setdefault(name, []).append(part.astype(np.float64))
    answers.dense = {name: np.moveaxis(part, 1, reach.axis + 1) for name, part in answers.dense.items()}
    for name, parts in scores.items():
        every = np.concatenate(parts)
        answers.scores[name] = every.max(axis=0) if caller.spec.aggregate == "max" else every.mean(axis=0)
    report("inference", 1.0)
    return answers


def _joined(parts: Sequence[Array]) -> Array:
    """Channels of all series behind one another; the array itself where there is one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _whole(reach: Whole, caller: _Caller, series: Sequence[Array], report: Report) -> Answers:
    report("inference", 0.0)
    far = [(0, -n % reach.multiple) for n in series[0].shape]
    a, b, c = series[0].shape
    if any(after for _, after in far):
        series = [np.pad(v.astype(np.float32, copy=False), far, constant_values=reach.pad_value) for v in series]
    dense, scores = caller(_joined([v[np.newaxis, np.newaxis] for v in series]), (2, 3, 4))
    report("inference", 1.0)
    return Answers(
        {name: part[0, :, :a, :b, :c] for name, part in dense.items()},
        {name: part[0].astype(np.float64) for name, part in scores.items()},
    )


def _patches(reach: Patches, caller: _Caller, series: Sequence[Array], report: Report) -> Answers:
    values = series[0]
    a, b, c = (max(n, w) for n, w in zip(values.shape, reach.size, strict=True))
    before = [(t - n) // 2 for t, n in zip((a, b, c), values.shape, strict=True)]
    inside = tuple(slice(o, o + n) for o, n in zip(before, values.shape, strict=True))
    if (a, b, c) != values.shape:
        series = [_widened(v, (a, b, c), inside, reach.pad_value) for v in series]
    places = [starts(n, w, reach.overlap, reach.placing) for n, w in zip((a, b, c), reach.size, strict=True)]
    windows = list(product(*places))
    if len(windows) > reach.max_patches:
        raise UnsuitableSeries(
            "run model",
            "TOO_LARGE",
            f"the volume needs {len(windows)} windows; the bundle allows {reach.max_patches}",
            "Send a shorter part of the body or a thicker reconstruction",
        )
    weights = weight_map(reach.size, reach.blend, reach.sigma_scale)
    total = np.zeros((a, b, c), np.float32)
    sums: dict[str, Array] = {}
    for done, chosen in _batches(windows, reach.batch):
        report("inference", done / len(windows))
        boxes = [tuple(slice(s, s + w) for s, w in zip(at, reach.size, strict=True)) for at in chosen]
        dense, _ = caller(_joined([np.stack([v[box] for box in boxes])[:, np.newaxis] for v in series]), (2, 3, 4))
        for index, box in enumerate(boxes):
            total[box] += weights
            for name, part in dense.items():
                if name not in sums:
                    _check_answer(name, part.shape[1], total.size, np.dtype(np.float32))
                    sums[name] = np.zeros((part.shape[1], a, b, c), np.float32)
                for channel in range(part.shape[1]):
                    sums[name][channel][box] += part[index, channel] * weights
    for name in sums:
        sums[name] /= total
    report("inference", 1.0)
    return Answers({name: summed[(slice(None), *inside)] for name, summed in sums.items()})


def _widened(values: Array, shape: tuple[int, int, int], inside: tuple[slice, ...], fill: float) -> Array:
    wide = np.full(shape, fill, np.float32)
    wide[inside] = values
    return wide


def _batches(windows: list[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    for first in range(0, len(windows), size):
        yield first, windows[first : first + size]


def _check_answer(name: str, channels: int, voxels: int, dtype: np.dtype[Any]) -> None:
    size = channels * voxels * dtype.itemsize
    if size > MAX_ANSWER_BYTES:
        raise UnsuitableSeries(
            "run model",
            "TOO_LARGE",
            f"{channels} channels of output {name} would take {size >> 20} MiB; the limit is {MAX_ANSWER_BYTES >> 20}",
            "Send a shorter part of the body or a thicker reconstruction",
        )
