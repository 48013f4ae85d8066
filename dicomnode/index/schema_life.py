"""Tables of the life of model versions, as migration m0012 makes them; see :mod:`dicomnode.index.life`."""

from __future__ import annotations

from sqlite_utils import Database


def create_model_life(db: Database) -> None:
    """States of versions, their history, attempts by version and comparisons; what was active stays so."""
    db["model_versions"].create(
        {
            "name": str,
            "version": str,
            "state": str,
            "percent": float,
            "peers": str,
            "faulty": int,
            "since_at": float,
            "since_time": str,
        },
        pk=("name", "version"),
        not_null={"state", "percent", "peers", "faulty"},
        defaults={"percent": 0.0, "peers": "[]", "faulty": 0},
    )
    db.execute("CREATE UNIQUE INDEX idx_model_versions_active ON model_versions(name) WHERE state = 'active'")
    db["model_history"].create(
        {
            "id": int,
            "name": str,
            "version": str,
            "event": str,
            "from_state": str,
            "to_state": str,
            "percent": float,
            "peers": str,
            "automatic": int,
            "who": str,
            "why": str,
            "at": float,
            "time": str,
        },
        pk="id",
        not_null={"name", "version", "event", "to_state", "who"},
        defaults={"automatic": 0},
    )
    db["model_history"].create_index(["name", "id"])
    db["model_runs"].create(
        {
            "id": int,
            "job_id": int,
            "study_id": int,
            "name": str,
            "version": str,
            "role": str,
            "state": str,
            "instances": int,
            "seconds": float,
            "outputs": str,
            "at": float,
            "time": str,
        },
        pk="id",
        not_null={"job_id", "name", "version", "role", "state"},
    )
    db["model_runs"].create_index(["name", "version", "id"])
    db["model_runs"].create_index(["study_id", "name"])
    db["model_runs"].create_index(["job_id"])
    db["model_comparisons"].create(
        {
            "id": int,
            "job_id": int,
            "name": str,
            "version": str,
            "other_version": str,
            "role": str,
            "state": str,
            "attempts": int,
            "dice": str,
            "least_dice": float,
            "differences": str,
            "greatest_difference": float,
            "same_findings": int,
            "seconds": float,
            "other_seconds": float,
            "outputs": str,
            "error": str,
            "at": float,
            "time": str,
        },
        pk="id",
        not_null={"job_id", "name", "version", "other_version", "role", "state"},
        defaults={"attempts": 0},
    )
    db["model_comparisons"].create_index(["job_id", "version", "role"], unique=True)
    db["model_comparisons"].create_index(["name", "version", "id"])
    for name, version, activated in db.execute("SELECT name, version, activated_time FROM models").fetchall():
        db["model_versions"].insert(
            {"name": name, "version": version, "state": "active", "since_at": 0.0, "since_time": activated}
        )


def create_removals(db: Database) -> None:
    db["model_removals"].create(
        {"name": str, "version": str, "folder": str, "who": str, "why": str, "automatic": int},
        pk=("name", "version"),
        not_null={"folder", "who", "why", "automatic"},
    )
