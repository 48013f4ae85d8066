"""Jobs whose series share batches of one network: their leases, and what a death in the middle of one counts.

``jobs.batch_studies`` is how many series shared batches at a job's present or last attempt, 0 where it
was done alone. While it is above 0 whatever ends the worker may be another series' doing: such an
attempt does not count, and the job is done alone the next time.
"""

from __future__ import annotations

from collections.abc import Sequence

from dicomnode.index.database import Database, Row
from dicomnode.index.states import JobEvent, JobState, next_job_state

MOST_ROWS = 512
"""Of a batch, by ``[inference] max_batch``: further instances of a series are not looked at."""

_IMAGES = (
    "(SELECT coalesce(sum(max(1, CAST(coalesce(n.NumberOfFrames, '') AS INTEGER))), 0) FROM"
    f" (SELECT SOPInstanceUID FROM job_inputs WHERE job_id = %s LIMIT {MOST_ROWS + 1}) i"
    " LEFT JOIN instances n ON n.SOPInstanceUID = i.SOPInstanceUID)"
)


def images_of(db: Database, job_id: int) -> int:
    """How many images are the input of a job: each frame of an instance is one. Exact up to ``MOST_ROWS``."""
    return int(db.value(f"SELECT {_IMAGES % '?'}", (job_id,)))


def waiting_beside(db: Database, job: Row, limit: int) -> list[Row]:
    """Jobs that are due, of the priority and model of ``job``, in the order of the queue; ``instances``: images_of."""
    return db.rows(
        f"SELECT j.*, {_IMAGES % 'j.id'} AS instances FROM jobs j"
        " WHERE j.state = 'pending' AND j.priority = ? AND j.next_at <= ? AND j.model = ? ORDER BY j.id LIMIT ?",
        (job["priority"], db.clock.ticks(), job["model"], limit),
    )


def lease_beside(db: Database, job_id: int, others: Sequence[int], owner: str, seconds: float) -> list[Row]:
    """Take ``others`` that are still there to the job that ``owner`` holds, as one batch; returns their rows."""
    now = db.clock.ticks()
    with db.transaction():
        taken = []
        for other in others:
            row = db.row("SELECT id, state FROM jobs WHERE id = ? AND state = 'pending' AND next_at <= ?", (other, now))
            if row is None:
                continue
            db.execute(
                "UPDATE jobs SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1,"
                " started_at = ? WHERE id = ?",
                (next_job_state(row["state"], JobEvent.lease), owner, now + seconds, now, other),
            )
            taken.append(other)
        if taken:
            share(db, [job_id, *taken], owner)
        return [row for n in taken if (row := db.row("SELECT * FROM jobs WHERE id = ?", (n,))) is not None]


def share(db: Database, job_ids: Sequence[int], owner: str, count: int | None = None) -> None:
    """``count`` series share batches with each of these jobs of ``owner``, without it as many as these are; 1 is none.

    Not synced but as part of another transaction: a power cut takes no worker down by itself, and an
    attempt that then counts is one of ``max_attempts``.
    """
    count = len(job_ids) if count is None else count
    with db.transaction(sync=False):
        for job_id in job_ids:
            db.execute(
                "UPDATE jobs SET batch_studies = ? WHERE id = ? AND lease_owner = ? AND state = 'running'",
                (count if count > 1 else 0, job_id, owner),
            )


def lost_in_company(db: Database, job: Row, error: str | None) -> JobState:
    """Inside a transaction: the worker ended, or has to, while ``job`` shared a batch. It waits again, uncounted."""
    state = next_job_state(job["state"], JobEvent.lose)
    db.execute(
        "UPDATE jobs SET state = ?, lease_owner = NULL, lease_until = NULL,"
        " last_error = coalesce(?, last_error),"
        " attempts = max(0, attempts - 1) WHERE id = ?",
        (state, error, job["id"]),
    )
    return state


def release(db: Database, job_ids: Sequence[int], owner: str) -> int:
    """These jobs of ``owner`` are due again as if nothing had been; returns how many it still held."""
    return _hand_back(db, job_ids, owner, None)


def part(db: Database, job_ids: Sequence[int], owner: str, error: str) -> int:
    """The device was lost under a shared batch: each of these jobs of ``owner`` is due again, alone; returns how many.

    Jobs that it no longer holds are left as they are.
    """
    return _hand_back(db, job_ids, owner, error)


def _hand_back(db: Database, job_ids: Sequence[int], owner: str, error: str | None) -> int:
    """The attempt does not count; with an ``error`` the next one is alone."""
    count = 0
    with db.transaction():
        for job_id in job_ids:
            job = db.row("SELECT * FROM jobs WHERE id = ? AND state = 'running' AND lease_owner = ?", (job_id, owner))
            if job is None:
                continue
            count += 1
            lost_in_company(db, job, error)
            marker = 0 if error is None else max(2, int(job["batch_studies"]))
            db.execute("UPDATE jobs SET batch_studies = ? WHERE id = ?", (marker, job_id))
    return count
