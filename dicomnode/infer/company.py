"""Which queued jobs join one that is about to be done, so that their series share the network's batches. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Queued:
    """A job as far as this decision needs it.

    ``version``: that it would go to now. ``instances``: images of its series, about as many rows its
    network takes. ``attempts``: before the present one. ``parted``: its last attempt was one in company
    that ended the worker.
    """

    job_id: int
    priority: int
    model: str
    version: str
    instances: int
    attempts: int = 0
    parted: bool = False


CPU = "onnxruntime-cpu"


def most_studies(setting: int, engine: str, rows: int) -> int:
    """Series in one batch at most, by ``[inference] batch_studies``, of a batch of ``rows`` on an engine.

    Left to the node (0): as many as have room where a call has a price of its own, which is a GPU or an
    endpoint. A CPU takes as long for sixteen rows at once as for sixteen one by one, and the first of them
    would wait until the others were read.
    """
    return setting or (1 if engine == CPU else rows)


def sociable(job: Queued, rows: int) -> bool:
    """Whether a job may share a batch of ``rows`` with any other.

    One that failed before is done alone, so that a poisonous study is known by its own attempts, and one
    whose company ended the worker is, so that it is not blamed for it again.
    """
    return job.attempts == 0 and not job.parted and 0 < job.instances < rows


def company(first: Queued, queue: Sequence[Queued], *, studies: int, rows: int) -> tuple[int, ...]:
    """The ids of those in ``queue``, which is in its order, that join ``first``: one batch in all.

    ``studies``: most series in it, ``first`` among them; ``rows``: most rows. They are of one model and
    version and of one priority: what is less urgent would make the more urgent one wait for its reading,
    which costs more than a row in a batch saves. One that does not fit lets those behind it pass; it is
    the first to be done when its turn comes, so nothing starves.
    """
    if studies < 2 or not sociable(first, rows):
        return ()
    chosen: list[int] = []
    total = first.instances
    for job in queue:
        if len(chosen) + 1 >= studies:
            break
        alike = (job.model, job.version, job.priority) == (first.model, first.version, first.priority)
        if job.job_id != first.job_id and alike and sociable(job, rows) and total + job.instances <= rows:
            chosen.append(job.job_id)
            total += job.instances
    return tuple(chosen)
