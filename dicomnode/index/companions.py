"""Further series of the same study that a step's model takes as inputs beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dicomnode.conditions import all_match
from dicomnode.identity import input_digest
from dicomnode.index.database import Database, Row
from dicomnode.index.prior import attributes_of


def bind(db: Database, job: Row, wanted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Inside a transaction: choose a complete series for each input; those that there is none for.

    Of several that meet the conditions the one in the frame of reference of the job's own series,
    then the one with most images. Bound anew each time, all or none.
    """
    own = attributes_of(db, int(job["series_id"]))
    others = [
        (attributes_of(db, int(r["id"])), r)
        for r in db.rows(
            "SELECT se.id, se.SeriesInstanceUID, (SELECT count(*) FROM instances i WHERE i.series_id = se.id) AS images"
            " FROM series se WHERE se.study_id = ? AND se.id != ? AND se.origin = 'received'"
            " AND se.selected_generation >= se.generation",
            (own["study_id"], job["series_id"]),
        )
        if r["images"]
    ]
    chosen: dict[str, int] = {}
    for name, conditions in wanted.items():
        fitting = [(a, r) for a, r in others if r["id"] not in chosen.values() and all_match(conditions, a)]
        frame = str(own.get("FrameOfReferenceUID") or "")
        fitting.sort(
            key=lambda pair: (
                str(pair[0].get("FrameOfReferenceUID") or "") != frame,
                -int(pair[1]["images"]),
                str(pair[1]["SeriesInstanceUID"]),
            )
        )
        if fitting:
            chosen[name] = int(fitting[0][1]["id"])
    missing = [name for name in wanted if name not in chosen]
    if not missing:
        _keep(db, int(job["id"]), chosen)
    return missing


def _keep(db: Database, job_id: int, chosen: Mapping[str, int]) -> None:
    db.execute("DELETE FROM job_series_inputs WHERE job_id = ?", (job_id,))
    for name, series_id in chosen.items():
        for row in db.rows("SELECT SOPInstanceUID, dataset_sha256 FROM instances WHERE series_id = ?", (series_id,)):
            db.insert(
                "job_series_inputs",
                {
                    "job_id": job_id,
                    "name": name,
                    "SOPInstanceUID": row["SOPInstanceUID"],
                    "sha256": row["dataset_sha256"],
                },
            )


def bound(db: Database, job_id: int) -> dict[str, list[Row]]:
    """Stored instances of each input, with SeriesInstanceUID and FrameOfReferenceUID of their series.

    One whose content was replaced since is left out; see :func:`counts`.
    """
    found: dict[str, list[Row]] = {}
    for row in db.rows(
        "SELECT i.name, n.*, s.SeriesInstanceUID, s.FrameOfReferenceUID FROM job_series_inputs i"
        " JOIN instances n ON n.SOPInstanceUID = i.SOPInstanceUID AND n.dataset_sha256 = i.sha256"
        " JOIN series s ON s.id = n.series_id WHERE i.job_id = ? ORDER BY n.id",
        (job_id,),
    ):
        found.setdefault(str(row["name"]), []).append(row)
    return found


def count(db: Database, job_id: int) -> int:
    return int(db.value("SELECT count(*) FROM job_series_inputs WHERE job_id = ?", (job_id,)))


def digest(db: Database, job_id: int) -> str:
    """Of all further inputs; "" where there are none."""
    rows = db.rows("SELECT name, SOPInstanceUID, sha256 FROM job_series_inputs WHERE job_id = ?", (job_id,))
    return input_digest((f"{r['name']} {r['SOPInstanceUID']}", str(r["sha256"])) for r in rows) if rows else ""


def waiting_beside(db: Database, series_id: int) -> list[int]:
    """Other series of the study with steps that wait: one may be waiting for this series."""
    return [
        int(r["series_id"])
        for r in db.rows(
            "SELECT DISTINCT j.series_id FROM jobs j JOIN series se ON se.id = j.series_id"
            " WHERE j.state = 'waiting' AND j.next_at > 0 AND j.series_id != ?"
            " AND se.study_id = (SELECT study_id FROM series WHERE id = ?)",
            (series_id, series_id),
        )
    ]


def overdue(db: Database) -> list[int]:
    """Series with steps whose further series did not come in time."""
    sql = "SELECT DISTINCT series_id FROM jobs WHERE state = 'waiting' AND next_at > 0 AND next_at <= ?"
    return [int(r["series_id"]) for r in db.rows(sql, (db.clock.ticks(),))]
