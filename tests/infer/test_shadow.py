"""Comparisons beside the clinical work: real child processes, stopped, killed, and heard of nowhere else."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.infer import shadow_child
from dicomnode.infer.cuda import CudaError
from dicomnode.infer.shadow import LEAST_SHARE, Shadows, beside
from dicomnode.infer.worker import Worker
from dicomnode.settings import Settings
from tests.infer.life_case import add_series, add_version, settings_of, worker_on
from tests.infer.test_choice import box
from tests.infer.test_engines_contract import ONNX
from tests.peers import wait_for

TABLES = ("results", "deliveries", "sync_items", "notifications", "instances", "jobs", "job_inputs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_version(tmp_path, "1.0.0")
    add_version(tmp_path, "1.1.0")
    return tmp_path


@pytest.fixture
def db(folder: Path) -> Iterator[Database]:
    made = Database(folder / "data")
    yield made
    made.close()


class Case:
    def __init__(self, folder: Path, db: Database, **rollout: Any) -> None:
        self.db = db
        self.settings: Settings = settings_of(folder, rollout=rollout)
        self.worker: Worker = worker_on(self.settings, db)
        self.shadows = Shadows(self.settings, db, self.worker.router)
        Models(db).activate("ct-lung", "1.0.0")

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        def step() -> Any:
            self.shadows.go_on()
            return condition()

        try:
            return wait_for(step, 60, what)
        finally:
            self.shadows.pause()

    def finished(self) -> list[dict[str, Any]]:
        return [r for r in Runs(self.db).comparisons("ct-lung") if r["state"] != "running"]

    def counts(self) -> dict[str, int]:
        return {t: int(self.db.value(f"SELECT count(*) FROM {t}")) for t in TABLES}


def test_shadow_compares_and_its_results_go_nowhere(folder: Path, db: Database) -> None:
    """Stopped on its way by a clinical job, it goes on afterwards; the same model agrees with itself."""
    case = Case(folder, db)
    early = add_series(db)
    assert case.worker.run_once()
    Life(db).shadow("ct-lung", "1.1.0", who="me")
    job_id = add_series(db)
    assert case.worker.run_once()
    before, files = case.counts(), sorted(p for p in (folder / "data" / "objects").rglob("*") if p.is_file())
    case.shadows.go_on()
    pid = case.shadows.child_pid
    assert pid is not None
    child = psutil.Process(pid)
    case.shadows.pause()
    wait_for(lambda: child.status() == psutil.STATUS_STOPPED, 10, "the child is stopped")
    assert child.nice() == 19 or child.cpu_times().user < 5  # it may not have come that far
    case.shadows.go_on()
    [row] = case.until(case.finished, "the comparison is done")
    assert (row["job_id"], row["version"], row["other_version"], row["role"]) == (job_id, "1.1.0", "1.0.0", "shadow")
    assert row["error"] is None and row["state"] == "done"
    assert (row["least_dice"], row["greatest_difference"], row["same_findings"]) == (
        1.0,
        pytest.approx(0, abs=1e-6),
        True,
    )
    assert set(row["dice"]) == {"Left lung", "Right lung"}
    assert row["seconds"] > 0 and row["other_seconds"] > 0
    assert case.counts() == before
    assert sorted(p for p in (folder / "data" / "objects").rglob("*") if p.is_file()) == files
    case.shadows.go_on()
    assert not case.shadows.busy, "what was analysed before the shadow began is not compared"
    assert not [c for c in Runs(db).comparisons("ct-lung") if c["job_id"] == early]


def test_a_canary_is_compared_with_the_active_version(folder: Path, db: Database) -> None:
    """The canary's result is the one that is delivered; a disagreement rolls it back."""
    case = Case(folder, db, min_runs=1, min_dice=1.0, max_difference=0.0, max_disagreement=0.0)
    Life(db).canary("ct-lung", "1.1.0", percent=100, who="me")
    job_id = add_series(db)
    assert case.worker.run_once()
    shown = Jobs(db).show(job_id)
    assert shown is not None and shown["model_version"] == "1.1.0" and len(shown["deliveries"]) == 2
    # As if the canary had measured something else.
    summary = shown["summary"]
    summary["measurements"][0]["value"] *= 2
    with db.transaction():
        db.execute("UPDATE jobs SET summary = ? WHERE id = ?", (json.dumps(summary), job_id))
    [row] = case.until(case.finished, "the comparison is done")
    assert (row["version"], row["other_version"], row["role"]) == ("1.1.0", "1.0.0", "canary")
    assert row["least_dice"] == 1.0 and row["greatest_difference"] > 0.1
    assert Life(db).state("ct-lung", "1.1.0") == "retired"
    assert Life(db).rolled_back()[0]["why"].startswith("disagreement: 100% of 1")


def test_a_child_that_dies_or_takes_too_long_costs_its_comparison_only(folder: Path, db: Database) -> None:
    case = Case(folder, db, shadow_seconds=1000)
    Life(db).shadow("ct-lung", "1.1.0", who="me")
    add_series(db)
    assert case.worker.run_once()
    case.shadows.go_on()
    assert case.shadows.child_pid is not None
    os.kill(case.shadows.child_pid, signal.SIGKILL)
    [row] = case.until(case.finished, "the failure is noted")
    assert row["state"] == "failed" and "ended (code -9)" in row["error"]
    assert "model-comparison" in {e["kind"] for e in Events(db).listing()}
    case.shadows.go_on()
    assert not case.shadows.busy, "it is not tried without end"
    add_series(db)
    assert case.worker.run_once()
    case.shadows.go_on()
    case.shadows._settings = settings_of(folder, rollout={"shadow_seconds": 1.0001})
    rows = case.until(lambda: len(case.finished()) == 2 and case.finished(), "it is ended")
    assert "took more than 1.0001 s" in rows[0]["error"] or rows[0]["state"] == "done"
    case.shadows.close()


def test_a_worker_that_ends_leaves_no_child_and_its_comparison_is_made_up_for(folder: Path, db: Database) -> None:
    case = Case(folder, db)
    Life(db).shadow("ct-lung", "1.1.0", who="me")
    add_series(db)
    assert case.worker.run_once()
    case.shadows.go_on()
    pid = case.shadows.child_pid
    case.shadows.pause()
    case.shadows.close()
    assert pid is not None and not psutil.pid_exists(pid)
    assert case.finished() == []
    again = Shadows(case.settings, db, case.worker.router)
    again.go_on()
    assert again.busy
    again.close()


def test_what_was_replaced_since_the_analysis_is_not_compared(folder: Path, db: Database) -> None:
    """The two versions would have seen different images."""
    case = Case(folder, db)
    Life(db).shadow("ct-lung", "1.1.0", who="me")
    job_id = add_series(db)
    assert case.worker.run_once()
    with db.transaction():
        db.execute("UPDATE instances SET dataset_sha256 = 'other' WHERE id = (SELECT min(id) FROM instances)")
    case.shadows.go_on()
    [row] = case.finished()
    assert (row["job_id"], row["state"], row["error"]) == (
        job_id,
        "failed",
        "an image was replaced after the job's analysis",
    )
    assert not case.shadows.busy


def test_no_child_can_be_made_and_the_worker_goes_on(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box without memory for a process: nothing is raised, nothing is left open, and it is tried once more."""
    case = Case(folder, db)
    Life(db).shadow("ct-lung", "1.1.0", who="me")
    add_series(db)
    assert case.worker.run_once()

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = psutil.Process().num_fds()
    with monkeypatch.context() as patch:
        patch.setattr("dicomnode.infer.shadow.subprocess.Popen", refused)
        case.shadows.go_on()
    assert not case.shadows.busy and psutil.Process().num_fds() == before
    case.shadows.go_on()
    assert case.shadows.busy
    case.shadows.close()
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("trouble", ["not built", "no memory beside the clinical work"])
def test_a_comparison_that_gets_no_gpu_is_made_on_the_cpu(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A stopped child keeps its memory of the GPU: it takes no more than the clinical work leaves."""
    case = Case(folder, db)
    Life(db).shadow("ct-lung", "1.1.0", who="me")
    add_series(db)
    assert case.worker.run_once()
    tasks: list[shadow_child.Task] = []

    def caught(**fields: Any) -> shadow_child.Task:
        tasks.append(shadow_child.Task(**fields))
        raise OSError

    monkeypatch.setattr("dicomnode.infer.shadow.Task", caught)
    case.shadows.go_on()
    assert tasks[0].gpu_memory_share == pytest.approx(0.2) and beside(1.0) == LEAST_SHARE
    engines, trt, _ = box(folder)
    if trouble != "not built":
        engines[0].build(ONNX, "fp32")
        trt.cuda.fail["copy_in"] = CudaError("copy", 2, "out of memory")
    monkeypatch.setattr("dicomnode.infer.engine.default_engines", lambda *_: engines)
    answer = shadow_child.run(replace(tasks[0], engine="tensorrt"))
    assert "error" not in answer and answer["least_dice"] == 1.0 and not trt.executed
