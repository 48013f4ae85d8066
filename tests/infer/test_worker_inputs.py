"""The worker analyses what was acknowledged, or says why not; a stop costs no attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicomnode.durable import ObjectStore
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.worker import Worker
from dicomnode.settings import Settings
from tests.index.rows import job


@pytest.fixture
def db(tmp_path: Path):
    made = Database(tmp_path / "data")
    yield made
    made.close()


def test_a_flipped_bit_is_found_before_the_analysis(db: Database, tmp_path: Path) -> None:
    job_id = job(db)
    store = ObjectStore(tmp_path / "data")
    store.prepare()
    for row in db.rows("SELECT file FROM instances"):
        store.path(row["file"]).parent.mkdir(exist_ok=True)
        store.path(row["file"]).write_bytes(b"not what was acknowledged")
    settings = Settings(node={"data_dir": tmp_path / "data"})
    models = type("Models", (), {"for_job": lambda self, reference, record: object()})()
    worker = Worker(settings, db, models, lambda *_: (), owner="w", decoder=InlineDecoder(), on_results=lambda: None)
    assert worker.run_once()
    shown = Jobs(db).show(job_id)
    assert shown["state"] == "pending" and "SHA-256" in shown["last_error"]


def test_a_stop_hands_the_job_back_and_costs_no_attempt(db: Database) -> None:
    job_id = job(db)
    jobs = Jobs(db)
    for _ in range(20):
        assert jobs.lease("w", 60)["id"] == job_id
        assert jobs.hand_back("w") == 1
    assert jobs.show(job_id)["state"] == "pending" and jobs.show(job_id)["attempts"] == 0
    assert jobs.hand_back("other") == 0
