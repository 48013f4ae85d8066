"""Several jobs of one model at once: each is read, finished and committed by itself, their networks share batches.

What goes wrong with one (its input, its lease, its results) is that one's; when a shared batch fails, each
is done alone, and when the device is lost under it, each is handed back to be done alone, uncounted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from dicomnode import logs, metrics
from dicomnode.errors import EngineError, NodeError, PeerAway
from dicomnode.index import sharing
from dicomnode.index.database import Database, Row
from dicomnode.infer.attempt import Attempt
from dicomnode.infer.batching import Arrays
from dicomnode.infer.choice import engine_name
from dicomnode.infer.decode import Decoder
from dicomnode.infer.endings import Endings
from dicomnode.infer.faults import Fault, fault_of
from dicomnode.infer.heart import Heart
from dicomnode.infer.joint import companies, planned, run_together
from dicomnode.infer.mates import Mates, sharing_model
from dicomnode.infer.placing import PlacedModel
from dicomnode.infer.routing import Router
from dicomnode.records import Analysis

MOST_BYTES = 512 << 20
"""Images and prepared rows that wait for the network; when there are more, it is called for those that are there."""


class Hands(Protocol):
    """What the worker does with one job."""

    def open(self, job: Row) -> Attempt: ...

    def close(self, attempt: Attempt) -> None: ...

    def between(self, attempt: Attempt, step: str) -> None:
        """A more urgent job goes first, if there is one."""
        ...

    def analysed(self, attempt: Attempt) -> Analysis: ...

    def conclude(self, attempt: Attempt, analysis: Analysis) -> None: ...


@dataclass(frozen=True, slots=True)
class _Share:
    """What a job has of a network that was called for ``opened`` series at once.

    ``seconds``: its share of the time; ``company``: series in the largest batch with a call of its own, 1 where
    each of its calls was one by itself.
    """

    answers: list[Arrays]
    seconds: float
    company: int
    opened: int


class Together:
    def __init__(
        self,
        hands: Hands,
        db: Database,
        router: Router,
        endings: Endings,
        mates: Mates,
        *,
        owner: str,
        decoder: Decoder,
    ) -> None:
        self._hands = hands
        self._db = db
        self._router = router
        self._endings = endings
        self._mates = mates
        self._owner = owner
        self._decoder = decoder
        self._log = logs.get()

    def run(self, first: Attempt, mates: Sequence[Row], heart: Heart) -> None:
        """Do them all; how each ends is settled when this returns, or the device is lost.

        ``heart``: of the first one's lease, which keeps the others' as well.
        """
        heart.keep([int(job["id"]) for job in mates])
        left = deque([first.job, *mates])
        with ExitStack() as opened:
            while left and not self._endings.lost:
                ready: list[Attempt] = []
                while left and (not ready or sum(a.size for a in ready) < MOST_BYTES):
                    heart.turn()
                    job = left.popleft()
                    attempt = self._begun(job, first if job is first.job else None, opened)
                    if attempt is not None:
                        ready.append(attempt)
                    if self._endings.lost:
                        return
                if ready:
                    self._finish(ready, [int(job["id"]) for job in left], heart)

    def _begun(self, job: Row, attempt: Attempt | None, opened: ExitStack) -> Attempt | None:
        """Read and prepared; None when that ended it."""
        with self._endings.guard(job):
            if attempt is None:
                attempt = self._hands.open(job)
                opened.callback(self._hands.close, attempt)
            model = sharing_model(attempt.served_by)
            if model is not None:  # else it is done alone: the place that was best for it is another one
                attempt.begun = model.begin(
                    attempt.sources,
                    decoder=self._decoder,
                    progress=attempt.reports_to(self._hands.between),
                    ahead=attempt.ahead,
                    more=attempt.more,
                )
            attempt.begun_at = time.perf_counter()
            return attempt
        return None

    def _finish(self, ready: Sequence[Attempt], left: Sequence[int], heart: Heart) -> None:
        """The network for all of them at once, then one after another."""
        session = next((a.served_by.session for a in ready if a.begun is not None), None)
        shared = [a for a in ready if a.begun is not None and a.served_by.session is session]
        self._mark([a.job_id for a in shared])
        heart.turn()
        gone: PeerAway | None = None
        try:
            shares = self._shares(shared, left, [a for a in ready if a not in shared]) if shared else {}
        except PeerAway as error:
            shares, gone = {}, error
            self._release([a.job_id for a in shared[1:]], error)
            ready = [a for a in ready if a not in shared[1:]]
        if self._endings.lost:
            return
        well = alone = 0
        for attempt in sorted(ready, key=lambda a: a not in shared):
            if self._endings.lost:
                return
            heart.turn()
            with self._endings.guard(attempt.job):
                self._hands.between(attempt, "companions")
                if gone is not None and attempt in shared and isinstance(attempt.served_by, PlacedModel):
                    attempt.served_by.leave(gone)  # its place was asked and is away: not once more
                share = shares.pop(attempt.job_id, None)
                analysis = self._of_share(attempt, share) if share is not None else None
                if analysis is None:
                    alone += attempt in shared
                    analysis = self._alone(attempt)
                self._hands.conclude(attempt, analysis)
                well += 1
            attempt.begun = None
        model = sharing_model(ready[0].served_by)
        if model is not None and well == len(ready) and alone and gone is None:
            self._mates.rest(model)

    def _of_share(self, attempt: Attempt, share: _Share) -> Analysis | None:
        """Of the shared batches' answers; None where they are of no use."""
        begun, model = attempt.begun, attempt.served_by
        assert begun is not None
        waited = time.perf_counter() - attempt.begun_at - share.seconds
        progress = attempt.reports_to(self._hands.between)
        try:
            analysis = begun.finish(model.session, share.answers, progress=progress, seconds=share.seconds)
        except EngineError as error:
            self._log.warning("its part of a shared batch is of no use", job=attempt.job_id, cause=error.cause)
            return None
        if isinstance(model, PlacedModel):
            model.did()
        attempt.shared = share.company if share.company > 1 else 0
        attempt.waited = max(0.0, waited)
        if share.company != share.opened:  # its images were like those of fewer others, or of none
            self._mark([attempt.job_id], share.company)
        return analysis

    def _alone(self, attempt: Attempt) -> Analysis:
        attempt.begun = None
        self._mark([attempt.job_id])  # from here on it is its own doing
        return self._hands.analysed(attempt)

    def _shares(self, shared: Sequence[Attempt], left: Sequence[int], beside: Sequence[Attempt]) -> dict[int, _Share]:
        """By job, what the network gave it; none where a batch failed. Raises PeerAway."""
        first = shared[0]
        model = sharing_model(first.served_by)
        assert model is not None
        begun = [a.begun for a in shared if a.begun is not None]
        calls = [b.calls for b in begun]
        stood_before = sum(first.stood.values())
        began = time.perf_counter()
        try:
            found = run_together(
                model.session, calls, model.most_rows, lambda: self._hands.between(first, "companions")
            )
        except PeerAway:
            raise
        except EngineError as error:
            if fault_of(error.code) is Fault.lost and len(shared) > 1:
                self._part([*(a.job_id for a in (*shared, *beside)), *left], error)
                return {}
            self._log.warning("shared batch failed, each is done alone", count=len(shared), cause=error.cause)
            return {}
        except Exception as error:  # noqa: BLE001 too little memory, or whatever a model does: alone it is told
            self._log.warning(
                "shared batch failed, each is done alone", count=len(shared), exc_type=type(error).__name__
            )
            return {}
        seconds = max(0.0, time.perf_counter() - began - (sum(first.stood.values()) - stood_before))
        batches = planned(calls, model.most_rows)
        for batch in batches:
            if (series := len({part.study for part in batch})) > 1:
                metrics.batch_studies(engine_name(model), series)
        company = companies(batches)
        rows = sum(b.rows for b in begun) or 1
        return {
            a.job_id: _Share(answers, seconds * b.rows / rows, company.get(n, 1), len(shared))
            for n, (a, b, answers) in enumerate(zip(shared, begun, found, strict=True))
        }

    def _release(self, job_ids: Sequence[int], error: PeerAway) -> None:
        """The endpoint is away: the first one finds another place, and these are placed anew after that."""
        self._log.warning("endpoint went away under a shared batch", count=len(job_ids) + 1, cause=error.cause)
        for job_id in job_ids:
            self._give_back(job_id, lambda one: sharing.release(self._db, one, self._owner))

    def _give_back(self, job_id: int, change: Callable[[Sequence[int]], int]) -> None:
        """It is due again, uncounted."""

        def end() -> None:
            self._router.end(job_id, "stopped")
            change([job_id])

        self._endings.settle(job_id, end)

    def _mark(self, job_ids: Sequence[int], count: int | None = None) -> None:
        """In the rows, how many share a batch from now on: ``count``, or these."""
        try:
            sharing.share(self._db, job_ids, self._owner, count)
        except NodeError as error:  # what stands there spares the jobs an attempt at worst
            self._log.warning("could not note who shares a batch", error=str(error))

    def _part(self, job_ids: Sequence[int], error: EngineError) -> None:
        """The device is lost: nobody knows whose doing it was."""
        self._endings.lost = True
        text = f"the device was lost while {len(job_ids)} jobs shared a batch; each is done alone"
        for job_id in job_ids:
            self._give_back(job_id, lambda one: sharing.part(self._db, one, self._owner, f"{error.cause}; {text}"))
            metrics.job("retried")
        names = ", ".join(str(job_id) for job_id in job_ids)
        self._log.error("device lost under a shared batch", count=len(job_ids), cause=error.cause)
        self._endings.tell("error", "device-lost", f"jobs {names}", f"{error.cause}; {text}; the worker is restarted")
