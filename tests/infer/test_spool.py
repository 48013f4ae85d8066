"""Back-pressure of the cloud outbox: batch jobs wait while too much does; nothing is dropped."""

from __future__ import annotations

from dicomnode.cloud_settings import CloudPlan
from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.database import Database
from dicomnode.index.jobs import PRIORITIES, Jobs
from dicomnode.index.spool import Spool
from tests.index.rows import FakeClock, job, outcome


def test_it_fills_and_empties(db: Database, clock: FakeClock) -> None:
    spool, box = Spool(db, 20), CloudOutbox(db)
    assert not spool.full() and not Spool(db, 0).full()
    job_id = job(db, destinations=())
    assert Jobs(db).lease("w", 60) is not None
    Jobs(db).finish(job_id, "w", outcome(), cloud=CloudPlan("cloud"))  # two results of 10 bytes
    assert box.waiting_bytes() == 20
    assert not spool.full(), "it was looked at a moment ago"
    clock.move(6)
    assert spool.full() and not Spool(db, 0).full() and not Spool(db, 21).full()
    batch = job(db, study="1.2.11", priority="batch")
    routine = job(db, study="1.2.12", priority="routine")
    before = PRIORITIES["batch"] if spool.full() else None
    leased = Jobs(db).lease("w", 60, before=before)
    assert leased is not None and leased["id"] == routine, "the PACS needs its results"
    assert Jobs(db).lease("w", 60, before=before) is None
    assert db.value("SELECT state FROM jobs WHERE id = ?", (batch,)) == "pending", "it waits, it is not dropped"
    items = box.lease_lane(1, "s", 60, 50, 1 << 20)
    assert spool.full(), "what is being sent has not arrived"
    box.settle([i["id"] for i in items], "s")
    clock.move(6)
    assert not spool.full()
    assert Jobs(db).lease("w", 60, before=None) is not None
