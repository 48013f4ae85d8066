"""What a node finds after a power cut, and whether that keeps its promises.

The promises are RELIABILITY.md's invariant: acknowledged => stored, byte-equal and indexed; not
acknowledged => absent or whole; nothing that is not durable was ever sent on.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import apsw

from dicomnode import durable, logs
from dicomnode.errors import NodeError
from dicomnode.index.database import Database
from dicomnode.receive.listener import Listener
from dicomnode.settings import Dimse, Settings
from dicomnode.settings import Node as NodeSettings
from scripts.crashing.wire import Said
from tests.peers import data_set_of

TABLES = ("patients", "instances", "former_instances", "results", "jobs", "deliveries", "models")
JOURNAL_MB = 4
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """Files by path, the index's rows by table, and why the index cannot be used, if so."""

    files: Mapping[str, bytes]
    rows: Mapping[str, list[Row]]
    broken: str = ""

    def object(self, row: Row) -> bytes | None:
        return self.files.get(f"objects/{row['file']}")


Promise = Callable[[Found, int], Iterable[str]]
"""``promise(found, number)``: what is wrong when the power went after event ``number``."""


class Recovery:
    """Starts on a crash state as a receiver does, up to where it would listen; ``folder`` should be in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(16384, _hard()), _hard()))
        self._settings = Settings(
            node=NodeSettings(data_dir=folder, reserve_mb=1), dimse=Dimse(workers=1, journal_mb=JOURNAL_MB)
        )
        self._known: dict[int, Found] = {}
        self.started = 0
        logs.configure("crash", "error", "json")

    def find(self, files: Mapping[str, bytes]) -> Found:
        """What is there after the start."""
        key = hash(frozenset((path, hash(content)) for path, content in files.items()))
        if key not in self._known:
            if len(self._known) > 2000:
                self._known.clear()
            self._known[key] = self._start(files)
        return self._known[key]

    def _start(self, files: Mapping[str, bytes]) -> Found:
        self.started += 1
        self._clear()
        for path, content in files.items():
            target = self._folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            with mock.patch.object(durable, "die", _raise):
                rows = self._rows()
        except (apsw.Error, NodeError, OSError) as error:
            return Found({}, {}, f"the node does not start: {type(error).__name__}: {error}")
        if isinstance(rows, str):
            return Found({}, {}, rows)
        left = {p: content for p in self._wanted(rows) if (content := _read(self._folder / p)) is not None}
        return Found(left, rows)

    def _clear(self) -> None:
        """Empty, but for the store's folders: to make 256 of them costs more than all the rest."""
        for entry in os.scandir(self._folder):
            if entry.name == "objects":
                for folder in os.scandir(entry):
                    for file in os.scandir(folder):
                        Path(file).unlink()
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                Path(entry).unlink(missing_ok=True)  # a start that failed may close its connection only now

    def _wanted(self, rows: Mapping[str, list[Row]]) -> Iterator[str]:
        for table in ("instances", "former_instances", "results"):
            yield from (f"objects/{row['file']}" for row in rows[table])
        models = self._folder / "models"
        yield from (p.relative_to(self._folder).as_posix() for p in models.rglob("*") if p.is_file())

    def _rows(self) -> dict[str, list[Row]] | str:
        db = Database(self._folder)
        try:
            verdict = db.backup_check()
            if verdict != "ok":
                return f"integrity_check: {verdict}"
            Listener(self._settings, db, [], "receiver-1").close()
            verdict = db.backup_check()
            if verdict != "ok":
                return f"integrity_check after the start: {verdict}"
            if foreign := db.rows("PRAGMA foreign_key_check"):
                return f"foreign_key_check: {len(foreign)} rows"
            return {table: db.rows(f"SELECT * FROM {table}") for table in TABLES}
        finally:
            db.close()


def _hard() -> int:
    """Most descriptors: a start that fails leaves its own to the end of the process, as it does in life."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _raise(error: BaseException) -> NoReturn:
    raise error


@lru_cache(maxsize=4096)
def data_set_hash(part10: bytes) -> str:
    """SHA-256 of the data set; empty when the file is no Part 10 file."""
    try:
        return hashlib.sha256(data_set_of(part10)).hexdigest()
    except AssertionError:
        return ""


def usable(found: Found, _: int) -> Iterator[str]:
    """The index opens and is whole."""
    if found.broken:
        yield found.broken


def whole(found: Found, _: int) -> Iterator[str]:
    """No row names a file that is gone or differs; the replaced versions are kept."""
    for row in found.rows.get("instances", ()):
        part10 = found.object(row)
        if part10 is None:
            yield f"instance {row['id']} has no file"
        elif len(part10) != row["size"] or data_set_hash(part10) != row["dataset_sha256"]:
            yield f"instance {row['id']} has a file that is not whole"
    for row in found.rows.get("former_instances", ()):
        part10 = found.object(row)
        if part10 is None or not data_set_hash(part10):
            yield f"former instance {row['id']} has no whole file"
    by_uid = {row["SOPInstanceUID"] for row in found.rows.get("instances", ())}
    for row in found.rows.get("results", ()):
        if row["SOPInstanceUID"] not in by_uid:
            yield f"result {row['id']} is no instance"


@dataclass(slots=True)
class Received:
    """The sender's ledger: SHA-256 of each data set in the order sent, by SOP Instance UID, and our answers.

    ``begun``: numbers of the events before which each was sent, where that is known.
    """

    sent: dict[str, list[str]]
    answers: Sequence[Said]
    begun: dict[str, list[int]] = field(default_factory=dict)
    _when: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for said in self.answers:
            if said.status == 0:
                self._when.setdefault(said.uid, []).append(said.number)

    def fresh(self) -> list[int]:
        """Numbers of the answers that acknowledged something new: other bytes than the last time."""
        return sorted(
            number
            for uid, numbers in self._when.items()
            for turn, number in enumerate(numbers)
            if turn == 0 or self.sent[uid][turn] != self.sent[uid][turn - 1]
        )

    def __call__(self, found: Found, number: int) -> Iterator[str]:
        rows = {row["SOPInstanceUID"]: row for row in found.rows.get("instances", ())}
        for uid, versions in self.sent.items():
            count = sum(moment <= number for moment in self._when.get(uid, ()))
            row = rows.get(uid)
            if row is None:
                if count:
                    yield f"an acknowledged object is not in the index (answered {count} times)"
                continue
            begun = sum(moment <= number for moment in self.begun.get(uid, ())) if self.begun else len(versions)
            allowed = versions[max(count - 1, 0) : begun]
            if row["dataset_sha256"] not in allowed:
                yield "an object is indexed with other bytes than were acknowledged last"


@dataclass(slots=True)
class Delivered:
    """What reached the peer is what the index holds: sent only when durable, marked stored only when it was.

    ``peer`` is what the peer has in the end: SHA-256 of the data set by SOP Instance UID.
    """

    requests: Sequence[Said]
    heard: Sequence[Said]
    peer: dict[str, str]

    def __call__(self, found: Found, number: int) -> Iterator[str]:
        results = {row["SOPInstanceUID"]: row for row in found.rows.get("results", ())}
        hashes = {row["SOPInstanceUID"]: row["dataset_sha256"] for row in found.rows.get("instances", ())}
        for said in self.requests:
            if said.number <= number and hashes.get(said.uid) != self.peer.get(said.uid):
                yield "a result was sent that is not in the index as it was sent"
        stored = {said.uid for said in self.heard if said.number <= number and said.status == 0}
        uid_of = {row["id"]: uid for uid, row in results.items()}
        for row in found.rows.get("deliveries", ()):
            if row["state"] == "stored" and uid_of[row["result_id"]] not in stored:
                yield "a delivery counts as stored before the peer said so"
        for job in found.rows.get("jobs", ()):
            made = [r["id"] for r in results.values() if r["job_id"] == job["id"]]
            sent = [d for d in found.rows["deliveries"] if d["result_id"] in made]
            if job["state"] == "done" and (len(made) != 2 or len(sent) != 2):
                yield f"a finished job has {len(made)} results and {len(sent)} deliveries"
            if job["state"] != "done" and made:
                yield "an unfinished job has results"


@dataclass(slots=True)
class Kept:
    """So many rows of a table stay."""

    table: str
    count: int

    def __call__(self, found: Found, _: int) -> Iterator[str]:
        if not found.broken and len(found.rows.get(self.table, ())) != self.count:
            yield f"{len(found.rows.get(self.table, ()))} of {self.count} rows of {self.table} are left"


@dataclass(slots=True)
class Bundle:
    """A pulled model stands under its final name only whole, and is active only when it stands there."""

    name: str
    version: str
    files: dict[str, bytes]

    def __call__(self, found: Found, _: int) -> Iterator[str]:
        place = f"models/{self.name}/{self.version}/"
        standing = {p.removeprefix(place): c for p, c in found.files.items() if p.startswith(place)}
        if standing and standing != self.files:
            yield "a bundle that is not whole stands where the worker looks"
        active = {row["name"]: row["version"] for row in found.rows.get("models", ())}
        if active.get(self.name) == self.version and standing != self.files:
            yield "a bundle is active that is not there"
