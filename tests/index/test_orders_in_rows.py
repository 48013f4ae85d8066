"""Orders in the rows: fallback, debts of reports, urgency; all of it survives the process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dicomnode.cloud_settings import CloudPlan
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import REPORT_TRIES, Jobs, Outcome, Result
from dicomnode.index.notices import Notices
from dicomnode.index.outbox import Outbox
from dicomnode.index.urgency import Alerts
from dicomnode.orders import order_for
from tests.index.rows import FakeClock, finished_job, instance, job, outcome, request, select, uid

LABELMAP_KINDS = ("LABELMAP", "LABELMAP-SR", "SEG", "SR")


def ordered_job(db: Database, destinations: tuple[str, ...] = ("pacs", "new"), **wishes: object) -> int:
    series = uid()
    Catalogue(db).commit([instance(series)])
    order = order_for(destinations, **wishes)  # type: ignore[arg-type]
    (made,) = select(db, series, replace(request(destinations=destinations), order=order, notify=("ris",)))
    assert Jobs(db).lease("w", 60) is not None
    return made


def test_a_refused_label_map_takes_its_report_along_and_the_notice_too(db: Database, clock: FakeClock) -> None:
    job_id = ordered_job(db, seg="labelmap")
    Jobs(db).finish(job_id, "w", outcome(kinds=LABELMAP_KINDS))
    box = Outbox(db, "deliveries")
    items = box.lease("pacs", "c", 60, 10)
    assert [i["kind"] for i in items] == ["LABELMAP", "LABELMAP-SR"]
    assert not box.fall_back(items[0]["id"], "somebody else", "no")
    assert box.fall_back(items[0]["id"], "c", "it takes none")
    box.retry(items[1]["id"], "c", "goes later", first=2, longest=9)  # what the sender says of the rest: too late
    listed = {i["kind"]: i for i in box.listing() if i["destination"] == "pacs"}
    assert {k: (v["instead_of"], v["state"]) for k, v in listed.items()} == {
        "SEG": ("LABELMAP", "pending"),
        "SR": ("LABELMAP-SR", "pending"),
    }
    assert {i["kind"] for i in box.listing() if i["destination"] == "new"} == {"LABELMAP", "LABELMAP-SR"}
    again = Outbox(db, "deliveries").lease("pacs", "another life", 60, 10)
    assert [i["kind"] for i in again] == ["SEG", "SR"]
    assert not box.fall_back(again[0]["id"], "another life", "twice"), "there is nothing left to fall back to"
    for item in again:
        box.stored(item["id"], "another life")
    assert Notices(db).release() == 1, "the notice waits for what the peer gets, not for what it refused"


def test_each_destination_gets_its_kinds_and_the_cloud_the_binary(db: Database) -> None:
    job_id = ordered_job(db, ("pacs",), seg="labelmap", kinds=("SEG",))
    Jobs(db).finish(job_id, "w", outcome(kinds=LABELMAP_KINDS), cloud=CloudPlan("cloud"))
    assert [i["kind"] for i in Outbox(db, "deliveries").listing()] == ["LABELMAP"]
    assert [i["kind"] for i in Outbox(db, "sync_items").listing()] == ["SEG"]


@pytest.mark.parametrize("how", ["refused", "failed", "lost"])
def test_a_report_is_owed_until_it_is_committed(db: Database, clock: FakeClock, how: str) -> None:
    jobs = Jobs(db)
    job_id = ordered_job(db, ("pacs",), report_failures=True)
    if how == "refused":
        jobs.refuse(job_id, "w", "GAP: a slice is missing")
    elif how == "failed":
        jobs.fail(job_id, "w", "x", max_attempts=1)
    else:
        clock.move(61)
        jobs.expire(1)
    owed = jobs.owed_report()
    assert owed is not None and owed["id"] == job_id
    assert jobs.owed_report() is None, "not at once again"
    clock.move(11)  # the process died meanwhile
    assert jobs.owed_report() is not None
    report = Outcome([Result("SR", instance(uid(), origin="result"))])
    assert jobs.reported(job_id, report)
    clock.move(11)
    assert jobs.owed_report() is None
    (item,) = Outbox(db, "deliveries").listing()
    assert (item["kind"], item["destination"]) == ("SR", "pacs")
    jobs.retry(job_id)
    assert not jobs.reported(job_id, report), "it runs again: there is no failure to report"


def test_a_second_failure_of_one_job_makes_no_second_object_of_the_same_uid(db: Database, clock: FakeClock) -> None:
    """Its report has the UIDs of the first one and other bytes (times, the number of attempts): the first one stays."""
    jobs = Jobs(db)
    job_id = ordered_job(db, ("pacs",), report_failures=True)
    first = instance(uid(), origin="result")
    for stored in (first, replace(first, file="other", sha256="f" * 64, dataset_sha256="e" * 64)):
        jobs.fail(job_id, "w", "x", max_attempts=1)
        assert jobs.owed_report() is not None
        assert jobs.reported(job_id, Outcome([Result("SR", stored)]))
        (item,) = Outbox(db, "deliveries").listing()
        assert db.value("SELECT sha256 FROM results") == first.sha256
        assert db.value("SELECT count(*) FROM results") == 1
        jobs.retry(job_id)
        assert jobs.lease("w", 60) is not None
        clock.move(11)
    assert item["kind"] == "SR"


def test_a_report_that_kills_its_worker_is_not_tried_for_ever(db: Database, clock: FakeClock) -> None:
    jobs = Jobs(db)
    jobs.refuse(ordered_job(db, ("pacs",), report_failures=True), "w", "x")
    for _ in range(REPORT_TRIES):
        assert jobs.owed_report() is not None
        clock.move(11)
    assert jobs.owed_report() is None


def test_a_passing_cause_uses_up_no_try_of_a_report(db: Database, clock: FakeClock) -> None:
    jobs = Jobs(db)
    job_id = ordered_job(db, ("pacs",), report_failures=True)
    jobs.refuse(job_id, "w", "x")
    begun = clock.now
    for _ in range(10 * REPORT_TRIES):
        assert jobs.owed_report() is not None
        jobs.report_waits(job_id)
        assert jobs.owed_report() is None, "not at once again"
        clock.move(301)
    assert clock.now > begun
    assert jobs.owed_report() is not None
    jobs.report_waits(job_id, at_once=True)
    for _ in range(REPORT_TRIES):
        assert jobs.owed_report() is not None
        clock.move(11)
    assert jobs.owed_report() is None
    jobs.retry(job_id)
    jobs.report_waits(job_id)
    assert db.value("SELECT report_owed FROM jobs") == 0, "it runs again"


def test_where_no_rule_asks_nothing_is_owed(db: Database) -> None:
    jobs = Jobs(db)
    jobs.refuse(ordered_job(db, ("pacs",)), "w", "x")
    assert jobs.owed_report() is None


def test_critical_results_go_first_and_keep_the_order_of_their_study(db: Database) -> None:
    finished_job(db, study="1.2.1")
    finished_job(db, study="1.2.2")
    job_id = job(db, study="1.2.2")
    Jobs(db).lease("w", 60)
    Jobs(db).finish(job_id, "w", replace(outcome("1.2.2"), critical=("volume", "volume")))
    items = Outbox(db, "deliveries").lease("pacs", "c", 60, 10)
    assert [i["id"] for i in items] == [3, 4, 5, 6, 1, 2]
    (alert,) = Alerts(db).listing()
    assert alert["keys"] == ["volume"] and alert["state"] == "pending"
    assert json.loads(Jobs(db).listing()[0]["critical"]) == ["volume", "volume"]


def test_an_alert_waits_ends_and_comes_back_by_hand(db: Database, clock: FakeClock, tmp_path: Path) -> None:
    job_id = job(db)
    Jobs(db).lease("w", 60)
    Jobs(db).finish(job_id, "w", replace(outcome(), critical=("k",)))
    alerts = Alerts(db)
    (alert,) = alerts.due()
    alerts.retry(alert["id"], "503", first=2, longest=60)
    assert alerts.due() == []
    clock.move(3)
    assert [a["uuid"] for a in alerts.due()] == [alert["uuid"]]
    alerts.reject(alert["id"], "422")
    clock.move(999)
    assert alerts.due() == [] and alerts.counts() == {"pending": 0, "stored": 0, "rejected": 1}
    alerts.requeue(alert["id"])
    alerts.stored(alert["id"])
    assert alerts.counts()["stored"] == 1


def test_nobody_is_told_where_no_webhook_is_set(db: Database) -> None:
    job_id = job(db)
    Jobs(db).lease("w", 60)
    Jobs(db).finish(job_id, "w", replace(outcome(), critical=("k",), alert=False))
    assert Alerts(db).listing() == [] and Jobs(db).listing()[0]["critical"]
