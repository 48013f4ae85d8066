"""Rows of the cloud outbox, made in the transaction that commits what they carry.

Objects go by their result, records as a snapshot with a version and an idempotency key. What is
kept here has home identities; they are exchanged when it leaves.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from dicomnode.clock import iso
from dicomnode.cloud_settings import CloudPlan
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.index.states import SendState

_OPEN = "state IN ('pending', 'sending')"
PICTURES_STAY = "key-images-stay"
STUDY_KEYS = ("StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "StudyDescription")
PATIENT_KEYS = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex")


class Finished(Protocol):
    """Of an outcome, what a summary tells."""

    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def summary(self) -> Mapping[str, Any]: ...
    @property
    def critical(self) -> Sequence[str]: ...


def hand_to_cloud(
    db: Database,
    plan: CloudPlan,
    *,
    job: Row,
    study_id: int,
    results: Iterable[int],
    outcome: Finished,
    identified: bool,
) -> None:
    """Inside a transaction: what a finished job gives to the cloud, the study's metadata first."""
    if not plan.destination:
        return
    critical = bool(outcome.critical)

    def priority(kind: str) -> int:
        return min(plan.priority(kind), plan.priority("critical")) if critical else plan.priority(kind)

    common = {"job_id": job["id"], "study_id": study_id, "identified": int(identified)}
    results = _leaving(db, plan, int(job["series_id"]), results, identified=identified)
    if plan.records:
        study = study_metadata(db, study_id)
        put_record(db, plan, "study", study["StudyInstanceUID"], study, priority=priority("study"), **common)
    for result_id in results:
        size = db.value(
            "SELECT i.size FROM results r JOIN instances i ON i.SOPInstanceUID = r.SOPInstanceUID WHERE r.id = ?",
            (result_id,),
        )
        row = {"result_id": result_id, "type": "result", "size": int(size or 0), **common}
        _enqueue(db, plan, row, priority("result"))
    if plan.records:
        name, data = summary(db, job, results, outcome)
        put_record(db, plan, "ai-result", name, data, priority=priority("ai-result"), **common)


def _leaving(db: Database, plan: CloudPlan, series_id: int, results: Iterable[int], *, identified: bool) -> list[int]:
    """Results but for key images that could not leave without identity: told once for a series, not parked each."""
    leaving: list[int] = []
    kept = 0
    for result_id in results:
        found = db.row("SELECT kind, shows FROM results WHERE id = ?", (result_id,)) or {"kind": "", "shows": ""}
        if identified or found["kind"] != "SC" or not found["shows"] or found["shows"] in plan.pictures:
            leaving.append(result_id)
        else:
            kept += 1
    subject = f"series {series_id}"
    if kept and not db.row("SELECT 1 AS one FROM events WHERE kind = ? AND subject = ?", (PICTURES_STAY, subject)):
        text = f"{kept} key images stay here: their source does not say BurnedInAnnotation NO (see cloud.key_images)"
        Events(db).add("info", PICTURES_STAY, subject, text)
    return leaving


def put_record(
    db: Database,
    plan: CloudPlan,
    kind: str,
    record_id: str,
    data: Mapping[str, Any],
    *,
    priority: int | None = None,
    job_id: int | None = None,
    study_id: int | None = None,
    identified: int = 0,
    reported: bool = True,
    settles: Sequence[str] = (),
) -> int:
    """Inside a transaction: the next version of a record, and its item; 0 when nothing has changed.

    ``reported``: ``data`` is what the node itself knows. Only what it says otherwise than before is
    changed, so a correction by people at either end stays. ``settles``: keys of changes whose conflict
    this one decides; it goes out even when the value is the one that serves.
    """
    held = db.row("SELECT * FROM records WHERE type = ? AND record_id = ?", (kind, record_id))
    said = canonical(data) if reported else held["reported"] if held else None
    if reported and held is not None:
        if held["reported"] == said:
            return 0
        before_it = json.loads(held["reported"] or "{}")
        news = {k: v for k, v in data.items() if k not in before_it or before_it[k] != v}
        data = {**json.loads(held["data"]), **news} if held["reported"] else data
    text = canonical(data)
    if held is not None and held["data"] == text and not settles:
        db.execute("UPDATE records SET reported = ? WHERE type = ? AND record_id = ?", (said, kind, record_id))
        return 0
    before = int(held["version"]) if held else 0
    moment, key = iso(db.clock.wall()), str(uuid.uuid4())
    db.execute(
        "INSERT INTO records (type, record_id, version, data, changed_time, key, reported) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (type, record_id) DO UPDATE SET version = excluded.version, data = excluded.data,"
        " changed_time = excluded.changed_time, key = excluded.key, reported = excluded.reported",
        (kind, record_id, before + 1, text, moment, key, said),
    )
    if plan.destination and plan.records:
        row = {
            "type": kind,
            "record_id": record_id,
            "version": before + 1,
            "base_version": before,
            "base_key": held["key"] if held else None,
            "settles": json.dumps(list(settles)) if settles else None,
            "idempotency_key": key,
            "data": text,
            "changed_time": moment,
            "size": len(text.encode()),
            "job_id": job_id,
            "study_id": study_id,
            "identified": identified,
        }
        _enqueue(db, plan, row, plan.priority(kind) if priority is None else priority)
    return before + 1


def canonical(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, ensure_ascii=False)


def _enqueue(db: Database, plan: CloudPlan, row: Row, priority: int) -> None:
    """What waits in the same stream is lifted to the class of the newcomer, which must not overtake it."""
    study_id = row["study_id"]
    stream = f"study/{study_id}" if study_id is not None else f"{row['type']}/{row['record_id']}"
    db.execute(
        f"UPDATE sync_items SET priority = ? WHERE stream = ? AND {_OPEN} AND priority > ?",
        (priority, stream, priority),
    )
    db.insert(
        "sync_items",
        {
            **row,
            "destination": plan.destination,
            "stream": stream,
            "priority": priority,
            "state": SendState.pending,
            "created_at": db.clock.ticks(),
            "created_time": iso(db.clock.wall()),
        },
        conflict="OR IGNORE",
    )


def study_metadata(db: Database, study_id: int) -> Row:
    """Study and patient by DICOM keyword, and counts of what was received; results are not counted."""
    names = ", ".join((*(f"st.{k}" for k in STUDY_KEYS), *(f"p.{k}" for k in PATIENT_KEYS)))
    found = db.row(
        f"SELECT {names} FROM studies st JOIN patients p ON p.id = st.patient_id WHERE st.id = ?", (study_id,)
    )
    assert found is not None
    series = db.rows(
        "SELECT se.Modality, count(*) AS images FROM series se JOIN instances i ON i.series_id = se.id"
        " WHERE se.study_id = ? AND se.origin = 'received' GROUP BY se.id",
        (study_id,),
    )
    return {
        **{k: v or "" for k, v in found.items()},
        "ModalitiesInStudy": sorted({str(s["Modality"] or "") for s in series} - {""}),
        "NumberOfStudyRelatedSeries": len(series),
        "NumberOfStudyRelatedInstances": sum(int(s["images"]) for s in series),
    }


def summary(db: Database, job: Row, results: Sequence[int], outcome: Finished) -> tuple[str, Row]:
    """Id and content of the record of one analysis; each revision of it is another version."""
    series = db.row("SELECT SeriesInstanceUID, Modality FROM series WHERE id = ?", (job["series_id"],))
    assert series is not None
    current = db.row("SELECT model_version, model_digest FROM jobs WHERE id = ?", (job["id"],)) or {}
    marks = ", ".join("?" * len(results))
    objects = db.rows(f"SELECT kind, SOPInstanceUID FROM results WHERE id IN ({marks}) ORDER BY id", results)
    whose = "\n".join((str(series["SeriesInstanceUID"]), str(job["model"]), str(job["step"])))
    told = outcome.summary
    return hashlib.sha256(whose.encode()).hexdigest()[:32], {
        "SeriesInstanceUID": series["SeriesInstanceUID"],
        "Modality": series["Modality"] or "",
        "model": job["model"],
        "model_version": current.get("model_version"),
        "model_digest": current.get("model_digest"),
        "step": job["step"],
        "revision": job["revision"],
        "critical": list(dict.fromkeys(outcome.critical)),
        "objects": [{"kind": o["kind"], "SOPInstanceUID": o["SOPInstanceUID"]} for o in objects],
        **{k: told[k] for k in ("segments", "measurements", "findings", "slices", "engine") if k in told},
        "notes": list(outcome.notes),
    }
