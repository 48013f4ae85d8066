"""Reports of failure: a full disk or a stop costs no try, a report that cannot be made ends some time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dicomnode.errors import DiskFull
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import REPORT_TRIES, Jobs, Request
from dicomnode.index.operation import Events
from dicomnode.infer.failure_reports import FailureReports
from dicomnode.infer.job_files import JobFiles
from dicomnode.orders import Order
from dicomnode.settings import Settings
from tests.index.rows import FakeClock, instance, series_row


def refused(db: Database) -> int:
    """A refused job whose rule wants a report."""
    Catalogue(db).commit([instance()])
    row = series_row(db, "1.2.20")
    order = Order(kinds={"pacs": ("SR",)}, report_to=("pacs",))
    request = Request("m", ("rule",), ("pacs",), "routine", order=order)
    [job_id] = Jobs(db).select(row["id"], row["generation"], "because", [request])
    Jobs(db).lease("w", 60)
    Jobs(db).refuse(job_id, "w", "GAP: a slice is missing")
    return job_id


def reports(db: Database, tmp_path: Path, report: Callable[..., object]) -> FailureReports:
    settings = Settings(node={"data_dir": tmp_path / "data"})
    return FailureReports(settings, db, JobFiles(Jobs(db), tmp_path / "data"), lambda reference: None, report)


def owed(db: Database, job_id: int) -> int:
    return int(db.value("SELECT report_owed FROM jobs WHERE id = ?", (job_id,)))


def test_a_full_disk_costs_no_try_and_is_told_once(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    job_id = refused(db)

    def full(*_: object) -> None:
        raise DiskFull("write object", "no space left", "Free some")

    made = reports(db, tmp_path, full)
    for _ in range(REPORT_TRIES + 2):
        assert made.run_once(lambda: None)
        assert not made.run_once(lambda: None), "it waits"
        clock.move(301)
    assert owed(db, job_id) == REPORT_TRIES
    assert [e["kind"] for e in Events(db).listing()] == ["report-waits"]


def test_a_report_that_cannot_be_made_ends_and_is_told(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    refused(db)

    def broken(*_: object) -> None:
        raise KeyError("a mistake of ours")

    made = reports(db, tmp_path, broken)
    for _ in range(REPORT_TRIES):
        assert made.run_once(lambda: None)
        clock.move(301)
    assert not made.run_once(lambda: None)
    assert [e["kind"] for e in Events(db).listing()] == ["report-impossible"]


def test_a_stop_in_the_middle_of_it_costs_no_try(db: Database, tmp_path: Path) -> None:
    job_id = refused(db)
    seen: list[int] = []

    def stopped(*_: object) -> None:
        seen.append(owed(db, job_id))
        made.hand_back()  # from another thread, in life; the process ends right after it
        seen.append(owed(db, job_id))
        raise SystemExit

    made = reports(db, tmp_path, stopped)
    with pytest.raises(SystemExit):
        made.run_once(lambda: None)
    assert seen == [REPORT_TRIES - 1, REPORT_TRIES]
    assert Jobs(db).owed_report() is not None, "due at once"
