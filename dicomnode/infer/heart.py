"""The lease of a job while it is being done, and the end of a worker whose job takes too long."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from dicomnode import logs
from dicomnode.errors import LeaseLost, NodeError
from dicomnode.index.jobs import Jobs

EXIT_HUNG = 75
"""EX_TEMPFAIL of sysexits.h."""


class Heart:
    """Keeps the lease alive while a job runs, and those of jobs that share its batches; ends the process
    when it takes too long.

    A codec or engine that hangs cannot be interrupted from Python, so the process goes: the
    lease is taken back at its restart, and after ``max_attempts`` the job is parked.
    """

    def __init__(self, jobs: Jobs, job_id: int, owner: str, seconds: float, limit: float) -> None:
        """``seconds``: of the lease; ``limit``: of the job."""
        self._jobs, self._job_id, self._owner, self._seconds = jobs, job_id, owner, seconds
        self._held: tuple[int, ...] = (job_id,)  # written by the worker's thread alone
        self._let_go: set[int] = set()  # by the heart's
        self._limit = limit
        self._deadline = time.monotonic() + limit
        self._stands = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def keep(self, job_ids: Iterable[int]) -> None:
        """The leases of these jobs as well."""
        self._held = (*self._held, *job_ids)

    def turn(self) -> None:
        """Another of the jobs is at hand: it has its own time."""
        self._deadline = time.monotonic() + self._limit

    @contextmanager
    def standing_still(self) -> Iterator[Callable[[], float]]:
        """While a more urgent job is done, this one's time does not run; gives the seconds that it stood."""
        begin = time.monotonic()
        self._stands = True
        try:
            yield lambda: time.monotonic() - begin
        finally:
            self._deadline += time.monotonic() - begin
            self._stands = False

    def _beat(self) -> None:
        while not self._stop.wait(min(self._seconds / 3, max(0.1, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline and not self._stands:
                logs.get().error("job takes too long, the worker is restarted", job=self._job_id)
                os._exit(EXIT_HUNG)
            for job_id in self._held:
                if job_id not in self._let_go:  # with none left the work still runs, and may still hang
                    self._extend(job_id)

    def _extend(self, job_id: int) -> None:
        try:
            self._jobs.extend(job_id, self._owner, self._seconds)
        except LeaseLost:  # or it has ended, of several; else finish() will find out and drop the result
            self._let_go.add(job_id)
        except NodeError:
            return  # a locked index: the next beat is soon enough
