"""Table of desired states, as migration m0030 makes it; see :mod:`dicomnode.index.desired`."""

from __future__ import annotations

from sqlite_utils import Database


def create_desired(db: Database) -> None:
    """One row for each generation; ``serves`` is 1 for the last good one, of which there is one at most."""
    db["desired_states"].create(
        {
            "generation": int,
            "digest": str,
            "state": str,
            "status": str,
            "reason": str,
            "serves": int,
            "reported": int,
            "received_time": str,
            "decided_time": str,
            "decided_at": float,
        },
        pk="generation",
        not_null={"digest", "state", "status", "reason", "serves", "reported"},
        defaults={"reason": "", "serves": 0, "reported": 0},
    )
    db.execute("CREATE UNIQUE INDEX idx_desired_states_serves ON desired_states(serves) WHERE serves = 1")
