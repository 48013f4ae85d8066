"""How an attempt at a job ends when it does not come to a result: what is counted, told and tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dicomnode import durable, logs, metrics
from dicomnode.durable import SyncFailed
from dicomnode.errors import (
    DeviceFull,
    DeviceLost,
    InputError,
    LeaseLost,
    NodeError,
    OperatorError,
    PeerAway,
    UnsuitableSeries,
)
from dicomnode.index.database import Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events
from dicomnode.infer.routing import Router
from dicomnode.rollout import RunState

MEMORY_WAITS = 100
"""Waits of one job for memory of the GPU, some eight hours in all: from then on it counts as too large for it."""


class Endings:
    """Of the jobs that ``owner`` has leased."""

    def __init__(self, jobs: Jobs, router: Router, events: Events, owner: str, max_attempts: int) -> None:
        self._jobs = jobs
        self._router = router
        self._events = events
        self._owner = owner
        self._max_attempts = max_attempts
        self._log = logs.get()
        self.lost = False
        """The device is spoilt for this process, which has to end."""

    @contextmanager
    def guard(self, job: Row) -> Iterator[None]:
        """Whatever is raised within ends this attempt at ``job``, and nothing else."""
        job_id = int(job["id"])
        try:
            yield
        except LeaseLost as error:
            self._router.end(job_id, "stopped")
            metrics.job("lost")
            self._log.info("result dropped", job=job_id, cause=error.cause)
        except InputError as error:
            self._input(job, error)
        except SyncFailed as error:
            durable.die(error)
        except DeviceLost as error:
            # Handed back and counted: a study that spoils the device each time is parked at last.
            self.retry(job, str(error))
            self._events.add("error", "device-lost", f"job {job_id}", f"{error.cause}; the worker is restarted")
            self.lost = True
        except DeviceFull as error:
            # The version counts it as an error, once for each job: one that needs more than there is goes back.
            if int(job["waits"]) < MEMORY_WAITS:
                self._wait(job, str(error), ended="error" if int(job["waits"]) == 0 else "stopped")
            else:
                self.retry(job, str(error))
        except (OperatorError, PeerAway) as error:
            # A missing model, a full disk, an endpoint that is away: it passes, if only once the operator has acted.
            self._wait(job, str(error))
        except NodeError as error:
            self.retry(job, str(error))
        except Exception as error:  # noqa: BLE001 whatever a model does, the next study must work
            self._log.exception("job failed", job=job_id, exc_type=type(error).__name__)
            self.retry(job, f"unexpected {type(error).__name__}")

    def _input(self, job: Row, error: InputError) -> None:
        job_id = int(job["id"])
        code = error.code if isinstance(error, UnsuitableSeries) else "MALFORMED"
        if code == "DECODER_CRASHED":  # or the kernel took its memory: worth another try
            self.retry(job, str(error))
            return
        text = f"{code}: {error.cause}. {error.hint}".strip()
        self._settle(lambda: self._jobs.refuse(job_id, self._owner, text))
        self._router.end(job_id, "refused")
        metrics.job("refused")
        self._log.warning("series refused", job=job_id, model=job["model"], code=code, cause=error.cause)
        self._events.add("warning", "job-refused", f"job {job_id}", text)

    def retry(self, job: Row, text: str) -> None:
        """Again later, or parked after too many attempts."""
        job_id = int(job["id"])
        self._router.end(job_id, "error")
        states: list[str] = []
        self._settle(lambda: states.append(self._jobs.fail(job_id, self._owner, text, max_attempts=self._max_attempts)))
        state = states[0] if states else "lost"
        metrics.job("failed" if state == "failed" else "retried")
        self._log.error("job not done", job=job_id, state=state, attempts=job["attempts"], error=text)
        if state == "failed" or job["attempts"] == 1:
            self._events.add("error", "job-failed", f"job {job_id}", text)

    def _wait(self, job: Row, text: str, *, ended: RunState = "stopped") -> None:
        """Without limit, and it is no attempt: ten such waits must not let the first crash park the job."""
        job_id = int(job["id"])
        self._router.end(job_id, ended)
        waits: list[int] = []
        self._settle(lambda: waits.append(self._jobs.wait(job_id, self._owner, text)))
        metrics.job("retried")
        self._log.error("job waits", job=job_id, attempts=job["attempts"], error=text)
        if waits == [1]:
            self._events.add("error", "job-waits", f"job {job_id}", text)

    def _settle(self, change: Callable[[], None]) -> None:
        try:
            change()
        except LeaseLost as error:
            self._log.info("job was taken over", cause=error.cause)
