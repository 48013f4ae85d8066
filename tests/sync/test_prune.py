"""Pulled versions leave the disk when nobody needs them: whole or gone whatever is cut, never one that could serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode import durable
from dicomnode.admin.status import models_disk
from dicomnode.errors import BundleError, OperatorError, StorageError
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.model_space import GRACE_SECONDS, aside_of, removable
from dicomnode.index.operation import Events, Models
from dicomnode.index.removals import Removals
from dicomnode.ladder import Plan
from dicomnode.model_desk import ModelDesk
from dicomnode.settings import Settings
from dicomnode.sync.prune import Pruner
from dicomnode.sync.pull import Wanted, is_due, named
from tests.sync.index_case import FakeClock, add_job, make_settings

NAME = "ct-lung"
FILES = {"manifest.json": b"{}", "model.onnx": b"weights", "golden/1.npz": b"case"}


class Case:
    def __init__(self, folder: Path, **cloud: Any) -> None:
        self.data_dir, self.clock = folder, FakeClock()
        self.db = Database(folder, self.clock)
        self.settings = make_settings(folder, cloud=cloud, inference={"models_dir": folder / "shipped"})
        self.life = Life(self.db)

    def pulled(self, version: str, *, name: str = NAME, state: str = "placed") -> Path:
        target = self.data_dir / "models" / name / version
        for file, data in FILES.items():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).write_bytes(data)
        Models(self.db).record_pull(
            {"sha256": f"{name}{version}", "name": name, "version": version, "state": state, "attempts": 1,
             "next_at": 0.0, "source": "repository"}
        )  # fmt: skip
        return target

    def served(self, *versions: str) -> None:
        """Pulled and activated one after another, an hour and more apart."""
        for version in versions:
            self.pulled(version)
            self.life.activate(NAME, version, who="sync")
            self.clock.now += GRACE_SECONDS + 1

    def prune(self, settings: Settings | None = None) -> int:
        return asyncio.run(Pruner(settings or self.settings, self.db).run_once())

    @property
    def here(self) -> list[str]:
        folder = self.data_dir / "models" / NAME
        for version in folder.iterdir():
            whole = {str(p.relative_to(version)): p.read_bytes() for p in version.rglob("*") if p.is_file()}
            assert whole == FILES, "no half bundle, ever"
        return sorted(v.name for v in folder.iterdir())

    def desk(self, verify: Callable[[Path], object] = lambda _: None) -> ModelDesk:
        return ModelDesk(self.settings, self.db, verify)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr("dicomnode.model_desk.check_clinical_at", lambda _: None)
    made = Case(tmp_path)
    yield made
    made.db.close()


def test_what_is_not_needed_goes_and_it_is_told(case: Case) -> None:
    case.served("1.0.0", "2.0.0", "3.0.0", "4.0.0", "5.0.0")
    assert case.prune() == 2
    assert case.here == ["3.0.0", "4.0.0", "5.0.0"], "what serves, the one before it, and one more (keep_retired)"
    events = Events(case.db).listing(kind="model-removed")
    assert {e["subject"] for e in events} == {f"{NAME}@1.0.0", f"{NAME}@2.0.0"}
    assert all("fetched again" in e["text"] and "MiB" in e["text"] for e in events)
    assert next(h["event"] for h in case.life.history(NAME) if h["version"] == "1.0.0") == "remove"
    assert {p["version"]: p["state"] for p in Models(case.db).pulls()}["1.0.0"] == "removed"
    assert case.prune() == 0 and not list(aside_of(case.data_dir).iterdir())


def test_a_version_that_was_just_retired_stays_for_a_while(case: Case) -> None:
    """A job may be about to begin with it."""
    case.settings = make_settings(case.data_dir, cloud={"keep_retired": 0})
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        case.pulled(version)
        case.life.activate(NAME, version, who="sync")
    assert case.prune() == 0 and case.here == ["1.0.0", "2.0.0", "3.0.0"]
    case.clock.now += GRACE_SECONDS
    assert case.prune() == 1 and case.here == ["2.0.0", "3.0.0"]


def test_what_somebody_names_stays(case: Case) -> None:
    versions = [f"{n}.0.0" for n in range(1, 9)]
    case.served(*versions)
    pins = {"name": "pinned", "models": [f"{NAME}@1.0.0"], "match": {}, "send_to": []}
    entry = {"name": NAME, "version": "2.0.0", "url": "https://models.example/a.zip", "sha256": "0" * 64}
    settings = make_settings(case.data_dir, cloud={"models": [entry], "keep_retired": 0}, rules=[pins])
    job = add_job(case.db, case.data_dir)
    with case.db.transaction():
        case.db.execute("UPDATE jobs SET model_version = '3.0.0', state = 'running' WHERE id = ?", (job,))
        case.db.execute(
            "INSERT INTO model_runs (job_id, study_id, name, version, role, state) VALUES (?, 1, ?, '4.0.0', 'active',"
            " 'running')", (job, NAME),
        )  # fmt: skip
    for version, event in (("5.0.0", case.life.stage), ("6.0.0", case.life.stage)):
        event(NAME, version, who="cli")
    case.life.shadow(NAME, "6.0.0", who="cli")
    assert case.prune(settings) == 0
    assert case.here == versions
    with case.db.transaction():
        case.db.execute("UPDATE jobs SET state = 'done'")
        case.db.execute("UPDATE model_runs SET state = 'done'")
    assert case.prune(settings) == 2
    assert case.here == [v for v in versions if v not in ("3.0.0", "4.0.0")]


def test_the_way_back_stays_where_the_version_before_was_deleted_by_hand(case: Case) -> None:
    case.settings = make_settings(
        case.data_dir, cloud={"keep_retired": 0}, inference={"models_dir": case.data_dir / "x"}
    )
    case.served("1.0.0", "2.0.0", "3.0.0", "4.0.0")
    shutil.rmtree(case.data_dir / "models" / NAME / "3.0.0")
    case.prune()
    assert case.here == ["2.0.0", "4.0.0"]
    assert case.desk().roll_back(NAME, who="cli")["version"] == "2.0.0"


def test_what_was_not_pulled_is_never_touched(case: Case) -> None:
    """Imported bundles lie in the same folder, and nobody could fetch them again."""
    case.settings = make_settings(case.data_dir, cloud={"keep_retired": 0})
    case.served("1.0.0", "2.0.0", "3.0.0")
    with case.db.transaction():
        case.db.execute("DELETE FROM model_pulls")
    assert case.prune() == 0 and case.here == ["1.0.0", "2.0.0", "3.0.0"]


def test_those_that_were_rolled_back_go_first() -> None:
    def row(version: str, since: float, **more: Any) -> dict[str, Any]:
        return {"name": NAME, "version": version, "state": "retired", "previous": False, "faulty": False,
                "since_at": since} | more  # fmt: skip

    rows = [row("1.0.0", 1.0), row("2.0.0", 2.0), row("3.0.0", 3.0, faulty=True), row("4.0.0", 4.0, previous=True)]
    pulled = {(NAME, r["version"]) for r in rows}
    late = 4.0 + GRACE_SECONDS
    assert removable(rows, pulled, set(), keep=1, now=late) == [(NAME, "1.0.0"), (NAME, "3.0.0")]
    assert removable(rows, pulled, {(NAME, "1.0.0")}, keep=0, now=late) == [(NAME, "2.0.0"), (NAME, "3.0.0")]
    assert removable(rows, pulled, set(), keep=0, now=2.0 + GRACE_SECONDS) == [(NAME, "2.0.0"), (NAME, "1.0.0")]
    assert removable(rows, set(), set(), keep=0, now=late) == []


def test_a_roll_back_to_one_that_is_gone_says_what_to_do(case: Case) -> None:
    case.settings = make_settings(
        case.data_dir, cloud={"keep_retired": 0}, inference={"models_dir": case.data_dir / "x"}
    )
    case.served("1.0.0", "2.0.0", "3.0.0")
    assert case.prune() == 1 and case.here == ["2.0.0", "3.0.0"]
    desk = case.desk()
    assert desk.roll_back(NAME, who="cli")["version"] == "2.0.0"
    for attempt in (
        lambda: desk.roll_back(NAME, who="cli"),
        lambda: desk.change("activate", NAME, "1.0.0", who="cli"),
        lambda: desk.activate_all({NAME: "1.0.0"}, who="cloud", why=""),
    ):
        with pytest.raises(OperatorError, match="removed on") as told:
            attempt()
        assert 'version = "1.0.0"' in told.value.hint and "models activate" in told.value.hint
    assert Models(case.db).active() == {NAME: "2.0.0"}
    with pytest.raises(BundleError, match="no bundle"):
        desk.change("activate", NAME, "9.0.0", who="cli")


def test_it_is_fetched_again_where_an_entry_names_it() -> None:
    removed = {"state": "removed", "last_error": None, "next_at": 0.0}
    assert not is_due(removed, "m", 5.0), "the newest offer may be one that was rolled back and removed"
    assert is_due(removed, "m", 5.0, by_version=True)
    wanted = Wanted(NAME, "1.0.0", "", "0" * 64, Plan())
    assert not wanted.by_version
    entry = {"name": NAME, "version": "1.0.0", "url": "https://m.example/a.zip", "sha256": "0" * 64}
    assert named(Settings(node={"data_dir": "/x"}, cloud={"models": [entry]}).cloud.models[0]).by_version


def test_who_activates_it_at_the_same_moment_finds_it_whole_or_gone(case: Case) -> None:
    """Between its verification and its activation the version is removed: then nothing is activated."""
    case.settings = make_settings(
        case.data_dir, cloud={"keep_retired": 0}, inference={"models_dir": case.data_dir / "x"}
    )
    case.served("1.0.0", "2.0.0", "3.0.0")
    desk = case.desk(lambda path: case.prune() if path.name == "1.0.0" else None)
    with pytest.raises(OperatorError, match="removed on"):
        desk.change("activate", NAME, "1.0.0", who="cli")
    assert Models(case.db).active() == {NAME: "3.0.0"} and case.here == ["2.0.0", "3.0.0"]


def test_status_tells_the_disk(case: Case) -> None:
    case.served("1.0.0", "2.0.0")
    (case.pulled("2.0.0") / "model.onnx").write_bytes(bytes(3 << 20))
    part = case.data_dir / "staging" / "models" / "a.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(2 << 20))
    found = models_disk(case.settings)
    assert found == {"versions": 2, "mb": 3, "coming_mb": 2, "keep_retired": 1}


STEPS = ("rename", "fsync")


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_refuses_leaves_it_whole_or_gone(case: Case, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case.settings = make_settings(case.data_dir, cloud={"keep_retired": 0})
    case.served("1.0.0", "2.0.0", "3.0.0")
    durable.make_directory(aside_of(case.data_dir))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(durable.Steps, step, staticmethod(fail))
        with pytest.raises(StorageError):
            case.prune()
    assert case.here in (["1.0.0", "2.0.0", "3.0.0"], ["2.0.0", "3.0.0"])
    assert Models(case.db).active() == {NAME: "3.0.0"}
    Pruner(case.settings, case.db).start()
    case.prune()
    assert case.here == ["2.0.0", "3.0.0"] and not list(aside_of(case.data_dir).iterdir())
    assert {p["version"]: p["state"] for p in Models(case.db).pulls()}["1.0.0"] == "removed"


@pytest.mark.parametrize("which", [1, 2])
def test_an_index_that_refuses_leaves_it_whole_or_to_be_ended(
    case: Case, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the commit that begins a removal, or that ends it."""
    case.settings = make_settings(case.data_dir, cloud={"keep_retired": 0})
    case.served("1.0.0", "2.0.0", "3.0.0")
    real, commits = case.db.transaction, 0

    @contextlib.contextmanager
    def refuses(**how: Any) -> Iterator[None]:
        nonlocal commits
        with real(**how):
            yield
            commits += 1
            if commits == which:
                raise StorageError("commit to the index", "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(case.db, "transaction", refuses)
        with pytest.raises(StorageError, match="no space left"):
            case.prune()
    pull = {p["version"]: p["state"] for p in Models(case.db).pulls()}["1.0.0"]
    assert ("1.0.0" in case.here, pull) == (which == 1, "placed")
    Pruner(case.settings, case.db).start()
    case.prune()
    assert case.here == ["2.0.0", "3.0.0"] and not list(aside_of(case.data_dir).iterdir())
    assert {p["version"]: p["state"] for p in Models(case.db).pulls()}["1.0.0"] == "removed"
    assert [h["event"] for h in case.life.history(NAME) if h["version"] == "1.0.0"].count("remove") == 1


def test_what_was_put_in_its_place_stays(case: Case) -> None:
    """The sidecar was killed before it could tell that the folder is gone, and the version was imported by hand."""
    case.settings = make_settings(case.data_dir, cloud={"keep_retired": 0})
    case.served("1.0.0", "2.0.0", "3.0.0")
    folder, removals = case.data_dir / "models" / NAME / "1.0.0", Removals(case.db)
    with case.db.transaction():
        removals.begin(NAME, "1.0.0", who="sync", why="", automatic=True)
    shutil.copytree(folder, folder.with_name("new"))
    shutil.rmtree(folder)
    folder.with_name("new").rename(folder)
    Pruner(case.settings, case.db).start()
    assert case.prune() == 0 and "1.0.0" in case.here and removals.open() == []
    case.desk().change("activate", NAME, "1.0.0", who="cli")


KILLED_AT = ("marked", "renamed", "committed", "half deleted")


@pytest.mark.parametrize("phase", KILLED_AT)
def test_killed_in_the_middle(case: Case, phase: str) -> None:
    case.served("1.0.0", "2.0.0", "3.0.0")
    child = subprocess.run(
        [sys.executable, "-m", "tests.sync.test_prune", str(case.data_dir), phase],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert case.here == (["1.0.0"] if phase == "marked" else []) + ["2.0.0", "3.0.0"]
    assert Models(case.db).active() == {NAME: "3.0.0"}
    with pytest.raises(OperatorError, match="removed"):
        case.desk().change("activate", NAME, "1.0.0", who="cli")
    settings = make_settings(case.data_dir, cloud={"keep_retired": 0})
    pruner = Pruner(settings, case.db)
    pruner.start()
    asyncio.run(pruner.run_once())
    assert case.here == ["2.0.0", "3.0.0"] and not list(aside_of(case.data_dir).iterdir())
    assert {p["version"]: p["state"] for p in Models(case.db).pulls()}["1.0.0"] == "removed"
    assert case.life.removed_time(NAME, "1.0.0")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(folder: Path, phase: str) -> None:
    """In a child: prune and die in ``phase``."""
    clock = FakeClock()
    clock.now += 10 * GRACE_SECONDS
    db = Database(folder, clock)
    settings = make_settings(folder, cloud={"keep_retired": 0})
    aside, tree = durable.set_aside, durable.remove_tree

    def set_aside(path: Path, into: Path) -> Path:
        if phase == "marked":
            _die()
        found = aside(path, into)
        if phase == "renamed":
            _die()
        return found

    def remove_tree(path: Path) -> None:
        if phase == "half deleted":
            next(p for p in path.rglob("*") if p.is_file()).unlink()
        _die()
        tree(path)

    durable.set_aside, durable.remove_tree = set_aside, remove_tree  # type: ignore[assignment]
    asyncio.run(Pruner(settings, db).run_once())


if __name__ == "__main__":
    _killed(Path(sys.argv[1]), sys.argv[2])
