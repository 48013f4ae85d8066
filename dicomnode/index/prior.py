"""Rows of earlier studies that jobs wish for: begun with the job, looked for in the index, compared at the end.

The courier asks the PACS (:mod:`dicomnode.index.prior_work`); everything here happens inside the
transaction of whoever decides about the job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dicomnode.clock import iso
from dicomnode.identity import input_digest
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database, Row
from dicomnode.index.states import JobState
from dicomnode.orders import dump as dump_order
from dicomnode.orders import order_for
from dicomnode.priors import (
    INDEX,
    PRIOR_TABLE,
    Candidate,
    PriorEvent,
    PriorState,
    Wish,
    askable,
    days_between,
    dump,
    load,
    ranked,
)

STEP = "prior"
"""``step`` of a job that analyses an earlier series for comparison: its results stay on this node."""

OPEN_STATES = (PriorState.pending, PriorState.asking, PriorState.arriving)
LOOK_AGAIN_SECONDS = 1.0
MOST_CANDIDATES = 500


def next_prior_state(state: str, event: PriorEvent) -> PriorState:
    """Raises KeyError for what the table does not know: a mistake of ours."""
    return PRIOR_TABLE[PriorState(state), event]


def of_job(db: Database, job_id: int) -> Row | None:
    return db.row("SELECT * FROM priors WHERE job_id = ?", (job_id,))


def begin(db: Database, job: Row, wish: Wish) -> Row:
    """Make the row of a wish and look into the index at once."""
    now = db.clock.ticks()
    prior_id = db.insert(
        "priors",
        {
            "job_id": job["id"],
            "wish": dump(wish),
            "state": PriorState.pending,
            "place": 0,
            "tried": "[]",
            "deadline_at": now + wish.seconds,
            "created_at": now,
            "created_time": iso(db.clock.wall()),
        },
    )
    look(db, prior_id)
    row = db.row("SELECT * FROM priors WHERE id = ?", (prior_id,))
    assert row is not None
    return row


def look(db: Database, prior_id: int) -> PriorState:
    """Go through the sources up to the first peer; settles the row where that decides it."""
    row = db.row("SELECT * FROM priors WHERE id = ?", (prior_id,))
    assert row is not None
    wish, place = load(row["wish"]), int(row["place"])
    current = attributes_of_job(db, int(row["job_id"]))
    cause = askable(current)
    if cause:
        return change(db, row, PriorEvent.give_up, last_error=cause)
    while place < len(wish.sources) and wish.sources[place] == INDEX:
        held = ranked(current, _held(db, current), wish)
        if held:
            best = held[0].attributes
            if best["selected_generation"] >= best["generation"]:
                return take(db, row, int(best["series_id"]), INDEX)
            return _wait(db, row, place)  # it is still coming in
        place += 1
    if place >= len(wish.sources):
        where = " and ".join(wish.sources)
        return change(db, row, PriorEvent.give_up, place=place, last_error=row["last_error"] or f"none in {where}")
    db.execute("UPDATE priors SET place = ? WHERE id = ?", (place, prior_id))
    return PriorState(row["state"])


def _wait(db: Database, row: Row, place: int) -> PriorState:
    db.execute(
        "UPDATE priors SET place = ?, next_at = ? WHERE id = ?",
        (place, db.clock.ticks() + LOOK_AGAIN_SECONDS, row["id"]),
    )
    return PriorState(row["state"])


def take(db: Database, row: Row, series_id: int, source: str) -> PriorState:
    return change(db, row, PriorEvent.take, series_id=series_id, source=source, last_error=None)


def change(db: Database, row: Row, event: PriorEvent, **columns: Any) -> PriorState:
    """Inside a transaction: the row after ``event``, with further columns; its lease ends."""
    state = next_prior_state(row["state"], event)
    final = state in (PriorState.found, PriorState.none)
    values = {"state": state, "finished_time": iso(db.clock.wall()) if final else None, **columns}
    if state is not PriorState.asking:
        values["lease_owner"] = None
    assignments = ", ".join(f"{name} = ?" for name in values)
    db.execute(f"UPDATE priors SET {assignments} WHERE id = ?", (*values.values(), row["id"]))
    return state


def attributes_of_job(db: Database, job_id: int) -> Row:
    """Patient, study and series attributes of a job's series."""
    return attributes_of(db, int(db.value("SELECT series_id FROM jobs WHERE id = ?", (job_id,))))


def attributes_of(db: Database, series_id: int) -> Row:
    catalogue = Catalogue(db)
    own = {k: v for k, v in catalogue.first_attributes(series_id).items() if v}
    return {
        **(catalogue.series_attributes(series_id) or {}),
        **own,
    }  # a patient's row has the birth date that came first


def _held(db: Database, current: Mapping[str, Any]) -> list[Candidate]:
    """Received series of other studies of patients with this ID."""
    rows = db.rows(
        "SELECT se.id, se.generation, se.selected_generation,"
        " (SELECT count(*) FROM instances i WHERE i.series_id = se.id) AS images"
        " FROM patients p JOIN studies st ON st.patient_id = p.id JOIN series se ON se.study_id = st.id"
        " WHERE p.PatientID = ? AND st.StudyInstanceUID != ? AND se.origin = 'received'"
        " ORDER BY st.StudyDate DESC, se.id DESC LIMIT ?",
        (str(current["PatientID"]), str(current["StudyInstanceUID"]), MOST_CANDIDATES),
    )
    return [
        Candidate({**attributes_of(db, int(r["id"])), "series_id": r["id"]}, int(r["images"]))
        for r in rows
        if r["images"]
    ]


def compared(db: Database, job: Row, row: Row) -> bool:
    """Whether the series that was found has been analysed by the job's model; makes the job for that.

    What is known then is kept with the wish, so that a retry says the same.
    """
    if row["compared"] is not None:
        return True
    if not load(row["wish"]).compare:
        _keep(db, row, None)
        return True
    before = _analysis(db, job, int(row["series_id"]))
    if before is None:
        _analyse(db, job, row)
        return False
    if before["state"] in (JobState.waiting, JobState.pending, JobState.running):
        return False
    _keep(db, row, before)
    return True


def _analysis(db: Database, job: Row, series_id: int) -> Row | None:
    """The job by the same model on a series as it is: done by the version that is active, else under way."""
    name, _, pinned = str(job["model"]).partition("@")
    active = pinned or db.value("SELECT version FROM model_versions WHERE name = ? AND state = 'active'", (name,))
    rows = db.rows(
        "SELECT * FROM jobs WHERE series_id = ? AND model = ? AND inputs_sha256 = ? AND state != ? ORDER BY id DESC",
        (series_id, job["model"], input_digest(_inputs(db, series_id)), JobState.superseded),
    )
    done = [r for r in rows if r["state"] == JobState.done and (active is None or r["model_version"] == active)]
    own = [r for r in rows if r["step"] in ("", STEP) and r["state"] != JobState.done]
    if done:
        return done[0]
    made = [r for r in rows if r["step"] == STEP]  # by another version meanwhile: once is enough
    return next(iter((*own, *made)), None)


def _inputs(db: Database, series_id: int) -> list[tuple[str, str]]:
    sql = "SELECT SOPInstanceUID, dataset_sha256 FROM instances WHERE series_id = ?"
    return [(str(r["SOPInstanceUID"]), str(r["dataset_sha256"])) for r in db.rows(sql, (series_id,))]


def _analyse(db: Database, job: Row, row: Row) -> int:
    """A job on the earlier series, for nobody but the comparison."""
    series = db.row("SELECT * FROM series WHERE id = ?", (row["series_id"],))
    assert series is not None
    inputs = _inputs(db, int(series["id"]))
    last = db.value(
        "SELECT max(revision) FROM jobs WHERE series_id = ? AND model = ? AND step = ?",
        (series["id"], job["model"], STEP),
    )
    made = db.insert(
        "jobs",
        {
            "series_id": series["id"],
            "model": job["model"],
            "step": STEP,
            "rules": job["rules"],
            "destinations": "[]",
            "notify": "[]",
            "wishes": dump_order(order_for((), ("SR",))),
            "priority": job["priority"],
            "revision": int(last or 0) + 1,
            "inputs_sha256": input_digest(inputs),
            "generation": series["generation"],
            "reason": f"an earlier study for comparison in job {job['id']}",
            "state": JobState.pending,
            "last_received_at": db.clock.ticks(),
            "created_at": db.clock.ticks(),
            "created_time": iso(db.clock.wall()),
        },
    )
    for uid, content in inputs:
        db.insert("job_inputs", {"job_id": made, "SOPInstanceUID": uid, "sha256": content})
    return made


def _keep(db: Database, row: Row, before: Row | None) -> None:
    now, then = attributes_of_job(db, int(row["job_id"])), attributes_of(db, int(row["series_id"]))
    summary = json.loads(before["summary"]) if before is not None and before["summary"] else {}
    kept = {
        "job": before["id"] if before is not None else None,
        "state": before["state"] if before is not None else None,
        "inputs_sha256": input_digest(_inputs(db, int(row["series_id"]))),
        "model_version": before["model_version"] if before is not None else None,
        "StudyInstanceUID": then["StudyInstanceUID"],
        "SeriesInstanceUID": then["SeriesInstanceUID"],
        "Modality": then["Modality"],
        "StudyDate": then["StudyDate"],
        "days": days_between(now, then),
        "measurements": summary.get("measurements", []),
    }
    db.execute("UPDATE priors SET compared = ? WHERE id = ?", (json.dumps(kept), row["id"]))


def comparing(db: Database, series_id: int) -> list[int]:
    """Series of jobs that wait to be compared with this one."""
    rows = db.rows(
        "SELECT DISTINCT j.series_id FROM priors p JOIN jobs j ON j.id = p.job_id"
        " WHERE p.series_id = ? AND p.compared IS NULL AND j.state = ?",
        (series_id, JobState.waiting),
    )
    return [int(r["series_id"]) for r in rows]


def instances(db: Database, series_id: int) -> list[tuple[str, str]]:
    """SOP class and instance UID of what the index holds of a series."""
    sql = "SELECT SOPClassUID, SOPInstanceUID FROM instances WHERE series_id = ? ORDER BY id"
    return [(str(r["SOPClassUID"]), str(r["SOPInstanceUID"])) for r in db.rows(sql, (series_id,))]


def fetched(db: Database, series_uid: str) -> bool:
    """Whether this series was asked for as an earlier one: it is not analysed by itself."""
    return db.value("SELECT 1 FROM prior_series WHERE SeriesInstanceUID = ?", (series_uid,)) is not None


def told(db: Database, job_id: int) -> Row | None:
    """The wish of a job for people: state, where it was found, why not."""
    row = of_job(db, job_id)
    if row is None:
        return None
    kept = json.loads(row["compared"]) if row["compared"] else {}
    return {
        "state": row["state"],
        "source": row["source"],
        "last_error": row["last_error"],
        "attempts": row["attempts"],
        "StudyInstanceUID": kept.get("StudyInstanceUID"),
        "SeriesInstanceUID": kept.get("SeriesInstanceUID") or row["SeriesInstanceUID"],
        "days": kept.get("days"),
        "job": kept.get("job"),
    }
