"""Questions to peers: do you accept responsibility for what you stored? (PS3.4 J)

A transaction is committed before it is sent, and a delivery is ``committed`` only by a report
of the peer that was asked, about the very storing that it was asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from dicomnode.clock import iso
from dicomnode.commitment import Reference, Report, Request, Verdict
from dicomnode.identity import derived_uid
from dicomnode.index.commitment import AskEvent, AskState, Role, let_go, next_ask_state
from dicomnode.index.database import Database, Row
from dicomnode.index.procedure import WITHHELD
from dicomnode.index.states import SendEvent, SendState, backoff_seconds, next_send_state

ASKED_AGAIN = frozenset({Verdict.duplicate_transaction, Verdict.class_not_supported})
"""Reasons that sending the object again cannot cure."""

MAX_IN_ONE = 1000
"""Instances of one study in one transaction."""

_READY = "d.state = 'stored' AND d.commit_wanted = 1"  # as in the partial index


@dataclass(frozen=True, slots=True)
class Ask:
    """A transaction to be sent."""

    id: int
    peer: str
    request: Request
    attempts: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What a report meant for the deliveries: how many are committed, sent again, asked for again.

    ``reasons`` counts the failure reasons, ``foreign`` what was not asked for in the transaction.
    """

    id: int
    committed: int = 0
    missing: int = 0
    unanswered: int = 0
    withheld: int = 0
    foreign: int = 0
    reasons: Mapping[int, int] = field(default_factory=dict)


def effect(state: str, said: int | None, *, same_storing: bool, latest: bool) -> SendEvent | None:
    """What a report does to one delivery; None for nothing. Pure.

    ``said`` is the verdict, None when the report does not name the instance. ``same_storing``:
    the object was not sent again since the question. ``latest``: it was not asked for in a
    later transaction, whose answer would be newer.
    """
    if state not in (SendState.stored, SendState.committing) or not same_storing:
        return None
    if said == Verdict.committed:
        return SendEvent.commit
    if not latest:
        return None
    if said is None or said in ASKED_AGAIN:
        return SendEvent.unanswered if state == SendState.committing else None
    return SendEvent.miss


class Asks:
    def __init__(self, db: Database) -> None:
        self.db = db

    def ready_destinations(self) -> list[str]:
        """Peers that stored something which is to be asked for now."""
        rows = self.db.rows(
            f"SELECT DISTINCT d.destination FROM deliveries d WHERE {_READY} AND d.next_at <= ?",
            (self.db.clock.ticks(),),
        )
        return [str(r["destination"]) for r in rows]

    def make(self, destination: str) -> int:
        """Commit transactions for what the peer stored, one per study; how many were made.

        A study waits while something of it is being sent to that peer.
        """
        db = self.db
        ready = (
            "SELECT d.id, d.state, d.study_id, d.stores, r.SOPClassUID, r.SOPInstanceUID FROM deliveries d"
            f" JOIN results r ON r.id = d.result_id WHERE {_READY} AND d.destination = ? AND d.next_at <= ?"
            " AND NOT EXISTS (SELECT 1 FROM deliveries o WHERE o.state = 'sending'"
            " AND o.destination = d.destination AND o.study_id = d.study_id) ORDER BY d.study_id, d.id LIMIT ?"
        )
        parameters = (destination, db.clock.ticks(), MAX_IN_ONE)
        if not db.rows(ready, parameters):
            return 0
        made = 0
        with db.transaction():
            for _, rows in groupby(db.rows(ready, parameters), key=lambda row: row["study_id"]):
                self._make(destination, list(rows))
                made += 1
        return made

    def _make(self, destination: str, rows: Sequence[Row]) -> None:
        db = self.db
        refs = [[row["id"], row["stores"], row["SOPClassUID"], row["SOPInstanceUID"]] for row in rows]
        ask_id = db.insert(
            "commitments",
            {
                "role": Role.scu,
                "peer": destination,
                "TransactionUID": "",
                "refs": json.dumps(refs, separators=(",", ":")),
                "instances": len(rows),
                "state": AskState.pending,
                "created_at": db.clock.ticks(),
                "created_time": iso(db.clock.wall()),
            },
        )
        moment = f"{db.clock.ticks():.6f}"
        uid = derived_uid("commitment", destination, str(ask_id), moment, *(str(r["SOPInstanceUID"]) for r in rows))
        db.execute("UPDATE commitments SET TransactionUID = ? WHERE id = ?", (uid, ask_id))
        for row in rows:
            state = next_send_state(row["state"], SendEvent.ask)
            db.execute(
                "UPDATE deliveries SET state = ?, commitment_id = ?, asks = asks + 1 WHERE id = ?",
                (state, ask_id, row["id"]),
            )

    def due_peers(self) -> list[str]:
        """Peers that may be asked now."""
        rows = self.db.rows(
            "SELECT peer, min(next_at) AS soonest FROM commitments WHERE role = 'scu' AND state = 'pending'"
            " GROUP BY peer HAVING soonest <= ? ORDER BY soonest",
            (self.db.clock.ticks(),),
        )
        return [str(r["peer"]) for r in rows]

    def next_due_in(self) -> float | None:
        """Seconds until something more is to be asked or given up; None when nothing will."""
        now = self.db.clock.ticks()
        soonest = [
            self.db.value(sql, (now,))
            for sql in (
                f"SELECT min(d.next_at) FROM deliveries d WHERE {_READY} AND d.next_at > ?",
                "SELECT min(next_at) FROM commitments WHERE role = 'scu' AND state = 'pending' AND next_at > ?",
                "SELECT min(due_at) FROM commitments WHERE role = 'scu' AND state = 'waiting' AND due_at > ?",
            )
        ]
        known = [float(moment) for moment in soonest if moment is not None]
        return min(known) - now if known else None

    def lease(self, destination: str, owner: str, seconds: float, limit: int) -> list[Ask]:
        """Take up to ``limit`` due transactions for one peer, oldest first."""
        db = self.db
        now = db.clock.ticks()
        with db.transaction():
            due = db.rows(
                "SELECT * FROM commitments WHERE role = 'scu' AND state = 'pending' AND peer = ? AND next_at <= ?"
                " ORDER BY id LIMIT ?",
                (destination, now, limit),
            )
            for row in due:
                state = next_ask_state(row["state"], AskEvent.lease)
                db.execute(
                    "UPDATE commitments SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1"
                    " WHERE id = ?",
                    (state, owner, now + seconds, row["id"]),
                )
        return [
            Ask(
                int(row["id"]),
                destination,
                Request(str(row["TransactionUID"]), tuple(Reference(r[2], r[3]) for r in json.loads(row["refs"]))),
                int(row["attempts"]) + 1,
            )
            for row in due
        ]

    def accepted(self, ask_id: int, owner: str, seconds: float) -> None:
        """The peer took the request and has ``seconds`` for its report; nothing when that came already."""
        db = self.db
        with db.transaction():
            row = self._owned(ask_id, owner)
            if row is not None:
                state = next_ask_state(row["state"], AskEvent.accept)
                db.execute(
                    "UPDATE commitments SET state = ?, lease_owner = NULL, last_error = NULL, due_at = ? WHERE id = ?",
                    (state, db.clock.ticks() + seconds, ask_id),
                )

    def retry(self, ask_id: int, owner: str, error: str, wait: float) -> None:
        """The peer did not see the request, or refused it: the same again after ``wait``."""
        db = self.db
        with db.transaction():
            row = self._owned(ask_id, owner)
            if row is not None:
                state = next_ask_state(row["state"], AskEvent.retry)
                db.execute(
                    "UPDATE commitments SET state = ?, lease_owner = NULL, last_error = ?, next_at = ? WHERE id = ?",
                    (state, error, db.clock.ticks() + wait, ask_id),
                )

    def lost(self, ask_id: int, owner: str, error: str, wait: float) -> None:
        """Nobody knows whether the peer took the request: it is asked again in a new transaction."""
        with self.db.transaction():
            row = self._owned(ask_id, owner)
            if row is not None:
                self._abandon(row, AskEvent.lose, error, wait)

    def give_up(self, destination: str) -> int:
        """The peer is not to be asked any more: ``stored`` is final for what it has. How many deliveries."""
        db = self.db
        waiting = "SELECT * FROM commitments WHERE role = 'scu' AND peer = ? AND state IN ('pending', 'waiting')"
        now, moment = db.clock.ticks(), iso(db.clock.wall())
        with db.transaction():
            for row in db.rows(waiting, (destination,)):
                self._abandon(row, AskEvent.abandon, "the peer is not to be asked for storage commitment any more", 0)
            return db.execute(
                "UPDATE deliveries SET commit_wanted = 0, finished_at = ?, finished_time = ?"
                " WHERE state = 'stored' AND commit_wanted = 1 AND destination = ?",
                (now, moment, destination),
            )

    def expire(self, own: str | None = None) -> list[Row]:
        """Give up what nobody answers: a report overdue, or the sender dead; the transactions."""
        db = self.db
        query = (
            "SELECT * FROM commitments WHERE role = 'scu' AND ((state = 'waiting' AND due_at < ?)"
            " OR (state = 'asking' AND (lease_until < ? OR lease_owner = ?)))"
        )
        now = db.clock.ticks()
        if not db.rows(query, (now, now, own)):
            return []
        with db.transaction():
            late = db.rows(query, (now, now, own))
            for row in late:
                waited = row["state"] == AskState.waiting
                event = AskEvent.abandon if waited else AskEvent.lose
                self._abandon(row, event, "no report came in time" if waited else "the sender died", 0.0)
        return late

    def waits(self, ask_id: int) -> bool:
        """Whether the peer still owes its report."""
        return self.db.row("SELECT 1 FROM commitments WHERE id = ? AND state = 'waiting'", (ask_id,)) is not None

    def take(self, peer: str, report: Report, *, first: float, longest: float) -> Taken | None:
        """Commit what a peer reports, before it is answered; None for what it was not asked.

        What it committed to is finished; what it lacks is sent again after a back-off from
        ``first`` to ``longest`` seconds; what it does not name is asked for again.
        """
        db = self.db
        with db.transaction():
            row = db.row(
                "SELECT * FROM commitments WHERE TransactionUID = ? AND role = 'scu' AND peer = ?",
                (report.TransactionUID, peer),
            )
            if row is None:
                return None
            events: Counter[SendEvent] = Counter()
            reasons: Counter[int] = Counter()
            named = set()
            for delivery_id, stores, _, uid in json.loads(row["refs"]):
                named.add(uid)
                said = Verdict.committed if uid in report.committed else report.failed.get(uid)
                if said:
                    reasons[said] += 1
                event = self._deliver(row, int(delivery_id), int(stores), said, first=first, longest=longest)
                if event is not None:
                    events[event] += 1
            state = next_ask_state(row["state"], AskEvent.answer)
            db.execute(
                "UPDATE commitments SET state = ?, lease_owner = NULL, failed = ?, last_error = ?, finished_at = ?,"
                " finished_time = ? WHERE id = ?",
                (
                    state,
                    sum(reasons.values()),
                    _reasons(reasons) or None,
                    db.clock.ticks(),
                    iso(db.clock.wall()),
                    row["id"],
                ),
            )
        return Taken(
            int(row["id"]),
            committed=events[SendEvent.commit],
            missing=events[SendEvent.miss],
            unanswered=events[SendEvent.unanswered],
            withheld=events[SendEvent.withdraw],
            foreign=len((report.committed | report.failed.keys()) - named),
            reasons=dict(reasons),
        )

    def _deliver(
        self, ask: Row, delivery_id: int, stores: int, said: int | None, *, first: float, longest: float
    ) -> SendEvent | None:
        db = self.db
        row = db.row(
            "SELECT d.state, d.stores, d.attempts, d.asks, d.commitment_id, se.selected_reason FROM deliveries d"
            " JOIN jobs j ON j.id = d.job_id JOIN series se ON se.id = j.series_id WHERE d.id = ?",
            (delivery_id,),
        )
        if row is None:
            return None
        event = effect(
            row["state"], said, same_storing=row["stores"] == stores, latest=row["commitment_id"] == ask["id"]
        )
        if event is None:
            return None
        if event is SendEvent.miss and row["selected_reason"] == WITHHELD:
            event = SendEvent.withdraw  # it was withdrawn since: what the PACS has removed must not come back
        error = None
        if event is SendEvent.withdraw:
            error = WITHHELD
        elif event is not SendEvent.commit:
            error = "the peer did not commit to it: " + (f"0x{said:04X}" if said else "its report does not name it")
        now = db.clock.ticks()
        done = event is SendEvent.commit
        wait = {
            SendEvent.miss: backoff_seconds(row["attempts"], first, longest),
            SendEvent.unanswered: longest
            if said == Verdict.class_not_supported
            else backoff_seconds(row["asks"], first, longest),
        }.get(event, 0.0)
        db.execute(
            "UPDATE deliveries SET state = ?, next_at = ?, last_error = ?, finished_at = ?, finished_time = ?"
            " WHERE id = ?",
            (
                next_send_state(row["state"], event),
                now + wait,
                error,
                now if done else None,
                iso(db.clock.wall()) if done else None,
                delivery_id,
            ),
        )
        return event

    def _owned(self, ask_id: int, owner: str) -> Row | None:
        """None when it is not ours any more: the lease ran out, or the report came first."""
        return self.db.row(
            "SELECT * FROM commitments WHERE id = ? AND lease_owner = ? AND state = 'asking'", (ask_id, owner)
        )

    def _abandon(self, row: Row, event: AskEvent, error: str, wait: float) -> None:
        db = self.db
        now = db.clock.ticks()
        db.execute(
            "UPDATE commitments SET state = ?, lease_owner = NULL, last_error = ?, finished_at = ?,"
            " finished_time = ? WHERE id = ?",
            (next_ask_state(row["state"], event), error, now, iso(db.clock.wall()), row["id"]),
        )
        let_go(db, row["id"], now + wait)


def _reasons(reasons: Mapping[int, int]) -> str:
    return ", ".join(f"{count} with 0x{reason:04X}" for reason, count in sorted(reasons.items()))
