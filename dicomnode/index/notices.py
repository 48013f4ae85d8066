"""Outbox of Instance Availability Notifications (PS3.4 R): which peers still have to be told.

Rows are made in the transaction that commits the results. A notice about what a peer will
hold waits until that peer has stored all of it. There is no attempt limit while the cause
can pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from dicomnode.clock import iso
from dicomnode.errors import IllegalTransition, OperatorError
from dicomnode.identity import derived_uid
from dicomnode.index.database import Database, Row
from dicomnode.index.states import backoff_seconds


class NoticeState(StrEnum):
    waiting = "waiting"  # for the results to be where the notice will say that they are
    pending = "pending"
    sending = "sending"
    stored = "stored"  # the peer knows
    rejected = "rejected"


class NoticeEvent(StrEnum):
    release = "release"
    lease = "lease"
    store = "store"
    retry = "retry"
    reject = "reject"
    lose = "lose"
    withdraw = "withdraw"  # the series must not be analysed after all
    requeue = "requeue"


NOTICE_TABLE: Mapping[tuple[NoticeState, NoticeEvent], NoticeState] = {
    (NoticeState.waiting, NoticeEvent.release): NoticeState.pending,
    (NoticeState.waiting, NoticeEvent.withdraw): NoticeState.rejected,
    (NoticeState.pending, NoticeEvent.lease): NoticeState.sending,
    (NoticeState.pending, NoticeEvent.withdraw): NoticeState.rejected,
    (NoticeState.sending, NoticeEvent.store): NoticeState.stored,
    (NoticeState.sending, NoticeEvent.retry): NoticeState.pending,
    (NoticeState.sending, NoticeEvent.reject): NoticeState.rejected,
    (NoticeState.sending, NoticeEvent.lose): NoticeState.pending,
    (NoticeState.sending, NoticeEvent.withdraw): NoticeState.rejected,
    (NoticeState.rejected, NoticeEvent.requeue): NoticeState.waiting,
}
"""``stored`` is final. A requeued notice waits again, in case the results went elsewhere since."""

NOT_THERE = "('pending', 'sending', 'rejected')"
"""States of a delivery whose object the peer does not have."""


def next_notice_state(state: str, event: NoticeEvent) -> NoticeState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return NOTICE_TABLE[NoticeState(state), event]
    except (KeyError, ValueError):
        raise IllegalTransition("change notification state", f"'{event}' is not possible in state '{state}'") from None


def make_notices(
    db: Database,
    *,
    job_id: int,
    study_id: int,
    results: Mapping[int, str],
    notify: Iterable[str],
    destinations: Sequence[str],
) -> None:
    """Rows for one job, inside the transaction that commits its results.

    ``results`` maps row id to SOP Instance UID. One notice for each peer to tell and each
    place to retrieve from: the destinations, or this node ("") where there is none. The SOP
    Instance UID of the notice derives from these, so no retry makes a second one.
    """
    now, moment = db.clock.ticks(), iso(db.clock.wall())
    for destination in dict.fromkeys(notify):
        for place in dict.fromkeys(destinations) or ("",):
            db.insert(
                "notifications",
                {
                    "job_id": job_id,
                    "study_id": study_id,
                    "destination": destination,
                    "retrieve_from": place,
                    "SOPInstanceUID": derived_uid("availability", destination, place, *sorted(results.values())),
                    "results": json.dumps(sorted(results)),
                    "state": NoticeState.waiting,
                    "created_at": now,
                    "created_time": moment,
                },
                conflict="OR IGNORE",
            )


class Notices:
    """The same questions and answers as :class:`dicomnode.index.outbox.Outbox`."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def release(self) -> int:
        """Let go what the place of its results has stored by now; the number let go."""
        ready = (
            "SELECT id, state FROM notifications n WHERE state = 'waiting' AND (retrieve_from = '' OR NOT EXISTS"
            " (SELECT 1 FROM json_each(n.results) e LEFT JOIN deliveries d"
            " ON d.result_id = e.value AND d.destination = n.retrieve_from"
            f" WHERE d.id IS NULL OR d.state IN {NOT_THERE}))"
        )
        if not self.db.rows(ready):
            return 0
        with self.db.transaction():
            rows = self.db.rows(ready)
            for row in rows:
                state = next_notice_state(row["state"], NoticeEvent.release)
                self.db.execute("UPDATE notifications SET state = ?, next_at = 0 WHERE id = ?", (state, row["id"]))
        return len(rows)

    def due_destinations(self) -> list[str]:
        """Peers whose oldest unsent notice may be tried now."""
        rows = self.db.rows(
            "SELECT destination, min(next_at) AS soonest FROM notifications WHERE state = 'pending'"
            " GROUP BY destination HAVING soonest <= ? ORDER BY soonest",
            (self.db.clock.ticks(),),
        )
        return [str(r["destination"]) for r in rows]

    def next_due_in(self) -> float | None:
        """Seconds until the next notice is due; None when none is."""
        soonest = self.db.value("SELECT min(next_at) FROM notifications WHERE state = 'pending'")
        return None if soonest is None else max(0.0, float(soonest) - self.db.clock.ticks())

    def lease(self, destination: str, owner: str, seconds: float, limit: int) -> list[Row]:
        """Take up to ``limit`` due notices for one peer, oldest first, each with its ``instances``.

        ``instances``: rows with SeriesInstanceUID, SOPClassUID and SOPInstanceUID.
        """
        db = self.db
        now = db.clock.ticks()
        with db.transaction():
            due = db.rows(
                "SELECT n.*, st.StudyInstanceUID FROM notifications n JOIN studies st ON st.id = n.study_id"
                " WHERE n.destination = ? AND n.state = 'pending' AND n.next_at <= ? ORDER BY n.id LIMIT ?",
                (destination, now, limit),
            )
            for row in due:
                state = next_notice_state(row["state"], NoticeEvent.lease)
                db.execute(
                    "UPDATE notifications SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1"
                    " WHERE id = ?",
                    (state, owner, now + seconds, row["id"]),
                )
        for row in due:
            row["instances"] = db.rows(
                "SELECT SeriesInstanceUID, SOPClassUID, SOPInstanceUID FROM results"
                " WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id",
                (row["results"],),
            )
        return due

    def stored(self, notice_id: int, owner: str) -> None:
        """The peer took it."""
        self._leave(notice_id, owner, NoticeEvent.store, None, 0.0)

    def retry(self, notice_id: int, owner: str, error: str, *, first: float, longest: float) -> None:
        """A passing cause: wait and try again, for ever."""
        attempts = self.db.value("SELECT attempts FROM notifications WHERE id = ?", (notice_id,))
        self._leave(notice_id, owner, NoticeEvent.retry, error, backoff_seconds(int(attempts or 1), first, longest))

    def reject(self, notice_id: int, owner: str, error: str) -> None:
        """Refused for good: parked with its reason until requeued by hand."""
        self._leave(notice_id, owner, NoticeEvent.reject, error, 0.0)

    def expire(self, own: str | None = None) -> int:
        """Take back notices whose lease ran out, or all of ``own``'s former life."""
        db = self.db
        query = "SELECT id, state FROM notifications WHERE state = 'sending' AND (lease_until < ? OR lease_owner = ?)"
        if not db.rows(query, (db.clock.ticks(), own)):
            return 0
        with db.transaction():
            lost = db.rows(query, (db.clock.ticks(), own))
            for row in lost:
                state = next_notice_state(row["state"], NoticeEvent.lose)
                db.execute("UPDATE notifications SET state = ?, lease_owner = NULL WHERE id = ?", (state, row["id"]))
        return len(lost)

    def requeue(self, notice_id: int) -> NoticeState:
        """The operator wants a rejected notice sent again, or a pending one at once; its state then."""
        db = self.db
        with db.transaction():
            row = db.row("SELECT id, state FROM notifications WHERE id = ?", (notice_id,))
            if row is None:
                raise OperatorError(
                    "retry notification", f"there is no notification {notice_id}", "See 'dicomnode notifications list'"
                )
            state = NoticeState(row["state"])
            if state not in (NoticeState.pending, NoticeState.waiting):
                state = next_notice_state(row["state"], NoticeEvent.requeue)
                db.execute("UPDATE notifications SET state = ?, attempts = 0 WHERE id = ?", (state, notice_id))
            db.execute("UPDATE notifications SET next_at = 0 WHERE id = ?", (notice_id,))
        return state

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        where, parameters = ("WHERE n.state = ?", [state]) if state else ("", [])
        return self.db.rows(
            "SELECT n.*, st.StudyInstanceUID, 'IAN' AS kind FROM notifications n JOIN studies st ON st.id = n.study_id"
            f" {where} ORDER BY n.id DESC LIMIT ?",
            (*parameters, limit),
        )

    def counts(self) -> dict[str, int]:
        rows = self.db.rows("SELECT state, count(*) AS n FROM notifications GROUP BY state")
        found = {r["state"]: int(r["n"]) for r in rows}
        return {state.value: found.get(state.value, 0) for state in NoticeState}

    def _leave(self, notice_id: int, owner: str, event: NoticeEvent, error: str | None, wait: float) -> None:
        db = self.db
        with db.transaction():
            row = db.row("SELECT state FROM notifications WHERE id = ? AND lease_owner = ?", (notice_id, owner))
            if row is None or row["state"] != NoticeState.sending:
                return  # the lease ran out or the notice was withdrawn; telling twice is harmless: same UID
            state = next_notice_state(row["state"], event)
            now = db.clock.ticks()
            finished = now if state is NoticeState.stored else None
            db.execute(
                "UPDATE notifications SET state = ?, lease_owner = NULL, next_at = ?, last_error = ?,"
                " finished_at = ?, finished_time = ? WHERE id = ?",
                (state, now + wait, error, finished, iso(db.clock.wall()) if finished else None, notice_id),
            )
