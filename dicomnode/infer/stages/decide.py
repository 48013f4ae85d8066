"""From the network's channels to labels on the source grid: activation, then one decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy import special

from dicomnode.errors import EngineError
from dicomnode.infer.stages.frame import Array, StageStep, Undo, restore
from dicomnode.infer.steps import FromOutput, State, start
from dicomnode.infer.volume import Volume

Number = Annotated[int, Field(ge=0, le=255)]


class Softmax(StageStep):
    """exp(x) / sum(exp(x)) over the channels of ``output``, stable against large values."""

    step: Literal["softmax"]
    output: str

    def apply(self, channels: Array) -> Array:
        out = np.empty(channels.shape, np.float32)
        for plane in range(channels.shape[1]):  # plane by plane: the temporaries stay small
            part = out[:, plane]
            np.subtract(channels[:, plane], channels[:, plane].max(axis=0), out=part, casting="unsafe")
            np.exp(part, out=part)
            part /= part.sum(axis=0)
        return out


class Sigmoid(StageStep):
    """1 / (1 + exp(-x)) of each channel of ``output``."""

    step: Literal["sigmoid"]
    output: str

    def apply(self, channels: Array) -> Array:
        return np.asarray(special.expit(channels.astype(np.float32, copy=False)))


class _Decision(StageStep):
    """``on``: ``source`` brings each channel back linearly and decides there (smooth borders);
    ``network`` decides on the network's grid and brings the labels back (nearest; faster).
    ``labels``: segment number of each channel, 0 for background; by default its index.
    """

    output: str
    on: Literal["source", "network"] = "source"
    labels: tuple[Number, ...] | None = None

    def _numbers(self, channels: int) -> tuple[int, ...]:
        numbers = tuple(range(channels)) if self.labels is None else self.labels
        if len(numbers) != channels or channels > 256:
            raise EngineError(
                "post-process", "GOLDEN_MISMATCH", f"output {self.output} has {channels} channels, not {len(numbers)}"
            )
        return numbers


class Argmax(_Decision):
    """Each voxel belongs to its strongest channel; at a tie to the first."""

    step: Literal["argmax"]

    def apply(self, volume: Volume, channels: Array, undo: tuple[Undo, ...]) -> State:
        numbers = self._numbers(len(channels))
        labels, _ = _strongest(channels, undo, numbers, None, self.on)
        return _state(volume, labels)


class Threshold(_Decision):
    """A voxel belongs to the strongest channel that reaches ``threshold``, else to none.

    For independent channels (sigmoid). Channel i makes label i + 1 unless ``labels`` says
    otherwise. The threshold is above 0, which is what the outside of a crop has. A voxel has one
    label: where several channels reach the threshold, a note says so.
    """

    step: Literal["threshold"]
    threshold: float = Field(default=0.5, gt=0)

    def apply(self, volume: Volume, channels: Array, undo: tuple[Undo, ...]) -> State:
        numbers = self._numbers(len(channels)) if self.labels is not None else tuple(range(1, len(channels) + 1))
        labels, several = _strongest(channels, undo, numbers, self.threshold, self.on)
        state = _state(volume, labels)
        if not several:
            return state
        share = several / max(1, int(np.count_nonzero(labels)))
        return state.note(
            f"Structures overlap in {share:.1%} of what was marked; each voxel was given to the most probable one"
        )


class MaskFrom(FromOutput):
    """The mask that the mask steps (``inside_body`` ...) go on from: one channel, at least ``threshold``."""

    def begin(self, volume: Volume, channels: Array, undo: tuple[Undo, ...]) -> State:
        if len(channels) != 1:
            raise EngineError(
                "post-process", "GOLDEN_MISMATCH", f"output {self.output} has {len(channels)} channels, not 1"
            )
        whole = restore(undo, channels[0], "linear" if channels.dtype.kind == "f" else "nearest")
        state = start(volume, {self.output: whole})
        return FromOutput.apply(self, state)


def _strongest(
    channels: Array, undo: tuple[Undo, ...], numbers: tuple[int, ...], threshold: float | None, on: str
) -> tuple[npt.NDArray[np.uint8], int]:
    """Labels, and at how many voxels of the decision's grid more than one channel reaches ``threshold``.

    Running maximum over the channels, one restored channel at a time: memory does not grow with them.
    """
    back = undo if on == "source" else ()
    shared = np.zeros(0, bool)
    best: Array | None = None
    labels = np.zeros(0, np.uint8)
    for channel, number in zip(channels, numbers, strict=True):
        value = restore(back, channel, "linear") if back else channel
        if best is None:
            best = np.array(value, np.float32)
            labels = np.full(best.shape, number, np.uint8)
            if threshold is not None:
                labels[best < threshold] = 0
                shared = np.zeros(best.shape, bool)
            continue
        for plane in range(len(best)):  # in the cache
            part = value[plane]
            stronger = part > best[plane]
            if threshold is not None:
                reached = part >= threshold
                if number:
                    shared[plane] |= reached & (labels[plane] != 0)
                stronger &= reached
            labels[plane][stronger] = number
            np.copyto(best[plane], part, where=stronger, casting="same_kind")
    if on == "network":
        labels = np.ascontiguousarray(restore(undo, labels, "nearest"))
    return np.ascontiguousarray(labels), int(np.count_nonzero(shared))


def _state(volume: Volume, labels: npt.NDArray[np.uint8]) -> State:
    if labels.shape != volume.values.shape:
        raise EngineError("post-process", "GOLDEN_MISMATCH", f"labels of {labels.shape} for {volume.values.shape}")
    n, r, c = labels.shape
    return State(volume, {}, (slice(0, n), slice(0, r), slice(0, c)), labels != 0, labels=labels)


Activation = Annotated[Softmax | Sigmoid, Field(discriminator="step")]
Decision = Annotated[Argmax | Threshold | MaskFrom, Field(discriminator="step")]


class KeepLargest(StageStep):
    """Keep the ``keep`` largest connected pieces of each segment that have at least ``min_ml``.

    ``keep`` null keeps all that are large enough. ``connectivity``: voxels touch at faces
    (6), also edges (18), also corners (26). ``segments`` null means all.
    """

    step: Literal["largest_components"]
    keep: int | None = Field(default=1, ge=1)
    min_ml: float = Field(default=0.0, ge=0)
    connectivity: Literal[6, 18, 26] = 6
    segments: tuple[Number, ...] | None = None

    @model_validator(mode="after")
    def _does_something(self) -> KeepLargest:
        if self.keep is None and self.min_ml == 0:
            raise ValueError("give keep or min_ml: without both nothing is removed")
        return self

    def apply(self, state: State) -> State:
        from dicomnode.infer.stages.components import keep_largest

        least = int(np.ceil(round(self.min_ml / state.volume.voxel_ml, 6)))
        labels = keep_largest(_labels(state, self.step), self.keep, least, self.connectivity, self.segments)
        return replace(state, labels=labels)


class FillHoles(StageStep):
    """Background that a segment encloses becomes the segment, up to ``max_ml`` each.

    ``mode`` ``volume``: enclosed in 3-D; ``in_plane``: within each slice.
    """

    step: Literal["fill_holes"]
    mode: Literal["volume", "in_plane"] = "volume"
    max_ml: float | None = Field(default=None, gt=0)
    segments: tuple[Number, ...] | None = None

    def apply(self, state: State) -> State:
        from dicomnode.infer.stages.components import fill_holes

        most = None if self.max_ml is None else self.max_ml / state.volume.voxel_ml
        return replace(
            state, labels=fill_holes(_labels(state, self.step), self.mode == "in_plane", most, self.segments)
        )


def _labels(state: State, step: str) -> npt.NDArray[np.uint8]:
    if state.labels is None:
        raise EngineError("post-process", "BUILD_FAILED", f"{step} needs labels; put a step that makes them before it")
    return state.labels
