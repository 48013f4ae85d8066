"""Storage commitment, one row for each transaction: state tables, and what operators see.

``role`` is this node's. As SCP a row is a request of a peer that must be answered
(:mod:`dicomnode.index.promises`); as SCU it is a question to a peer about results that it
stored (:mod:`dicomnode.index.asks`). There is no attempt limit while the cause can pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from dicomnode.errors import IllegalTransition, OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.states import SendEvent, next_send_state

KEPT_SECONDS = 90 * 86400.0
"""What is finished is forgotten after this long; the states of deliveries stay."""


class Role(StrEnum):
    scp = "scp"
    scu = "scu"


class PromiseState(StrEnum):
    pending = "pending"
    reporting = "reporting"
    reported = "reported"
    rejected = "rejected"  # the peer refused the report


class PromiseEvent(StrEnum):
    lease = "lease"
    report = "report"
    retry = "retry"
    reject = "reject"
    lose = "lose"
    again = "again"  # the peer sent the same request again
    requeue = "requeue"


class AskState(StrEnum):
    pending = "pending"
    asking = "asking"
    waiting = "waiting"  # the peer took the request and owes a report
    answered = "answered"
    abandoned = "abandoned"  # no report in time; its instances are asked for in a new transaction


class AskEvent(StrEnum):
    lease = "lease"
    accept = "accept"
    retry = "retry"  # the peer did not see it, or refused it
    lose = "lose"
    answer = "answer"
    abandon = "abandon"


PROMISE_TABLE: Mapping[tuple[PromiseState, PromiseEvent], PromiseState] = {
    (PromiseState.pending, PromiseEvent.lease): PromiseState.reporting,
    (PromiseState.pending, PromiseEvent.again): PromiseState.pending,
    (PromiseState.reporting, PromiseEvent.report): PromiseState.reported,
    (PromiseState.reporting, PromiseEvent.retry): PromiseState.pending,
    (PromiseState.reporting, PromiseEvent.reject): PromiseState.rejected,
    (PromiseState.reporting, PromiseEvent.lose): PromiseState.pending,
    (PromiseState.reporting, PromiseEvent.again): PromiseState.reporting,
    (PromiseState.reported, PromiseEvent.again): PromiseState.pending,
    (PromiseState.reported, PromiseEvent.requeue): PromiseState.pending,
    (PromiseState.rejected, PromiseEvent.again): PromiseState.pending,
    (PromiseState.rejected, PromiseEvent.requeue): PromiseState.pending,
}
"""Requests of peers. Reporting twice is harmless: it is the same transaction."""

ASK_TABLE: Mapping[tuple[AskState, AskEvent], AskState] = {
    (AskState.pending, AskEvent.lease): AskState.asking,
    (AskState.pending, AskEvent.answer): AskState.answered,
    (AskState.pending, AskEvent.abandon): AskState.abandoned,
    (AskState.asking, AskEvent.accept): AskState.waiting,
    (AskState.asking, AskEvent.retry): AskState.pending,
    (AskState.asking, AskEvent.lose): AskState.abandoned,
    (AskState.asking, AskEvent.answer): AskState.answered,
    (AskState.waiting, AskEvent.answer): AskState.answered,
    (AskState.waiting, AskEvent.abandon): AskState.abandoned,
    (AskState.answered, AskEvent.answer): AskState.answered,
    (AskState.abandoned, AskEvent.answer): AskState.answered,
}
"""Questions to peers. A Transaction UID that a peer may have seen is not used for another one.

A report can overtake the response to its request, come late, and come twice.
"""


def next_promise_state(state: str, event: PromiseEvent) -> PromiseState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return PROMISE_TABLE[PromiseState(state), event]
    except (KeyError, ValueError):
        raise IllegalTransition("change commitment state", f"'{event}' is not possible in state '{state}'") from None


def next_ask_state(state: str, event: AskEvent) -> AskState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return ASK_TABLE[AskState(state), event]
    except (KeyError, ValueError):
        raise IllegalTransition("change commitment state", f"'{event}' is not possible in state '{state}'") from None


def let_go(db: Database, commitment_id: int, next_at: float) -> None:
    """Inside a transaction: the deliveries of a question are ``stored`` again, to be asked for anew."""
    waiting = "SELECT id, state FROM deliveries WHERE commitment_id = ? AND state = 'committing'"
    for delivery in db.rows(waiting, (commitment_id,)):
        state = next_send_state(delivery["state"], SendEvent.unanswered)
        db.execute("UPDATE deliveries SET state = ?, next_at = ? WHERE id = ?", (state, next_at, delivery["id"]))


def hold(db: Database, role: Role, peer: str, seconds: float) -> None:
    """A peer cannot be reached: whatever waits for it waits at least this long."""
    with db.transaction():
        db.execute(
            "UPDATE commitments SET next_at = max(next_at, ?) WHERE role = ? AND state = 'pending' AND peer = ?",
            (db.clock.ticks() + seconds, role, peer),
        )


class Commitments:
    """Both roles, for command line, API and dashboard."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        """Newest first, without the references."""
        where, parameters = ("WHERE state = ?", [state]) if state else ("", [])
        return self.db.rows(
            "SELECT id, role, peer, TransactionUID, instances, failed, state, attempts, next_at, last_error,"
            f" created_at, created_time, finished_time FROM commitments {where} ORDER BY id DESC LIMIT ?",
            (*parameters, limit),
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """By role and state."""
        found = {
            (r["role"], r["state"]): int(r["n"])
            for r in self.db.rows("SELECT role, state, count(*) AS n FROM commitments GROUP BY role, state")
        }
        states: Mapping[Role, type[StrEnum]] = {Role.scp: PromiseState, Role.scu: AskState}
        return {
            role.value: {state.value: found.get((role.value, state.value), 0) for state in kinds}
            for role, kinds in states.items()
        }

    def waiting(self) -> list[Row]:
        """Per role, peer and state: ``count``, and ``oldest_seconds`` since the oldest was made."""
        return self.db.rows(
            "SELECT role, peer, state, count(*) AS count, max(0.0, ? - min(created_at)) AS oldest_seconds"
            " FROM commitments GROUP BY role, peer, state ORDER BY role, peer, state",
            (self.db.clock.ticks(),),
        )

    def requeue(self, commitment_id: int) -> str:
        """The operator wants a report sent again, or a question asked again, at once; the state then.

        Raises IllegalTransition when it is under way or there is nothing left to ask.
        """
        db = self.db
        with db.transaction():
            row = db.row("SELECT id, role, state FROM commitments WHERE id = ?", (commitment_id,))
            if row is None:
                raise OperatorError(
                    "retry commitment", f"there is no commitment {commitment_id}", "See 'dicomnode commitments list'"
                )
            if row["state"] == "pending":
                state: str = row["state"]
            elif row["role"] == Role.scp:
                state = next_promise_state(row["state"], PromiseEvent.requeue)
                db.execute("UPDATE commitments SET attempts = 0 WHERE id = ?", (commitment_id,))
            else:
                state = next_ask_state(row["state"], AskEvent.abandon)
                let_go(db, commitment_id, 0.0)
            db.execute("UPDATE commitments SET state = ?, next_at = 0 WHERE id = ?", (state, commitment_id))
        return state

    def forget(self) -> int:
        """Remove what was finished long ago; the number removed."""
        oldest = self.db.clock.ticks() - KEPT_SECONDS
        with self.db.transaction():
            return self.db.execute(
                "DELETE FROM commitments WHERE state IN ('reported', 'answered', 'abandoned') AND created_at < ?",
                (oldest,),
            )
