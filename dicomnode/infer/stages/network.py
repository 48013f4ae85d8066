"""How the volume reaches the network and its answers come back onto the grid; bounded in memory.

A network's dense output has one vector of channels per voxel, a score output one per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
Arrays = Mapping[str, Array]
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
    given = calls(spec, [values, *more])
    return gather(spec, values.shape, (session.run(inputs) for inputs in given), report)


def calls(spec: Network, series: Sequence[Array]) -> Iterator[Arrays]:
    """The network's inputs by name for each of its calls, in order and made when asked for.

    ``series``: the first one and further ones, each 3-D on the same grid. A batch is called once for
    each combination of ``flips``. Raises UnsuitableSeries for a volume that would need too many.
    """
    axes = _axes(spec.reach)
    names = spec.inputs or (spec.input,)
    for batch in _batches_of(spec.reach, series):
        for chosen in _flips(spec):
            at = tuple(axes[axis] for axis in chosen)
            turned = np.flip(batch, at) if at else batch
            parts = np.split(turned, len(names), axis=1) if len(names) > 1 else [turned]
            yield {name: np.ascontiguousarray(p, spec.dtype) for name, p in zip(names, parts, strict=True)}


def gather(spec: Network, shape: tuple[int, ...], results: Iterable[Arrays], report: Report) -> Answers:
    """What the network's answers to :func:`calls` say of a grid of ``shape``; ``results`` in the order of the calls.

    Raises EngineError for an output of another shape or not finite, UnsuitableSeries for an answer that is too large.
    """
    answered = _Answered(spec, iter(results))
    if isinstance(spec.reach, Patches):
        return _patches(spec.reach, answered, shape, report)
    if isinstance(spec.reach, Whole):
        return _whole(spec.reach, answered, shape, report)
    return _slices(spec.reach, answered, shape, report)


def _flips(spec: Network) -> list[tuple[int, ...]]:
    """The axes of the grid that are mirrored, for each call of one batch."""
    return [f for n in range(len(spec.flips) + 1) for f in combinations(spec.flips, n)]


def _axes(reach: Reach) -> tuple[int, ...]:
    """Where each axis of the grid is in a batch (calls, channels, spatial)."""
    if isinstance(reach, Slices | Neighbours):
        return {0: (0, 2, 3), 1: (2, 0, 3), 2: (2, 3, 0)}[reach.axis]
    return (2, 3, 4)


def _batches_of(reach: Reach, series: Sequence[Array]) -> Iterator[Array]:
    """(calls, channels, spatial), the channels of all series behind one another."""
    if isinstance(reach, Patches):
        yield from _patch_batches(reach, series)
    elif isinstance(reach, Whole):
        far = [(0, -n % reach.multiple) for n in series[0].shape]
        if any(after for _, after in far):
            series = [np.pad(v.astype(np.float32, copy=False), far, constant_values=reach.pad_value) for v in series]
        yield _joined([v[np.newaxis, np.newaxis] for v in series])
    else:
        yield from _slice_batches(reach, series)


class _Answered:
    """The answers to one batch after another, those to its flips mirrored back and averaged."""

    def __init__(self, spec: Network, results: Iterator[Arrays]) -> None:
        self.spec = spec
        self._results = results

    def next(self, rows: int, spatial: tuple[int, ...]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Dense outputs (rows, channels, ``spatial``) and scores (rows, classes), by name."""
        flips, axes = _flips(self.spec), _axes(self.spec.reach)
        dense: dict[str, Array] = {}
        scores: dict[str, Array] = {}
        for chosen in flips:
            at = tuple(axes[axis] for axis in chosen)
            result = next(self._results)
            for name in self.spec.outputs:
                part = self._checked(result, name)
                if part.ndim != 2 + len(spatial) or part.shape[0] != rows or part.shape[2:] != spatial:
                    raise EngineError("run model", "BUILD_FAILED", f"output {name} has shape {part.shape}")
                _add(dense, name, np.flip(part, at) if at else part, len(flips))
            for name in self.spec.scores:
                part = self._checked(result, name)
                if part.shape[0] != rows:
                    raise EngineError("run model", "BUILD_FAILED", f"output {name} has shape {part.shape}")
                _add(scores, name, part.reshape(rows, -1), len(flips))
        return dense, scores

    @staticmethod
    def _checked(result: Arrays, name: str) -> Array:
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


def _slice_batches(reach: Slices | Neighbours, series: Sequence[Array]) -> Iterator[Array]:
    stacks = [np.moveaxis(values, reach.axis, 0) for values in series]
    count = len(stacks[0])
    for first in range(0, count, reach.batch):
        rows = np.arange(first, min(first + reach.batch, count))
        if isinstance(reach, Neighbours):
            half = reach.channels // 2
            around = np.clip(rows[:, None] + np.arange(-half, half + 1), 0, count - 1)
            yield _joined([s[around] for s in stacks])
        else:
            yield _joined([s[rows[0] : rows[-1] + 1][:, np.newaxis] for s in stacks])


def _slices(reach: Slices | Neighbours, answered: _Answered, shape: tuple[int, ...], report: Report) -> Answers:
    count, plane, voxels = shape[reach.axis], tuple(np.delete(shape, reach.axis).tolist()), int(np.prod(shape))
    answers = Answers()
    scores: dict[str, list[Array]] = {}
    for first in range(0, count, reach.batch):
        report("inference", first / count)
        end = min(first + reach.batch, count)
        dense, some = answered.next(end - first, plane)
        for name, part in dense.items():
            if name not in answers.dense:
                _check_answer(name, part.shape[1], voxels, part.dtype)
                answers.dense[name] = np.empty((part.shape[1], count, *plane), part.dtype)
            answers.dense[name][:, first:end] = part.swapaxes(0, 1)
        for name, part in some.items():
            scores.setdefault(name, []).append(part.astype(np.float64))
    answers.dense = {name: np.moveaxis(part, 1, reach.axis + 1) for name, part in answers.dense.items()}
    for name, parts in scores.items():
        every = np.concatenate(parts)
        answers.scores[name] = every.max(axis=0) if answered.spec.aggregate == "max" else every.mean(axis=0)
    report("inference", 1.0)
    return answers


def _joined(parts: Sequence[Array]) -> Array:
    """Channels of all series behind one another; the array itself where there is one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _whole(reach: Whole, answered: _Answered, shape: tuple[int, ...], report: Report) -> Answers:
    report("inference", 0.0)
    a, b, c = shape
    dense, scores = answered.next(1, tuple(n + -n % reach.multiple for n in shape))
    report("inference", 1.0)
    return Answers(
        {name: part[0, :, :a, :b, :c] for name, part in dense.items()},
        {name: part[0].astype(np.float64) for name, part in scores.items()},
    )


def _inside(reach: Patches, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[slice, ...]]:
    """The grid that the windows cover, and where the volume lies in it."""
    a, b, c = (max(n, w) for n, w in zip(shape, reach.size, strict=True))
    before = [(t - n) // 2 for t, n in zip((a, b, c), shape, strict=True)]
    return (a, b, c), tuple(slice(o, o + n) for o, n in zip(before, shape, strict=True))


def _windows(reach: Patches, wide: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """First voxel of each window."""
    windows = list(
        product(*(starts(n, w, reach.overlap, reach.placing) for n, w in zip(wide, reach.size, strict=True)))
    )
    if len(windows) > reach.max_patches:
        raise UnsuitableSeries(
            "run model",
            "TOO_LARGE",
            f"the volume needs {len(windows)} windows; the bundle allows {reach.max_patches}",
            "Send a shorter part of the body or a thicker reconstruction",
        )
    return windows


def _boxes(reach: Patches, chosen: Sequence[tuple[int, ...]]) -> list[tuple[slice, ...]]:
    return [tuple(slice(s, s + w) for s, w in zip(at, reach.size, strict=True)) for at in chosen]


def _patch_batches(reach: Patches, series: Sequence[Array]) -> Iterator[Array]:
    wide, inside = _inside(reach, series[0].shape)
    windows = _windows(reach, wide)
    if wide != series[0].shape:
        series = [_widened(v, wide, inside, reach.pad_value) for v in series]
    for _, chosen in _batches(windows, reach.batch):
        boxes = _boxes(reach, chosen)
        yield _joined([np.stack([v[box] for box in boxes])[:, np.newaxis] for v in series])


def _patches(reach: Patches, answered: _Answered, shape: tuple[int, ...], report: Report) -> Answers:
    (a, b, c), inside = _inside(reach, shape)
    windows = _windows(reach, (a, b, c))
    weights = weight_map(reach.size, reach.blend, reach.sigma_scale)
    total = np.zeros((a, b, c), np.float32)
    sums: dict[str, Array] = {}
    for done, chosen in _batches(windows, reach.batch):
        report("inference", done / len(windows))
        dense, _ = answered.next(len(chosen), reach.size)
        for index, box in enumerate(_boxes(reach, chosen)):
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
