"""Critical results: first in every queue of their study, and an alert for the webhook.

Rows are made in the transaction that commits the results. There is no attempt limit while
the cause can pass.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence

from dicomnode.clock import iso
from dicomnode.errors import OperatorError
from dicomnode.identity import derived_uid
from dicomnode.index.database import Database, Row
from dicomnode.index.states import SendEvent, SendState, backoff_seconds, next_send_state

URGENT = 0


def hurry(db: Database, study_id: int) -> None:
    """Inside a transaction: what waits for this study goes before all else.

    The whole study, so that its order is kept: a revision must not overtake what it replaces.
    The cloud outbox has classes of its own (:mod:`dicomnode.index.cloud_rows`).
    """
    db.execute(
        "UPDATE deliveries SET priority = ? WHERE study_id = ? AND state IN ('pending', 'sending')", (URGENT, study_id)
    )


def raise_alert(db: Database, *, job_id: int, study_id: int, keys: Sequence[str]) -> None:
    """Inside a transaction: one alert for a job, whatever is repeated; its id derives from the job's work."""
    work = db.row("SELECT series_id, model, revision, inputs_sha256 FROM jobs WHERE id = ?", (job_id,))
    assert work is not None
    number = int(derived_uid("alert", *(str(work[k]) for k in sorted(work))).removeprefix("2.25."))
    db.insert(
        "alerts",
        {
            "job_id": job_id,
            "study_id": study_id,
            "uuid": str(uuid.UUID(int=number)),
            "keys": json.dumps(list(dict.fromkeys(keys))),
            "state": SendState.pending,
            "created_at": db.clock.ticks(),
            "created_time": iso(db.clock.wall()),
        },
        conflict="OR IGNORE",
    )


class Alerts:
    """Outbox of the webhook. One process sends, one alert at a time, so it needs no leases."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def due(self, limit: int = 20) -> list[Row]:
        """Alerts that may be tried now, oldest first, with what their message names."""
        return self.db.rows(
            "SELECT a.*, st.StudyInstanceUID, se.SeriesInstanceUID, j.model, j.model_version, j.revision, j.rules"
            " FROM alerts a JOIN jobs j ON j.id = a.job_id JOIN series se ON se.id = j.series_id"
            " JOIN studies st ON st.id = a.study_id WHERE a.state = 'pending' AND a.next_at <= ?"
            " ORDER BY a.id LIMIT ?",
            (self.db.clock.ticks(), limit),
        )

    def stored(self, alert_id: int) -> None:
        """The other side took it."""
        self._settle(alert_id, SendEvent.store, None, 0.0)

    def retry(self, alert_id: int, error: str, *, first: float, longest: float) -> None:
        """A passing cause: wait and try again, for ever."""
        attempts = int(self.db.value("SELECT attempts FROM alerts WHERE id = ?", (alert_id,)) or 0)
        self._settle(alert_id, SendEvent.retry, error, backoff_seconds(attempts + 1, first, longest))

    def reject(self, alert_id: int, error: str) -> None:
        """Refused for good: parked with its reason until requeued by hand."""
        self._settle(alert_id, SendEvent.reject, error, 0.0)

    def requeue(self, alert_id: int) -> None:
        """The operator wants an alert sent again, or a waiting one at once."""
        with self.db.transaction():
            row = self.db.row("SELECT state FROM alerts WHERE id = ?", (alert_id,))
            if row is None:
                raise OperatorError("retry alert", f"there is no alert {alert_id}", "See 'dicomnode alerts list'")
            if row["state"] != SendState.pending:
                next_send_state(row["state"], SendEvent.requeue)
            self.db.execute("UPDATE alerts SET state = 'pending', attempts = 0, next_at = 0 WHERE id = ?", (alert_id,))

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        where, parameters = ("WHERE state = ?", [state]) if state else ("", [])
        rows = self.db.rows(f"SELECT * FROM alerts {where} ORDER BY id DESC LIMIT ?", (*parameters, limit))
        for row in rows:
            row["keys"] = json.loads(row["keys"])
        return rows

    def counts(self) -> dict[str, int]:
        rows = self.db.rows("SELECT state, count(*) AS n FROM alerts GROUP BY state")
        found = {r["state"]: int(r["n"]) for r in rows}
        return {s.value: found.get(s.value, 0) for s in (SendState.pending, SendState.stored, SendState.rejected)}

    def _settle(self, alert_id: int, event: SendEvent, error: str | None, wait: float) -> None:
        db = self.db
        with db.transaction():
            row = db.row("SELECT state FROM alerts WHERE id = ?", (alert_id,))
            if row is None or row["state"] != SendState.pending:
                return
            state = next_send_state(next_send_state(row["state"], SendEvent.lease), event)
            db.execute(
                "UPDATE alerts SET state = ?, attempts = attempts + 1, next_at = ?, last_error = ?,"
                " finished_time = ? WHERE id = ?",
                (
                    state,
                    db.clock.ticks() + wait,
                    error,
                    iso(db.clock.wall()) if state is SendState.stored else None,
                    alert_id,
                ),
            )
