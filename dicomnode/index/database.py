"""Connections to the index: SQLite in WAL with synchronous FULL.

Every running process uses apsw, whose SQLite has the fix of the WAL-reset bug (3.51.3;
RELIABILITY.md). The system's sqlite3, which sqlite-utils needs, opens the file only to
migrate it, and only while no other process has it open: everyone else holds a shared lock
on ``index.lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import apsw
import sqlite_utils

from dicomnode import durable
from dicomnode.clock import Clock, SystemClock, boot_id
from dicomnode.errors import StorageError
from dicomnode.index.schema import migrations

SAFE_SQLITE = (3, 51, 3)
BUSY_MILLISECONDS = 30_000
MIGRATION_WAIT_SECONDS = 30.0
TURN_SECONDS = 0.0003
"""First pause while another process writes; a commit takes about a millisecond."""

Row = dict[str, Any]


def rows_of(connection: apsw.Connection, sql: str, parameters: Sequence[Any] | Row = ()) -> list[Row]:
    """Run one statement and return its rows as dictionaries."""
    cursor = connection.execute(sql, parameters)
    first = cursor.fetchone()
    if first is None:
        return []
    names = [d[0] for d in cursor.get_description()]
    return [dict(zip(names, values, strict=True)) for values in (first, *cursor)]


class Database:
    """One index. Thread-safe: each thread gets its own connection.

    ``clock`` is node time; it is established on opening unless one is given (tests).
    """

    def __init__(self, data_dir: Path, clock: Clock | None = None) -> None:
        if tuple(map(int, apsw.sqlitelibversion().split("."))) < SAFE_SQLITE:
            raise StorageError("open index", "SQLite is older than 3.51.3", "Install the pinned apsw")
        self.data_dir = data_dir
        durable.make_directory(data_dir)
        self.path = data_dir / "index.sqlite"
        self._lock_fd = _lock_and_migrate(self.path, data_dir / "index.lock")
        self._turn_fd = os.open(data_dir / "index.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._local = threading.local()
        self._write_lock = threading.Lock()
        self.clock: Clock = clock or SystemClock(self._establish_base())

    def close(self) -> None:
        """Close this thread's connection and the lock; other threads' close with them."""
        for name in ("connection", "reader"):
            connection = getattr(self._local, name, None)
            if connection is not None:
                connection.close()
                setattr(self._local, name, None)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            os.close(self._turn_fd)
            self._lock_fd = self._turn_fd = -1

    def _connection(self) -> Any:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
        return connection

    def reader(self) -> Any:
        """A second connection of this thread, for a long statement during which the thread does other work, too.

        SQLite forbids to use a connection from its own progress handler, and a transaction that
        began with reading cannot write when another has written since.
        """
        connection = getattr(self._local, "reader", None)
        if connection is None:
            connection = self._local.reader = self._connect()
            connection.execute("PRAGMA query_only=ON")
        return connection

    def _connect(self) -> Any:
        connection = apsw.Connection(str(self.path))
        connection.set_busy_timeout(BUSY_MILLISECONDS)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def session(self) -> Session:
        """A connection that goes from thread to thread; its commits leave checkpoints to others."""
        connection = self._connect()
        connection.execute("PRAGMA wal_autocheckpoint=0")
        return Session(self, connection)

    def rows(self, sql: str, parameters: Sequence[Any] | Row = ()) -> list[Row]:
        """Run one statement and return its rows as dictionaries."""
        return rows_of(self._connection(), sql, parameters)

    def row(self, sql: str, parameters: Sequence[Any] | Row = ()) -> Row | None:
        found = self.rows(sql, parameters)
        return found[0] if found else None

    def value(self, sql: str, parameters: Sequence[Any] | Row = ()) -> Any:
        first = self._connection().execute(sql, parameters).fetchone()
        return first[0] if first else None

    def execute(self, sql: str, parameters: Sequence[Any] | Row = ()) -> int:
        """Run one statement inside :meth:`transaction`; returns the number of changed rows."""
        connection = self._connection()
        connection.execute(sql, parameters).fetchall()
        return int(connection.changes())

    def insert(self, table: str, row: Row, *, conflict: str = "") -> int:
        """Insert a row whose keys are our own column names; returns its rowid, 0 if ignored."""
        names = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        connection = self._connection()
        connection.execute(
            f"INSERT {conflict} INTO {table} ({names}) VALUES ({marks})",
            tuple(row.values()),
        ).fetchall()
        return int(connection.last_insert_rowid()) if connection.changes() else 0

    @contextlib.contextmanager
    def transaction(self, *, sync: bool = True) -> Iterator[None]:
        """Everything inside commits together, durably, or not at all.

        Without ``sync`` it is visible at once, but a power cut may undo it until a later
        transaction with ``sync`` has committed: the log is one sequence.

        One inside another is part of it. Ends the process when SQLite reports an I/O error: fsync is
        never retried.
        """
        connection = self._connection()
        if connection.in_transaction:
            yield
            return
        with self._write_lock, self._turn():
            try:
                if not sync:
                    connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    with contextlib.suppress(apsw.Error):
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
            except apsw.FullError as error:
                with contextlib.suppress(apsw.Error):
                    connection.execute("ROLLBACK")
                raise StorageError(
                    "commit to the index",
                    "no space left",
                    "Free space on the volume of data_dir",
                    retryable=True,
                ) from error
            except (apsw.IOError, apsw.CorruptError, apsw.NotADBError) as error:
                durable.die(error)
            except apsw.BusyError as error:
                raise StorageError("commit to the index", "the index is locked", "", retryable=True) from error
            finally:
                if not sync:
                    connection.execute("PRAGMA synchronous=FULL")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One writer at a time among all processes; SQLite's own waiting would sleep ever longer."""
        deadline = time.monotonic() + BUSY_MILLISECONDS / 1000.0
        wait = TURN_SECONDS
        while True:
            try:
                fcntl.flock(self._turn_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError("commit to the index", "the index is locked", "", retryable=True) from None
            time.sleep(wait)
            wait = min(wait * 1.5, 10 * TURN_SECONDS)
        try:
            yield
        finally:
            fcntl.flock(self._turn_fd, fcntl.LOCK_UN)

    def checkpoint(self) -> None:
        """Move what the log holds into the database, as far as readers and room allow.

        Ends the process when SQLite reports an I/O error: fsync is never retried.
        """
        try:
            self._connection().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except (apsw.BusyError, apsw.LockedError, apsw.FullError):
            return  # the log keeps it; the next one moves it
        except (apsw.IOError, apsw.CorruptError, apsw.NotADBError) as error:
            durable.die(error)

    def backup_check(self) -> str:
        """``ok`` or what ``PRAGMA integrity_check`` found."""
        return str(self.value("PRAGMA integrity_check(1)"))

    def _establish_base(self) -> float:
        """Base of node time for this boot; made once per boot, never behind what was seen."""
        boot = boot_id()
        with self.transaction():
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            known = self.row("SELECT base FROM boots WHERE boot_id = ?", (boot,))
            if known is not None:
                base = float(known["base"])
            else:
                last = float(self.value("SELECT max(last_at) FROM boots") or 0.0)
                base = max(datetime.now().timestamp(), last + 1.0) - now
                self.insert("boots", {"boot_id": boot, "base": base, "last_at": base + now})
            self.execute("UPDATE boots SET last_at = max(last_at, ?) WHERE boot_id = ?", (base + now, boot))
        return base

    def remember_time(self) -> None:
        """Store how far node time has come, for the next boot. Called by a periodic job."""
        with self.transaction():
            self.execute(
                "UPDATE boots SET last_at = max(last_at, ?) WHERE boot_id = ?",
                (self.clock.ticks(), boot_id()),
            )


class Session:
    """``with session:`` makes the thread use this connection; one thread at a time."""

    def __init__(self, db: Database, connection: Any) -> None:
        self._db = db
        self._connection = connection
        self._former: Any = None

    def __enter__(self) -> None:
        local = self._db._local
        self._former = getattr(local, "connection", None)
        local.connection = self._connection

    def __exit__(self, *_: object) -> None:
        self._db._local.connection = self._former
        self._former = None

    def close(self) -> None:
        self._connection.close()


def _lock_and_migrate(path: Path, lock_path: Path) -> int:
    """Return a descriptor with a shared lock once the schema is current."""
    fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock_current(fd, path)
    except (apsw.NotADBError, apsw.CorruptError) as error:
        os.close(fd)
        raise StorageError(
            "open index", f"{path} is damaged ({type(error).__name__})", "Restore the index from a backup"
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock_current(fd: int, path: Path) -> None:
    """Hold the shared lock and have the schema current, migrating it alone if need be."""
    deadline = time.monotonic() + MIGRATION_WAIT_SECONDS
    while True:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if _current(path):
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(fd, fcntl.LOCK_UN)
            if time.monotonic() > deadline:
                raise StorageError(
                    "migrate the index",
                    "another process of this node has it open",
                    "Stop all of dicomnode.target, then start it again",
                    retryable=True,
                ) from None
            time.sleep(random.uniform(0.02, 0.08))  # noqa: S311 jitter, so that starters do not retry in step
            continue
        if not _current(path):
            _migrate(path)


def _current(path: Path) -> bool:
    if not path.exists():
        return False
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(BUSY_MILLISECONDS)
        table = connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = ?", (migrations.migrations_table,)
        ).fetchone()
        if table is None:
            return False
        names = {r[0] for r in connection.execute(f"SELECT name FROM {migrations.migrations_table}")}
    finally:
        connection.close()
    wanted = {m.name for m in migrations._migrations}
    newer = names - wanted
    if newer:
        raise StorageError(
            "open index",
            f"it was made by a newer version (migration {min(newer)})",
            "Install that version again, or restore the index from before the upgrade",
        )
    return wanted <= names


def _migrate(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        path.chmod(0o600)
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=FULL")
        migrations.apply(sqlite_utils.Database(connection))
    finally:
        connection.close()
    durable.sync_directory(path.parent)
