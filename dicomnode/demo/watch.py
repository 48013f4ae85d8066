"""Following the node's index until everything that was sent is answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dicomnode.errors import NodeError
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.outbox import Outbox

POLL_SECONDS = 0.05
STALL_SECONDS = 240.0
MANY = 100_000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the node is: counts of series, jobs and deliveries."""

    open_series: int
    jobs: int
    jobs_ended: int
    running: str
    deliveries: int
    deliveries_ended: int

    @property
    def finished(self) -> bool:
        return self.open_series == 0 and self.jobs == self.jobs_ended and self.deliveries == self.deliveries_ended

    def __str__(self) -> str:
        if self.open_series:
            return f"{self.open_series} series not complete yet"
        if self.jobs != self.jobs_ended:
            return f"analysing: {self.jobs_ended} of {self.jobs} done{self.running}"
        if not self.finished:
            return f"delivering to the PACS: {self.deliveries_ended} of {self.deliveries} stored"
        return "all answered"


def look(db: Database) -> Progress:
    jobs, deliveries = Jobs(db).counts(), Outbox(db, "deliveries").counts()
    waiting = jobs["pending"] + jobs["running"]
    sending = deliveries["pending"] + deliveries["sending"]
    return Progress(
        len(Catalogue(db).open_series()),
        sum(jobs.values()),
        sum(jobs.values()) - waiting,
        ", one is at work" if jobs["running"] else "",
        sum(deliveries.values()),
        sum(deliveries.values()) - sending,
    )


def wait_answered(db: Database, on_progress: Callable[[Progress], None], check: Callable[[], None]) -> None:
    """Until every series is selected, every job ended and every delivery settled.

    ``check`` raises when one of the programs has ended. Raises NodeError when nothing
    changes for ``STALL_SECONDS``, with what is stuck.
    """
    last: Progress | None = None
    changed = time.monotonic()
    while True:
        now = look(db)
        if now != last:
            last, changed = now, time.monotonic()
            on_progress(now)
        if now.finished:
            return
        check()
        if time.monotonic() - changed > STALL_SECONDS:
            raise NodeError("wait for the results", f"nothing has moved for {STALL_SECONDS:.0f} s: {_stuck(db)}")
        time.sleep(POLL_SECONDS)


def _stuck(db: Database) -> str:
    errors = [
        str(r["last_error"]) for r in (*Jobs(db).listing(5), *Outbox(db, "deliveries").listing(5)) if r["last_error"]
    ]
    return errors[0] if errors else "see node.log"


def all_jobs(db: Database) -> list[Row]:
    """Every job with its results and deliveries, oldest first."""
    jobs = Jobs(db)
    ids = sorted(int(row["id"]) for row in jobs.listing(MANY))
    return [job for job_id in ids if (job := jobs.show(job_id)) is not None]
