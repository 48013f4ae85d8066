"""Attempts at jobs by model version, and comparisons of two versions on the same series.

A run is a row from the moment at which a version was chosen for a job: it keeps a study with
that version and shows attempts that ended with the process. Neither table feeds a delivery;
losing the last rows in a power cut costs figures, never a result, so they are not synced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row
from dicomnode.rollout import Compared, Role, Run, RunState

KEPT = 50_000
"""Rows kept of each table."""

TRIES = 2
"""A comparison that did not come about is tried once more."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a job's series comes from: ``callers`` are peer names and calling AE titles."""

    study_id: int
    study_uid: str
    callers: tuple[str, ...]


class Runs:
    def __init__(self, db: Database) -> None:
        self.db = db

    def origin(self, job: Row) -> Origin:
        row = self.db.row(
            "SELECT st.id, st.StudyInstanceUID FROM series se JOIN studies st ON st.id = se.study_id WHERE se.id = ?",
            (job["series_id"],),
        )
        assert row is not None  # foreign keys
        callers = self.db.rows(
            "SELECT DISTINCT a.peer, a.calling_ae FROM instances i JOIN associations a ON a.id = i.association_id"
            " WHERE i.series_id = ?",
            (job["series_id"],),
        )
        names = {str(name) for r in callers for name in (r["peer"], r["calling_ae"]) if name}
        return Origin(int(row["id"]), str(row["StudyInstanceUID"]), tuple(sorted(names)))

    def before(self, study_id: int, name: str) -> str | None:
        """The version that a series of the study went to last; pinned versions do not count."""
        found = self.db.value(
            "SELECT version FROM model_runs WHERE study_id = ? AND name = ? AND role != 'pinned'"
            " ORDER BY id DESC LIMIT 1",
            (study_id, name),
        )
        return None if found is None else str(found)

    def begin(self, job_id: int, study_id: int, name: str, version: str, role: Role, instances: int) -> int:
        """The row of this attempt; a former one of the job that never ended was lost with its process."""
        db = self.db
        with db.transaction(sync=False):
            db.execute("UPDATE model_runs SET state = 'lost' WHERE job_id = ? AND state = 'running'", (job_id,))
            run = db.insert(
                "model_runs",
                {
                    "job_id": job_id,
                    "study_id": study_id,
                    "name": name,
                    "version": version,
                    "role": role,
                    "state": "running",
                    "instances": instances,
                    "at": db.clock.ticks(),
                    "time": iso(db.clock.wall()),
                },
            )
            if run % 100 == 0:
                db.execute("DELETE FROM model_runs WHERE id <= ?", (run - KEPT,))
        return run

    def end(
        self,
        run: int,
        state: RunState,
        *,
        seconds: float = 0.0,
        outputs: Mapping[str, float] | None = None,
        engine: str = "",
        settled: bool = True,
        batch_studies: int = 0,
    ) -> None:
        """``outputs``: value of each measurement by its name, for the drift; ``batch_studies``: series that shared
        its batches, 0 if none did; the others as in :class:`Run`.
        """
        with self.db.transaction(sync=False):
            self.db.execute(
                "UPDATE model_runs SET state = ?, seconds = ?, outputs = ?, engine = ?, settled = ?, batch_studies = ?"
                " WHERE id = ? AND state = 'running'",
                (state, seconds, json.dumps(dict(outputs or {})), engine, int(settled), batch_studies, run),
            )

    def stop(self) -> None:
        """The node is told to stop: what runs says nothing of its version."""
        with self.db.transaction(sync=False):
            self.db.execute("UPDATE model_runs SET state = 'stopped' WHERE state = 'running'")

    def part(self, job_ids: Sequence[int]) -> None:
        """The worker died under a batch that these jobs shared: that says nothing of the version by any one of them."""
        with self.db.transaction(sync=False):
            for job_id in job_ids:
                self.db.execute(
                    "UPDATE model_runs SET state = 'stopped' WHERE job_id = ? AND state = 'running'", (job_id,)
                )

    def lose(self, job_ids: Sequence[int]) -> list[tuple[str, str]]:
        """Jobs whose worker died; returns name and version of each run that was lost."""
        lost: list[tuple[str, str]] = []
        with self.db.transaction(sync=False):
            for job_id in job_ids:
                for row in self.db.rows(
                    "SELECT name, version FROM model_runs WHERE job_id = ? AND state = 'running'", (job_id,)
                ):
                    lost.append((row["name"], row["version"]))
                self.db.execute(
                    "UPDATE model_runs SET state = 'lost' WHERE job_id = ? AND state = 'running'", (job_id,)
                )
        return lost

    def recent(self, name: str, version: str, limit: int, *, since: float = 0.0) -> list[Run]:
        """The last ``limit`` attempts that began at node time ``since`` or later, newest first.

        One that shared batches has no seconds of its own: it took less than it would have alone, and a
        version that got fewer such series would look slow.
        """
        return [
            Run(
                r["state"],
                int(r["instances"] or 0),
                0.0 if r["batch_studies"] else float(r["seconds"] or 0.0),
                r["engine"] or "",
                bool(r["settled"]),
            )
            for r in self.db.rows(
                "SELECT state, instances, seconds, engine, settled, batch_studies FROM model_runs"
                " WHERE name = ? AND version = ? AND at >= ?"
                " ORDER BY id DESC LIMIT ?",
                (name, version, since, limit),
            )
        ]

    def outputs(self, name: str, version: str) -> list[dict[str, float]]:
        """Measurements of every finished run of a version, oldest first."""
        return [
            json.loads(r["outputs"])
            for r in self.db.rows(
                "SELECT outputs FROM model_runs WHERE name = ? AND version = ? AND state = 'done' ORDER BY id",
                (name, version),
            )
        ]

    def known_versions(self) -> list[tuple[str, str]]:
        return [
            (r["name"], r["version"])
            for r in self.db.rows("SELECT DISTINCT name, version FROM model_runs ORDER BY name, version")
        ]

    # Comparisons

    def due(self, name: str, version: str, *, role: str, since: float) -> Row | None:
        """The newest finished job that ``version`` has not been compared on; None when there is none.

        ``role`` ``shadow``: jobs of the model that another version did in the normal course.
        ``canary``: jobs that a canary did, for the active ``version`` to be compared on.
        """
        return self.db.row(
            "SELECT j.*, r.version AS made_by, r.seconds AS made_in FROM model_runs r JOIN jobs j ON j.id = r.job_id"
            " WHERE r.name = ? AND r.version != ? AND r.state = 'done' AND r.role = ? AND r.at >= ?"
            " AND j.state = 'done' AND NOT EXISTS (SELECT 1 FROM job_series_inputs i WHERE i.job_id = j.id)"
            " AND instr(coalesce(j.needs, ''), '\"masks\": {\"') = 0"
            " AND NOT EXISTS (SELECT 1 FROM model_comparisons c WHERE c.job_id = j.id AND c.role = ?"
            "   AND c.version = CASE ? WHEN 'shadow' THEN ? ELSE r.version END"
            "   AND (c.state IN ('done', 'failed') OR c.attempts >= ?))"
            " ORDER BY r.id DESC LIMIT 1",
            (name, version, "canary" if role == "canary" else "active", since, role, role, version, TRIES),
        )

    def compare_begin(self, job_id: int, name: str, version: str, other: str, role: str) -> int:
        db = self.db
        with db.transaction(sync=False):
            known = db.value(
                "SELECT id FROM model_comparisons WHERE job_id = ? AND version = ? AND role = ?",
                (job_id, version, role),
            )
            if known is not None:
                db.execute(
                    "UPDATE model_comparisons SET attempts = attempts + 1, state = 'running' WHERE id = ?", (known,)
                )
                return int(known)
            row = db.insert(
                "model_comparisons",
                {
                    "job_id": job_id,
                    "name": name,
                    "version": version,
                    "other_version": other,
                    "role": role,
                    "state": "running",
                    "attempts": 1,
                    "at": db.clock.ticks(),
                    "time": iso(db.clock.wall()),
                },
            )
            if row % 100 == 0:
                db.execute("DELETE FROM model_comparisons WHERE id <= ?", (row - KEPT,))
            return row

    def compare_end(self, comparison: int, fields: Mapping[str, Any]) -> None:
        """``fields``: columns of the row; dictionaries are stored as JSON."""
        values = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in fields.items()}
        changes = ", ".join(f'"{key}" = ?' for key in values)
        with self.db.transaction(sync=False):
            self.db.execute(f"UPDATE model_comparisons SET {changes} WHERE id = ?", (*values.values(), comparison))

    def compared(self, name: str, version: str, limit: int, *, since: float = 0.0) -> list[Compared]:
        """The last comparisons of a version in whatever role that came about, newest first."""
        return [
            Compared(r["least_dice"], r["greatest_difference"], bool(r["same_findings"]))
            for r in self.db.rows(
                "SELECT least_dice, greatest_difference, same_findings FROM model_comparisons"
                " WHERE name = ? AND version = ? AND state = 'done' AND at >= ? ORDER BY id DESC LIMIT ?",
                (name, version, since, limit),
            )
        ]

    def times_compared(self, name: str, version: str, since: float) -> int:
        """Series on which a version in the shadow was compared since node time ``since``."""
        return int(
            self.db.value(
                "SELECT count(*) FROM model_comparisons"
                " WHERE name = ? AND version = ? AND role = 'shadow' AND state = 'done' AND at >= ?",
                (name, version, since),
            )
        )

    def studies(self, name: str, version: str, since: float) -> int:
        """Studies that a version has served since node time ``since``."""
        return int(
            self.db.value(
                "SELECT count(DISTINCT study_id) FROM model_runs"
                " WHERE name = ? AND version = ? AND state = 'done' AND at >= ?",
                (name, version, since),
            )
        )

    def comparisons(self, name: str | None = None, version: str | None = None, limit: int = 100) -> list[Row]:
        """Rows for people, newest first, JSON columns parsed."""
        rows = self.db.rows(
            "SELECT * FROM model_comparisons WHERE name = coalesce(?, name) AND version = coalesce(?, version)"
            " ORDER BY id DESC LIMIT ?",
            (name, version, limit),
        )
        for row in rows:
            for column in ("dice", "differences", "outputs"):
                row[column] = json.loads(row[column] or "{}")
            row["same_findings"] = None if row["same_findings"] is None else bool(row["same_findings"])
        return rows

    def failed_comparisons(self, name: str, version: str, limit: int, *, since: float = 0.0) -> int:
        rows = self.db.rows(
            "SELECT state FROM model_comparisons WHERE name = ? AND version = ? AND at >= ? ORDER BY id DESC LIMIT ?",
            (name, version, since, limit),
        )
        return sum(r["state"] == "failed" for r in rows)
