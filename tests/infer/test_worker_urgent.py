"""A STAT study does not wait for the one at hand: it goes first after the batch that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import LeaseLost
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.infer import worker as module
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.heart import Heart
from dicomnode.infer.worker import Worker
from dicomnode.records import Analysis, ModelIdentity
from dicomnode.settings import Settings
from tests.index.rows import job

BATCHES = 4


class Model:
    """Four batches; ``during[(model, batch)]`` happens while that batch runs."""

    def __init__(self, name: str, trace: list[str], during: dict[tuple[str, int], Callable[[], Any]]) -> None:
        self.name, self.trace, self.during = name, trace, during
        self.identity = ModelIdentity(name, "1.0.0", "m", "ab" * 32, "2.25.1")

    def analyse(self, sources, *, decoder, progress, ahead) -> Analysis:
        for batch in range(BATCHES):
            progress("inference", batch / BATCHES)
            self.trace.append(f"{self.name}{batch}")
            self.during.get((self.name, batch), lambda: None)()
        return Analysis(None, tuple(s.sop_instance_uid for s in sources), (), (), seconds={"inference": 1.0})


@pytest.fixture
def db(tmp_path: Path):
    made = Database(tmp_path / "data")
    yield made
    made.close()


def make_worker(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: Any, **inference: Any):
    monkeypatch.setattr(module, "intact", lambda source: True)
    trace: list[str] = []
    nothing = {"hold": lambda self, model: None, "let_go": lambda self, model: None}
    held = {**nothing, "settled": lambda self, *_: True}
    models = type("Models", (), {"for_job": lambda self, name, record: Model(name, trace, during), **held})()
    settings = Settings(node={"data_dir": tmp_path / "data"}, inference=inference)
    return trace, Worker(
        settings, db, models, lambda *_: (), owner="w", decoder=InlineDecoder(), on_results=lambda: None
    )


def states(db: Database) -> dict[str, str]:
    return {row["model"]: row["state"] for row in Jobs(db).listing()}


def test_stat_overtakes_within_one_batch(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during = {("a", 1): lambda: (job(db, model="b", priority="stat"), job(db, model="c", priority="routine"))}
    trace, worker = make_worker(db, tmp_path, monkeypatch, during)
    job(db, model="a", priority="routine")
    assert worker.run_once() and worker.run_once() and not worker.run_once()
    assert trace == ["a0", "a1", "b0", "b1", "b2", "b3", "a2", "a3", "c0", "c1", "c2", "c3"]
    assert set(states(db).values()) == {"done"}


def test_what_is_not_more_urgent_waits(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during = {("a", 0): lambda: (job(db, model="b", priority="stat"), job(db, model="c", priority="batch"))}
    trace, worker = make_worker(db, tmp_path, monkeypatch, during)
    job(db, model="a", priority="stat")
    while worker.run_once():
        pass
    assert [t[0] for t in trace] == ["a"] * BATCHES + ["b"] * BATCHES + ["c"] * BATCHES


def test_three_deep(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during = {
        ("a", 0): lambda: job(db, model="b", priority="routine"),
        ("b", 0): lambda: job(db, model="c", priority="stat"),
    }
    trace, worker = make_worker(db, tmp_path, monkeypatch, during)
    job(db, model="a", priority="batch")
    assert worker.run_once() and not worker.run_once()
    assert trace == ["a0", "b0", "c0", "c1", "c2", "c3", "b1", "b2", "b3", "a1", "a2", "a3"]


def test_an_urgent_job_that_fails_does_not_take_the_other_with_it(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("a model that errs")

    during = {("a", 0): lambda: job(db, model="b", priority="stat"), ("b", 2): fail}
    trace, worker = make_worker(db, tmp_path, monkeypatch, during, max_attempts=1)
    job(db, model="a", priority="routine")
    assert worker.run_once()
    assert states(db) == {"a": "done", "b": "failed"}
    assert trace == ["a0", "b0", "b1", "b2", "a1", "a2", "a3"]


def test_time_that_a_job_stood_still_is_not_counted_as_its_own(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: moment[0])

    def pass_time() -> None:
        moment[0] += 20.0  # longer than job_seconds

    during = {("a", 0): lambda: job(db, model="b", priority="stat"), ("b", 0): pass_time}
    _, worker = make_worker(db, tmp_path, monkeypatch, during, job_seconds=11.0)
    monkeypatch.setattr(module.os, "_exit", lambda code: pytest.fail("the worker ended itself"))
    job(db, model="a", priority="routine")
    assert worker.run_once()
    seconds = {row["model"]: Jobs(db).show(row["id"])["seconds"] for row in Jobs(db).listing()}
    assert seconds["a"]["inference"] == pytest.approx(1.0 - 20.0) and seconds["b"]["inference"] == 1.0


def test_the_limit_of_a_job_stands_still_with_it_and_then_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, beaten = threading.Event(), threading.Semaphore(0)

    class Rows:
        def extend(self, *_: Any) -> None:
            beaten.release()

    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    with Heart(Rows(), 1, "w", 0.3, 0.05) as heart:
        with heart.standing_still() as stood:
            for _ in range(3):
                assert beaten.acquire(timeout=10)
            assert stood() > 0.05 and not ended.is_set()
        assert ended.wait(10)


def test_a_job_whose_lease_is_lost_is_still_ended_when_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result would be dropped, but a codec that hangs would keep the worker from every other job."""
    ended, asked = threading.Event(), threading.Event()

    class Taken:
        def extend(self, *_: Any) -> None:
            assert not asked.is_set(), "a lease that is lost is not asked for again"
            asked.set()
            raise LeaseLost("extend lease", "another process holds it")

    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    with Heart(Taken(), 1, "w", 0.03, 0.2):
        assert asked.wait(10) and ended.wait(10)


def test_one_lease_that_is_lost_of_several_leaves_the_others_alive() -> None:
    asked: dict[int, int] = {}
    enough = threading.Event()

    class Rows:
        def extend(self, job_id: int, *_: Any) -> None:
            asked[job_id] = asked.get(job_id, 0) + 1
            if asked.get(1, 0) >= 3 and asked.get(3, 0) >= 3:
                enough.set()
            if job_id == 2:
                raise LeaseLost("extend lease", "it has ended")

    with Heart(Rows(), 1, "w", 0.03, 60.0) as heart:
        heart.keep([2, 3])
        assert enough.wait(10)
    assert asked[2] == 1


def test_each_of_several_jobs_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moment, beats, ended = [0.0], threading.Semaphore(0), threading.Event()

    class Rows:
        def extend(self, *_: Any) -> None:
            beats.release()

    monkeypatch.setattr(module.time, "monotonic", lambda: moment[0])
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    with Heart(Rows(), 1, "w", 0.03, 10.0) as heart:
        for _ in range(3):
            moment[0] += 9.0
            heart.turn()
            assert beats.acquire(timeout=10)
        assert not ended.is_set()
        moment[0] += 11.0
        assert ended.wait(10)


def test_batch_jobs_wait_while_too_much_waits_for_the_cloud(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, worker = make_worker(db, tmp_path, monkeypatch, {})
    full = [True]
    monkeypatch.setattr(worker._spool, "full", lambda: full[0])
    job(db, model="a", priority="batch")
    job(db, model="b", priority="routine")
    assert worker.run_once() and not worker.run_once()
    assert states(db) == {"a": "pending", "b": "done"}, "the PACS needs its results; nothing is dropped"
    full[0] = False
    assert worker.run_once() and states(db)["a"] == "done" and len(trace) == 2 * BATCHES
