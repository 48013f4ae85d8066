"""Batches of bounded size: the cap of ``[inference] max_batch``, halved while the device has too little memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np

from dicomnode import logs, metrics
from dicomnode.errors import EngineError
from dicomnode.infer.engine import Array, Session
from dicomnode.infer.faults import Remedy, remedy
from dicomnode.infer.filling import Call, streamed
from dicomnode.infer.streaming import stream

Arrays = Mapping[str, Array]
Fill = Callable[[Sequence[Call]], Iterator[None]]
RESTORE_SECONDS = 600.0


class CappedSession:
    """A session whose batches (axis 0 of every input) are at most ``max_batch`` long.

    Rows of a batch are independent of each other, as the manifest's ``engine`` says, so that
    splitting does not change a result. After OOM the batch is halved, and stays so for
    RESTORE_SECONDS: what was too little for one study is too little for the next of its shape, but
    another program may have had the memory.
    """

    def __init__(self, session: Session, max_batch: int) -> None:
        self._session = session
        self._most = self._limit = max(1, max_batch)
        self._shrunk_at = float("-inf")
        self._name = session.engine.split(" ")[0]

    @property
    def engine(self) -> str:
        return self._session.engine

    @property
    def precision(self) -> str:
        """``fp32`` or ``fp16``, of the session within."""
        return str(getattr(self._session, "precision", "fp32"))

    @property
    def batch(self) -> int:
        """The largest batch at present."""
        return self._limit

    def run(self, inputs: Arrays) -> Arrays:
        return next(self.stream([inputs]))

    def stream(self, batches: Iterable[Arrays]) -> Iterator[Arrays]:
        """See :func:`stream`; each yielded item is the whole batch, put together again."""
        self._restore()
        source = iter(batches)
        whole: list[Arrays] = []  # batches whose outputs have not been yielded, oldest first
        counts: list[int] = []  # parts of each

        def parts() -> Iterator[Arrays]:
            for batch in source:
                cut = split(batch, self._limit)
                whole.append(batch)
                counts.append(len(cut))
                for part in cut:
                    metrics.inference_batch(self._name, _length(part))
                    yield part

        done: list[Arrays] = []
        try:
            for outputs in stream(self._session, parts()):
                done.append(outputs)
                if len(done) == counts[0]:
                    counts.pop(0)
                    whole.pop(0)
                    ready, done = join(done), []
                    yield ready
        except EngineError as error:
            if not self._shrink(error, map(_length, whole)):
                raise
        else:
            return
        # What was taken and not yielded is done again in smaller parts, then the rest follows.
        yield from self.stream(chain(list(whole), source))

    @property
    def fill(self) -> Fill | None:
        """As the session within has it (``filling.fill``); None where it has none.

        Slabs that are longer than a batch, and what is left after OOM, are streamed in parts.
        """
        within = getattr(self._session, "fill", None)
        return partial(self._fill, within) if within is not None else None

    def _restore(self) -> None:
        if time.monotonic() - self._shrunk_at >= RESTORE_SECONDS:
            self._limit = self._most

    def _fill(self, within: Fill, todo: Sequence[Call]) -> Iterator[None]:
        self._restore()
        left = deque(todo)
        if all(call.count <= self.batch for call in todo):
            try:
                for _ in within(todo):
                    metrics.inference_batch(self._name, left.popleft().count)
                    yield
            except EngineError as error:
                if not self._shrink(error, [call.count for call in left]):
                    raise
        yield from streamed(self, left)

    def _shrink(self, error: EngineError, lengths: Iterable[int]) -> bool:
        longest = max((min(length, self._limit) for length in lengths), default=1)
        if remedy(error.code, can_shrink=longest > 1, has_other=False) is not Remedy.smaller_batch:
            return False
        self._limit, self._shrunk_at = longest // 2, time.monotonic()
        logs.get().warning("too little GPU memory, smaller batches", engine=self._name, batch=self._limit)
        return True

    def close(self) -> None:
        self._session.close()


def _length(batch: Arrays) -> int:
    return min((len(a) if a.ndim else 1 for a in batch.values()), default=0)


def split(batch: Arrays, limit: int) -> list[Arrays]:
    """``batch`` in parts of at most ``limit`` along axis 0, in order. Pure.

    Inputs whose axis 0 differs in length cannot be cut and stay whole.
    """
    lengths = {len(a) if a.ndim else 1 for a in batch.values()}
    if len(lengths) != 1 or (length := lengths.pop()) <= limit:
        return [batch]
    return [{name: a[at : at + limit] for name, a in batch.items()} for at in range(0, length, limit)]


def join(parts: list[Arrays]) -> Arrays:
    """The inverse of :func:`split` for outputs. Pure."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
