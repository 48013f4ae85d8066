"""The cloud outbox: objects and records in three classes, in order within their streams."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from dicomnode.index.database import Database, Row
from dicomnode.index.outbox import Outbox
from dicomnode.index.procedure import WITHHELD
from dicomnode.index.states import SendEvent, backoff_seconds, next_send_state

MOST_ENDED = 10
"""Ends of a process that had an item alone in hand, after which it is parked; as with jobs."""

ENDED = "the sidecar ended {n} times while it sent this item alone"

_LOOK = (
    "SELECT d.id, d.state, d.size FROM sync_items d WHERE d.state = 'pending' AND d.priority = ?1 AND d.next_at <= ?2"
    " AND d.suspect = {suspect} AND NOT EXISTS (SELECT 1 FROM sync_items o WHERE o.stream = d.stream AND o.id < d.id"
    " AND o.state IN ('pending', 'sending'){unless}) ORDER BY d.id LIMIT ?3"
)
_TOGETHER = _LOOK.format(
    suspect=0, unless=" AND (o.state = 'sending' OR o.next_at > ?2 OR o.priority != ?1 OR o.suspect = 1)"
)
_ALONE = _LOOK.format(suspect=1, unless="")


class CloudOutbox(Outbox):
    def __init__(self, db: Database) -> None:
        super().__init__(db, "sync_items")

    def lease_lane(self, priority: int, owner: str, seconds: float, limit: int, most_bytes: int) -> list[Row]:
        """Take up to ``limit`` due items of one class, oldest first, of ``most_bytes`` together (one at least).

        An item waits while an older one of its stream is being sent, is not due, is a suspect, or belongs
        to another class, which is more urgent then and goes by itself. Suspects go by :meth:`lease_suspect`.
        """
        return self._take(_TOGETHER, priority, owner, seconds, limit, most_bytes, trying=0)

    def lease_suspect(self, priority: int, owner: str, seconds: float) -> list[Row]:
        """Take the oldest due item that may be what ends the process or breaks its requests; by itself.

        That it is about to be tried is committed with the lease: :meth:`recover` counts it.
        """
        return self._take(_ALONE, priority, owner, seconds, 1, 0, trying=1)

    def _take(
        self, look: str, priority: int, owner: str, seconds: float, limit: int, most_bytes: int, *, trying: int
    ) -> list[Row]:
        db = self.db
        now = db.clock.ticks()
        if not db.rows(look, (priority, now, 1)):  # look before taking the write lock
            return []
        with db.transaction():
            taken: list[int] = []
            total = 0
            for item in db.rows(look, (priority, now, limit)):
                total += int(item["size"])
                if taken and total > most_bytes:
                    break
                state = next_send_state(item["state"], SendEvent.lease)
                db.execute(
                    "UPDATE sync_items SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1,"
                    " trying = ? WHERE id = ?",
                    (state, owner, now + seconds, trying, item["id"]),
                )
                taken.append(item["id"])
            marks = ", ".join("?" * len(taken))
            return db.rows(f"{self._joined} WHERE d.id IN ({marks}) ORDER BY d.id", taken) if taken else []

    def recover(self, owner: str, *, first: float, longest: float) -> list[Row]:
        """What a former life of ``owner`` had in hand when it ended; the items that are parked for it.

        What went together may hold the cause: each goes alone from now on. What went alone is counted
        and waits; after MOST_ENDED it is parked.
        """
        db, parked = self.db, []
        query = "SELECT * FROM sync_items WHERE state = 'sending' AND lease_owner = ? ORDER BY id"
        if not db.rows(query, (owner,)):
            return []
        with db.transaction():
            for item in db.rows(query, (owner,)):
                ended = int(item["ended"]) + int(item["trying"])
                if ended >= MOST_ENDED:
                    self._leave(item["id"], owner, SendEvent.reject, ENDED.format(n=ended), 0.0)
                    parked.append({**item, "last_error": ENDED.format(n=ended)})
                else:
                    wait = backoff_seconds(ended, first, longest) if item["trying"] else 0.0
                    self._leave(item["id"], owner, SendEvent.lose, item["last_error"], wait)
                db.execute("UPDATE sync_items SET suspect = 1, ended = ? WHERE id = ?", (ended, item["id"]))
        return parked

    def doubt(
        self, item_id: int, owner: str, error: str, *, strikes: int, ended: int, first: float, longest: float
    ) -> None:
        """It failed by itself: it waits, goes alone from now on, and what speaks against it is kept.

        ``strikes``: failures while others were stored; ``ended``: processes that ended with it in hand.
        """
        with self.db.transaction():
            self.retry(item_id, owner, error, first=first, longest=longest)
            self.db.execute(
                "UPDATE sync_items SET suspect = 1, strikes = ?, ended = ? WHERE id = ?", (strikes, ended, item_id)
            )

    def requeue(self, item_id: int) -> None:
        """As :meth:`Outbox.requeue`; a suspect has all its tries again, alone."""
        with self.db.transaction():
            super().requeue(item_id)
            self.db.execute("UPDATE sync_items SET strikes = 0, ended = 0 WHERE id = ?", (item_id,))

    def release(self, ids: Sequence[int], owner: str, error: str | None = None, *, tried: bool = True) -> None:
        """Nothing is wrong with these items: they wait again and are due at once.

        ``tried``: the attempt counts; without it they were never sent, and ``error`` is not theirs.
        """
        with self.db.transaction():
            for item_id in ids:
                if self._leave(item_id, owner, SendEvent.retry, error, 0.0) and not tried:
                    self.db.execute("UPDATE sync_items SET attempts = max(0, attempts - 1) WHERE id = ?", (item_id,))

    def settle(self, stored: Sequence[int], owner: str, conflicts: Collection[int] = ()) -> None:
        """The other side has these; one transaction for all.

        ``conflicts``: records among them where another change serves there. Of the others, this
        version is the last one that both ends had.
        """
        db = self.db
        with db.transaction():
            for item_id in stored:
                if not self._leave(item_id, owner, SendEvent.store, None, 0.0, finish=True):
                    continue
                conflict = item_id in conflicts
                outcome = "conflict" if conflict else "stored"
                db.execute(
                    "UPDATE sync_items SET outcome = ? WHERE id = ? AND record_id IS NOT NULL", (outcome, item_id)
                )
                if not conflict:
                    db.execute(
                        "UPDATE records SET common_version = i.version, common_data = i.data, common_key ="
                        " i.idempotency_key, common_time = i.changed_time FROM sync_items i WHERE i.id = ?"
                        " AND records.type = i.type AND records.record_id = i.record_id",
                        (item_id,),
                    )

    def requeue_rejected(self) -> int:
        """All that is parked goes again, but for what was withheld; how many items that were."""
        with self.db.transaction():
            ids = self.db.rows(
                "SELECT id FROM sync_items WHERE state = 'rejected' AND last_error IS NOT ? ORDER BY id", (WITHHELD,)
            )
            for row in ids:
                self.requeue(row["id"])
        return len(ids)

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        """Newest first, without the content of records."""
        rows = super().listing(limit, state)
        for row in rows:
            row["kind"] = row["kind"] or row["type"]
            del row["data"]
        return rows

    def waiting(self, ids: Sequence[int]) -> set[int]:
        """Those of these items that have not arrived and will be tried."""
        look = "SELECT 1 FROM sync_items WHERE id = ? AND state IN ('pending', 'sending')"
        return {item for item in ids if self.db.value(look, (item,))}

    def waiting_bytes(self) -> int:
        """Bytes of what has not arrived yet: stored objects and the content of records."""
        return int(
            self.db.value("SELECT coalesce(sum(size), 0) FROM sync_items WHERE state IN ('pending', 'sending')") or 0
        )

    def lanes(self) -> list[Row]:
        """Per class: how many wait, bytes, and the age of the oldest in seconds."""
        return self.db.rows(
            "SELECT priority, count(*) AS count, sum(size) AS bytes, max(0.0, ? - min(created_at)) AS oldest_seconds"
            " FROM sync_items INDEXED BY idx_sync_items_waiting"  # of itself SQLite takes another, and sorts
            " WHERE state IN ('pending', 'sending') GROUP BY priority ORDER BY priority",
            (self.db.clock.ticks(),),
        )


def record_of(item: Row) -> Row:
    """The content of a record's item, with home identities."""
    found: Row = json.loads(item["data"])
    return found
