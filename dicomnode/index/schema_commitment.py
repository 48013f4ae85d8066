"""Table of storage commitments, as migration m0006 makes it; see :mod:`dicomnode.index.commitment`."""

from __future__ import annotations

from sqlite_utils import Database


def create_commitments(db: Database) -> None:
    """One row for each request that is owed an answer or waits for one, and what deliveries need for them."""
    db["commitments"].create(
        {
            "id": int,
            "role": str,
            "peer": str,
            "TransactionUID": str,
            "digest": str,
            "refs": str,
            "outcome": str,
            "instances": int,
            "failed": int,
            "state": str,
            "attempts": int,
            "next_at": float,
            "due_at": float,
            "lease_owner": str,
            "lease_until": float,
            "last_error": str,
            "created_at": float,
            "created_time": str,
            "finished_at": float,
            "finished_time": str,
        },
        pk="id",
        not_null={"role", "peer", "TransactionUID", "refs", "instances", "state"},
        defaults={"attempts": 0, "next_at": 0.0, "digest": ""},
    )
    db["commitments"].create_index(["TransactionUID", "role", "peer", "digest"], unique=True)
    db["commitments"].create_index(["role", "state", "peer"])
    db["deliveries"].add_column("commit_wanted", int, not_null_default=0)
    db["deliveries"].add_column("commitment_id", int)
    db["deliveries"].add_column("asks", int, not_null_default=0)
    db["deliveries"].add_column("stores", int, not_null_default=0)
    db.execute(
        "CREATE INDEX idx_deliveries_to_ask ON deliveries(destination, next_at)"
        " WHERE state = 'stored' AND commit_wanted = 1"
    )
