"""Rows of jobs that share a batch: leased together, and what the end of the worker in between counts."""

from __future__ import annotations

import pytest

from dicomnode.index import sharing
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from tests.index.rows import FakeClock, job, outcome


def together(db: Database, count: int = 3) -> list[int]:
    ids = [job(db) for _ in range(count)]
    first = Jobs(db).lease("w", 60)
    assert first is not None and first["id"] == ids[0] and first["batch_studies"] == 0
    leased = sharing.lease_beside(db, ids[0], ids[1:], "w", 60)
    assert [row["id"] for row in leased] == ids[1:]
    return ids


def rows(db: Database, ids: list[int]) -> list[Row]:
    found = [db.row("SELECT * FROM jobs WHERE id = ?", (n,)) for n in ids]
    return [row for row in found if row is not None]


def told(db: Database, ids: list[int], *columns: str) -> list[tuple[object, ...]]:
    return [tuple(row[c] for c in columns) for row in rows(db, ids)]


def test_they_are_leased_together_and_ended_by_themselves(db: Database) -> None:
    ids = together(db)
    assert told(db, ids, "state", "attempts", "lease_owner", "batch_studies") == [("running", 1, "w", 3)] * 3
    Jobs(db).finish(ids[0], "w", outcome())
    Jobs(db).refuse(ids[1], "w", "not suitable")
    assert [r["state"] for r in rows(db, ids)] == ["done", "refused", "running"]
    shown = Jobs(db).show(ids[0])
    assert shown is not None and shown["batch_studies"] == 3


def test_only_what_is_due_and_pending_of_that_model_and_priority_is_waiting(db: Database) -> None:
    alike = [job(db) for _ in range(3)]
    job(db, model="n")
    job(db, priority="stat")
    job(db, priority="batch")
    later = job(db)
    with db.transaction():
        db.execute("UPDATE jobs SET next_at = ? WHERE id = ?", (db.clock.ticks() + 60, later))
    (first,) = rows(db, alike[:1])
    assert [r["id"] for r in sharing.waiting_beside(db, first, 2)] == alike[:2]
    assert [(r["id"], r["instances"]) for r in sharing.waiting_beside(db, first, 99)] == [(n, 1) for n in alike]


@pytest.mark.parametrize(("stated", "images"), [("600", 600), ("", 1), (None, 1), ("many", 1)])
def test_each_frame_of_an_instance_is_an_image(db: Database, stated: str | None, images: int) -> None:
    one, other = job(db), job(db)
    with db.transaction():
        uid = db.value("SELECT SOPInstanceUID FROM job_inputs WHERE job_id = ?", (other,))
        db.execute("UPDATE instances SET NumberOfFrames = ? WHERE SOPInstanceUID = ?", (stated, uid))
    assert (sharing.images_of(db, one), sharing.images_of(db, other)) == (1, images)
    (first,) = rows(db, [one])
    assert [r["instances"] for r in sharing.waiting_beside(db, first, 9)] == [1, images]


def test_one_that_was_taken_or_superseded_meanwhile_does_not_come_along(db: Database) -> None:
    ids = [job(db) for _ in range(4)]
    Jobs(db).lease("w", 60)
    Jobs(db).lease("other", 60)
    with db.transaction():
        db.execute("UPDATE jobs SET state = 'superseded' WHERE id = ?", (ids[2],))
    assert [r["id"] for r in sharing.lease_beside(db, ids[0], ids[1:], "w", 60)] == [ids[3]]
    assert told(db, ids, "lease_owner", "batch_studies") == [("w", 2), ("other", 0), (None, 0), ("w", 2)]


def test_with_nobody_left_to_share_with_nothing_is_shared(db: Database) -> None:
    only = job(db)
    Jobs(db).lease("w", 60)
    assert sharing.lease_beside(db, only, [only + 1], "w", 60) == []
    assert told(db, [only], "batch_studies") == [(0,)]


@pytest.mark.parametrize("how", ["owner", "silence"])
@pytest.mark.parametrize("most", [1, 10])
def test_a_death_in_company_counts_for_nobody_and_is_remembered(
    db: Database, clock: FakeClock, how: str, most: int
) -> None:
    ids = together(db)
    clock.move(61 if how == "silence" else 1)
    expired = Jobs(db).expire(most, ("w",) if how == "owner" else ())
    assert [r["id"] for r in expired] == ids
    assert told(db, ids, "state", "attempts", "batch_studies") == [("pending", 0, 3)] * 3, "none is parked"
    again = Jobs(db).lease("w", 60)
    assert again is not None and (again["attempts"], again["batch_studies"]) == (1, 0)


def test_once_alone_a_death_counts(db: Database) -> None:
    ids = together(db)
    sharing.share(db, ids[:1], "w")
    Jobs(db).expire(1, ("w",))
    assert told(db, ids, "state", "attempts") == [("failed", 1), ("pending", 0), ("pending", 0)]


def test_after_a_stop_signal_or_a_requeue_they_may_share_again(db: Database) -> None:
    ids = together(db)
    assert Jobs(db).hand_back("w") == 3
    assert told(db, ids, "state", "attempts", "batch_studies") == [("pending", 0, 0)] * 3
    Jobs(db).lease("w", 60)
    sharing.lease_beside(db, ids[0], ids[1:], "w", 60)
    Jobs(db).fail(ids[0], "w", "an error", max_attempts=1)
    Jobs(db).wait(ids[1], "w", "a full disk")
    Jobs(db).retry(ids[0])
    assert told(db, ids[:2], "state", "attempts", "batch_studies") == [("pending", 0, 0)] * 2


def test_a_lost_device_parts_those_that_are_still_held(db: Database) -> None:
    ids = together(db)
    Jobs(db).finish(ids[0], "w", outcome())
    with db.transaction():
        db.execute("UPDATE jobs SET state = 'superseded', lease_owner = NULL WHERE id = ?", (ids[1],))
    assert sharing.part(db, ids, "w", "device lost") == 1
    assert told(db, ids, "state", "attempts", "batch_studies", "last_error") == [
        ("done", 1, 3, None),
        ("superseded", 1, 3, None),
        ("pending", 0, 3, "device lost"),
    ]


def test_what_is_released_is_due_as_if_nothing_had_been(db: Database) -> None:
    ids = together(db)
    Jobs(db).finish(ids[0], "w", outcome())
    assert sharing.release(db, ids, "w") == 2
    assert told(db, ids[1:], "state", "attempts", "batch_studies", "last_error") == [("pending", 0, 0, None)] * 2
