"""Jobs on a GPU stand-in that is full, or whose engine cache is damaged: none is lost, each is done once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.infer import endings as endings_module
from dicomnode.infer.choice import EngineChoice
from dicomnode.infer.cuda import CudaError
from dicomnode.infer.worker import Worker
from tests.infer.fake_trt import FakeTrt
from tests.infer.life_case import add_series, add_version, settings_of, worker_on
from tests.infer.test_choice import LIMITS, box, damage
from tests.infer.test_engines_contract import ONNX

FULL = CudaError("copy to the device", 2, "out of memory")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    add_version(tmp_path, "1.0.0")
    made = Database(tmp_path / "data")
    Models(made).activate("ct-lung", "1.0.0")
    yield made
    made.close()


class Box:
    """A worker on a GPU whose TensorRT engine for ct-lung is built."""

    def __init__(self, folder: Path, db: Database, setting: str) -> None:
        self.folder, self.db, self.setting = folder, db, setting
        self.engines, self.trt, _ = box(folder)
        self.engines[0].build(ONNX, "fp32")
        self.worker = self.start()

    def start(self) -> Worker:
        choice = EngineChoice(self.setting, self.engines, limits=LIMITS)
        return worker_on(settings_of(self.folder), self.db, choice)

    def fill(self, *calls: str) -> None:
        """Another program takes the memory of the GPU."""
        self.trt.cuda.fail |= dict.fromkeys(calls, FULL)

    def show(self, job_id: int) -> Row:
        found = Jobs(self.db).show(job_id)
        assert found is not None
        return found

    def assert_done_once(self, job_id: int, engine: str) -> None:
        job = self.show(job_id)
        assert (job["state"], [r["kind"] for r in job["results"]]) == ("done", ["SEG", "SR"])
        assert job["summary"]["engine"].startswith(engine) and len(job["deliveries"]) == 2
        assert self.db.value("SELECT count(*) FROM results") == 2 * self.db.value("SELECT count(*) FROM jobs")


def test_the_gpu_gets_full_under_a_job_and_the_next_engine_does_it(tmp_path: Path, db: Database) -> None:
    """Smaller batches first, down to one slice; then another engine; the job takes one attempt."""
    node = Box(tmp_path, db, "auto")
    first = add_series(db)
    assert node.worker.run_once()
    node.assert_done_once(first, "tensorrt")
    node.fill("copy_in")
    second = add_series(db)
    shapes = len(node.trt.executed)
    assert node.worker.run_once()
    node.assert_done_once(second, "onnxruntime-gpu")
    assert len(node.trt.executed) == shapes and node.show(second)["attempts"] == 1
    node.trt.cuda.fail.clear()
    third = add_series(db)
    assert node.worker.run_once()
    node.assert_done_once(third, "tensorrt")


@pytest.mark.parametrize("when", ["at the start of the worker", "under a job"])
def test_a_named_engine_without_memory_waits_however_long_others_take(tmp_path: Path, db: Database, when: str) -> None:
    """No attempt is used, the operator is told once, and the study is done when the memory is back."""
    node = Box(tmp_path, db, "tensorrt")
    if when == "under a job":
        node.worker._models.get("ct-lung")
    node.fill("copy_in", "allocate")
    job_id = add_series(db)
    for wait in range(1, 13):  # more than max_attempts
        assert node.worker.run_once()
        job = node.show(job_id)
        assert (job["state"], job["attempts"], job["waits"], job["results"]) == ("pending", 0, wait, [])
        assert "OOM" in job["last_error"]
        with db.transaction():
            db.execute("UPDATE jobs SET next_at = 0")
    assert [e["subject"] for e in Events(db).listing(kind="job-waits")] == [f"job {job_id}"]
    bad = [r for r in Runs(db).recent("ct-lung", "1.0.0", 99) if r.state == "error"]
    assert len(bad) == (when == "under a job"), "one study does not make a version look bad twelve times"
    node.trt.cuda.fail.clear()
    assert node.start().run_once()
    node.assert_done_once(job_id, "tensorrt")


def test_a_series_that_never_fits_is_parked_at_last(
    tmp_path: Path, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings_module, "MEMORY_WAITS", 2)
    node = Box(tmp_path, db, "tensorrt")
    node.worker._models.get("ct-lung")
    node.fill("copy_in")
    job_id = add_series(db)
    tries = 0
    while node.show(job_id)["state"] == "pending":
        assert node.worker.run_once()
        tries += 1
        with db.transaction():
            db.execute("UPDATE jobs SET next_at = 0")
    job = node.show(job_id)
    assert (job["state"], job["waits"], tries) == ("failed", 2, 2 + node.worker._settings.inference.max_attempts)


def test_a_version_that_needs_more_memory_than_there_is_goes_back(
    tmp_path: Path, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting would keep every study of it for hours: the errors count, and the version before does them."""
    add_version(tmp_path, "1.1.0")
    node = Box(tmp_path, db, "tensorrt")
    Life(db).canary("ct-lung", "1.1.0", percent=100, who="me")
    node.worker._models.get("ct-lung@1.1.0")
    node.fill("copy_in")
    jobs = [add_series(db) for _ in range(3)]
    assert all(node.worker.run_once() for _ in jobs)
    assert Life(db).state("ct-lung", "1.1.0") == "retired"
    node.trt.cuda.fail.clear()
    with db.transaction():
        db.execute("UPDATE jobs SET next_at = 0")
    assert all(node.worker.run_once() for _ in jobs)
    assert {node.show(job_id)["model_version"] for job_id in jobs} == {"1.0.0"}


def test_a_damaged_cache_delays_no_study(tmp_path: Path, db: Database) -> None:
    """The worker comes back, finds its engine damaged, and does the study at once on the next one."""
    node = Box(tmp_path, db, "auto")
    damage(tmp_path)
    go, build = threading.Event(), node.engines[0].build

    def slowly(onnx: bytes, precision: str, report: object = None) -> None:
        assert go.wait(30)
        build(onnx, precision, report)

    node.engines[0].build = slowly
    better = threading.Event()
    worker = node.start()
    worker._models._upgrades._on_ready = better.set
    first = add_series(db)
    assert worker.run_once()
    node.assert_done_once(first, "onnxruntime-gpu")
    go.set()
    assert better.wait(30)
    second = add_series(db)
    assert worker.run_once()
    node.assert_done_once(second, "tensorrt")
    assert isinstance(node.trt, FakeTrt) and len(node.trt.builds) == 2
