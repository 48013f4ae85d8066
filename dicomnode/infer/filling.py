"""Slabs of a volume through a network, each answer written where it belongs.

An engine that can (``fill``) prepares, computes and writes several slabs at once: nothing is copied,
and no memory is asked for that is thrown away after one slab. Any other engine has its batches
streamed and its answers copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.errors import EngineError
from dicomnode.infer.engine import Session
from dicomnode.infer.prefetch import prefetched
from dicomnode.infer.slabs import Slabs
from dicomnode.infer.streaming import stream

Array = npt.NDArray[Any]
FINITE_STEP = 1 << 20
"""Values that are looked at together: 4 MiB of float32."""


class Answers:
    """The outputs ``names`` of a network, each of the volume's ``shape`` (slices, rows, columns).

    The first answer settles the dtype of its output. May be used by several threads.
    """

    def __init__(self, names: Sequence[str], shape: tuple[int, ...]) -> None:
        self.names = tuple(names)
        self.whole: dict[str, Array] = {}
        self._shape = shape
        self._lock = threading.Lock()

    def place(self, name: str, first: int, count: int, dtype: np.dtype[Any]) -> Array:
        """C-contiguous memory (``count``, 1, rows, columns) for the answer that begins with slice ``first``."""
        with self._lock:
            if name not in self.whole:
                self.whole[name] = np.empty(self._shape, dtype)
        return self.whole[name][first : first + count][:, np.newaxis]


@dataclass(frozen=True, slots=True)
class Call:
    """One slab: slices ``first`` to ``first`` + ``count`` of ``values`` by way of ``slabs``."""

    input: str
    values: Array
    first: int
    count: int
    slabs: Slabs
    answers: Answers

    def make(self) -> dict[str, Array]:
        """What the network gets; its memory is used again after :meth:`read`."""
        return {self.input: self.slabs.make(self.values[self.first : self.first + self.count])}

    def read(self, inputs: Mapping[str, Array]) -> None:
        """The engine has read ``inputs``."""
        self.slabs.done(inputs[self.input])

    def place(self, name: str, dtype: np.dtype[Any]) -> Array:
        """Where the answer of output ``name`` belongs."""
        return self.answers.place(name, self.first, self.count, dtype)

    def check(self, name: str, part: Array) -> None:
        """Raises EngineError unless ``part`` has one finite value per voxel."""
        if part.shape != (self.count, 1, *self.values.shape[1:]):
            raise EngineError("run model", "BUILD_FAILED", f"output {name} has shape {part.shape}")
        if not finite(part):
            raise EngineError("run model", "GOLDEN_MISMATCH", f"output {name} is not finite")

    def take(self, result: Mapping[str, Array]) -> None:
        """Copy what the engine gave. Raises EngineError for an output that is missing or as :meth:`check`."""
        for name in self.answers.names:
            if name not in result:
                raise EngineError("run model", "BUILD_FAILED", f"the model gave no output {name}")
            self.check(name, result[name])
            self.place(name, result[name].dtype)[:] = result[name]


def calls(input_name: str, values: Array, slices: int, slabs: Slabs, answers: Answers) -> list[Call]:
    """The slabs of ``slices`` slices that ``values`` consists of, in order."""
    count = len(values)
    return [
        Call(input_name, values, first, min(slices, count - first), slabs, answers) for first in range(0, count, slices)
    ]


def fill(session: Session, todo: Sequence[Call]) -> Iterator[None]:
    """Do ``todo``; yields as often as there are calls, each time when the next one's answer is in its place.

    Raises EngineError.
    """
    own = getattr(session, "fill", None)
    if own is not None:
        yield from own(todo)
        return
    yield from streamed(session, todo)


def streamed(session: Session, todo: Iterable[Call]) -> Iterator[None]:
    """As :func:`fill`, by any session: each slab is prepared while the one before is computed."""
    every = list(todo)
    inside: list[dict[str, Array]] = []

    def batches() -> Iterator[Mapping[str, Array]]:
        for call in every:
            inside.append(call.make())
            yield inside[-1]

    for call, result in zip(every, stream(session, prefetched(batches())), strict=True):
        call.take(result)
        call.read(inside.pop(0))  # after its answer is taken, which may lie in the same memory
        yield


def finite(values: Array) -> bool:
    """Whether no value is infinite or not a number; a sum shows it at a third of the price of looking at each."""
    if values.dtype.kind != "f":
        return True
    flat = values.reshape(-1)
    for at in range(0, len(flat), FINITE_STEP):
        some = flat[at : at + FINITE_STEP]
        with np.errstate(over="ignore", invalid="ignore"):
            total = some.sum()
        # A sum of finite values may be too large for its dtype; then each is looked at.
        if not np.isfinite(total) and not np.isfinite(some).all():
            return False
    return True
