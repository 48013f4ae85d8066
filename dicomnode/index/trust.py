"""What is known of the signed repository of models, kept so that a restart without the cloud changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row

State = Literal["current", "away", "refused", "expired", "unknown"]
"""``current``: looked at and right. ``away``: cannot be reached, what is known is still valid.
``refused``: what came is not signed as it must be, or older than what was seen. ``expired``: nothing
that is known is valid any more. ``unknown``: never seen."""

REASON_MOST = 300


@dataclass(frozen=True, slots=True)
class Offer:
    """An archive that the repository vouches for; ``target`` is where it lies there, ``length`` in bytes.

    ``role``: the delegated role that signs it, empty for the repository's own; ``until``: when that role ends.
    """

    name: str
    version: str
    target: str
    sha256: str
    length: int
    role: str = ""
    until: str = ""

    @property
    def order(self) -> tuple[int, ...]:
        """Versions of offers are plain releases, MAJOR.MINOR.PATCH."""
        return release(self.version)


def release(version: str) -> tuple[int, ...]:
    """To compare plain releases by; what is none (a pre-release) comes before all. Pure."""
    parts = version.split(".")
    return tuple(int(p) for p in parts) if all(p.isdecimal() and p.isascii() for p in parts) else ()


@dataclass(frozen=True, slots=True)
class Trusted:
    """Verified metadata: ``expires`` is the earliest end of its four roles.

    ``faults``: delegated roles that are not followed, and why; they take nothing from the others.
    """

    versions: Mapping[str, int]
    expires: datetime
    offers: Sequence[Offer]
    faults: Sequence[str] = ()

    @property
    def reason(self) -> str:
        return "; ".join(self.faults)[:REASON_MOST]


class Trust:
    def __init__(self, db: Database, repository: str) -> None:
        self.db, self.repository = db, repository

    def row(self) -> Row | None:
        """``versions`` and ``offers`` parsed, ``state`` as of now: what has run out since is ``expired``."""
        row = self.db.row("SELECT * FROM model_trust WHERE repository = ?", (self.repository,))
        if row is None:
            return None
        row["versions"] = json.loads(row["versions"])
        row["offers"] = [Offer(**o) for o in json.loads(row["offers"])]
        if row["state"] in ("current", "away") and row["expires_time"] and self._ended(row["expires_time"]):
            row["state"], row["reason"] = "expired", row["reason"] or f"valid until {row['expires_time']}"
        return row

    def _ended(self, expires: str | None) -> bool:
        return expires is None or self.db.clock.wall() >= datetime.fromisoformat(expires)

    def offers(self, *, stale: bool = False) -> list[Offer]:
        """What it vouches for now; with ``stale`` what it vouched for last."""
        row = self.row()
        if row is None or (not stale and self._ended(row["expires_time"])):
            return []
        found: list[Offer] = row["offers"]
        return [o for o in found if stale or not o.until or not self._ended(o.until)]

    def good(self, trusted: Trusted) -> None:
        now = iso(self.db.clock.wall())
        self._put(
            {
                "state": "current",
                "reason": trusted.reason,
                "checked_time": now,
                "good_time": now,
                "expires_time": iso(trusted.expires),
                "versions": json.dumps(dict(trusted.versions)),
                "offers": json.dumps([asdict(o) for o in trusted.offers]),
            }
        )

    def bad(self, state: State, reason: str) -> bool:
        """What was known stays. True when state or reason are new."""
        known = self.db.row("SELECT * FROM model_trust WHERE repository = ?", (self.repository,))
        fields: dict[str, Any] = {
            "state": state,
            "reason": reason[:REASON_MOST],
            "checked_time": iso(self.db.clock.wall()),
        }
        self._put({**(known or {}), **fields})
        return known is None or (known["state"], known["reason"]) != (state, fields["reason"])

    def _put(self, fields: Mapping[str, Any]) -> None:
        with self.db.transaction():
            self.db.insert("model_trust", {**fields, "repository": self.repository}, conflict="OR REPLACE")


def trust_rows(db: Database, repository: str, held: str = "") -> dict[str, Any]:
    """For ``status``, the dashboard and /metrics; empty without a repository.

    ``held``: why it is not looked at now, whatever stands in the row; empty when it is.
    """
    if not repository:
        return {}
    row = Trust(db, repository).row()
    if row is None:
        return {
            "repository": repository,
            "state": "unknown",
            "reason": held or "it has not been looked at yet",
            "offers": [],
        }
    return {
        **row,
        "reason": held or row["reason"],
        "offers": [{"name": o.name, "version": o.version, "role": o.role} for o in row["offers"]],
    }
