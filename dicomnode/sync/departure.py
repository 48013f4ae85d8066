"""What leaves in place of what is stored: as it is where every rule says so, else de-identified."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dicomnode.burned_in import Shows
from dicomnode.cloud_settings import pictures_of
from dicomnode.deidentify import PATIENT_TYPES, Departure, deidentify_record
from dicomnode.errors import MalformedDataSet
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import ServingRules
from dicomnode.index.known_names import known_names
from dicomnode.index.mapping import PseudonymRows
from dicomnode.index.record_reviews import is_pseudonym
from dicomnode.metrics_cloud import DEPARTED
from dicomnode.pseudonym_key import ensure_key
from dicomnode.pseudonyms import Pseudonyms
from dicomnode.settings import Settings
from dicomnode.sync.aside import leave

TakeAway = Callable[[Path, bytes, bool], Departure]
MOST_REMEMBERED = 20_000
_PATIENT = (
    "SELECT p.PatientID, p.IssuerOfPatientID, st.PatientName, p.PatientBirthDate, st.AccessionNumber, st.StudyID,"
    " st.ReferringPhysicianName, st.StudyInstanceUID FROM studies st"
    " JOIN patients p ON p.id = st.patient_id WHERE st.id = ?"
)


_UIDS = (
    "SELECT se.SeriesInstanceUID AS uid FROM series se WHERE se.study_id = ?1"
    " UNION SELECT i.SOPInstanceUID FROM instances i JOIN series se ON se.id = i.series_id WHERE se.study_id = ?1"
)


class Departures:
    """One per node, used by several threads; the key is read once."""

    def __init__(self, settings: Settings, db: Database, take_away: TakeAway = leave) -> None:
        """``take_away`` de-identifies one file, here or in another process."""
        self._settings = settings
        self._db = db
        self._rows = PseudonymRows(db)
        self._rules = ServingRules(settings, db, tell=False)
        self._pseudonyms: Pseudonyms | None = None
        self._key = b""
        self._told_apart = False
        self._leave = take_away
        self._new: dict[tuple[str, str], str] = {}
        self._kept: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._keeping = threading.Lock()

    def ready(self) -> None:
        """Raises OperatorError when there is no usable key; then nothing leaves."""
        with self._lock:
            if self._pseudonyms is None:
                self._key = ensure_key(self._settings, used=self._rows.used)
                self._pseudonyms = Pseudonyms(self._key)
            codec = self._pseudonyms
        if not self._told_apart:
            self._rows.tell_apart(codec)  # not under _lock: as in keep
            self._told_apart = True

    def object(self, item: Row, path: Path) -> tuple[str, bytes | None]:
        if self._identified(item):
            DEPARTED.labels("object", "kept").inc()
            return str(item["SOPInstanceUID"]), None
        self.ready()
        plain = item["shows"] == Shows.primary and Shows.primary in pictures_of(self._settings.cloud)
        try:
            left = self._leave(path, self._key, plain)
        except MalformedDataSet:
            DEPARTED.labels("object", "withheld").inc()
            raise
        DEPARTED.labels("object", "removed").inc()
        self._note(left.mapping)
        return left.sop_instance_uid, left.content

    def record(self, item: Row) -> Mapping[str, Any]:
        data = json.loads(item["data"])
        patient = self._db.row(_PATIENT, (item["study_id"],)) if item["study_id"] is not None else None
        name, study = str(item["record_id"]), str(patient["StudyInstanceUID"]) if patient else None
        if not self._identified(item) and (patient is not None or item["type"] in PATIENT_TYPES):
            codec = self._codec()
            known = {k: str(v or "") for k, v in (patient or {}).items()}
            known |= self._corrected(known, codec) if known else {}
            uids = {known.get("StudyInstanceUID", "")}
            if patient is not None:
                uids |= {str(r["uid"]) for r in self._db.rows(_UIDS, (item["study_id"],))}
            data, mapping = deidentify_record(item["type"], data, known, codec, uids)
            self._note(mapping)
            name = self._name(item["type"], name)
            study = codec.uid(study) if study else None
        return {
            "idempotency_key": item["idempotency_key"],
            "type": item["type"],
            "id": name,
            "version": item["version"],
            "base_version": item["base_version"],
            "base_key": item["base_key"],
            "settles": json.loads(item["settles"] or "[]"),
            "changed_time": item["changed_time"],
            "study": study,
            "data": data,
        }

    def _identified(self, item: Row) -> bool:
        """Whether it leaves with patient identity: it was allowed when it was made, and it is allowed now.

        A permission that was taken back since, or whose rule is gone, holds for nothing that has not left.
        """
        if not item["identified"]:
            return False
        if item["type"] == "patient":
            return self._settings.sync.patients_identity == "kept"
        names = json.loads(self._db.value("SELECT rules FROM jobs WHERE id = ?", (item["job_id"],)) or "[]")
        kept = {rule.name for rule in self._rules() if rule.cloud_identity == "kept"}
        return bool(names) and kept.issuperset(names)

    def _corrected(self, known: Mapping[str, str], codec: Pseudonyms) -> dict[str, str]:
        """By what else patient and study are known since a correction: people write that in a text, too."""
        whose = codec.patient(known["PatientID"], known["IssuerOfPatientID"])
        names = known_names(self._db, "patient", whose) | known_names(self._db, "study", known["StudyInstanceUID"])
        return {f"corrected {n}": name for n, name in enumerate(sorted(names))}

    def _name(self, kind: str, name: str) -> str:
        """A patient's record is known by a pseudonym at home, too; a review goes by the name of its result.

        What is no pseudonym may be a Patient ID: one leaves in its place.
        """
        codec = self._codec()
        if kind == "patient":
            return name if is_pseudonym(self._db, name) else codec.patient(name)
        kind = "ai-result" if kind == "result-review" else kind
        left = codec.uid(name) if kind == "study" else codec.record(kind, name)
        self._note({(kind, left): name})
        return left

    def keep(self) -> None:
        with self._keeping:  # whose rows another thread is committing waits here: nothing leaves before its rows
            with self._lock:
                new, self._new = self._new, {}
            if not new:
                return
            try:
                # Not under _lock: who has the index's turn may be about to note something.
                self._rows.keep(new, self._pseudonyms)
            except BaseException:
                with self._lock:
                    self._new = {**new, **self._new}
                raise
            with self._lock:
                if len(self._kept) > MOST_REMEMBERED:
                    self._kept.clear()
                self._kept |= new.keys()

    def _note(self, mapping: Mapping[tuple[str, str], str]) -> None:
        with self._lock:
            self._new |= {k: v for k, v in mapping.items() if k not in self._kept}

    def _codec(self) -> Pseudonyms:
        self.ready()
        assert self._pseudonyms is not None
        return self._pseudonyms
