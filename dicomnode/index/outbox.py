"""Outboxes: results that still have to reach a DICOM peer or the cloud.

Rows are made in the transaction that commits the result. There is no attempt limit while
the cause can pass.
"""

from __future__ import annotations

import json
from typing import Literal

from dicomnode.clock import iso
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.states import SendEvent, SendState, backoff_seconds, next_send_state

Table = Literal["deliveries", "sync_items"]
_COMMITTED: Table = "deliveries"
_OF_COMMITMENT = (SendState.committing, SendState.committed)

_JOINED = (
    "SELECT d.*, r.kind, r.SOPClassUID, r.SOPInstanceUID, r.SeriesInstanceUID, r.TransferSyntaxUID, r.file, r.sha256,"
    " r.shows,"
    " st.StudyInstanceUID FROM {table} d {join} JOIN results r ON r.id = d.result_id"
    " {join} JOIN studies st ON st.id = d.study_id"
)


class Outbox:
    """``table`` is ``deliveries`` (DICOM peers) or ``sync_items`` (cloud)."""

    def __init__(self, db: Database, table: Table) -> None:
        self.db = db
        self.table = table
        self._joined = _JOINED.format(table=table, join="" if table == _COMMITTED else "LEFT")  # records have no result

    def due_destinations(self) -> list[str]:
        """Destinations whose oldest unfinished item may be tried now."""
        rows = self.db.rows(
            f"SELECT destination, min(next_at) AS soonest FROM {self.table} WHERE state = 'pending'"
            " GROUP BY destination HAVING soonest <= ? ORDER BY soonest",
            (self.db.clock.ticks(),),
        )
        return [str(r["destination"]) for r in rows]

    def next_due_in(self) -> float | None:
        """Seconds until another item becomes due, beside those that are; None when none will."""
        now = self.db.clock.ticks()
        soonest = self.db.value(
            f"SELECT min(next_at) FROM {self.table} WHERE state = 'pending' AND next_at > ?", (now,)
        )
        return None if soonest is None else float(soonest) - now

    def lease(self, destination: str, owner: str, seconds: float, limit: int) -> list[Row]:
        """Take up to ``limit`` due items for one destination, critical ones first, then the oldest.

        Order is kept per study: an item waits while an older one of its study for the same
        destination is unfinished and not due.
        """
        db = self.db
        now = db.clock.ticks()
        with db.transaction():
            due = db.rows(
                f"SELECT d.id, d.state FROM {self.table} d WHERE d.destination = ? AND d.state = 'pending'"
                f" AND d.next_at <= ? AND NOT EXISTS (SELECT 1 FROM {self.table} o WHERE o.destination = d.destination"
                " AND o.study_id = d.study_id AND o.id < d.id AND (o.state = 'sending' OR"
                " (o.state = 'pending' AND o.next_at > ?))) ORDER BY d.priority, d.id LIMIT ?",
                (destination, now, now, limit),
            )
            for item in due:
                state = next_send_state(item["state"], SendEvent.lease)
                db.execute(
                    f"UPDATE {self.table} SET state = ?, lease_owner = ?, lease_until = ?,"
                    " attempts = attempts + 1 WHERE id = ?",
                    (state, owner, now + seconds, item["id"]),
                )
            ids = [item["id"] for item in due]
            marks = ", ".join("?" * len(ids))
            return db.rows(f"{self._joined} WHERE d.id IN ({marks}) ORDER BY d.priority, d.id", ids) if ids else []

    def extend(self, ids: list[int], owner: str, seconds: float) -> None:
        marks = ", ".join("?" * len(ids))
        with self.db.transaction():
            self.db.execute(
                f"UPDATE {self.table} SET lease_until = ?"
                f" WHERE lease_owner = ? AND state = 'sending' AND id IN ({marks})",
                (self.db.clock.ticks() + seconds, owner, *ids),
            )

    def stored(self, item_id: int, owner: str, *, commit: bool = False) -> None:
        """The other side said that it has the object; with ``commit`` it is asked for commitment next."""
        with self.db.transaction():
            if self._leave(item_id, owner, SendEvent.store, None, 0.0, finish=not commit) and self.table == _COMMITTED:
                self.db.execute(
                    "UPDATE deliveries SET stores = stores + 1, commit_wanted = ? WHERE id = ?", (int(commit), item_id)
                )

    def retry(self, item_id: int, owner: str, error: str, *, first: float, longest: float) -> None:
        """A passing cause: wait and try again, for ever."""
        attempts = self.db.value(f"SELECT attempts FROM {self.table} WHERE id = ?", (item_id,))
        wait = backoff_seconds(int(attempts or 1), first, longest)
        with self.db.transaction():
            self._leave(item_id, owner, SendEvent.retry, error, wait)

    def reject(self, item_id: int, owner: str, error: str) -> None:
        """Refused for good: parked with its reason until requeued by hand."""
        with self.db.transaction():
            self._leave(item_id, owner, SendEvent.reject, error, 0.0)

    def fall_back(self, item_id: int, owner: str, error: str) -> bool:
        """The peer does not take this kind of object: send what stands in for it, now.

        The other objects of the job that refer to it are exchanged in the same transaction,
        and so are they in notices that wait for them. False when there is no fallback or the
        lease ran out.
        """
        db = self.db
        with db.transaction():
            refused = db.row(
                "SELECT job_id, destination FROM deliveries WHERE id = ? AND lease_owner = ? AND state = 'sending'"
                " AND fallback_result_id IS NOT NULL",
                (item_id, owner),
            )
            if refused is None:
                return False
            affected = db.rows(
                "SELECT d.id, d.state, d.result_id, d.fallback_result_id, r.kind FROM deliveries d"
                " JOIN results r ON r.id = d.result_id WHERE d.job_id = ? AND d.destination = ?"
                " AND d.fallback_result_id IS NOT NULL AND d.state IN ('pending', 'sending')",
                (refused["job_id"], refused["destination"]),
            )
            for item in affected:
                if item["state"] == SendState.sending:
                    next_send_state(item["state"], SendEvent.retry)
                db.execute(
                    "UPDATE deliveries SET result_id = fallback_result_id, fallback_result_id = NULL, instead_of = ?,"
                    " state = 'pending', lease_owner = NULL, next_at = 0, attempts = 0, last_error = ? WHERE id = ?",
                    (item["kind"], error, item["id"]),
                )
            exchanged = {int(i["result_id"]): int(i["fallback_result_id"]) for i in affected}
            for notice in db.rows(
                "SELECT id, results FROM notifications WHERE job_id = ? AND retrieve_from = ? AND state = 'waiting'",
                (refused["job_id"], refused["destination"]),
            ):
                results = sorted(exchanged.get(r, r) for r in json.loads(notice["results"]))
                db.execute("UPDATE notifications SET results = ? WHERE id = ?", (json.dumps(results), notice["id"]))
        return True

    def expire(self, own: str | None = None) -> int:
        """Take back items whose lease ran out, or all of ``own``'s former life."""
        db = self.db
        query = f"SELECT id, state FROM {self.table} WHERE state = 'sending' AND (lease_until < ? OR lease_owner = ?)"
        if not db.rows(query, (db.clock.ticks(), own)):
            return 0
        with db.transaction():
            lost = db.rows(query, (db.clock.ticks(), own))
            for item in lost:
                state = next_send_state(item["state"], SendEvent.lose)
                db.execute(f"UPDATE {self.table} SET state = ?, lease_owner = NULL WHERE id = ?", (state, item["id"]))
        return len(lost)

    def requeue(self, item_id: int) -> None:
        """The operator wants an item sent again that was rejected or is not committed to, or a waiting one at once."""
        db = self.db
        with db.transaction():
            item = db.row(f"SELECT id, state FROM {self.table} WHERE id = ?", (item_id,))
            if item is None:
                raise OperatorError(
                    "retry delivery",
                    f"there is no {'delivery' if self.table == _COMMITTED else 'cloud item'} {item_id}",
                    f"See 'dicomnode {'deliveries' if self.table == _COMMITTED else 'sync'} list'",
                )
            if item["state"] != SendState.pending:
                state = next_send_state(item["state"], SendEvent.requeue)
                db.execute(f"UPDATE {self.table} SET state = ?, attempts = 0 WHERE id = ?", (state, item_id))
            db.execute(f"UPDATE {self.table} SET next_at = 0 WHERE id = ?", (item_id,))

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        """The newest first; chosen by number alone, then read."""
        where, parameters = ("WHERE state = ?", [state]) if state else ("", [])
        chosen = f"SELECT id FROM {self.table} {where} ORDER BY id DESC LIMIT ?"
        return self.db.rows(f"{self._joined} WHERE d.id IN ({chosen}) ORDER BY d.id DESC", (*parameters, limit))

    def counts(self) -> dict[str, int]:
        rows = self.db.rows(f"SELECT state, count(*) AS n FROM {self.table} GROUP BY state")
        found = {r["state"]: int(r["n"]) for r in rows}
        kinds = [s for s in SendState if self.table == _COMMITTED or s not in _OF_COMMITMENT]
        return {state.value: found.get(state.value, 0) for state in kinds}

    def _leave(
        self, item_id: int, owner: str, event: SendEvent, error: str | None, wait: float, *, finish: bool = False
    ) -> bool:
        """Inside a transaction; False when the lease ran out.

        Then whoever has it now decides: sending again is harmless, it is the same UID.
        """
        db = self.db
        item = db.row(f"SELECT state FROM {self.table} WHERE id = ? AND lease_owner = ?", (item_id, owner))
        if item is None or item["state"] != SendState.sending:
            return False
        state = next_send_state(item["state"], event)
        now = db.clock.ticks()
        db.execute(
            f"UPDATE {self.table} SET state = ?, lease_owner = NULL, next_at = ?, last_error = ?,"
            " finished_at = ?, finished_time = ? WHERE id = ?",
            (state, now + wait, error, now if finish else None, iso(db.clock.wall()) if finish else None, item_id),
        )
        return True
