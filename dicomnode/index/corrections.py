"""What of patients and studies was corrected (records of people, here or at the cloud), by row of the index.

The rows of ``patients`` and ``studies`` hold what was received and never change; a correction is what the
serving record says otherwise. Nothing is kept twice: what is decided, taken back or in dispute is seen at once.
A field that waits for a decision (an open conflict) counts as not corrected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dicomnode.clock import iso
from dicomnode.conflicts import moment
from dicomnode.index.database import Database
from dicomnode.index.keys import PATIENT_KEYS
from dicomnode.index.mapping import patient_of
from dicomnode.record_shapes import FIELDS, MAY_BE_EMPTY, fault
from dicomnode.settings import Settings

STUDY_FIELDS = tuple(FIELDS["study"])
Values = Mapping[str, str]
"""Keyword -> corrected value; of :data:`dicomnode.record_shapes.MAY_BE_EMPTY` it may be decided that it is empty."""

CORRECTED_STUDIES = (
    "SELECT r.type, r.record_id, r.data, r.reported, st.id FROM records r INDEXED BY idx_records_corrected"
    " CROSS JOIN studies st ON st.StudyInstanceUID = r.record_id"
    " WHERE r.type = 'study' AND r.data <> r.reported LIMIT ?"
)
"""Of all studies that the node told of, the planner would look at each; the partial index has the corrected ones."""

MOST = 100_000
"""Corrections that are looked at; far beyond what people make."""


@dataclass(frozen=True, slots=True)
class Corrections:
    """By ``patients.id`` and ``studies.id``; only what differs from what was received."""

    patients: Mapping[int, Values] = field(default_factory=dict)
    studies: Mapping[int, Values] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.patients or self.studies)

    def of(self, keyword: str) -> tuple[str, list[int]] | None:
        """Which rows have another value for a keyword: ``p`` or ``st``, and their ids; None when there is none."""
        for alias, rows in (("p", self.patients), ("st", self.studies)):
            ids = [row for row, values in rows.items() if keyword in values]
            if ids:
                return alias, ids
        return None

    def values(self, patient: int | None, study: int | None) -> dict[str, str]:
        found = dict(self.patients.get(patient, {})) if patient is not None else {}
        return {**found, **self.studies.get(study, {})} if study is not None else found


NONE = Corrections()


@dataclass(frozen=True, slots=True)
class Corrected:
    """For new results of one study: keyword -> value, and when the last of the corrections was made (ISO 8601)."""

    values: Values
    changed_time: str


def read_corrections(db: Database) -> Corrections:
    """All of the index; a few statements that cost what there is to correct."""
    disputed = _disputed(db)
    patients: dict[int, Values] = {}
    for row in _patient_records(db):
        patient = patient_of(db, row["original"], row["issuer"])
        values = _differing(row, patient, PATIENT_KEYS, disputed) if patient else {}
        if patient and values:
            patients[int(patient["id"])] = values
    studies = {
        int(row["id"]): values
        for row in _study_records(db)
        if (values := _differing(row, json.loads(row["reported"]), STUDY_FIELDS, disputed))
    }
    return Corrections(patients, studies) if patients or studies else NONE


def serving_corrections(settings: Settings, db: Database) -> Corrections:
    """What queries show: nothing where the site has not asked for it."""
    return read_corrections(db) if settings.sync.apply_corrections else NONE


def corrected_study(db: Database, sop_instance_uid: str) -> Corrected | None:
    """What a new result of the study that an instance belongs to has to say otherwise than the instance; or None."""
    found = db.row(
        "SELECT p.id AS patient, st.id AS study, p.PatientID, p.IssuerOfPatientID, st.StudyInstanceUID"
        " FROM instances i JOIN series se ON se.id = i.series_id JOIN studies st ON st.id = se.study_id"
        " JOIN patients p ON p.id = st.patient_id WHERE i.SOPInstanceUID = ?",
        (sop_instance_uid,),
    )
    values = read_corrections(db).values(found["patient"], found["study"]) if found else {}
    if found is None or not values:
        return None
    number, issuer = str(found["PatientID"]), str(found["IssuerOfPatientID"] or "")
    rows = db.rows(
        "SELECT r.changed_time FROM records r WHERE (r.type = 'study' AND r.record_id = ?1) OR (r.type = 'patient'"
        " AND r.record_id IN (SELECT pseudonym FROM pseudonyms WHERE kind = 'patient' AND original = ?2"
        " AND coalesce(issuer, ?3) = ?3))",
        (found["StudyInstanceUID"], f"{number}^{issuer}" if issuer else number, issuer),
    )
    # What came from outside may be no time at all; then it is that at which it is applied.
    times = [when for row in rows if (when := moment(str(row["changed_time"]))) is not None]
    return Corrected(values, iso(max(times, default=db.clock.wall())))


def _disputed(db: Database) -> Mapping[tuple[str, str], frozenset[str]]:
    rows = db.rows("SELECT type, record_id, fields FROM record_conflicts WHERE state = 'open'")
    found: dict[tuple[str, str], frozenset[str]] = {}
    for row in rows:
        one = (str(row["type"]), str(row["record_id"]))
        found[one] = found.get(one, frozenset()) | frozenset(json.loads(row["fields"]))
    return found


def _patient_records(db: Database) -> list[dict[str, Any]]:
    return db.rows(
        "SELECT r.type, r.record_id, r.data, s.original, s.issuer FROM records r JOIN pseudonyms s"
        " ON s.pseudonym = r.record_id AND s.kind = 'patient' WHERE r.type = 'patient' LIMIT ?",
        (MOST,),
    )


def _study_records(db: Database) -> list[dict[str, Any]]:
    return db.rows(CORRECTED_STUDIES, (MOST,))


def _differing(
    record: Mapping[str, Any],
    received: Mapping[str, Any],
    keywords: Iterable[str],
    disputed: Mapping[tuple[str, str], frozenset[str]],
) -> Values:
    """What a record says that was not received so. One that is not as it has to be corrects nothing.

    An empty text says that there is no value, null says nothing, as a field that is not there.
    """
    kind, name = str(record["type"]), str(record["record_id"])
    data = json.loads(record["data"])
    waiting = disputed.get((kind, name), frozenset())
    said = {k: str(data[k]).strip() for k in keywords if data.get(k) is not None and k not in waiting}
    told = {k: v for k, v in said.items() if v or k in MAY_BE_EMPTY[kind]}
    values = {k: v for k, v in told.items() if v != str(received.get(k) or "").strip()}
    return {} if values and fault(kind, name, values) else values
