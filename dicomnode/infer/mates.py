"""Which queued jobs are taken along with one that is about to be done: what ``company`` decides, out of the rows."""

from __future__ import annotations

import time

from dicomnode import logs
from dicomnode.errors import NodeError
from dicomnode.index import sharing
from dicomnode.index.database import Database, Row
from dicomnode.infer.attempt import Attempt
from dicomnode.infer.choice import engine_name
from dicomnode.infer.company import Queued, company, most_studies, sociable
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.placing import PlacedModel, Servable
from dicomnode.infer.routing import Router
from dicomnode.settings import Inference

REST_SECONDS = 600.0
"""A model whose shared batch failed although each of its series was done alone shares none for so long."""


class Mates:
    def __init__(self, db: Database, router: Router, inference: Inference, owner: str) -> None:
        self._db = db
        self._router = router
        self._inference = inference
        self._owner = owner
        self._rests: dict[tuple[str, str], float] = {}
        """Until when a model, by digest and engine, shares no batch."""
        self._log = logs.get()

    def of(self, attempt: Attempt) -> list[Row]:
        """Jobs that were queued and are leased now to share batches with ``attempt``; none is waited for."""
        ready, studies = self._sharing(attempt)
        if ready is None:
            return []
        rows = ready.most_rows
        images = self._images(attempt)
        first = _queued({**attempt.job, "instances": images}, ready.identity.version, leased=True)
        if not sociable(first, rows):
            return []
        try:
            waiting = sharing.waiting_beside(self._db, attempt.job, 4 * studies)
            versions = self._router.destined(waiting)
            queue = [_queued(job, version) for job, version in zip(waiting, versions, strict=True)]
            chosen = company(first, queue, studies=studies, rows=rows)
            if not chosen:
                return []
            seconds = self._inference.lease_seconds
            return sharing.lease_beside(self._db, attempt.job_id, chosen, self._owner, seconds)
        except NodeError as error:  # a locked index: alone, then
            self._log.warning("could not look for jobs to share a batch with", error=str(error))
            return []

    def suits(self, attempt: Attempt) -> bool:
        """Whether the images of its series alone are worth a batch of their own."""
        ready, _ = self._sharing(attempt)
        if ready is None or int(attempt.job["attempts"]) != 1:
            return False
        return 1 < self._images(attempt) <= ready.most_rows

    def _images(self, attempt: Attempt) -> int:
        """0 where they cannot be counted. A file of many frames counts as many: their rows are in memory at once."""
        if len(attempt.sources) > sharing.MOST_ROWS:
            return len(attempt.sources)
        try:
            return sharing.images_of(self._db, attempt.job_id)
        except NodeError as error:
            self._log.warning("could not count the images of a job", error=str(error))
            return 0

    def _sharing(self, attempt: Attempt) -> tuple[ReadyModel | None, int]:
        """The model, if it shares its batches now, and between how many series at most."""
        ready = sharing_model(attempt.served_by)
        if ready is None or time.monotonic() < self._rests.get(_key(ready), 0.0):
            return None, 1
        studies = most_studies(self._inference.batch_studies, engine_name(ready), ready.most_rows)
        return (ready, studies) if studies > 1 else (None, 1)

    def rest(self, model: ReadyModel) -> None:
        """A batch of several failed, and each of them did not."""
        self._rests[_key(model)] = time.monotonic() + REST_SECONDS


def sharing_model(model: Servable) -> ReadyModel | None:
    """The model as it is now, where its batches may be shared."""
    ready = model.ready if isinstance(model, PlacedModel) else model
    return ready if isinstance(ready, ReadyModel) and ready.shares else None


def _key(model: ReadyModel) -> tuple[str, str]:
    return model.identity.digest, engine_name(model)


def _queued(job: Row, version: str, *, leased: bool = False) -> Queued:
    return Queued(
        job_id=int(job["id"]),
        priority=int(job["priority"]),
        model=str(job["model"]),
        version=version,
        instances=int(job["instances"]),
        attempts=int(job["attempts"]) - leased,
        parted=bool(job["parted"]) if leased else int(job["batch_studies"]) > 0,  # the lease has set it to 0
    )
