"""Back-pressure of the cloud outbox: whether more waits than may wait."""

from __future__ import annotations

from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.database import Database

LOOK_SECONDS = 5.0


class Spool:
    """``limit_bytes`` 0: never full. Looked at anew every :data:`LOOK_SECONDS` of node time."""

    def __init__(self, db: Database, limit_bytes: int) -> None:
        self._db = db
        self._limit = limit_bytes
        self._looked = float("-inf")
        self._full = False

    def full(self) -> bool:
        if not self._limit:
            return False
        now = self._db.clock.ticks()
        if now - self._looked >= LOOK_SECONDS:
            self._looked, self._full = now, CloudOutbox(self._db).waiting_bytes() >= self._limit
        return self._full
