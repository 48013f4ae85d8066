"""Several jobs of one model at once: each is read, finished and committed by itself, their networks share batches.

What goes wrong with one (its input, its lease, its results) is that one's; when a shared batch fails, each
is done alone, and when the device is lost under it, each is handed back to be done alone, uncounted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from dicomnode import logs, metrics
from dicomnode.errors import EngineError, NodeError, PeerAway
from dicomnode.index import sharing
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.infer.attempt import Attempt
from dicomnode.infer.batching import Arrays
from dicomnode.infer.choice import engine_name
from dicomnode.infer.decode import Decoder
from dicomnode.infer.endings import Endings
from dicomnode.infer.faults import Fault, fault_of
from dicomnode.infer.heart import Heart
from dicomnode.infer.joint import run_together
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
        self._events = Events(db)
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
        try:
            answers = self._answers(shared, left, [a for a in ready if a not in shared]) if shared else {}
        except PeerAway as error:
            answers = {}
            self._release([a.job_id for a in shared[1:]], error)
            ready = [a for a in ready if a not in shared[1:]]
        if self._endings.lost:
            return
        well = 0
        for attempt in sorted(ready, key=lambda a: a not in shared):
            if self._endings.lost:
                return
            heart.turn()
            with self._endings.guard(attempt.job):
                self._hands.between(attempt, "companions")
                self._hands.conclude(attempt, self._analysis(attempt, answers.pop(attempt.job_id, None), len(shared)))
                well += 1
            attempt.begun = None
        model = sharing_model(ready[0].served_by)
        if model is not None and well == len(ready) and not all(a.shared for a in shared):
            self._mates.rest(model)

    def _analysis(self, attempt: Attempt, answers: tuple[list[Arrays], float] | None, count: int) -> Analysis:
        """Of the shared batch's answers; else, and where they are of no use, alone."""
        begun = attempt.begun
        if answers is not None and begun is not None:
            model = attempt.served_by
            waited = time.perf_counter() - attempt.begun_at - answers[1]
            progress = attempt.reports_to(self._hands.between)
            try:
                analysis = begun.finish(model.session, answers[0], progress=progress, seconds=answers[1])
            except EngineError as error:
                self._log.warning("its part of a shared batch is of no use", job=attempt.job_id, cause=error.cause)
            else:
                if isinstance(model, PlacedModel):
                    model.did()
                attempt.shared, attempt.waited = count, max(0.0, waited)
                return analysis
        attempt.begun = None
        self._mark([attempt.job_id])  # from here on it is its own doing
        return self._hands.analysed(attempt)

    def _answers(
        self, shared: Sequence[Attempt], left: Sequence[int], beside: Sequence[Attempt]
    ) -> dict[int, tuple[list[Arrays], float]]:
        """By job: the network's answers and the job's share of the seconds for them; none where a batch failed.

        Raises PeerAway.
        """
        first = shared[0]
        model = sharing_model(first.served_by)
        assert model is not None
        begun = [a.begun for a in shared if a.begun is not None]
        stood_before = sum(first.stood.values())
        began = time.perf_counter()
        try:
            found = run_together(
                model.session,
                [b.calls for b in begun],
                model.most_rows,
                lambda: self._hands.between(first, "companions"),
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
        if len(shared) > 1:
            metrics.batch_studies(engine_name(model), len(shared))
        rows = sum(b.rows for b in begun) or 1
        return {
            a.job_id: (answers, seconds * b.rows / rows) for a, b, answers in zip(shared, begun, found, strict=True)
        }

    def _release(self, job_ids: Sequence[int], error: PeerAway) -> None:
        """The endpoint is away: the first one finds another place, and these are placed anew after that."""
        self._log.warning("endpoint went away under a shared batch", count=len(job_ids) + 1, cause=error.cause)
        for job_id in job_ids:
            self._router.end(job_id, "stopped")
        try:
            sharing.release(self._db, job_ids, self._owner)
        except NodeError as cause:  # then their leases run out, which counts no attempt either
            self._log.warning("jobs were not handed back", error=str(cause))

    def _mark(self, job_ids: Sequence[int]) -> None:
        """In the rows, how many share a batch from now on."""
        try:
            sharing.share(self._db, job_ids, self._owner)
        except NodeError as error:  # what stands there spares the jobs an attempt at worst
            self._log.warning("could not note who shares a batch", error=str(error))

    def _part(self, job_ids: Sequence[int], error: EngineError) -> None:
        """The device is lost: nobody knows whose doing it was."""
        text = f"the device was lost while {len(job_ids)} jobs shared a batch; each is done alone"
        for job_id in job_ids:
            self._router.end(job_id, "stopped")
            metrics.job("retried")
        try:
            sharing.part(self._db, job_ids, self._owner, f"{error.cause}; {text}")
        except NodeError as cause:  # then their leases run out, which counts no attempt either
            self._log.warning("jobs were not handed back", error=str(cause))
        names = ", ".join(str(job_id) for job_id in job_ids)
        self._log.error("device lost under a shared batch", count=len(job_ids), cause=error.cause)
        self._events.add("error", "device-lost", f"jobs {names}", f"{error.cause}; {text}; the worker is restarted")
        self._endings.lost = True
