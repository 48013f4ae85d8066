"""The cloud outbox: rows with the result, classes, order in a stream, records with versions."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
import sqlite_utils
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.cloud_settings import CloudPlan, Sync
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.cloud_rows import put_record
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Request, Result
from dicomnode.index.schema import migrations
from dicomnode.orders import Order, dump, join, load
from dicomnode.sync.batch import runs
from tests.index.rows import FakeClock, instance, job, outcome, select, uid

PLAN = CloudPlan("cloud", Sync().lanes, records=True)
URGENT, NORMAL, BATCH = 0, 1, 2


def finish(db: Database, study: str = "1.2.10", *, critical: bool = False, plan: CloudPlan = PLAN) -> int:
    job_id = job(db, study=study, destinations=())
    assert Jobs(db).lease("w", 60) is not None
    done = outcome(study)
    keys = ["effusion"] if critical else []
    Jobs(db).finish(job_id, "w", Outcome(done.results, summary={"slices": 3}, critical=keys, alert=False), cloud=plan)
    return job_id


def rows(db: Database) -> list[tuple[str, int]]:
    return [(r["type"], r["priority"]) for r in db.rows("SELECT type, priority FROM sync_items ORDER BY id")]


@pytest.fixture
def box(db: Database) -> CloudOutbox:
    return CloudOutbox(db)


def take(box: CloudOutbox, lane: int, limit: int = 50) -> list[int]:
    return [r["id"] for r in box.lease_lane(lane, "s", 60.0, limit, 1 << 20)]


def test_a_result_brings_its_records_in_the_same_transaction(db: Database) -> None:
    finish(db)
    assert rows(db) == [("study", NORMAL), ("result", NORMAL), ("result", NORMAL), ("ai-result", NORMAL)], (
        "the study's metadata is lifted from batch: what comes later must not overtake it"
    )
    study, summary = (json.loads(r["data"]) for r in db.rows("SELECT data FROM sync_items WHERE data IS NOT NULL"))
    assert study["PatientID"] == "P1" and study["NumberOfStudyRelatedInstances"] == 1
    assert summary["slices"] == 3 and [o["kind"] for o in summary["objects"]] == ["SEG", "SR"]
    finish(db, plan=CloudPlan("cloud", Sync().lanes))
    assert [t for t, _ in rows(db)[4:]] == ["result", "result"], "no records where there is no place for them"


def test_nothing_is_made_where_nothing_leaves(db: Database) -> None:
    finish(db, plan=CloudPlan())
    assert rows(db) == []


def test_a_critical_finding_lifts_what_its_study_has_waiting(db: Database, box: CloudOutbox) -> None:
    finish(db)
    finish(db, study="1.2.11")
    finish(db, critical=True)
    assert {p for t, p in rows(db)[:4]} == {URGENT} and {p for t, p in rows(db)[4:8]} == {NORMAL}
    assert take(box, URGENT) == [1, 2, 3, 4, *range(9, 13)]


def test_a_later_revision_is_another_version_of_the_record(db: Database) -> None:
    finish(db)
    series = db.row("SELECT SeriesInstanceUID, id FROM series WHERE origin = 'received'")
    assert series is not None
    Catalogue(db).commit([instance(series["SeriesInstanceUID"])])
    (second,) = select(db, series["SeriesInstanceUID"], Request("m", ("rule",), (), "routine"))
    assert Jobs(db).lease("w", 60) is not None
    Jobs(db).finish(second, "w", outcome(), cloud=PLAN)
    found = db.rows("SELECT version, base_version, record_id FROM sync_items WHERE type = 'ai-result' ORDER BY id")
    assert [(r["version"], r["base_version"]) for r in found] == [(1, 0), (2, 1)]
    assert len({r["record_id"] for r in found}) == 1
    assert db.value("SELECT count(*) FROM sync_items WHERE type = 'study'") == 2, "it has one image more"


def test_the_same_content_is_no_new_version(db: Database) -> None:
    with db.transaction():
        assert put_record(db, PLAN, "settings", "NODE", {"a": 1}) == 1
        assert put_record(db, PLAN, "settings", "NODE", {"a": 1}) == 0
        assert put_record(db, PLAN, "settings", "NODE", {"a": 2}) == 2
    assert [(r["version"], r["priority"]) for r in db.rows("SELECT * FROM sync_items")] == [(1, BATCH), (2, BATCH)]


def test_younger_waits_for_the_older_of_its_stream_only(db: Database, box: CloudOutbox, clock: FakeClock) -> None:
    finish(db)
    finish(db, study="1.2.11")
    assert take(box, NORMAL, 2) == [1, 2]
    assert take(box, NORMAL) == [5, 6, 7, 8], "the first study is being sent"
    box.retry(1, "s", "busy", first=10, longest=10)
    box.settle([2], "s")
    assert take(box, NORMAL) == []
    clock.move(11)
    assert take(box, NORMAL) == [1, 3, 4]
    box.reject(1, "s", "no")
    assert box.listing(state="rejected")[0]["last_error"] == "no"
    box.release([3, 4], "s", tried=False)
    assert [r["attempts"] for r in db.rows("SELECT attempts FROM sync_items WHERE id IN (3, 4)")] == [0, 0]
    assert take(box, NORMAL) == [3, 4], "what is parked holds up nobody"
    box.requeue(1)
    assert take(box, NORMAL) == [1]


def test_bytes_of_a_request_are_bounded_but_one_item_always_goes(db: Database, box: CloudOutbox) -> None:
    finish(db)
    db._connection().execute("UPDATE sync_items SET size = 100")
    assert len(box.lease_lane(NORMAL, "s", 60.0, 50, 250)) == 2
    box.settle([1, 2], "s")
    assert len(box.lease_lane(NORMAL, "s", 60.0, 50, 10)) == 1
    assert box.waiting_bytes() == 200 and box.lanes()[0]["count"] == 2


def test_a_listing_keeps_the_content_of_records_to_itself(db: Database, box: CloudOutbox) -> None:
    finish(db)
    assert [r["kind"] for r in box.listing()] == ["ai-result", "SR", "SEG", "study"]
    assert "P1" not in str(box.listing())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
def test_runs_keep_every_stream_in_order(made: list[tuple[str, bool]]) -> None:
    items = [{"id": n, "stream": s, "result_id": 1 if o else None} for n, (s, o) in enumerate(made)]
    found = list(runs(items))
    assert all(len({i["result_id"] for i in run}) == 1 for run in found)
    flat = [i for run in found for i in run]
    assert sorted(i["id"] for i in flat) == list(range(len(items)))
    for stream in "abc":
        ids = [i["id"] for i in flat if i["stream"] == stream]
        assert ids == sorted(ids)


def test_identity_is_kept_only_where_every_rule_says_so() -> None:
    kept, removed = Order(identified=True), Order()
    assert join(kept, kept).identified and not join(kept, removed).identified
    assert load(dump(kept)).identified and not load(None).identified


def test_what_waited_before_the_upgrade_waits_after_it(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    connection = sqlite3.connect(path)
    old = sqlite_utils.Database(connection)
    for migration in migrations._migrations:
        if migration.name == "m0017_cloud_outbox":
            break
        migration.fn(old)
    old["patients"].insert({"id": 1, "PatientID": "P1"})
    old["studies"].insert({"id": 7, "StudyInstanceUID": "1.2", "patient_id": 1})
    old["series"].insert({"id": 1, "SeriesInstanceUID": "1.3", "study_id": 7})
    old["jobs"].insert({"id": 1, "series_id": 1, "model": "m", "state": "done", "revision": 1, "priority": 1})
    old["results"].insert({"id": 1, "job_id": 1, "SOPInstanceUID": "1.4", "file": "a/b", "sha256": "x"})
    old["instances"].insert({"series_id": 1, "SOPInstanceUID": "1.4", "file": "a/b", "sha256": "x", "size": 77})
    old["sync_items"].insert(
        {"id": 5, "result_id": 1, "job_id": 1, "study_id": 7, "destination": "cloud", "state": "pending"}
    )
    next(m for m in migrations._migrations if m.name == "m0017_cloud_outbox").fn(old)
    [row] = list(old["sync_items"].rows)
    assert (row["id"], row["stream"], row["size"], row["type"], row["identified"]) == (5, "study/7", 77, "result", 0)
    connection.close()


def test_results_of_one_uid_twice_make_one_item(db: Database) -> None:
    finish(db)
    again = job(db, destinations=())
    assert Jobs(db).lease("w", 60) is not None
    same = db.row("SELECT SOPInstanceUID, SeriesInstanceUID FROM results LIMIT 1")
    assert same is not None
    result = Result("SEG", instance(same["SeriesInstanceUID"], sop=same["SOPInstanceUID"], origin="result"))
    Jobs(db).finish(again, "w", Outcome([result, *outcome(kinds=("SR",)).results]), cloud=CloudPlan("cloud"))
    assert [t for t, _ in rows(db)].count("result") == 3, uid()
