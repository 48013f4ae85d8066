"""The cloud outbox: objects and records in three classes, in order within their streams."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from dicomnode.index.database import Database, Row
from dicomnode.index.outbox import Outbox
from dicomnode.index.procedure import WITHHELD
from dicomnode.index.states import SendEvent, next_send_state


class CloudOutbox(Outbox):
    def __init__(self, db: Database) -> None:
        super().__init__(db, "sync_items")

    def lease_lane(self, priority: int, owner: str, seconds: float, limit: int, most_bytes: int) -> list[Row]:
        """Take up to ``limit`` due items of one class, oldest first, of ``most_bytes`` together (one at least).

        An item waits while an older one of its stream is being sent, is not due, or belongs to
        another class, which is more urgent then and goes by itself.
        """
        db = self.db
        now = db.clock.ticks()
        look = (
            "SELECT d.id, d.state, d.size FROM sync_items d WHERE d.state = 'pending' AND d.priority = ?1"
            " AND d.next_at <= ?2 AND NOT EXISTS (SELECT 1 FROM sync_items o WHERE o.stream = d.stream AND o.id < d.id"
            " AND o.state IN ('pending', 'sending')"
            " AND (o.state = 'sending' OR o.next_at > ?2 OR o.priority != ?1)) ORDER BY d.id LIMIT ?3"
        )
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
                    "UPDATE sync_items SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1"
                    " WHERE id = ?",
                    (state, owner, now + seconds, item["id"]),
                )
                taken.append(item["id"])
            marks = ", ".join("?" * len(taken))
            return db.rows(f"{self._joined} WHERE d.id IN ({marks}) ORDER BY d.id", taken) if taken else []

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

    def waiting_bytes(self) -> int:
        """Bytes of what has not arrived yet: stored objects and the content of records."""
        return int(
            self.db.value("SELECT coalesce(sum(size), 0) FROM sync_items WHERE state IN ('pending', 'sending')") or 0
        )

    def lanes(self) -> list[Row]:
        """Per class: how many wait, bytes, and the age of the oldest in seconds."""
        return self.db.rows(
            "SELECT priority, count(*) AS count, sum(size) AS bytes, max(0.0, ? - min(created_at)) AS oldest_seconds"
            " FROM sync_items WHERE state IN ('pending', 'sending') GROUP BY priority ORDER BY priority",
            (self.db.clock.ticks(),),
        )


def record_of(item: Row) -> Row:
    """The content of a record's item, with home identities."""
    found: Row = json.loads(item["data"])
    return found
