"""Key images whose source does not say that it shows no identity: they stay, told once, or leave by a setting."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicomnode import durable
from dicomnode.cloud_settings import Cloud, CloudPlan, Sync, plan_of
from dicomnode.index.cloud_rows import PICTURES_STAY, hand_to_cloud
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Result
from dicomnode.orders import dump, order_for
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import (
    add_job,
    as_they_are,
    make_settings,
    new_instance,
    secondary_capture,
    sender_of,
    states,
)

ADDRESS = "https://cloud.example/studies"
MARKED = plan_of(Cloud(stow_url=ADDRESS), Sync())
PRIMARY = plan_of(Cloud(stow_url=ADDRESS, key_images="primary"), Sync())
ALL = ("NO", "YES", "primary", "unsaid")


@pytest.fixture
def db(tmp_path: Path) -> Any:
    database = Database(tmp_path)
    yield database
    database.close()


def finished(db: Database, tmp_path: Path, plan: CloudPlan) -> int:
    """A job with a report and a key image of each kind of source."""
    job_id, store = add_job(db, tmp_path), durable.ObjectStore(tmp_path)
    wishes = dump(order_for((), ["SR", "SC"]))
    db._connection().execute("UPDATE jobs SET wishes = ? WHERE id = ?", (wishes, job_id))
    assert Jobs(db).lease("worker", 60.0) is not None
    made = [Result("SR", new_instance(store, "result")), *(Result("SC", new_instance(store, "result"), s) for s in ALL)]
    Jobs(db).finish(job_id, "worker", Outcome(made), cloud=plan)
    return job_id


def queued(db: Database) -> list[str]:
    rows = db.rows("SELECT r.shows FROM sync_items d JOIN results r ON r.id = d.result_id ORDER BY d.id")
    return [r["shows"] for r in rows]


@pytest.mark.parametrize(("plan", "leaving"), [(MARKED, ["", "NO"]), (PRIMARY, ["", "NO", "primary"])])
def test_what_cannot_leave_is_not_queued_and_told_once_for_a_series(
    db: Database, tmp_path: Path, plan: CloudPlan, leaving: list[str]
) -> None:
    job_id = finished(db, tmp_path, plan)
    assert queued(db) == leaving
    [event] = db.rows("SELECT * FROM events WHERE kind = ?", (PICTURES_STAY,))
    assert event["text"].startswith(f"{5 - len(leaving)} key images stay here") and event["severity"] == "info"
    again = db.row("SELECT * FROM jobs WHERE id = ?", (job_id,))
    assert again is not None
    with db.transaction():  # as another revision of the series does
        hand_to_cloud(db, plan, job=again, study_id=1, results=[3, 4, 5], outcome=Outcome([]), identified=False)
    assert len(db.rows("SELECT * FROM events WHERE kind = ?", (PICTURES_STAY,))) == 1
    assert queued(db) == leaving, "nothing is parked, and nothing is sent twice"


def test_with_identity_all_of_them_leave(db: Database, tmp_path: Path) -> None:
    job_id = finished(db, tmp_path, replace(MARKED, destination=""))
    job = db.row("SELECT * FROM jobs WHERE id = ?", (job_id,))
    assert job is not None
    with db.transaction():
        hand_to_cloud(db, MARKED, job=job, study_id=1, results=range(1, 6), outcome=Outcome([]), identified=True)
    assert queued(db) == ["", *ALL]
    assert db.rows("SELECT * FROM events WHERE kind = ?", (PICTURES_STAY,)) == []


@pytest.mark.parametrize(("word", "left"), [("primary", "stored"), ("marked", "rejected")])
def test_the_word_counts_when_it_leaves(db: Database, tmp_path: Path, word: str, left: str) -> None:
    """A picture that was queued while "primary" was set; it does not say anything of identity, and does not then."""
    finished(db, tmp_path, PRIMARY)
    store = durable.ObjectStore(tmp_path)
    for row in db.rows("SELECT id, file FROM results WHERE shows IN ('primary', 'unsaid')"):
        ds = dcmread(BytesIO(secondary_capture()[1]))
        del ds.BurnedInAnnotation
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"2.25.{row['id']}"
        ds.save_as(store.path(row["file"]), enforce_file_format=True)
        digest = durable.sha256_file(store.path(row["file"]))
        db._connection().execute("UPDATE results SET sha256 = ? WHERE id = ?", (digest, row["id"]))
    fake = FakeCloud()

    async def main() -> None:
        async with served(fake.handle) as url:
            settings = make_settings(tmp_path, cloud={"stow_url": url, "key_images": word})
            await sender_of(settings, db).flush()

    asyncio.run(main())
    assert states(db) == ["stored", "stored", left]
    assert all(
        ("BurnedInAnnotation" not in dcmread(BytesIO(b))) is (n == 2) for n, b in enumerate(fake.stored.values())
    )


def test_pictures_that_were_to_leave_with_identity_leave_without_it_when_that_is_taken_back(
    db: Database, tmp_path: Path
) -> None:
    finished(db, tmp_path, PRIMARY)
    as_they_are(db)
    db._connection().execute("UPDATE results SET shows = 'unsaid'")
    fake = FakeCloud()

    async def main() -> None:
        async with served(fake.handle) as url:
            settings = make_settings(tmp_path, cloud={"stow_url": url, "key_images": "primary"}, rules=[])
            await sender_of(settings, db).flush()

    asyncio.run(main())
    for content in fake.stored.values():
        assert b"CANARY" not in content
