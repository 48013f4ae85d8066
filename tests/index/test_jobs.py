"""Jobs: made once, leased by one, finished in one transaction."""

from __future__ import annotations

import json

import pytest

from dicomnode.cloud_settings import CloudPlan
from dicomnode.errors import IllegalTransition, LeaseLost, OperatorError
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from tests.index.rows import FakeClock, instance, job, outcome, request, select, series_row


def state(db: Database, job_id: int) -> str:
    return str(db.value("SELECT state FROM jobs WHERE id = ?", (job_id,)))


def test_same_inputs_make_no_second_job(db: Database) -> None:
    catalogue = Catalogue(db)
    catalogue.commit([instance(sop="1.1")])
    (first,) = select(db)
    assert select(db) == []
    catalogue.commit([instance(sop="1.1", content="b")])
    catalogue.commit([instance(sop="1.1", content="a")])  # back to the same content
    assert select(db) == []
    assert [i["SOPInstanceUID"] for i in Jobs(db).inputs(first)] == ["1.1"]


def test_series_that_grew_meanwhile_is_not_selected(db: Database) -> None:
    Catalogue(db).commit([instance()])
    before = series_row(db, "1.2.20")
    Catalogue(db).commit([instance()])
    assert Jobs(db).select(before["id"], before["generation"], "r", [request()]) == []
    assert len(Catalogue(db).open_series()) == 1, "it stays open"


@pytest.mark.parametrize("was", ["pending", "running", "failed", "refused", "done"])
def test_late_images_make_a_revision(db: Database, was: str) -> None:
    jobs, catalogue = Jobs(db), Catalogue(db)
    catalogue.commit([instance()])
    (first,) = select(db)
    if was != "pending":
        jobs.lease("w", 60)
    if was == "failed":
        jobs.fail(first, "w", "x", max_attempts=1)
    elif was == "refused":
        jobs.refuse(first, "w", "x")
    elif was == "done":
        jobs.finish(first, "w", outcome())
    catalogue.commit([instance()])
    (second,) = select(db)
    assert state(db, first) == ("done" if was == "done" else "superseded")
    row = jobs.show(second)
    assert row is not None and (row["revision"], row["instances"], row["state"]) == (2, 2, "pending")
    if was == "running":
        with pytest.raises(LeaseLost):
            jobs.finish(first, "w", outcome())
        assert db.value("SELECT count(*) FROM results") == 0
    before = jobs.predecessor(row)
    assert (before is not None and before["job_id"] == first) == (was == "done")


def test_urgent_first_then_oldest(db: Database) -> None:
    batch, routine, stat, later = (job(db, priority=p) for p in ("batch", "routine", "stat", "routine"))
    leased = [Jobs(db).lease("w", 60) for _ in range(5)]
    assert [j["id"] if j else None for j in leased] == [stat, routine, later, batch, None]


def test_lease_runs_out_and_its_owner_cannot_finish(db: Database, clock: FakeClock) -> None:
    jobs = Jobs(db)
    job_id = job(db)
    jobs.lease("old", 60)
    assert jobs.lease("new", 60) is None
    clock.move(59)
    assert jobs.expire(5) == []
    jobs.extend(job_id, "old", 60)
    clock.move(59)
    assert jobs.expire(5) == []
    clock.move(2)
    assert [j["id"] for j in jobs.expire(5)] == [job_id]
    again = jobs.lease("new", 60)
    assert again is not None and again["attempts"] == 2
    for late in (
        lambda: jobs.finish(job_id, "old", outcome()),
        lambda: jobs.refuse(job_id, "old", "x"),
        lambda: jobs.fail(job_id, "old", "x", max_attempts=5),
        lambda: jobs.extend(job_id, "old", 60),
        lambda: jobs.fix_identity(job_id, "old", version="1", digest="d", make=dict),
    ):
        with pytest.raises(LeaseLost):
            late()
    jobs.finish(job_id, "new", outcome())
    assert state(db, job_id) == "done"
    with pytest.raises(LeaseLost):
        jobs.finish(job_id, "new", outcome())
    assert db.value("SELECT count(*) FROM results") == 2


def test_dead_owner_gives_back_at_once(db: Database) -> None:
    job_id = job(db)
    Jobs(db).lease("w", 60)
    assert Jobs(db).expire(5, ("other",)) == []
    assert [j["id"] for j in Jobs(db).expire(5, ("w",))] == [job_id]


def test_poisonous_job_is_parked_and_requeued(db: Database) -> None:
    jobs = Jobs(db)
    job_id = job(db)
    for attempt in range(1, 4):
        leased = jobs.lease("w", 60)
        assert leased is not None and leased["attempts"] == attempt
        jobs.expire(3, ("w",))
    assert state(db, job_id) == "failed" and jobs.lease("w", 60) is None
    jobs.retry(job_id)
    leased = jobs.lease("w", 60)
    assert leased is not None and leased["attempts"] == 1


def test_failure_waits_longer_each_time(db: Database, clock: FakeClock) -> None:
    jobs = Jobs(db)
    job_id = job(db)
    waits = []
    for _ in range(12):
        assert jobs.lease("w", 60) is not None
        jobs.fail(job_id, "w", "no model", max_attempts=1000)
        assert jobs.lease("w", 60) is None
        due = float(db.value("SELECT next_at FROM jobs WHERE id = ?", (job_id,)))
        waits.append(due - clock.now)
        clock.now = due
    assert waits == sorted(waits) and waits[0] == 2.0 and waits[-1] == 300.0


def test_a_wait_is_longer_each_time_and_no_attempt(db: Database, clock: FakeClock) -> None:
    jobs = Jobs(db)
    job_id = job(db)
    dues = []
    for n in range(1, 13):
        assert jobs.lease("w", 60) is not None
        assert jobs.wait(job_id, "w", "the endpoint is away") == n
        assert jobs.lease("w", 60) is None
        due = float(db.value("SELECT next_at FROM jobs WHERE id = ?", (job_id,)))
        dues.append(due - clock.now)
        clock.now = due
    assert dues == sorted(dues) and dues[0] == 2.0 and dues[-1] == 300.0
    leased = jobs.lease("w", 60)
    assert leased is not None and (leased["attempts"], leased["waits"]) == (1, 12)
    jobs.expire(2, ("w",))
    assert state(db, job_id) == "pending", "the first crash"
    with pytest.raises(LeaseLost):
        jobs.wait(job_id, "w", "x")
    assert jobs.lease("w", 60) is not None
    jobs.expire(2, ("w",))
    assert state(db, job_id) == "failed"
    jobs.retry(job_id)
    assert db.row("SELECT attempts, waits FROM jobs") == {"attempts": 0, "waits": 0}


def test_retry_of_what_cannot_be_retried(db: Database) -> None:
    with pytest.raises(OperatorError, match="there is no job 99"):
        Jobs(db).retry(99)
    job_id = job(db)
    with pytest.raises(IllegalTransition):
        Jobs(db).retry(job_id)


def test_identity_is_made_once_for_a_model(db: Database) -> None:
    jobs = Jobs(db)
    job_id = job(db)
    jobs.lease("w", 60)
    first = jobs.fix_identity(job_id, "w", version="1", digest="d1", make=lambda _: {"seg_uid": "2.25.1"})
    jobs.expire(5, ("w",))
    jobs.lease("w", 60)
    again = jobs.fix_identity(job_id, "w", version="1", digest="d1", make=lambda _: {"seg_uid": "2.25.2"})
    assert first == again == {"seg_uid": "2.25.1"}
    other = jobs.fix_identity(job_id, "w", version="2", digest="d2", make=lambda _: {"seg_uid": "2.25.3"})
    assert other == {"seg_uid": "2.25.3"}


def test_finish_is_all_or_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(db)
    job_id = job(db, destinations=("pacs", "archive"))
    jobs.lease("w", 60)
    results = outcome()
    tables = ("instances", "results", "deliveries", "sync_items")
    before = {t: db.value(f"SELECT count(*) FROM {t}") for t in tables}
    real = db.insert
    inserts = 0

    def failing(after: int) -> None:
        def insert(*arguments: object, **named: object) -> int:
            nonlocal inserts
            inserts += 1
            if inserts > after:
                raise RuntimeError("power cut")
            return real(*arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(db, "insert", insert)

    for after in range(9):  # 2 x (series, result, 2 deliveries, 1 cloud item) = 10 inserts
        inserts = 0
        failing(after)
        with pytest.raises(RuntimeError):
            jobs.finish(job_id, "w", results, cloud=CloudPlan("cloud"))
        assert {t: db.value(f"SELECT count(*) FROM {t}") for t in tables} == before
        assert state(db, job_id) == "running"
    monkeypatch.undo()
    jobs.finish(job_id, "w", results, cloud=CloudPlan("cloud"))
    assert {t: db.value(f"SELECT count(*) FROM {t}") for t in tables[1:]} == {
        "results": 2,
        "deliveries": 4,
        "sync_items": 2,
    }


def test_listing_and_show(db: Database) -> None:
    job_id = job(db)
    (row,) = Jobs(db).listing(state="pending")
    assert row["id"] == job_id and row["instances"] == 1 and json.loads(row["rules"]) == ["rule"]
    assert Jobs(db).listing(state="done") == [] and Jobs(db).show(99) is None
    assert Jobs(db).counts()["pending"] == 1
