"""Wishes for earlier studies in rows: found in the index, asked of a PACS, given up in time; analysed and compared."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dicomnode.chains import Needs, When
from dicomnode.cloud_settings import CloudPlan
from dicomnode.index import prior
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs, Outcome, Request
from dicomnode.index.prior_work import Priors
from dicomnode.priors import Wish
from tests.index.rows import FakeClock, instance, outcome, select, series_row

OLD = {"study": "1.2.1", "StudyDate": "20250101", "PatientBirthDate": "19600101"}
NEW = {"study": "1.2.10", "StudyDate": "20260101", "PatientBirthDate": "19600101"}
VOLUME = {"key": "volume_ml", "segment": "Lung", "unit": "ml"}


def asks(*sources: str, when: tuple[When, ...] = (), compare: bool = True, **match: Any) -> Request:
    wish = Wish(match, None, sources, 60.0, compare)
    return Request("m", ("r",), ("pacs",), "stat", names=("r/m",), step="r/m", needs=Needs((), when, wish))


def arrive(db: Database, series: str, count: int = 2, **fields: Any) -> None:
    Catalogue(db).commit([instance(series, **fields) for _ in range(count)])


def close(db: Database, series: str) -> None:
    row = series_row(db, series)
    Jobs(db).select(row["id"], row["generation"], "r", [])


def wish(db: Database, request: Request) -> int:
    arrive(db, "1.2.20", **NEW)
    return select(db, "1.2.20", request)[0]


def shown(db: Database, job_id: int) -> Row:
    job = Jobs(db).show(job_id)
    assert job is not None
    return job


def finish(db: Database, value: float) -> int:
    job = Jobs(db).lease("w", 60)
    assert job is not None
    results = Outcome(outcome("1.2.1").results, summary={"measurements": [{**VOLUME, "value": value}]})
    Jobs(db).finish(job["id"], "w", results, cloud=CloudPlan("cloud"))
    return int(job["id"])


def test_found_in_the_index_analysed_first_and_compared(db: Database) -> None:
    arrive(db, "1.2.2", **OLD)
    close(db, "1.2.2")
    job_id = wish(db, asks("index"))
    assert (shown(db, job_id)["state"], shown(db, job_id)["prior"]["state"]) == ("waiting", "found")
    earlier = finish(db, 100.0)
    other = shown(db, earlier)
    assert (other["step"], other["destinations"], other["deliveries"], other["SeriesInstanceUID"]) == (
        prior.STEP,
        [],
        [],
        "1.2.2",
    )
    assert db.value("SELECT count(*) FROM sync_items") == 0, "nothing of it leaves"
    job = shown(db, job_id)
    assert job["state"] == "pending"
    assert (job["prior"]["source"], job["prior"]["days"], job["prior"]["job"]) == ("index", 365, earlier)
    row = prior.of_job(db, job_id)
    assert row is not None
    kept = json.loads(row["compared"])
    assert kept["measurements"] == [{**VOLUME, "value": 100.0}] and kept["StudyInstanceUID"] == "1.2.1"
    assert finish(db, 90.0) == job_id and Jobs(db).lease("w", 60) is None


def test_result_that_is_there_is_used(db: Database) -> None:
    arrive(db, "1.2.2", **OLD)
    (before,) = select(db, "1.2.2")
    assert finish(db, 100.0) == before
    job_id = wish(db, asks("index"))
    assert (shown(db, job_id)["state"], shown(db, job_id)["prior"]["job"]) == ("pending", before)


def test_result_of_a_version_that_is_not_active_any_more_is_made_anew(db: Database) -> None:
    arrive(db, "1.2.2", **OLD)
    select(db, "1.2.2")
    finish(db, 100.0)
    with db.transaction():
        db.execute("UPDATE jobs SET model_version = '1.0.0'")
        db.insert("model_versions", {"name": "m", "version": "1.1.0", "state": "active"})
    job_id = wish(db, asks("index"))
    assert shown(db, job_id)["state"] == "waiting"
    finish(db, 101.0)
    assert shown(db, job_id)["state"] == "pending"


@pytest.mark.parametrize("how", ["refuse", "fail"])
def test_earlier_series_that_cannot_be_analysed_holds_nothing_up(db: Database, how: str) -> None:
    arrive(db, "1.2.2", **OLD)
    close(db, "1.2.2")
    job_id = wish(db, asks("index"))
    job = Jobs(db).lease("w", 60)
    assert job is not None
    if how == "refuse":
        Jobs(db).refuse(job["id"], "w", "GAP")
    else:
        Jobs(db).fail(job["id"], "w", "x", max_attempts=1)
    assert shown(db, job_id)["state"] == "pending"


def test_none_goes_on_without(db: Database) -> None:
    arrive(db, "1.2.2", **{**OLD, "PatientBirthDate": "19610101"})
    close(db, "1.2.2")
    job = shown(db, wish(db, asks("index")))
    assert (job["state"], job["prior"]["state"], job["prior"]["last_error"]) == ("pending", "none", "none in index")


def test_condition_on_it(db: Database) -> None:
    job = shown(db, wish(db, asks("index", when=(When(prior=True),))))
    assert (job["state"], job["last_error"]) == (
        "skipped",
        "its condition does not hold: an earlier study is found: none in index",
    )
    other = Request("n", ("r",), (), "stat", step="r/n", needs=Needs((), (When(prior=False),), Wish()))
    Catalogue(db).commit([instance("1.2.20", **NEW)])
    assert shown(db, select(db, "1.2.20", other)[0])["state"] == "pending"


def test_one_that_is_still_coming_in_is_waited_for(db: Database, clock: FakeClock) -> None:
    arrive(db, "1.2.2", **OLD)
    job_id = wish(db, asks("index", "pacs", compare=False))
    work = Priors(db)
    assert work.due_peers() == [] and shown(db, job_id)["state"] == "waiting"
    clock.move(2)
    assert not work.tend()
    close(db, "1.2.2")
    clock.move(2)
    assert work.tend()
    assert (shown(db, job_id)["state"], shown(db, job_id)["prior"]["source"]) == ("pending", "index")


def test_asked_of_a_pacs_sent_and_taken_when_whole(db: Database, clock: FakeClock) -> None:
    job_id, work = wish(db, asks("index", "pacs", compare=False)), Priors(db)
    assert work.due_peers() == ["pacs"]
    row = work.ask("pacs", "courier")
    assert row is not None and work.ask("pacs", "courier") is None
    assert work.wanted(row)["PatientID"] == "P1"
    work.expect(row, ["1.2.2"])
    work.moved(row, "1.2.1", "1.2.2", 3)
    arrive(db, "1.2.2", 2, **OLD)
    assert prior.fetched(db, "1.2.2") and not prior.fetched(db, "1.2.20")
    close(db, "1.2.2")
    work.tend()
    assert shown(db, job_id)["state"] == "waiting", "one of three is missing"
    arrive(db, "1.2.2", 1, **OLD)
    clock.move(1)
    work.tend()
    assert shown(db, job_id)["state"] == "waiting", "its series is not complete yet"
    close(db, "1.2.2")
    clock.move(1)
    assert work.tend()
    assert (shown(db, job_id)["state"], shown(db, job_id)["prior"]["source"]) == ("pending", "pacs")


def test_what_came_and_is_not_what_was_meant_is_not_taken(db: Database) -> None:
    job_id, work = wish(db, asks("pacs", BodyPartExamined="CHEST")), Priors(db)
    row = work.ask("pacs", "courier")
    assert row is not None
    work.moved(row, "1.2.1", "1.2.2", 2)
    arrive(db, "1.2.2", **OLD, BodyPartExamined="HEAD")
    close(db, "1.2.2")
    work.tend()
    again = work.ask("pacs", "courier")
    assert again is not None and json.loads(again["tried"]) == ["1.2.2"]
    work.absent(again, "peer 'pacs' has none that fits")
    job = shown(db, job_id)
    assert (job["state"], job["prior"]["last_error"]) == ("pending", "peer 'pacs' has none that fits")


def test_next_source_where_one_has_none(db: Database) -> None:
    job_id, work = wish(db, asks("first", "second")), Priors(db)
    row = work.ask("first", "courier")
    assert row is not None
    work.absent(row, "x")
    assert work.due_peers() == ["second"] and shown(db, job_id)["state"] == "waiting"


@pytest.mark.parametrize("state", ["pending", "asking", "arriving"])
def test_time_is_over_in_every_state(db: Database, clock: FakeClock, state: str) -> None:
    job_id, work = wish(db, asks("pacs")), Priors(db)
    row = work.ask("pacs", "courier") if state != "pending" else None
    if state == "arriving" and row is not None:
        work.moved(row, "1.2.1", "1.2.2", 2)
    assert work.next_due_in() is not None or state == "asking"
    clock.move(61)
    assert work.tend()
    job = shown(db, job_id)
    assert (job["state"], job["prior"]["state"]) == ("pending", "none")
    assert job["prior"]["last_error"] == "not there within the time set: nothing has come"
    if row is not None:
        work.moved(row, "1.2.1", "1.2.2", 2)  # an answer that comes too late changes nothing
        work.retry(row, "x", first=1, longest=1)
        assert shown(db, job_id)["prior"]["state"] == "none"


def test_what_a_dead_courier_asked_is_asked_again(db: Database) -> None:
    wish(db, asks("pacs"))
    assert Priors(db).ask("pacs", "courier") is not None
    assert Priors(db).due_peers() == []
    assert Priors(db).start() == 1
    assert Priors(db).due_peers() == ["pacs"]


def test_passing_cause_waits_longer_each_time(db: Database, clock: FakeClock) -> None:
    wish(db, asks("pacs"))
    work, waits = Priors(db), []
    for _ in range(4):
        row = work.ask("pacs", "courier")
        assert row is not None
        work.retry(row, "away", first=2.0, longest=8.0)
        wait = work.next_due_in()
        assert wait is not None and work.due_peers() == []
        waits.append(wait)
        clock.move(wait)
    assert waits == [2.0, 4.0, 8.0, 8.0]


def test_job_that_was_superseded_is_not_asked_for_any_more(db: Database) -> None:
    wish(db, asks("pacs"))
    Catalogue(db).commit([instance("1.2.20", **NEW)])
    (second,) = select(db, "1.2.20", asks("pacs"))
    work = Priors(db)
    assert work.tend()
    row = work.ask("pacs", "courier")
    assert row is not None and row["job_id"] == second and work.ask("pacs", "courier") is None


def test_decision_and_its_wish_are_one_transaction(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever insert fails in the selection of the series: it stays open, without jobs and wishes."""
    arrive(db, "1.2.2", **OLD)
    close(db, "1.2.2")
    arrive(db, "1.2.20", **NEW)
    real, tables = db.insert, ("jobs", "job_inputs", "priors")
    before = {t: db.value(f"SELECT count(*) FROM {t}") for t in tables}
    for after in range(6):  # job, 2 inputs, wish, job on the earlier series, 2 inputs of it
        left = after

        def insert(*arguments: Any, **named: Any) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError("power cut")
            return real(*arguments, **named)

        monkeypatch.setattr(db, "insert", insert)
        with pytest.raises(RuntimeError):
            select(db, "1.2.20", asks("index"))
        monkeypatch.undo()
        assert {t: db.value(f"SELECT count(*) FROM {t}") for t in tables} == before
        assert len(Catalogue(db).open_series()) == 1
    assert len(select(db, "1.2.20", asks("index"))) == 1
    assert db.value("SELECT count(*) FROM jobs") == before["jobs"] + 2
