"""SIGKILL in every phase of a job and swaps of the model under it: one result, from one version, whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from dicomnode.chains import Needs, When
from dicomnode.errors import EngineError
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Request
from dicomnode.index.life import Change, Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.choice import NotBuilt
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.worker import Worker
from tests.e2e.harness import SEG, make_series, python_environment
from tests.infer.life_case import PHASES, add_series, add_version, boxes, settings_of, worker_on


@pytest.fixture(scope="module")
def killer() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.infer.life_case"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **python_environment()},
    )
    yield process
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()


@pytest.fixture(autouse=True)
def _boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadyModel, "analyse", boxes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for version in ("1.0.0", "1.1.0"):
        add_version(tmp_path, version)
    return tmp_path


@pytest.fixture
def db(folder: Path) -> Iterator[Database]:
    made = Database(folder / "data")
    worker_on(settings_of(folder), made)
    Models(made).activate("ct-lung", "1.0.0")
    yield made
    made.close()


def kill_in(killer: subprocess.Popen[str], phase: str, folder: Path) -> None:
    assert killer.stdin is not None and killer.stdout is not None
    killer.stdin.write(f"{phase} {folder}\n")
    killer.stdin.flush()
    assert int(killer.stdout.readline()) == signal.SIGKILL


def assert_one_result(db: Database, folder: Path, job_id: int, version: str) -> None:
    """One SEG and one SR, whose UIDs, provenance and rows all are of ``version``."""
    job = Jobs(db).show(job_id)
    assert job is not None
    assert (job["state"], job["model_version"]) == ("done", version)
    bundle = load_bundle(folder / "models" / "ct-lung" / version)
    assert job["model_digest"] == bundle.digest
    assert [r["kind"] for r in job["results"]] == ["SEG", "SR"]
    assert [r["SOPInstanceUID"] for r in job["results"]] == [job["identity"]["seg_uid"], job["identity"]["sr_uid"]]
    assert [d["state"] for d in job["deliveries"]] == ["pending", "pending"]
    assert db.value("SELECT count(*) FROM results WHERE job_id = ?", (job_id,)) == 2
    for result in job["results"]:
        ds = pydicom.dcmread(folder / "data" / "objects" / result["file"])
        [equipment] = ds.ContributingEquipmentSequence
        assert (equipment.ManufacturerModelName, equipment.SoftwareVersions) == ("ct-lung", version)
        for fact in (f"bundle SHA-256 {bundle.digest}", "engine onnxruntime-cpu 1.", "precision fp32"):
            assert fact in equipment.ContributionDescription
        if ds.SOPClassUID == SEG:
            for segment in ds.SegmentSequence:
                [algorithm] = segment.SegmentationAlgorithmIdentificationSequence
                assert algorithm.AlgorithmVersion == version
                assert f"bundle SHA-256 {bundle.digest}" in algorithm.AlgorithmParameters
        else:
            parameters = texts(ds, "111002")
            assert f"bundle SHA-256 {bundle.digest}" in parameters and "precision fp32" in parameters
            assert any(p.startswith("engine onnxruntime-cpu") for p in parameters)
            assert any(p.startswith('parameters {"postprocess"') for p in parameters)


def texts(item: pydicom.Dataset, code: str) -> set[str]:
    """Text values of all content items with that concept name."""
    found = set()
    for child in item.get("ContentSequence", []):
        name = child.get("ConceptNameCodeSequence")
        if child.ValueType == "TEXT" and name and name[0].CodeValue == code:
            found.add(str(child.TextValue))
        found |= texts(child, code)
    return found


@pytest.mark.parametrize("phase", ["files", "commit", "committed"])
@pytest.mark.parametrize("step", ["first", "second"])
def test_killed_between_two_steps_of_a_rule(
    killer: subprocess.Popen[str], folder: Path, db: Database, step: str, phase: str
) -> None:
    """Each step has one result, and the one whose condition does not hold none; nothing is lost or done twice."""
    when = {
        name: Needs(when=(When("r/first", measurement="volume_ml", minimum=bound),))
        for name, bound in (("second", 150.0), ("third", 1e6))
    }
    chain = [Request("ct-lung", ("r",), ("pacs",), "routine", names=("r/first",))] + [
        Request("ct-lung@1.1.0", ("r",), ("pacs",), "routine", names=(f"r/{n}",), step=f"r/{n}", needs=needs)
        for n, needs in when.items()
    ]
    first = add_series(db, requests=chain)
    if step == "second":
        assert worker_on(settings_of(folder), db).run_once()
    kill_in(killer, phase, folder)
    worker = worker_on(settings_of(folder), db)
    runs = 0
    while worker.run_once():
        runs += 1
    assert runs == 2 - (step == "second") - (phase == "committed")
    assert_one_result(db, folder, first, "1.0.0")
    assert_one_result(db, folder, first + 1, "1.1.0")
    assert [j["state"] for j in Jobs(db).listing()] == ["skipped", "done", "done"]
    assert db.value("SELECT count(*) FROM results") == 4


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_phase_and_swapped_before_the_retry(
    killer: subprocess.Popen[str], folder: Path, db: Database, phase: str
) -> None:
    """What was begun with 1.0.0 and not committed is done by 1.1.0 alone; what was committed stays 1.0.0's."""
    job_id = add_series(db)
    kill_in(killer, phase, folder)
    former = Jobs(db).show(job_id)
    assert former is not None
    assert former["state"] == ("done" if phase == "committed" else "running")
    assert bool(former["identity"]) == (phase in ("identity", "encoding", "files", "commit", "committed"))
    assert db.value("SELECT count(*) FROM deliveries") == (2 if phase == "committed" else 0)
    Models(db).activate("ct-lung", "1.1.0")
    worker = worker_on(settings_of(folder), db)
    assert worker.run_once() == (phase != "committed")
    assert not worker.run_once()
    assert_one_result(db, folder, job_id, "1.0.0" if phase == "committed" else "1.1.0")
    shown = Jobs(db).show(job_id)
    assert shown is not None
    if former["identity"] and phase != "committed":
        assert shown["identity"]["sr_uid"] != former["identity"]["sr_uid"], "another version is another result"
    # One that was committed and cut before its row could say so: nothing follows that would close it.
    states = [r["state"] for r in db.rows("SELECT state FROM model_runs ORDER BY id")]
    assert states == {"lease": ["done"], "committed": ["running"]}.get(phase, ["lost", "done"])


def test_killed_and_not_swapped_gives_the_uids_that_were_fixed(
    killer: subprocess.Popen[str], folder: Path, db: Database
) -> None:
    job_id = add_series(db)
    kill_in(killer, "files", folder)
    fixed = Jobs(db).show(job_id)
    assert worker_on(settings_of(folder), db).run_once()
    shown = Jobs(db).show(job_id)
    assert shown is not None and fixed is not None
    assert shown["identity"] == fixed["identity"]
    assert_one_result(db, folder, job_id, "1.0.0")


@pytest.mark.parametrize("moment", ["_identity", "_encode", "_commit"])
def test_a_job_ends_with_the_version_that_it_began_with(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Swapped there and back under a running job: it goes on; the next job takes what is active."""
    worker = worker_on(settings_of(folder), db)
    original = getattr(worker, moment)

    def swap(*arguments: Any) -> Any:
        Models(db).activate("ct-lung", "1.1.0")
        return original(*arguments)

    monkeypatch.setattr(worker, moment, swap)
    first = add_series(db)
    assert worker.run_once()
    assert_one_result(db, folder, first, "1.0.0")
    monkeypatch.undo()
    second = add_series(db)
    assert worker.run_once()
    assert_one_result(db, folder, second, "1.1.0")
    Life(db).roll_back("ct-lung", "1.1.0", "1.0.0", Change("me"))
    third = add_series(db)
    assert worker.run_once()
    assert_one_result(db, folder, third, "1.0.0")


def canary(db: Database, percent: float = 100.0) -> None:
    Life(db).canary("ct-lung", "1.1.0", percent=percent, who="me")


def versions_of(db: Database, *job_ids: int) -> list[str]:
    return [str(db.value("SELECT model_version FROM jobs WHERE id = ?", (job_id,))) for job_id in job_ids]


def test_all_series_of_a_study_go_to_one_version(folder: Path, db: Database) -> None:
    worker = worker_on(settings_of(folder), db)
    early = make_series("early")
    jobs = [add_series(db, early)]
    assert worker.run_once()
    canary(db)
    jobs.append(add_series(db, make_series("early, more", StudyInstanceUID=early.study_uid)))
    late = make_series("late")
    jobs.append(add_series(db, late))
    assert worker.run_once() and worker.run_once()
    assert versions_of(db, *jobs) == ["1.0.0", "1.0.0", "1.1.0"]
    canary(db, 1e-6)  # its share goes down; its studies stay
    jobs.append(add_series(db, make_series("late, more", StudyInstanceUID=late.study_uid)))
    assert worker.run_once()
    assert versions_of(db, jobs[-1]) == ["1.1.0"]
    assert json.loads(db.value("SELECT summary FROM jobs WHERE id = ?", (jobs[-1],)))["role"] == "canary"


def test_a_canary_that_cannot_serve_delays_nobody_and_goes_back(folder: Path, db: Database) -> None:
    (folder / "models" / "ct-lung" / "1.1.0" / "model.onnx").write_bytes(b"damaged")
    canary(db)
    worker = worker_on(settings_of(folder), db)
    jobs = [add_series(db) for _ in range(3)]
    assert all(worker.run_once() for _ in jobs)
    assert versions_of(db, *jobs) == ["1.0.0"] * 3
    assert Life(db).state("ct-lung", "1.1.0") == "retired"
    [row] = Life(db).rolled_back()
    assert row["why"].startswith("errors: 3 of 3")
    assert "model-rolled-back" in {e["kind"] for e in Events(db).listing()}


@pytest.mark.parametrize(
    "error",
    [
        NotBuilt("open ct-lung 1.1.0", "BUILDING", "tensorrt fp16 is being built for it"),
        EngineError("open ct-lung 1.1.0", "OOM", "CUDA error 2: out of memory"),
    ],
    ids=["its engine is built", "the GPU is full"],
)
def test_a_canary_that_cannot_be_opened_for_now_is_not_to_blame(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch, error: EngineError
) -> None:
    """The active version does its studies meanwhile, however many they are."""
    canary(db)
    worker = worker_on(settings_of(folder), db)
    for_job = worker._models.for_job

    def building(reference: str, record: Any) -> Any:
        if reference == "ct-lung@1.1.0":
            raise error
        return for_job(reference, record)

    monkeypatch.setattr(worker._models, "for_job", building)
    jobs = [add_series(db) for _ in range(4)]
    assert all(worker.run_once() for _ in jobs)
    assert versions_of(db, *jobs) == ["1.0.0"] * 4
    assert Life(db).state("ct-lung", "1.1.0") == "canary"
    assert Runs(db).recent("ct-lung", "1.1.0", 9) == []


def test_a_run_names_its_engine_and_whether_it_stays_there(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_on(settings_of(folder), db)
    add_series(db)
    assert worker.run_once()
    monkeypatch.setattr(worker._models, "settled", lambda model: False)
    add_series(db)
    assert worker.run_once()
    told = [(r.state, r.engine, r.settled) for r in Runs(db).recent("ct-lung", "1.0.0", 9)]
    assert told == [("done", "onnxruntime-cpu", False), ("done", "onnxruntime-cpu", True)]


def broken(worker: Worker, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Analyses by ``version`` fail as a bad model's do."""
    original = ReadyModel.analyse

    def analyse(self: ReadyModel, *arguments: Any, **options: Any) -> Any:
        if self.identity.version == version:
            raise EngineError("run model", "OOM", "no memory")
        return original(self, *arguments, **options)

    monkeypatch.setattr(ReadyModel, "analyse", analyse)


@pytest.mark.parametrize("as_canary", [True, False])
def test_a_version_that_fails_is_rolled_back_and_its_jobs_are_done(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch, as_canary: bool
) -> None:
    worker = worker_on(settings_of(folder), db)
    broken(worker, "1.1.0", monkeypatch)
    canary(db) if as_canary else Models(db).activate("ct-lung", "1.1.0")
    jobs = [add_series(db) for _ in range(3)]
    for _ in range(3):
        assert worker.run_once()
    assert Life(db).state("ct-lung", "1.1.0") == "retired"
    assert Models(db).active() == {"ct-lung": "1.0.0"}
    with db.transaction():
        db.execute("UPDATE jobs SET next_at = 0")
    assert all(worker.run_once() for _ in jobs)
    for job_id in jobs:
        assert_one_result(db, folder, job_id, "1.0.0")
    assert not worker.run_once()


def test_a_version_stays_where_it_may_not_be_rolled_back(
    folder: Path, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_on(settings_of(folder, rollout={"automatic": False}), db)
    broken(worker, "1.1.0", monkeypatch)
    Models(db).activate("ct-lung", "1.1.0")
    for _ in range(4):
        add_series(db)
        assert worker.run_once()
    assert Models(db).active() == {"ct-lung": "1.1.0"}


def test_a_worker_that_dies_of_a_version_comes_back_without_it(
    killer: subprocess.Popen[str], folder: Path, db: Database
) -> None:
    """A crash leaves no error behind but the row of an attempt that never ended."""
    canary(db)
    job_id = add_series(db)
    for _ in range(3):
        kill_in(killer, "pick", folder)
    worker = worker_on(settings_of(folder), db)
    assert Life(db).state("ct-lung", "1.1.0") == "retired"
    assert worker.run_once()
    assert_one_result(db, folder, job_id, "1.0.0")
    assert [r.state for r in Runs(db).recent("ct-lung", "1.1.0", 9)] == ["lost"] * 3


def test_a_stop_is_no_failure(folder: Path, db: Database) -> None:
    worker = worker_on(settings_of(folder), db)
    add_series(db)
    job = Jobs(db).lease("worker", 60)
    assert job is not None
    worker.router.pick(job, 32, lambda decision: None)
    assert worker.hand_back() == 1
    assert [r.state for r in Runs(db).recent("ct-lung", "1.0.0", 9)] == ["stopped"]
    assert worker.run_once()
