"""The calls of several studies' networks as shared batches, and each study's answers out of them.

Rows of a batch do not depend on each other (``golden`` has it proven before a model's batches are
shared), so that a study's answers are those that it would have got alone, within what an engine
rounds otherwise for another length of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dicomnode.errors import EngineError
from dicomnode.infer.batching import Arrays
from dicomnode.infer.engine import Session
from dicomnode.infer.streaming import stream

Shape = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Of the inputs of a call: name, dtype, and length of each axis but the first one."""


@dataclass(frozen=True, slots=True)
class Call:
    """``rows``: length of axis 0, 0 where the inputs differ in it: such a call stays by itself."""

    rows: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Part:
    """One call in a shared batch: of which study, its number there, and how many rows it has."""

    study: int
    call: int
    rows: int


def call_of(inputs: Arrays) -> Call:
    """What decides with which others a call may share a batch. Pure."""
    lengths = {len(a) if a.ndim else 0 for a in inputs.values()}
    return Call(
        lengths.pop() if len(lengths) == 1 else 0,
        tuple(sorted((name, a.dtype.str, a.shape[1:]) for name, a in inputs.items())),
    )


def plan(studies: Sequence[Sequence[Call]], limit: int) -> list[tuple[Part, ...]]:
    """Which calls go into which batch, in the order of the studies. Pure.

    Only calls of one shape share one. A batch has ``limit`` rows at most, but for a call that is
    longer by itself.
    """
    batches: list[list[Part]] = []
    rows: list[int] = []
    open_at: dict[Shape, int] = {}
    for study, calls in enumerate(studies):
        for number, call in enumerate(calls):
            part = Part(study, number, call.rows)
            at = open_at.get(call.shape)
            if call.rows and at is not None and rows[at] + call.rows <= limit:
                batches[at].append(part)
                rows[at] += call.rows
                continue
            if call.rows:
                open_at[call.shape] = len(batches)
            batches.append([part])
            rows.append(call.rows)
    return [tuple(batch) for batch in batches]


def planned(studies: Sequence[Sequence[Arrays]], limit: int) -> list[tuple[Part, ...]]:
    """The batches of :func:`run_together`. Pure."""
    return plan([[call_of(inputs) for inputs in calls] for calls in studies], limit)


def companies(batches: Sequence[tuple[Part, ...]]) -> dict[int, int]:
    """By study: how many are in the largest of its batches, 1 where each of its calls is one by itself. Pure."""
    found: dict[int, int] = {}
    for batch in batches:
        within = {part.study for part in batch}
        for study in within:
            found[study] = max(found.get(study, 0), len(within))
    return found


def run_together(
    session: Session,
    studies: Sequence[Sequence[Arrays]],
    limit: int,
    between: Callable[[], None] = lambda: None,
) -> list[list[Arrays]]:
    """The answers to each study's calls, in their order; ``between`` is called behind each batch.

    Raises EngineError when any batch fails.
    """
    batches = planned(studies, limit)

    def stacked() -> Iterator[Arrays]:
        for batch in batches:
            given = [studies[part.study][part.call] for part in batch]
            yield given[0] if len(given) == 1 else {n: np.concatenate([g[n] for g in given]) for n in given[0]}

    answers: list[list[Arrays]] = [[{}] * len(calls) for calls in studies]
    for batch, result in zip(batches, stream(session, stacked()), strict=True):
        between()
        for part, outputs in zip(batch, _apart(result, batch), strict=True):
            answers[part.study][part.call] = outputs
    return answers


def _apart(outputs: Arrays, batch: tuple[Part, ...]) -> Iterator[Arrays]:
    """The outputs of a batch cut into those of its calls."""
    if len(batch) == 1:
        yield outputs
        return
    total = sum(part.rows for part in batch)
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != total:
            raise EngineError(
                "run model", "BUILD_FAILED", f"output {name} has shape {array.shape} for a batch of {total} rows"
            )
    first = 0
    for part in batch:
        yield {name: array[first : first + part.rows] for name, array in outputs.items()}
        first += part.rows
