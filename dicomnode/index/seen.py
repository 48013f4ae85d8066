"""When the certificates of peers end, as receivers and courier last saw them; a restart does not forget it.

The processes of one kind share what they saw: of two receivers, one may not have met a peer
since it changed its certificate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dicomnode.clock import iso
from dicomnode.index.database import Database

KEPT_SECONDS = 30 * 86400.0
"""A certificate that ended longer ago and was not followed by another is not in use any more."""


class SeenCertificates:
    """One process's share. ``process`` is its kind: a peer may call with one certificate and be called with another."""

    def __init__(self, db: Database, process: str, peers: Collection[str]) -> None:
        self._db = db
        self._process = process
        self._peers = frozenset(peers)
        self._known: dict[str, float] = {}

    def exchange(self, seen: Mapping[str, float]) -> dict[str, float]:
        """Record what this process saw since the last time; what is known now, by peer, Unix time.

        Writes when a certificate changed, and else only reads. Raises StorageError.
        """
        oldest = self._db.clock.wall().timestamp() - KEPT_SECONDS
        changed = {p: end for p, end in seen.items() if self._counts(p, end, oldest) and end != self._known.get(p)}
        if changed:
            self._record(changed)
        rows = self._db.rows("SELECT peer, ends_at FROM peer_certificates WHERE process = ?", (self._process,))
        self._known = {r["peer"]: r["ends_at"] for r in rows if self._counts(r["peer"], r["ends_at"], oldest)}
        return dict(self._known)

    def _counts(self, peer: str, end: float, oldest: float) -> bool:
        return peer in self._peers and end > oldest

    def _record(self, ends: Mapping[str, float]) -> None:
        with self._db.transaction(sync=False):  # the heartbeat, which follows, makes it durable
            for peer, end in ends.items():
                row = {"process": self._process, "peer": peer, "ends_at": end, "seen_time": iso(self._db.clock.wall())}
                self._db.insert("peer_certificates", row, conflict="OR REPLACE")
