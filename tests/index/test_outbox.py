"""Outboxes: order per study, leases, back-off without end, rejection until requeued."""

from __future__ import annotations

import pytest

from dicomnode.errors import IllegalTransition, OperatorError
from dicomnode.index.database import Database
from dicomnode.index.outbox import Outbox, Table
from tests.index.rows import FakeClock, finished_job


@pytest.fixture
def box(db: Database) -> Outbox:
    return Outbox(db, "deliveries")


def ids(rows: list[dict[str, object]]) -> list[object]:
    return [r["id"] for r in rows]


def states(db: Database) -> list[str]:
    return [r["state"] for r in db.rows("SELECT state FROM deliveries ORDER BY id")]


def test_items_come_in_order_and_once(db: Database, box: Outbox) -> None:
    finished_job(db)
    finished_job(db, study="1.2.11")
    assert box.due_destinations() == ["pacs"]
    first = box.lease("pacs", "a", 60, 3)
    assert ids(first) == [1, 2, 3] and first[0]["kind"] == "SEG" and first[0]["attempts"] == 1
    assert box.lease("pacs", "b", 60, 10) == [], "the fourth belongs to a study that is being sent"
    box.stored(3, "a")
    assert ids(box.lease("pacs", "b", 60, 10)) == [4]
    assert box.lease("nowhere", "b", 60, 10) == []


def test_younger_waits_for_the_older_of_its_study_only(db: Database, box: Outbox) -> None:
    finished_job(db, study="1.2.10")
    finished_job(db, study="1.2.11")
    box.lease("pacs", "a", 60, 1)
    box.retry(1, "a", "busy", first=10, longest=900)
    assert ids(box.lease("pacs", "a", 60, 10)) == [3, 4]


def test_rejected_does_not_hold_up_the_rest(db: Database, box: Outbox) -> None:
    finished_job(db)
    box.lease("pacs", "a", 60, 1)
    box.reject(1, "a", "0xC000")
    assert ids(box.lease("pacs", "a", 60, 10)) == [2]


def test_back_off_has_a_cap_and_no_end(db: Database, box: Outbox, clock: FakeClock) -> None:
    finished_job(db)
    waits = []
    for _ in range(800):  # a PACS that is away for a week, and a little more
        box.lease("pacs", "a", 60, 1)
        box.retry(1, "a", "away", first=2, longest=900)
        due = float(db.value("SELECT next_at FROM deliveries WHERE id = 1"))
        waits.append(due - clock.now)
        assert box.next_due_in() == waits[-1], "the second item is due already"
        clock.move(waits[-1])
    assert waits[:4] == [2, 4, 8, 16] and max(waits) == 900 and waits == sorted(waits)
    assert sum(waits) > 7 * 86400
    (item, _) = box.lease("pacs", "a", 60, 2)
    box.stored(item["id"], "a")
    assert states(db) == ["stored", "sending"]


def test_lost_lease_cannot_decide(db: Database, box: Outbox, clock: FakeClock) -> None:
    finished_job(db)
    box.lease("pacs", "old", 60, 2)
    clock.move(30)
    box.extend([1, 2], "old", 60)
    clock.move(59)
    assert box.expire() == 0
    clock.move(2)
    assert box.expire() == 2
    box.lease("pacs", "new", 60, 2)
    box.stored(1, "old")
    box.reject(2, "old", "x")
    box.extend([1], "old", 10_000)
    assert states(db) == ["sending", "sending"]
    box.stored(1, "new")
    box.retry(1, "new", "late", first=1, longest=1)
    assert states(db) == ["stored", "sending"]
    assert box.expire("new") == 1, "a new life takes back what the former one held"


def test_requeue(db: Database, box: Outbox) -> None:
    finished_job(db)
    box.lease("pacs", "a", 60, 2)
    box.reject(1, "a", "0xC000")
    box.retry(2, "a", "busy", first=600, longest=900)
    assert box.due_destinations() == []
    box.requeue(2)
    assert ids(box.lease("pacs", "a", 60, 5)) == [2]
    with pytest.raises(IllegalTransition):
        box.requeue(2)  # it is being sent
    box.requeue(1)
    (first,) = [i for i in box.listing() if i["id"] == 1]
    assert (first["state"], first["attempts"]) == ("pending", 0)
    with pytest.raises(OperatorError, match="there is no delivery 99"):
        box.requeue(99)
    box.stored(2, "a")
    with pytest.raises(IllegalTransition):
        box.requeue(2)


@pytest.mark.parametrize("table", ["deliveries", "sync_items"])
def test_counts(db: Database, table: Table) -> None:
    finished_job(db)
    assert Outbox(db, table).counts()["pending"] == (2 if table == "deliveries" else 0)
    assert len(Outbox(db, table).listing(state="pending")) == Outbox(db, table).counts()["pending"]
