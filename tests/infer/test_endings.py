"""The index does not take how a job ended: it is written later, and the others done with it end as they would."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from dicomnode.durable import ObjectStore
from dicomnode.errors import StorageError
from dicomnode.index import database, sharing
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.infer.worker import Worker
from tests.infer.life_case import worker_on
from tests.infer.sharing_case import Trap, poisoned, queue, settings_of, triage


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    triage(folder)
    return folder


@pytest.fixture
def db(tmp_path: Path, bundles: Path) -> Iterator[Database]:
    (tmp_path / "models").symlink_to(bundles, target_is_directory=True)
    made = Database(tmp_path / "data")
    ObjectStore(tmp_path / "data").prepare()
    Models(made).activate("triage", "1.0.0")
    yield made
    made.close()


def a_worker(db: Database, on: Any = None, **inference: Any) -> tuple[Worker, Trap]:
    worker = worker_on(settings_of(db.data_dir.parent, **inference), db)
    return worker, Trap(worker, on)


def column(db: Database, name: str, ids: list[int]) -> list[Any]:
    return [db.value(f"SELECT {name} FROM jobs WHERE id = ?", (n,)) for n in ids]


@contextmanager
def locked(db: Database) -> Iterator[None]:
    """Another process writes and does not end."""
    fd = os.open(db.data_dir / "index.turn", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def _full(db: Database, call: Callable[[], Any]) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _busy(db: Database, call: Callable[[], Any]) -> Any:
    raise apsw.BusyError("database is locked")


def _locked(db: Database, call: Callable[[], Any]) -> Any:
    with locked(db):
        return call()


def fails(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, how: Any, *, times: int = 1) -> list[int]:
    """The first ``times`` calls of ``of.name`` fail as ``how`` does; gives what is left of them."""
    real, left = getattr(of, name), [times]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            return how(self.db, lambda: real(self, *arguments, **options))
        return real(self, *arguments, **options)

    monkeypatch.setattr(of, name, call)
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 20)
    return left


@pytest.mark.parametrize("how", [_locked, _full, _busy])
@pytest.mark.parametrize(
    ("of", "step"), [(Jobs, "refuse"), (Runs, "end")], ids=["the job's row", "the record of its attempt"]
)
def test_an_ending_that_is_not_taken_takes_no_other_along(
    db: Database, monkeypatch: pytest.MonkeyPatch, of: Any, step: str, how: Any
) -> None:
    worker, trap = a_worker(db)
    ids = [queue(db, 1), queue(db, 2, PresentationIntentType="FOR PROCESSING"), queue(db, 3)]
    left = fails(monkeypatch, of, step, how)
    assert worker.run_once() and trap.rows == [2] and left == [0]
    assert column(db, "state", ids) == ["done", "running", "done"]
    with db.transaction():  # time passes
        db.execute("UPDATE jobs SET lease_until = 0 WHERE id = ?", (ids[1],))
    assert not worker.run_once()
    assert column(db, "state", ids) == ["done", "refused", "done"], "it is written before leases are looked at"
    assert "FOR_PROCESSING" in column(db, "last_error", ids)[1] and column(db, "attempts", ids) == [1] * 3
    assert [r.state for r in Runs(db).recent("triage", "1.0.0", 10)].count("refused") == 1
    assert [e["subject"] for e in Events(db).listing() if e["kind"] == "job-refused"] == [f"job {ids[1]}"]
    assert not worker.run_once() and column(db, "state", ids)[1] == "refused", "and once"


def test_nothing_new_is_begun_while_the_index_takes_no_endings(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, trap = a_worker(db)
    ids = [queue(db, 1, PresentationIntentType="FOR PROCESSING"), queue(db, 2, priority="batch")]
    fails(monkeypatch, Jobs, "refuse", _locked, times=3)
    assert worker.run_once()
    for _ in range(2):
        assert not worker.run_once() and column(db, "state", ids) == ["running", "pending"]
    assert worker.run_once() and column(db, "state", ids) == ["refused", "done"] and trap.rows == [1]


@pytest.mark.parametrize("error", [KeyError("CANARY"), apsw.ConstraintError("CANARY")])
def test_an_ending_that_can_never_be_written_keeps_no_other_job_waiting(
    db: Database, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is our own fault, and the next ending of that job may be one that can be written."""
    worker, trap = a_worker(db)
    ids = [queue(db, 1, PresentationIntentType="FOR PROCESSING"), queue(db, 2, priority="batch")]
    with monkeypatch.context() as patch:
        patch.setattr(Jobs, "refuse", lambda *_: _raise(error))
        assert worker.run_once() and column(db, "state", ids) == ["running", "pending"]
        assert worker.run_once() and column(db, "state", ids) == ["running", "done"] and trap.rows == [1]
    [event] = [e for e in Events(db).listing() if e["kind"] == "job-ending"]
    assert event["subject"] == f"job {ids[0]}" and type(error).__name__ in event["text"]
    assert "CANARY" not in event["text"]
    with db.transaction():  # its lease runs out
        db.execute("UPDATE jobs SET lease_until = 0 WHERE id = ?", (ids[0],))
    while worker.run_once():
        pass
    with db.transaction():
        db.execute("UPDATE jobs SET next_at = 0 WHERE id = ?", (ids[0],))
    while worker.run_once():
        pass
    assert column(db, "state", ids) == ["refused", "done"]


def test_an_event_that_is_not_taken_undoes_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = a_worker(db)
    ids = [queue(db, 1), queue(db, 2, PresentationIntentType="FOR PROCESSING"), queue(db, 3)]
    fails(monkeypatch, Events, "add", _locked)
    assert worker.run_once()
    assert column(db, "state", ids) == ["done", "refused", "done"]


def test_a_lost_device_ends_the_process_whatever_the_index_says(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[int] = []
    worker, _ = a_worker(db, poisoned("DEVICE_LOST"))
    worker._on_lost = lambda: lost.append(1)
    ids = [queue(db, 1, poison=True)]
    fails(monkeypatch, Jobs, "fail", _locked, times=2)
    monkeypatch.setattr(Jobs, "hand_back", lambda self, owner: _raise(StorageError("commit", "the index is locked")))
    assert worker.run_once() and lost == [1]
    monkeypatch.undo()
    worker, _ = a_worker(db)
    worker.start()
    assert column(db, "state", ids) == ["pending"] and column(db, "attempts", ids) == [1], "counted as its death"


def test_a_device_lost_in_company_is_nobodys_attempt_whatever_the_index_says(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[int] = []
    worker, _ = a_worker(db, poisoned("DEVICE_LOST"))
    worker._on_lost = lambda: lost.append(1)
    ids = [queue(db, 1), queue(db, 2, poison=True), queue(db, 3)]
    left, real = [1], sharing.part

    def part(*arguments: Any) -> int:
        if left[0]:
            left[0] -= 1
            raise StorageError("commit to the index", "the index is locked")
        return real(*arguments)

    monkeypatch.setattr(sharing, "part", part)
    assert worker.run_once() and lost == [1] and left == [0]
    assert column(db, "state", ids) == ["pending"] * 3 and column(db, "attempts", ids) == [0] * 3
    assert all(column(db, "batch_studies", ids)), "and the next time each is alone"


def test_a_stop_while_the_index_is_locked_ends(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = a_worker(db)
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 20)
    with locked(db):
        assert worker.hand_back() == 0


def _raise(error: Exception) -> Any:
    raise error
