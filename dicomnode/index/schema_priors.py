"""Tables of earlier studies that jobs wish for; see :mod:`dicomnode.index.prior`."""

from __future__ import annotations

from sqlite_utils import Database


def create_companions(db: Database) -> None:
    """Instances of further series that a job takes as inputs; see :mod:`dicomnode.index.companions`."""
    db["job_series_inputs"].create(
        {"job_id": int, "name": str, "SOPInstanceUID": str, "sha256": str},
        pk=("job_id", "name", "SOPInstanceUID"),
        foreign_keys=[("job_id", "jobs", "id")],
    )


def create_priors(db: Database) -> None:
    """A row for each wish, and the series that a peer was asked for."""
    db["priors"].create(
        {
            "id": int,
            "job_id": int,
            "wish": str,
            "state": str,
            "place": int,
            "source": str,
            "StudyInstanceUID": str,
            "SeriesInstanceUID": str,
            "series_id": int,
            "images": int,
            "tried": str,
            "compared": str,
            "attempts": int,
            "next_at": float,
            "deadline_at": float,
            "lease_owner": str,
            "last_error": str,
            "created_at": float,
            "created_time": str,
            "finished_time": str,
        },
        pk="id",
        foreign_keys=[("job_id", "jobs", "id")],
        not_null={"job_id", "wish", "state", "place", "tried", "deadline_at"},
        defaults={"attempts": 0, "next_at": 0.0, "images": 0},
    )
    db["priors"].create_index(["job_id"], unique=True)
    db["priors"].create_index(["state", "next_at"])
    db["priors"].create_index(["series_id"])
    db["prior_series"].create({"SeriesInstanceUID": str, "prior_id": int}, pk="SeriesInstanceUID")
