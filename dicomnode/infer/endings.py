"""How an attempt at a job ends when it does not come to a result: what is counted, told and tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import apsw

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
    StorageError,
    UnsuitableSeries,
)
from dicomnode.index.database import Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events, Severity
from dicomnode.infer.routing import Router
from dicomnode.rollout import RunState

_PASSES = (
    StorageError,
    OSError,
    apsw.BusyError,
    apsw.LockedError,
    apsw.FullError,
    apsw.IOError,
    apsw.CantOpenError,
    apsw.ReadOnlyError,
)
"""What the index or its disk raises until somebody has made room, or has let go of a lock."""

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
        self._owed: list[tuple[int, Callable[[], None]]] = []
        """Endings that the index did not take, by job: in its row such a job is still being done."""
        self._log = logs.get()
        self.lost = False
        """The device is spoilt for this process, which has to end."""

    @contextmanager
    def guard(self, job: Row) -> Iterator[None]:
        """Whatever is raised within ends this attempt at ``job``, and nothing else; nothing comes out of it."""
        job_id = int(job["id"])
        try:
            yield
        except LeaseLost as error:
            self.settle(job_id, lambda: self._router.end(job_id, "stopped"))
            metrics.job("lost")
            self._log.info("result dropped", job=job_id, cause=error.cause)
        except InputError as error:
            self._input(job, error)
        except SyncFailed as error:
            durable.die(error)
        except DeviceLost as error:
            self.lost = True
            # Handed back and counted: a study that spoils the device each time is parked at last.
            self.retry(job, str(error))
            self.tell("error", "device-lost", f"job {job_id}", f"{error.cause}; the worker is restarted")
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

        def end() -> None:
            self._router.end(job_id, "refused")
            self._jobs.refuse(job_id, self._owner, text)
            metrics.job("refused")
            self._log.warning("series refused", job=job_id, model=job["model"], code=code, cause=error.cause)
            self.tell("warning", "job-refused", f"job {job_id}", text)

        self.settle(job_id, end)

    def retry(self, job: Row, text: str) -> None:
        """Again later, or parked after too many attempts."""
        job_id = int(job["id"])

        def end() -> None:
            self._router.end(job_id, "error")
            state = self._jobs.fail(job_id, self._owner, text, max_attempts=self._max_attempts)
            metrics.job("failed" if state == "failed" else "retried")
            self._log.error("job not done", job=job_id, state=state, attempts=job["attempts"], error=text)
            if state == "failed" or job["attempts"] == 1:
                self.tell("error", "job-failed", f"job {job_id}", text)

        self.settle(job_id, end)

    def _wait(self, job: Row, text: str, *, ended: RunState = "stopped") -> None:
        """Without limit, and it is no attempt: ten such waits must not let the first crash park the job."""
        job_id = int(job["id"])

        def end() -> None:
            self._router.end(job_id, ended)
            waits = self._jobs.wait(job_id, self._owner, text)
            metrics.job("retried")
            self._log.error("job waits", job=job_id, attempts=job["attempts"], error=text)
            if waits == 1:
                self.tell("error", "job-waits", f"job {job_id}", text)

        self.settle(job_id, end)

    def settle(self, job_id: int, end: Callable[[], None]) -> None:
        """``end`` commits how ``job_id`` ended and tells it; where the index does not take it, it is owed.

        So a locked index or a full disk at the end of one job takes nothing from the others that are done with it.
        """
        try:
            self._settle(job_id, end)
        except _PASSES as error:
            self._owed.append((job_id, end))
            self._log.error(
                "how a job ended could not be written, tried again",
                job=job_id,
                exc_type=type(error).__name__,
                cause=error.cause if isinstance(error, NodeError) else "",
            )

    def settle_owed(self) -> bool:
        """Write what is owed; False while the index does not take it.

        To be called before leases are looked at: an ending that is owed has kept its lease, whatever its age.
        """
        for owed in tuple(self._owed):
            try:
                self._settle(*owed)
            except _PASSES:  # told when it was owed first
                return False
            with suppress(ValueError):  # the thread that leaves on a stop signal may have been quicker
                self._owed.remove(owed)
        return True

    def _settle(self, job_id: int, end: Callable[[], None]) -> None:
        """Raises what passes. What does not would keep this worker from all others: then the lease runs out."""
        try:
            end()
        except LeaseLost as error:
            metrics.job("lost")
            self._log.info("job was taken over", job=job_id, cause=error.cause)
        except _PASSES:
            raise
        except Exception as error:  # noqa: BLE001
            kind = type(error).__name__
            self._log.exception("how a job ended could not be written", job=job_id, exc_type=kind)
            text = f"how it ended cannot be written (unexpected {kind}); its lease runs out, then it is tried again"
            self.tell("error", "job-ending", f"job {job_id}", f"{text}. Report this")

    def tell(self, severity: Severity, kind: str, about: str, text: str) -> None:
        """An event about what is committed already; one that is not taken must not undo it."""
        try:
            self._events.add(severity, kind, about, text)
        except Exception as error:  # noqa: BLE001
            self._log.error("an event could not be written", kind=kind, exc_type=type(error).__name__)
