"""What arrived: one SQLite file and a folder of objects. Blocking: call it off the event loop."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw

from dicomnode import durable
from dicomnode.cloud.schema import prepare
from dicomnode.cloud.series import MAX_SERIES, Series, shown
from dicomnode.errors import DiskFull

Row = dict[str, Any]

SETTLED_SHOWN = 100
_ONE = "site = ? AND type = ? AND id = ?"
_OF_ONE = "site = ? AND type = ? AND record_id = ?"
_NODE = "site = ? AND name = ?"


@dataclass(frozen=True, slots=True)
class Arrived:
    """A file that was staged in the object store, and what its header says."""

    attributes: Mapping[str, str]
    transfer_syntax_uid: str
    staged: durable.StagedFile
    size: int
    sha256: str

    @property
    def uid(self) -> str:
        return self.attributes["SOPInstanceUID"]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Storage:
    """``reserve_mb`` MiB of the volume stay free. One connection, one thread at a time.

    ``site``: whose; what is of one site is never seen, changed or counted with that of another.
    """

    def __init__(self, data_dir: Path, reserve_mb: int = 256) -> None:
        durable.make_directory(data_dir)
        self.data_dir = data_dir
        self.reserve_bytes = reserve_mb << 20
        self.objects = durable.ObjectStore(data_dir)
        self.objects.prepare()
        self._lock = threading.Lock()
        self._connection: Any = apsw.Connection(str(data_dir / "cloud.sqlite"))
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        prepare(self._connection)
        for folder in self.objects.folders():  # a request that was cut by the end of the process
            for part in folder.glob(f"*{durable.TEMPORARY_SUFFIX}"):
                durable.remove(part)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        with self._lock:
            return self._rows(sql, parameters)

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        cursor = self._connection.execute(sql, parameters)
        first = cursor.fetchone()
        if first is None:
            return []
        names = [d[0] for d in cursor.get_description()]
        return [dict(zip(names, values, strict=True)) for values in (first, *cursor)]

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                except BaseException:
                    self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except apsw.FullError as error:
                raise DiskFull("commit", "no space left", "Free space on the volume of the cloud's data") from error
            except (apsw.IOError, apsw.CorruptError) as error:
                durable.die(error)

    # Objects

    def begin(self) -> durable.StagedFile:
        """A file for an object that comes in. Raises DiskFull below the reserve."""
        if durable.free_bytes(self.data_dir) <= self.reserve_bytes:
            raise DiskFull("store an object", "free space is at the reserve", "Free space on the cloud's volume")
        return self.objects.begin()

    def add_objects(self, arrived: Sequence[Arrived], site: str = "") -> dict[str, str]:
        """Name the files, sync them and commit their rows: ``stored``, ``known`` or ``differs`` by UID.

        The first object with a UID stays; ``differs``: another came with other bytes.
        """
        fates: dict[str, str] = {}
        fresh: list[tuple[Arrived, str]] = []
        known = self._known([a.uid for a in arrived], site)
        for one in arrived:
            digest = known.get(one.uid)
            if digest is None:
                name = self.objects.new_name(one.attributes.get("SeriesInstanceUID", ""))
                self.objects.place(one.staged, name)
                fresh.append((one, name))
                known[one.uid] = one.sha256
                fates[one.uid] = "stored"
            else:
                one.staged.abandon()
                if fates.get(one.uid) != "stored" or digest != one.sha256:
                    fates[one.uid] = "known" if digest == one.sha256 else "differs"
        for folder in {self.objects.path(name).parent for _, name in fresh}:
            durable.sync_directory(folder)
        with self._transaction() as db:
            for one, name in fresh:
                self._insert_object(db, one, name, site)
            for uid, fate in fates.items():
                if fate != "stored":
                    column = "differing" if fate == "differs" else "puts"
                    where = "WHERE site = ? AND SOPInstanceUID = ?"
                    db.execute(f"UPDATE objects SET {column} = {column} + 1 {where}", (site, uid))
        return fates

    def _known(self, uids: Sequence[str], site: str) -> dict[str, str]:
        marks = ", ".join("?" * len(uids))
        query = f"SELECT SOPInstanceUID, sha256 FROM objects WHERE site = ? AND SOPInstanceUID IN ({marks})"
        return {r["SOPInstanceUID"]: r["sha256"] for r in self.rows(query, (site, *uids))}

    @staticmethod
    def _insert_object(db: Any, one: Arrived, name: str, site: str) -> None:
        moment, a = now(), one.attributes
        study = a.get("StudyInstanceUID", "")
        db.execute(
            "INSERT INTO objects (site, SOPInstanceUID, SOPClassUID, SeriesInstanceUID, StudyInstanceUID, Modality,"
            " PatientID, PatientIdentityRemoved, TransferSyntaxUID, file, size, sha256, received_time)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                site, one.uid, a.get("SOPClassUID", ""), a.get("SeriesInstanceUID", ""), study, a.get("Modality", ""),
                a.get("PatientID", ""), a.get("PatientIdentityRemoved", ""), one.transfer_syntax_uid,
                name, one.size, one.sha256, moment,
            ),
        )  # fmt: skip
        _arrival(db, "object", one.uid, study, moment, site)

    def object_file(self, uid: str, site: str = "") -> Path | None:
        found = self.rows("SELECT file FROM objects WHERE site = ? AND SOPInstanceUID = ?", (site, uid))
        return self.objects.path(found[0]["file"]) if found else None

    # Records

    def add_record(self, node: str, record: Row, site: str = "") -> Row:
        """Apply one record of a node, once for its key; the outcome as the API describes it.

        ``conflict``: it was made from a version that the cloud's has left behind; both sides are kept
        and the cloud's serves.
        """
        data = json.dumps(record["data"], sort_keys=True, ensure_ascii=False)
        digest = durable.sha256(f"{record['type']}\n{record['id']}\n{record['version']}\n{data}".encode())
        with self._transaction() as db:
            used = self._rows("SELECT * FROM keys WHERE site = ? AND key = ?", (site, record["idempotency_key"]))
            if used:
                same = used[0]["digest"] == digest
                if same:
                    return _outcome(record, "duplicate", used[0]["version"], was=used[0]["outcome"])
                return _outcome(record, "rejected", None, reason="the key was used for another record")
            held = self._rows(f"SELECT * FROM records WHERE {_ONE}", (site, record["type"], record["id"]))
            version = int(held[0]["version"]) if held else 0
            if self._contradicts(record, held[0] if held else None, site):
                outcome = "conflict"
                db.execute(
                    "INSERT INTO conflicts (type, record_id, node, cloud_version, cloud_data, edge_version, edge_base,"
                    " edge_data, state, time, key, site) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open', ?, ?, ?)",
                    (record["type"], record["id"], node, version, held[0]["data"] if held else "{}",
                     record["version"], record["base_version"], data, now(), record["idempotency_key"], site),
                )  # fmt: skip
            else:
                self._settle(db, record, data, site)
                outcome, version = "stored", int(record["version"])
                self._write(db, (site, record["type"], record["id"]), version, node, data, record)
            key = (site, record["idempotency_key"], digest, outcome, version)
            db.execute("INSERT INTO keys (site, key, digest, outcome, version) VALUES (?, ?, ?, ?, ?)", key)
            return _outcome(record, outcome, version)

    def _contradicts(self, record: Row, held: Row | None, site: str) -> bool:
        """Whether it was made from something else than what serves here.

        Versions of two branches may have the same numbers; ``base_key`` names the very change that it
        builds on. What builds on a change that was in conflict is in conflict itself.
        """
        version, base = int(held["version"]) if held else 0, record.get("base_key")
        if version > record["base_version"]:
            return True
        if not base:
            return False
        if held is not None and version == record["base_version"] and held["key"] not in ("", base):
            return True
        where = (site, record["type"], record["id"], base)
        return bool(self._rows(f"SELECT 1 AS one FROM conflicts WHERE {_OF_ONE} AND key = ?", where))

    def _settle(self, db: Any, record: Row, data: str, site: str) -> None:
        """A node has decided: its conflicts that the change names are closed."""
        for key in record.get("settles") or ():
            db.execute(
                "UPDATE conflicts SET state = CASE WHEN edge_data = ?1 THEN 'edge' WHEN cloud_data = ?1 THEN 'cloud'"
                " ELSE 'merged' END WHERE type = ?2 AND record_id = ?3 AND key = ?4 AND site = ?5 AND state = 'open'",
                (data, record["type"], record["id"], key, site),
            )

    @staticmethod
    def _write(db: Any, one: tuple[str, str, str], version: int, node: str, data: str, record: Row) -> None:
        """``one``: site, type and id."""
        moment, (site, kind, name) = now(), one
        seq = _arrival(db, "record", f"{kind}/{name}/{version}", record.get("study"), moment, site)
        db.execute(
            "INSERT OR REPLACE INTO records (site, type, id, version, node, study, data, changed_time, received_time,"
            " seq, key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (site, kind, name, version, node, record.get("study"), data, record["changed_time"], moment, seq,
             record.get("idempotency_key") or str(uuid.uuid4())),
        )  # fmt: skip

    def record(self, kind: str, name: str, site: str = "") -> Row | None:
        found = self.rows(f"SELECT * FROM records WHERE {_ONE}", (site, kind, name))
        return self._shown(found[0]) if found else None

    def _shown(self, row: Row) -> Row:
        """With its data, and the keys of its conflicts that are closed, the newest last."""
        settled = self.rows(
            f"SELECT key FROM conflicts WHERE {_OF_ONE} AND state != 'open' AND key != '' ORDER BY id DESC LIMIT ?",
            (row["site"], row["type"], row["id"], SETTLED_SHOWN),
        )
        return {**row, "data": json.loads(row["data"]), "settled": [r["key"] for r in reversed(settled)]}

    def change_record(self, kind: str, name: str, expected: int, data: Mapping[str, Any], site: str = "") -> Row | None:
        """A change made at the cloud: None when its version is not ``expected`` (0: there is none)."""
        with self._transaction() as db:
            held = self._rows(f"SELECT version, node, study FROM records WHERE {_ONE}", (site, kind, name))
            version = int(held[0]["version"]) if held else 0
            if version != expected:
                return None
            record = {"changed_time": now(), "study": held[0]["study"] if held else None}
            text = json.dumps(data, sort_keys=True, ensure_ascii=False)
            self._write(db, (site, kind, name), version + 1, "", text, record)
        return self.record(kind, name, site)

    def feed(self, after: int, kind: str | None, limit: int, site: str = "") -> list[Row]:
        """Records of the site in the order of their last change, from behind ``after`` (a ``seq``)."""
        rows = self.rows(
            "SELECT * FROM records WHERE site = ? AND seq > ? AND (? IS NULL OR type = ?) ORDER BY seq LIMIT ?",
            (site, after, kind, kind, limit),
        )
        return [self._shown(row) for row in rows]

    def newest(self, site: str = "") -> int:
        """The last ``seq`` of the site; smaller than a node remembers after a restore from a backup."""
        return int(self.rows("SELECT coalesce(max(seq), 0) AS n FROM arrivals WHERE site = ?", (site,))[0]["n"])

    def conflicts(self, state: str | None, limit: int, site: str | None = None) -> list[Row]:
        """Of one site, or of all; newest first."""
        rows = self.rows(
            "SELECT * FROM conflicts WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR site = ?2) ORDER BY id DESC"
            " LIMIT ?3",
            (state, site, limit),
        )
        for row in rows:
            for side in ("cloud_data", "edge_data"):
                row[side] = json.loads(row[side] or "{}")
        return rows

    def decide(self, conflict: int, take: str, data: Mapping[str, Any] | None) -> Row | None:
        """Close a conflict with the cloud's value, the node's, or ``data``; None when it is not open.

        Also the cloud's value becomes a new version, so that the nodes see that it was decided.
        """
        with self._transaction() as db:
            found = self._rows("SELECT * FROM conflicts WHERE id = ? AND state = 'open'", (conflict,))
            if not found:
                return None
            row = found[0]
            db.execute("UPDATE conflicts SET state = ? WHERE id = ?", (take, conflict))
            one = (row["site"], row["type"], row["record_id"])
            held = self._rows(f"SELECT version, study, data FROM records WHERE {_ONE}", one)
            merged = json.dumps(data, sort_keys=True, ensure_ascii=False)
            served = held[0]["data"] if held else row["cloud_data"]
            text = {"edge": row["edge_data"], "merged": merged, "cloud": served}[take]
            record = {"changed_time": now(), "study": held[0]["study"] if held else None}
            version = max(int(held[0]["version"]) if held else 0, int(row["edge_version"])) + 1
            self._write(db, one, version, "", text, record)
        return self.record(row["type"], row["record_id"], row["site"])

    # Nodes

    def heartbeat(self, node: str, body: Mapping[str, Any], site: str = "") -> int:
        """Keep the last one; the generation that is desired of this node."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO nodes (site, name, heartbeat, heartbeat_time) VALUES (?, ?, ?, ?) ON CONFLICT (site, name)"
                " DO UPDATE SET heartbeat = excluded.heartbeat, heartbeat_time = excluded.heartbeat_time",
                (site, node, json.dumps(body), now()),
            )
            return int(self._rows(f"SELECT generation FROM nodes WHERE {_NODE}", (site, node))[0]["generation"])

    def node(self, name: str, site: str = "") -> Row | None:
        found = self.rows(f"SELECT * FROM nodes WHERE {_NODE}", (site, name))
        return _node(found[0]) if found else None

    def nodes(self) -> list[Row]:
        return [_node(row) for row in self.rows("SELECT * FROM nodes ORDER BY site, name")]

    def desire(self, node: str, state: Mapping[str, Any], site: str = "") -> int:
        """Set what is desired of a node; the new generation."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO nodes (site, name, generation, desired) VALUES (?, ?, 1, ?) ON CONFLICT (site, name)"
                " DO UPDATE SET generation = generation + 1, desired = excluded.desired",
                (site, node, json.dumps(state)),
            )
            return int(self._rows(f"SELECT generation FROM nodes WHERE {_NODE}", (site, node))[0]["generation"])

    def report(self, node: str, body: Mapping[str, Any], site: str = "") -> bool:
        """What a node made of a generation; False when the node is unknown."""
        with self._transaction() as db:
            told = (json.dumps(body), now(), site, node)
            db.execute(f"UPDATE nodes SET report = ?, report_time = ? WHERE {_NODE}", told)
            return bool(db.changes())

    # Metrics

    def add_series(self, named: Iterable[tuple[str, Series]], site: str = "") -> int:
        """Keep the newest value of each series of a node, at most MAX_SERIES of them; how many samples came."""
        count, moment = 0, now()
        with self._transaction() as db:
            held: dict[str, int] = {}
            for node, one in named:
                if node not in held:
                    where = "SELECT count(*) AS n FROM series WHERE site = ? AND node = ?"
                    held[node] = int(self._rows(where, (site, node))[0]["n"])
                db.execute(
                    "UPDATE series SET samples = samples + ?4, received_time = ?7,"
                    " value = CASE WHEN ?6 >= sample_ms THEN ?5 ELSE value END, sample_ms = max(sample_ms, ?6)"
                    " WHERE site = ?1 AND node = ?2 AND labels = ?3",
                    (site, node, shown(one.labels), one.samples, one.value, one.time, moment),
                )
                if not db.changes() and held[node] < MAX_SERIES:
                    held[node] += 1
                    db.execute(
                        "INSERT INTO series (site, node, labels, samples, value, sample_ms, received_time)"
                        " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                        (site, node, shown(one.labels), one.samples, one.value, one.time, moment),
                    )
                count += one.samples
        return count

    def series(self, site: str, node: str) -> list[Row]:
        return self.rows("SELECT * FROM series WHERE site = ? AND node = ? ORDER BY labels", (site, node))

    def series_nodes(self) -> list[Row]:
        """For each node how many series and samples came, and when the last ones did."""
        return self.rows(
            "SELECT site, node, count(*) AS series, sum(samples) AS samples, max(received_time) AS received_time"
            " FROM series GROUP BY site, node ORDER BY site, node"
        )

    def counts(self) -> dict[str, int]:
        queries = {
            "objects": "SELECT count(*) AS n FROM objects",
            "bytes": "SELECT coalesce(sum(size), 0) AS n FROM objects",
            "studies": "SELECT count(DISTINCT StudyInstanceUID) AS n FROM objects",
            "records": "SELECT count(*) AS n FROM records",
            "conflicts": "SELECT count(*) AS n FROM conflicts WHERE state = 'open'",
            "samples": "SELECT coalesce(sum(samples), 0) AS n FROM series",
            "repeated": "SELECT coalesce(sum(puts - 1), 0) AS n FROM objects",
        }
        return {name: int(self.rows(sql)[0]["n"]) for name, sql in queries.items()}

    def arrivals(self, limit: int = 1000, after: int = 0) -> list[Row]:
        """What arrived, in order; an object or a version of a record once, whatever was repeated."""
        return self.rows("SELECT * FROM arrivals WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))


def _arrival(db: Any, kind: str, name: str, study: str | None, moment: str, site: str) -> int:
    row = (kind, name, study, moment, site)
    db.execute("INSERT INTO arrivals (kind, name, study, time, site) VALUES (?, ?, ?, ?, ?)", row)
    return int(db.last_insert_rowid())


def _outcome(record: Row, outcome: str, version: int | None, **more: Any) -> Row:
    return {"idempotency_key": record["idempotency_key"], "outcome": outcome, "version": version, **more}


def _node(row: Row) -> Row:
    return {**row, **{k: json.loads(row[k]) if row[k] else None for k in ("heartbeat", "desired", "report")}}


def make_token(path: Path) -> None:
    """Write a new random token (0600); for demos."""
    durable.write_durable(path, uuid.uuid4().hex.encode() + os.urandom(8).hex().encode())
