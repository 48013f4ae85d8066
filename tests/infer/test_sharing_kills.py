"""SIGKILL of a worker while studies share a batch: none is lost, none is done twice, none is parked for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest

from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events
from dicomnode.index.runs import Runs
from tests.e2e.harness import python_environment
from tests.infer.life_case import worker_on
from tests.infer.sharing_case import PHASES, queue, settings_of, triage

Kill = Callable[[str, Path], int]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.infer.sharing_case"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **python_environment()},
    )
    assert process.stdin is not None and process.stdout is not None
    given, told = process.stdin, process.stdout

    def in_phase(phase: str, folder: Path) -> int:
        given.write(f"{phase} in {folder}\n")
        given.flush()
        return int(told.readline())

    yield in_phase
    given.close()
    assert process.wait(10) == 0
    told.close()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    triage(tmp_path / "models")
    made = Database(tmp_path / "data")
    worker_on(settings_of(tmp_path), made)
    yield made
    made.close()


def assert_done_once(db: Database, job_id: int, number: int) -> None:
    """One SEG and one SR about the image that is its own."""
    job = Jobs(db).show(job_id)
    assert job is not None and job["state"] == "done" and len(job["deliveries"]) == 2
    assert [r["kind"] for r in job["results"]] == ["SEG", "SR"]
    image = db.value("SELECT SOPInstanceUID FROM job_inputs WHERE job_id = ?", (job_id,))
    for result in job["results"]:
        ds = pydicom.dcmread(db.data_dir / "objects" / result["file"])
        assert ds.PatientID == f"P{number}" and str(image) in ds.to_json()


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_company(kill: Kill, tmp_path: Path, db: Database, phase: str) -> None:
    ids = [queue(db, number) for number in range(1, 6)]
    assert kill(phase, tmp_path) == signal.SIGKILL
    held = db.rows("SELECT state, batch_studies FROM jobs")
    ended = 3 if phase == "third committed" else 2 if phase == "third encoded" else 0
    assert [r["state"] for r in held] == ["done"] * ended + ["running"] * (5 - ended)
    assert [r["batch_studies"] for r in held] == [5] * 5
    worker = worker_on(settings_of(tmp_path, max_attempts=1), db)
    while worker.run_once():
        pass
    for number, job_id in enumerate(ids, 1):
        assert_done_once(db, job_id, number)
    again = db.rows("SELECT attempts, batch_studies FROM jobs WHERE id > ?", (ids[0] + ended - 1,))
    assert [(r["attempts"], r["batch_studies"]) for r in again] == [(1, 0)] * (5 - ended), "alone, and it is the first"
    assert db.value("SELECT count(*) FROM results") == 10 and not Events(db).listing(kind="job-failed")
    states = [r.state for r in Runs(db).recent("triage", "1.0.0", 20)]
    assert "lost" not in states, "no version is blamed either"


def test_the_study_that_kills_is_parked_by_its_own_deaths_alone(kill: Kill, tmp_path: Path, db: Database) -> None:
    ids = [queue(db, 1), queue(db, 2, poison=True), queue(db, 3), queue(db, 4)]
    deaths = 0
    while kill("poison", tmp_path) == signal.SIGKILL:
        deaths += 1
        assert deaths < 8
    assert deaths == 1 + 3, "once in company, then max_attempts times alone"
    jobs = [Jobs(db).show(n) for n in ids]
    assert [j and j["state"] for j in jobs] == ["done", "failed", "done", "done"]
    assert [j and j["attempts"] for j in jobs] == [1, 3, 1, 1]
    for number, job_id in ((1, ids[0]), (3, ids[2]), (4, ids[3])):
        assert_done_once(db, job_id, number)
    [event] = Events(db).listing(kind="job-failed")
    assert event["subject"] == f"job {ids[1]}"
