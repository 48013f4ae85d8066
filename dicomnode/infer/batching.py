"""Batches of bounded size: the cap of ``[inference] max_batch``, halved while the device has too little memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np

from dicomnode import logs, metrics
from dicomnode.errors import EngineError
from dicomnode.infer.engine import Array, Session
from dicomnode.infer.faults import Remedy, remedy

Arrays = Mapping[str, Array]
RESTORE_SECONDS = 600.0


def stream(session: Session, batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Outputs of each batch, in order; copies of one overlap with computing another where the session can.

    At most two batches are taken ahead of the one that is yielded. What is yielded belongs to
    the caller. Raises EngineError.
    """
    own = getattr(session, "stream", None)
    if own is not None:
        yield from own(batches)
        return
    for batch in batches:
        yield session.run(batch)


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
        if time.monotonic() - self._shrunk_at >= RESTORE_SECONDS:
            self._limit = self._most
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
            if not self._shrink(error, whole):
                raise
        else:
            return
        # What was taken and not yielded is done again in smaller parts, then the rest follows.
        yield from self.stream(chain(list(whole), source))

    def _shrink(self, error: EngineError, whole: list[Arrays]) -> bool:
        longest = max((min(_length(b), self._limit) for b in whole), default=1)
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
