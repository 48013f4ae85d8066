"""Table of alerts about critical results, as migration m0011 makes it; see :mod:`dicomnode.index.urgency`."""

from __future__ import annotations

from sqlite_utils import Database


def create_alerts(db: Database) -> None:
    """One row for each critical job."""
    db["alerts"].create(
        {
            "id": int,
            "job_id": int,
            "study_id": int,
            "uuid": str,
            "keys": str,
            "state": str,
            "attempts": int,
            "next_at": float,
            "last_error": str,
            "created_at": float,
            "created_time": str,
            "finished_time": str,
        },
        pk="id",
        foreign_keys=[("job_id", "jobs", "id"), ("study_id", "studies", "id")],
        not_null={"job_id", "study_id", "uuid", "keys", "state"},
        defaults={"attempts": 0, "next_at": 0.0},
    )
    db["alerts"].create_index(["job_id"], unique=True)
    db["alerts"].create_index(["state", "next_at"])
