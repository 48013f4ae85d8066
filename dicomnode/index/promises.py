"""Requests for storage commitment that this node must answer (PS3.4 J.3.2, J.3.3).

:meth:`Promises.receive` is the step after which an N-ACTION may be answered with success:
from then on the peer gets a report, whatever happens to its association or to this node.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode.clock import iso
from dicomnode.commitment import Reference, Request, Verdict
from dicomnode.index.commitment import PromiseEvent, PromiseState, Role, next_promise_state
from dicomnode.index.database import Database, Row
from dicomnode.index.states import backoff_seconds


@dataclass(frozen=True, slots=True)
class Promise:
    """A report that is owed. ``verdicts`` are in the order of the references, None before the judgement."""

    id: int
    peer: str
    request: Request
    verdicts: tuple[int, ...] | None
    attempts: int


class Promises:
    def __init__(self, db: Database) -> None:
        self.db = db

    def receive(self, peer: str, request: Request, owner: str, seconds: float) -> Promise | None:
        """Commit a request and lease it to ``owner``; None when its report is under way already.

        The same request again is the same promise, judged anew. One with the Transaction UID of
        another of this peer fails as a whole, with the reason that the standard has for it.
        """
        db = self.db
        now, digest = db.clock.ticks(), _digest(request)
        with db.transaction():
            known = db.rows(
                "SELECT id, state, digest FROM commitments WHERE TransactionUID = ? AND role = ? AND peer = ?"
                " ORDER BY id",
                (request.TransactionUID, Role.scp, peer),
            )
            same = next((row for row in known if row["digest"] == digest), None)
            if same is None:
                duplicate = [int(Verdict.duplicate_transaction)] * len(request.references)
                row_id = self._insert(peer, request, digest, duplicate if known else None)
            else:
                row_id = int(same["id"])
                state = next_promise_state(same["state"], PromiseEvent.again)
                if state is PromiseState.reporting:
                    return None
                judged_anew = ", outcome = NULL, failed = NULL" if row_id == known[0]["id"] else ""
                db.execute(
                    f"UPDATE commitments SET state = ?, attempts = 0, last_error = NULL{judged_anew} WHERE id = ?",
                    (state, row_id),
                )
            self._take([row_id], owner, now + seconds)
        return self.read(row_id)

    def _insert(self, peer: str, request: Request, digest: str, outcome: list[int] | None) -> int:
        return self.db.insert(
            "commitments",
            {
                "role": Role.scp,
                "peer": peer,
                "TransactionUID": request.TransactionUID,
                "digest": digest,
                "refs": json.dumps(request.references, separators=(",", ":")),
                "outcome": None if outcome is None else json.dumps(outcome),
                "instances": len(request.references),
                "failed": None if outcome is None else len(outcome),
                "state": PromiseState.pending,
                "created_at": self.db.clock.ticks(),
                "created_time": iso(self.db.clock.wall()),
            },
        )

    def read(self, promise_id: int) -> Promise | None:
        row = self.db.row("SELECT * FROM commitments WHERE id = ? AND role = ?", (promise_id, Role.scp))
        return None if row is None else _promise(row)

    def judged(self, promise_id: int, owner: str, verdicts: Sequence[int]) -> bool:
        """Keep the judgement, so that each attempt reports the same; False when the lease is lost."""
        failed = sum(verdict != Verdict.committed for verdict in verdicts)
        with self.db.transaction():
            return bool(
                self.db.execute(
                    "UPDATE commitments SET outcome = ?, failed = ?"
                    " WHERE id = ? AND lease_owner = ? AND state = 'reporting'",
                    (json.dumps([int(v) for v in verdicts], separators=(",", ":")), failed, promise_id, owner),
                )
            )

    def due_peers(self) -> list[str]:
        """Peers whose oldest unsent report may be tried now."""
        rows = self.db.rows(
            "SELECT peer, min(next_at) AS soonest FROM commitments WHERE role = 'scp' AND state = 'pending'"
            " GROUP BY peer HAVING soonest <= ? ORDER BY soonest",
            (self.db.clock.ticks(),),
        )
        return [str(r["peer"]) for r in rows]

    def next_due_in(self) -> float | None:
        """Seconds until another report becomes due; None when none will."""
        now = self.db.clock.ticks()
        soonest = self.db.value(
            "SELECT min(next_at) FROM commitments WHERE role = 'scp' AND state = 'pending' AND next_at > ?", (now,)
        )
        return None if soonest is None else float(soonest) - now

    def lease(self, peer: str, owner: str, seconds: float, limit: int) -> list[Promise]:
        """Take up to ``limit`` due reports for one peer, oldest first."""
        db = self.db
        now = db.clock.ticks()
        with db.transaction():
            due = db.rows(
                "SELECT id FROM commitments WHERE role = 'scp' AND state = 'pending' AND peer = ? AND next_at <= ?"
                " ORDER BY id LIMIT ?",
                (peer, now, limit),
            )
            ids = [int(row["id"]) for row in due]
            self._take(ids, owner, now + seconds)
        return [promise for i in ids if (promise := self.read(i)) is not None]

    def _take(self, ids: Sequence[int], owner: str, until: float) -> None:
        for promise_id in ids:
            state = next_promise_state(PromiseState.pending, PromiseEvent.lease)
            self.db.execute(
                "UPDATE commitments SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1"
                " WHERE id = ?",
                (state, owner, until, promise_id),
            )

    def extend(self, promise_id: int, owner: str, seconds: float) -> bool:
        """Keep a lease alive; False when it is lost."""
        with self.db.transaction():
            return bool(
                self.db.execute(
                    "UPDATE commitments SET lease_until = ? WHERE id = ? AND lease_owner = ? AND state = 'reporting'",
                    (self.db.clock.ticks() + seconds, promise_id, owner),
                )
            )

    def reported(self, promise_id: int, owner: str) -> None:
        """The peer took the report."""
        self._leave(promise_id, owner, PromiseEvent.report, None, 0.0)

    def retry(self, promise_id: int, owner: str, error: str, *, first: float, longest: float) -> None:
        """A passing cause: wait and report later, for ever."""
        attempts = self.db.value("SELECT attempts FROM commitments WHERE id = ?", (promise_id,))
        wait = backoff_seconds(int(attempts or 1), first, longest)
        self._leave(promise_id, owner, PromiseEvent.retry, error, wait)

    def hand_on(self, promise_id: int, owner: str, error: str) -> None:
        """Not on this association: somebody else reports, at once, on one of its own."""
        self._leave(promise_id, owner, PromiseEvent.retry, error, 0.0)

    def reject(self, promise_id: int, owner: str, error: str) -> None:
        """The peer refused the report for good: parked with its reason until requeued by hand."""
        self._leave(promise_id, owner, PromiseEvent.reject, error, 0.0)

    def expire(self, own: str | None = None) -> int:
        """Take back reports whose lease ran out, or all of ``own``'s former life."""
        db = self.db
        query = (
            "SELECT id, state FROM commitments WHERE role = 'scp' AND state = 'reporting'"
            " AND (lease_until < ? OR lease_owner = ?)"
        )
        if not db.rows(query, (db.clock.ticks(), own)):
            return 0
        with db.transaction():
            lost = db.rows(query, (db.clock.ticks(), own))
            for row in lost:
                state = next_promise_state(row["state"], PromiseEvent.lose)
                db.execute(
                    "UPDATE commitments SET state = ?, lease_owner = NULL, next_at = 0 WHERE id = ?", (state, row["id"])
                )
        return len(lost)

    def _leave(self, promise_id: int, owner: str, event: PromiseEvent, error: str | None, wait: float) -> None:
        db = self.db
        with db.transaction():
            row = db.row("SELECT state FROM commitments WHERE id = ? AND lease_owner = ?", (promise_id, owner))
            if row is None or row["state"] != PromiseState.reporting:
                return  # the lease ran out; whoever has it reports too, which is harmless
            state = next_promise_state(row["state"], event)
            now = db.clock.ticks()
            finished = now if state is PromiseState.reported else None
            db.execute(
                "UPDATE commitments SET state = ?, lease_owner = NULL, next_at = ?, last_error = ?,"
                " finished_at = ?, finished_time = ? WHERE id = ?",
                (state, now + wait, error, finished, iso(db.clock.wall()) if finished else None, promise_id),
            )


def _digest(request: Request) -> str:
    """Of the set of references: a request that is sent again may have them in another order."""
    lines = sorted(f"{r.SOPClassUID} {r.SOPInstanceUID}\n" for r in request.references)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _promise(row: Row) -> Promise:
    references: list[Any] = json.loads(row["refs"])
    verdicts = json.loads(row["outcome"]) if row["outcome"] else None
    return Promise(
        int(row["id"]),
        str(row["peer"]),
        Request(str(row["TransactionUID"]), tuple(Reference(*pair) for pair in references)),
        None if verdicts is None else tuple(int(v) for v in verdicts),
        int(row["attempts"]),
    )
