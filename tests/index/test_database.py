"""The index file: migrations, locks, node time, several processes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from dicomnode.errors import StorageError
from dicomnode.index import database
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.schema import migrations
from tests.index.rows import FakeClock, instance


def test_migrations_are_recorded_and_run_once(tmp_path: Path, clock: FakeClock) -> None:
    for _ in range(2):
        db = Database(tmp_path, clock)
        names = [r["name"] for r in db.rows(f"SELECT name FROM {migrations.migrations_table} ORDER BY name")]
        assert names == sorted(m.name for m in migrations._migrations)
        assert db.backup_check() == "ok"
        assert db.value("PRAGMA journal_mode") == "wal"
        assert db.value("PRAGMA synchronous") == 2, "FULL: a commit survives a power cut"
        assert db.value("PRAGMA foreign_keys") == 1
        assert db.path.stat().st_mode & 0o077 == 0
        db.close()


def test_failed_migration_leaves_nothing_and_is_made_up_for(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = migrations._migrations[2]

    def half(db: Any) -> None:
        db["jobs"].create({"id": int})
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(third, "fn", half)
        with pytest.raises(RuntimeError):
            Database(tmp_path, clock)
    db = Database(tmp_path, clock)
    assert db.backup_check() == "ok"
    assert db.value("SELECT count(*) FROM jobs") == 0 and db.value("SELECT count(*) FROM events") == 0
    db.close()


def test_keys_of_names_are_made_for_what_was_there(tmp_path: Path, clock: FakeClock) -> None:
    """An index of the version before m0005 is searched by name like a new one."""
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    migrations.apply(sqlite_utils.Database(connection), stop_before="m0005_query")
    with connection:
        connection.execute("INSERT INTO patients (id, PatientID, PatientName) VALUES (7, 'P', 'M\u00fcller^J\u00f6rg')")
        connection.execute(
            "INSERT INTO studies (id, patient_id, StudyInstanceUID, PatientName) VALUES (9, 7, '1.2', NULL)"
        )
    connection.close()
    db = Database(tmp_path, clock)
    keys = [(r["form"], r["key"], r["patient_id"]) for r in db.rows("SELECT * FROM patient_names WHERE form < 2")]
    assert keys == [(0, "m\u00fcller^j\u00f6rg", 7), (1, "jorg", 7), (1, "muller", 7)]
    assert db.rows("SELECT * FROM study_names") == [{"form": 0, "key": "", "study_id": 9}]
    assert db.backup_check() == "ok"
    db.close()


def test_newer_schema_is_refused_in_words(tmp_path: Path, clock: FakeClock) -> None:
    db = Database(tmp_path, clock)
    with db.transaction():
        db.execute(
            f"INSERT INTO {migrations.migrations_table} (migration_set, name, applied_at)"
            " VALUES ('dicomnode', 'm9999_future', '2030')"
        )
    db.close()
    with pytest.raises(StorageError, match="newer version \\(migration m9999_future\\)"):
        Database(tmp_path, clock)


def test_damaged_index_is_told_in_words(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"garbage " * 1000)
    with pytest.raises(StorageError, match="is damaged"):
        Database(tmp_path, clock)


def test_migration_waits_for_others_and_gives_up_in_words(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = Database(tmp_path, clock)
    monkeypatch.setattr(database, "MIGRATION_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(database, "_current", lambda path: False)
    with pytest.raises(StorageError, match="another process of this node has it open") as caught:
        Database(tmp_path, clock)
    assert caught.value.retryable
    db.close()


def test_opens_next_to_a_process_that_has_it_open(tmp_path: Path) -> None:
    db = Database(tmp_path)
    code = (
        "import sys, pathlib\nfrom dicomnode.index.database import Database\n"
        "Database(pathlib.Path(sys.argv[1])).close()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    db.close()


WRITER = """
import pathlib, sys
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
sys.path.insert(0, sys.argv[3])
from tests.index.rows import instance
db = Database(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(60):
    Catalogue(db).commit([instance("1.2.20", "1.2.10", f"1.2.{sys.argv[2]}.{n}")])
db.close()
"""


def test_processes_create_and_write_at_once(tmp_path: Path) -> None:
    """Three processes race for a new index, then commit into the same series."""
    root = str(Path(__file__).resolve().parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(n), root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for n in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n", timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    db = Database(tmp_path)
    assert db.backup_check() == "ok"
    assert Catalogue(db).counts() == {"patients": 1, "studies": 1, "series": 1, "instances": 180}
    assert db.value("SELECT generation FROM series") == 180
    db.close()


def test_failed_transaction_leaves_nothing(db: Database) -> None:
    with pytest.raises(KeyError), db.transaction():
        db.insert("patients", {"PatientID": "x", "IssuerOfPatientID": ""})
        raise KeyError
    assert db.value("SELECT count(*) FROM patients") == 0
    with db.transaction():  # the lock was given back
        db.insert("patients", {"PatientID": "x", "IssuerOfPatientID": ""})
    assert db.value("SELECT count(*) FROM patients") == 1


def test_locked_index_is_retryable(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 50)
    first, second = Database(tmp_path, clock), Database(tmp_path, clock)
    with first.transaction():
        with pytest.raises(StorageError, match="locked") as caught, second.transaction():
            pass
        assert caught.value.retryable
    with second.transaction():
        pass
    first.close()
    second.close()


def test_threads_share_one_index(db: Database) -> None:
    failures: list[BaseException] = []

    def write(thread: int) -> None:
        try:
            for n in range(20):
                Catalogue(db).commit([instance(sop=f"1.{thread}.{n}")])
        except Exception as error:  # noqa: BLE001 the test looks at it
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and Catalogue(db).counts()["instances"] == 80


class Machine:
    """A machine whose wall clock and boots the test decides about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boot, self.up, self.wall = "boot-1", 100.0, 1_800_000_000.0
        machine = self

        class Wall(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.fromtimestamp(machine.wall, tz)

        monkeypatch.setattr(database, "boot_id", lambda: self.boot)
        monkeypatch.setattr(database, "datetime", Wall)
        monkeypatch.setattr(time, "clock_gettime", lambda _: self.up)


TEN_YEARS = 10 * 365.25 * 86400


@pytest.mark.parametrize("jump", [TEN_YEARS, -TEN_YEARS])
def test_node_time_ignores_jumps_of_the_wall_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    machine = Machine(monkeypatch)
    first = Database(tmp_path)
    before = first.clock.ticks()
    machine.wall += jump
    machine.up += 5
    assert first.clock.ticks() == pytest.approx(before + 5)
    second = Database(tmp_path)  # another process of the same boot, started after the jump
    assert second.clock.ticks() == pytest.approx(before + 5)
    first.close()
    second.close()


def test_node_time_never_runs_back_across_boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    seen = 0.0
    for boot in range(12):
        machine.boot, machine.up = f"boot-{boot}", 10.0
        machine.wall += (-1) ** boot * TEN_YEARS
        db = Database(tmp_path)
        assert db.clock.ticks() > seen
        machine.up += 3600
        db.remember_time()
        seen = db.clock.ticks()
        db.close()
