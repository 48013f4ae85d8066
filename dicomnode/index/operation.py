"""What operators look at: events, processes, active models, model pulls."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row

EVENTS_KEPT = 10_000
BEAT_SECONDS = 5.0

Severity = Literal["info", "warning", "error"]


class Events:
    """A bounded list of things that an operator should know; never holds patient data."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def add(self, severity: Severity, kind: str, subject: str, text: str) -> None:
        db = self.db
        with db.transaction():
            rowid = db.insert(
                "events",
                {
                    "time": iso(db.clock.wall()),
                    "at": db.clock.ticks(),
                    "severity": severity,
                    "kind": kind,
                    "subject": subject,
                    "text": text,
                },
            )
            if rowid % 100 == 0:
                db.execute("DELETE FROM events WHERE id <= ?", (rowid - EVENTS_KEPT,))

    def listing(self, limit: int = 100, kind: str | None = None) -> list[Row]:
        where, parameters = ("WHERE kind = ?", [kind]) if kind else ("", [])
        return self.db.rows(f"SELECT * FROM events {where} ORDER BY id DESC LIMIT ?", (*parameters, limit))


class Processes:
    """Heartbeats: each process writes its row; a silent one is not ready."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def beat(self, name: str, state: str, detail: Mapping[str, Any] | None = None, metrics: str = "") -> None:
        """``state``: ``starting``, ``ready`` or ``stopping``; ``detail`` is shown as it is.

        ``metrics`` is the process's snapshot of its metrics (:mod:`dicomnode.metrics`).
        """
        db = self.db
        with db.transaction():
            known = db.row("SELECT pid, started_time FROM processes WHERE name = ?", (name,))
            pid = os.getpid()
            started = known["started_time"] if known and known["pid"] == pid else iso(db.clock.wall())
            db.insert(
                "processes",
                {
                    "name": name,
                    "pid": pid,
                    "state": state,
                    "started_time": started,
                    "beat_at": db.clock.ticks(),
                    "detail": json.dumps(dict(detail or {})),
                    "metrics": metrics,
                },
                conflict="OR REPLACE",
            )

    def listing(self) -> list[Row]:
        """All rows with ``silent_seconds`` and parsed ``detail``."""
        now = self.db.clock.ticks()
        rows = self.db.rows("SELECT * FROM processes ORDER BY name")
        for row in rows:
            row["detail"] = json.loads(row["detail"] or "{}")
            row["silent_seconds"] = max(0.0, now - float(row["beat_at"]))
            row["alive"] = row["silent_seconds"] < 4 * BEAT_SECONDS and row["state"] == "ready"
        return rows


class Models:
    """Which version of each model serves, and the one before it."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def active(self) -> dict[str, str]:
        """Name -> version that an operator or the sidecar activated."""
        return {r["name"]: r["version"] for r in self.db.rows("SELECT name, version FROM models")}

    def previous(self, name: str) -> str | None:
        row = self.db.row("SELECT previous_version FROM models WHERE name = ?", (name,))
        return row["previous_version"] if row else None

    def activate(self, name: str, version: str, who: str = "operator", why: str = "") -> None:
        """Atomic; the version that served before is kept for a roll-back. See :class:`dicomnode.index.life.Life`."""
        from dicomnode.index.life import Life

        Life(self.db).activate(name, version, who=who, why=why)

    def pulls(self) -> list[Row]:
        return self.db.rows("SELECT * FROM model_pulls ORDER BY name, version")

    def record_pull(self, row: Row) -> None:
        """Insert or replace the row of one pull, by ``sha256``."""
        with self.db.transaction():
            self.db.insert("model_pulls", row, conflict="OR REPLACE")

    def forget_pull(self, sha256: str) -> None:
        """An archive that is not wanted any more and has not come."""
        with self.db.transaction():
            self.db.execute("DELETE FROM model_pulls WHERE sha256 = ? AND state = 'pending'", (sha256,))

    def gone(self, name: str, version: str) -> None:
        """The folder of a version that was pulled is not here any more; inside a transaction."""
        here = "state IN ('placed', 'activated')"
        self.db.execute(
            f"UPDATE model_pulls SET state = 'removed' WHERE name = ? AND version = ? AND {here}", (name, version)
        )

    def pull(self, sha256: str) -> Row | None:
        """What is remembered of one archive; survives a restart and a rollback."""
        return self.db.row("SELECT * FROM model_pulls WHERE sha256 = ?", (sha256,))


class Figures:
    """Counts and ages straight from the rows, for the dashboard, /metrics and ``status``."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def waiting(self, table: Literal["deliveries", "sync_items", "notifications"]) -> list[Row]:
        """Per destination and state: ``count``, and ``oldest_seconds`` since the oldest was made."""
        return self.db.rows(
            "SELECT destination, state, count(*) AS count, max(0.0, ? - min(created_at)) AS oldest_seconds"
            f" FROM {table} GROUP BY destination, state ORDER BY destination, state",
            (self.db.clock.ticks(),),
        )

    def oldest_job_seconds(self) -> float:
        """Age of the oldest job that is not finished; 0 when there is none."""
        oldest = self.db.value("SELECT min(created_at) FROM jobs WHERE state IN ('pending', 'running')")
        return 0.0 if oldest is None else max(0.0, self.db.clock.ticks() - float(oldest))

    def recent_events(self, seconds: float = 3600.0) -> dict[str, int]:
        """Number of events by severity, of the last ``seconds`` of node time."""
        rows = self.db.rows(
            "SELECT severity, count(*) AS n FROM events WHERE at >= ? GROUP BY severity",
            (self.db.clock.ticks() - seconds,),
        )
        return {severity: 0 for severity in ("info", "warning", "error")} | {r["severity"]: int(r["n"]) for r in rows}

    def rejections(self, limit: int = 20) -> list[Row]:
        """Newest events about something that was rejected or refused."""
        return self.db.rows(
            "SELECT * FROM events WHERE kind LIKE '%reject%' OR kind LIKE '%refuse%' ORDER BY id DESC LIMIT ?", (limit,)
        )

    def open_associations(self) -> int:
        return int(self.db.value("SELECT count(*) FROM associations WHERE state = 'open'"))

    def check_readable(self) -> None:
        """Raises when the index cannot be read."""
        self.db.value("SELECT count(*) FROM boots")
