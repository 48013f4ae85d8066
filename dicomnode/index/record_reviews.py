"""Records and their conflicts as people see, change and decide them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dicomnode.clock import iso
from dicomnode.cloud_settings import CloudPlan
from dicomnode.conflicts import empty
from dicomnode.errors import OperatorError
from dicomnode.index.cloud_rows import PATIENT_KEYS, put_record
from dicomnode.index.database import Database, Row
from dicomnode.index.mapping import patient_of
from dicomnode.index.operation import Events
from dicomnode.record_shapes import FIELDS, MAY_BE_EMPTY, fault

Take = Literal["cloud", "edge", "merged"]
TAKES: tuple[Take, ...] = ("cloud", "edge", "merged")
_LISTED = (
    "id, type, record_id, strategy, outcome, why, fields, edge_version, edge_time, cloud_version, cloud_time,"
    " cloud_node, state, decided_as, decided_by, created_time, decided_time"
)
_SIDES = ("edge_data", "cloud_data", "common_data")
_SEE = "See 'dicomnode records list'"
_OWNER = {"result-review": "ai-result"}
"""Type -> type of the record without which there is nothing to say."""


class Reviews:
    """Over one index; what is decided or changed goes out by ``plan``."""

    def __init__(self, db: Database, plan: CloudPlan) -> None:
        self.db = db
        self.plan = plan

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        """Newest first: names of the fields that differ, no values."""
        rows = self.db.rows(
            f"SELECT {_LISTED} FROM record_conflicts WHERE ?1 IS NULL OR state = ?1 ORDER BY id DESC LIMIT ?2",
            (state, limit),
        )
        return [{**row, "fields": json.loads(row["fields"])} for row in rows]

    def show(self, conflict: int) -> Row:
        """With both sides, what they had in common, and what serves now: patients' data."""
        row = self._row(conflict)
        found = {k: v for k, v in row.items() if k not in ("keys", "created_at", *_SIDES)}
        served = self.record(row["type"], row["record_id"])
        sides = {k: json.loads(row[k]) if row[k] else None for k in _SIDES}
        return {**found, "fields": json.loads(row["fields"]), **sides, "serves": served["data"]}

    def decide(self, conflict: int, take: Take, data: Mapping[str, Any] | None = None, *, who: str) -> Row:
        """One of the sides, or ``data`` with ``merged``, serves from now on and goes to the cloud.

        Raises OperatorError when there is no such review, or it was decided.
        """
        db = self.db
        if take not in TAKES or (take == "merged") != (data is not None):
            raise OperatorError(
                "decide conflict", "data goes with 'merged', and only with it", "Take cloud, edge or merged"
            )
        with db.transaction():
            row = self._row(conflict)
            if row["state"] != "open":
                cause = f"it was decided by {row['decided_by']} ({row['decided_as']})"
                raise OperatorError("decide conflict", cause, "See 'dicomnode conflicts show'")
            kind, name = row["type"], row["record_id"]
            serves = self.record(kind, name)["data"]
            chosen = {"edge": json.loads(row["edge_data"]), "cloud": serves, "merged": dict(data or {})}[take]
            wrong = fault(kind, name, chosen, json.loads(row["edge_data"]))
            if wrong:
                raise OperatorError("decide conflict", wrong, "Give the whole value as JSON")
            version = put_record(
                db, self.plan, kind, name, chosen, reported=False, settles=json.loads(row["keys"]),
                **origin_of(db, kind, name),
            )  # fmt: skip
            close(db, conflict, take, who)
        Events(db).add("info", "conflict-decided", f"conflict {conflict}", f"{take} by {who}")
        return {"id": conflict, "type": kind, "record_id": name, "take": take, "version": version or None}

    def records(self, limit: int = 100, kind: str | None = None) -> list[Row]:
        """Names and versions, no values."""
        return self.db.rows(
            "SELECT type, record_id, version, common_version, changed_time FROM records WHERE ?1 IS NULL OR type = ?1"
            " ORDER BY changed_time DESC LIMIT ?2",
            (kind, limit),
        )

    def refused(self, limit: int = 100) -> list[Row]:
        """Records of the cloud that were not taken and why, the newest first; no values.

        One that was changed at the cloud since, and taken, is not among them. ``seq``: its place in the cloud's
        feed, 0 where it was looked at later; names are empty where they could not be read.
        """
        return self.db.rows(
            "SELECT seq, type, cloud_id, why, time FROM refused_records r WHERE NOT EXISTS"
            " (SELECT 1 FROM cloud_records c WHERE c.type = r.type AND c.cloud_id = r.cloud_id"
            " AND c.state = 'taken' AND c.seq > r.seq)"
            " ORDER BY time DESC, seq DESC LIMIT ?",
            (limit,),
        )

    def record(self, kind: str, name: str) -> Row:
        """Raises OperatorError when there is none."""
        row = self.db.row(
            "SELECT type, record_id, version, common_version, changed_time, data FROM records"
            " WHERE type = ? AND record_id = ?",
            (kind, name),
        )
        if row is None:
            raise OperatorError("show record", f"there is no record of type {kind} with this id", _SEE)
        return {**row, "data": json.loads(row["data"])}

    def change(
        self,
        kind: str,
        name: str,
        changes: Mapping[str, Any],
        *,
        begin: Mapping[str, Any] | None = None,
        identified: bool = False,
        blank: Collection[str] = (),
    ) -> int:
        """Set fields of a record of people; an empty value takes a field away. The version, 0 when nothing changed.

        ``begin``: content of a record that does not exist yet. ``blank``: fields that have no value from now on,
        whatever was received. Raises OperatorError for what must not be.
        """
        db, operation = self.db, "change record"
        if kind not in FIELDS:
            raise OperatorError(operation, "people do not change records of this type", f"Types: {', '.join(FIELDS)}")
        may = MAY_BE_EMPTY.get(kind, frozenset())
        if not may.issuperset(blank):
            hint = f"Fields of {kind} that may: {', '.join(sorted(may)) or 'none'}"
            raise OperatorError(operation, "a field must not be empty", hint)
        unknown = sorted(changes.keys() - FIELDS[kind].keys())
        if unknown:
            raise OperatorError(operation, "a field is unknown", f"Fields of {kind}: {', '.join(FIELDS[kind])}")
        with db.transaction():
            held = db.value("SELECT data FROM records WHERE type = ? AND record_id = ?", (kind, name))
            owner = _OWNER.get(kind, kind if kind == "study" else None)
            if owner and db.row("SELECT 1 AS one FROM records WHERE type = ? AND record_id = ?", (owner, name)) is None:
                raise OperatorError(operation, f"there is no record of type {owner} with this id", _SEE)
            if kind == "patient" and not is_pseudonym(db, name):
                hint = "Name the patient by the pseudonym that 'dicomnode records set patient PATIENTID ...' tells"
                raise OperatorError(operation, "no patient is known by this pseudonym", hint)
            known = json.loads(held) if held is not None else begin or {}
            data = {**known, **changes}
            data = {k: v for k, v in data.items() if k not in changes or not empty(v)} | dict.fromkeys(blank, "")
            wrong = fault(kind, name, data, known)
            if wrong:
                raise OperatorError(operation, wrong, "Give another value")
            origin = origin_of(db, kind, name)
            if kind == "patient":
                origin["identified"] = int(identified)
            return put_record(db, self.plan, kind, name, data, reported=False, **origin)

    def counts(self) -> dict[str, int]:
        """Open reviews by type of record."""
        rows = self.db.rows("SELECT type, count(*) AS n FROM record_conflicts WHERE state = 'open' GROUP BY type")
        return {str(r["type"]): int(r["n"]) for r in rows}

    def oldest_seconds(self) -> float:
        """Age of the oldest open review; 0 without any."""
        first = self.db.value("SELECT min(created_at) FROM record_conflicts WHERE state = 'open'")
        return 0.0 if first is None else max(0.0, self.db.clock.ticks() - float(first))

    def decided(self) -> dict[str, int]:
        """Conflicts that were decided, by how."""
        rows = self.db.rows(
            "SELECT decided_as, count(*) AS n FROM record_conflicts WHERE state = 'decided' GROUP BY decided_as"
        )
        return {str(r["decided_as"]): int(r["n"]) for r in rows}

    def _row(self, conflict: int) -> Row:
        row = self.db.row("SELECT * FROM record_conflicts WHERE id = ?", (conflict,))
        if row is None:
            raise OperatorError("show conflict", f"there is no conflict {conflict}", "See 'dicomnode conflicts list'")
        return row


def serving(db: Database, kind: str, name: str) -> dict[str, Any]:
    """Content of a record, empty without one."""
    text = db.value("SELECT data FROM records WHERE type = ? AND record_id = ?", (kind, name))
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def demographics(db: Database, name: str, issuer: str) -> dict[str, Any]:
    """What the index holds of a patient, by Patient ID and issuer, or by its pseudonym.

    Raises OperatorError for one that never was here.
    """
    row = db.row(
        f"SELECT {', '.join(PATIENT_KEYS)} FROM patients WHERE PatientID = ? AND coalesce(IssuerOfPatientID, '') = ?",
        (name, issuer),
    )
    if row is None:
        told = db.row("SELECT original, issuer FROM pseudonyms WHERE kind = 'patient' AND pseudonym = ?", (name,))
        row = patient_of(db, told["original"], told["issuer"]) if told else None
    if row is None:
        raise OperatorError("change record", "there is no such patient in the index", "Check the ID and its issuer")
    return {k: row[k] for k in PATIENT_KEYS if row[k]}


def is_pseudonym(db: Database, name: str) -> bool:
    """Whether a patient is known by it: a Patient ID must not become the name of a record, for that leaves."""
    return db.row("SELECT 1 AS one FROM pseudonyms WHERE pseudonym = ? AND kind = 'patient'", (name,)) is not None


def origin_of(db: Database, kind: str, name: str) -> dict[str, Any]:
    """Job, study and identity of what was sent last, for what follows; a review has its result's."""
    for one in dict.fromkeys((kind, "ai-result" if kind == "result-review" else kind)):
        found = db.row(
            "SELECT job_id, study_id, identified FROM sync_items WHERE type = ? AND record_id = ?"
            " ORDER BY id DESC LIMIT 1",
            (one, name),
        )
        if found is not None:
            return found
    return {"job_id": None, "study_id": None, "identified": 0}


def close(db: Database, conflict: int, how: str, who: str) -> None:
    """Inside a transaction."""
    db.execute(
        "UPDATE record_conflicts SET state = 'decided', decided_as = ?, decided_by = ?, decided_time = ? WHERE id = ?",
        (how, who, iso(db.clock.wall()), conflict),
    )
