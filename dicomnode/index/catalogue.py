"""What is stored: associations, patients, studies, series, instances.

:meth:`Catalogue.commit` is the step after which a C-STORE may be answered with success.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row
from dicomnode.index.keys import INSTANCE_KEYS, PATIENT_KEYS, SERIES_KEYS, STUDY_KEYS


@dataclass(frozen=True, slots=True)
class NewInstance:
    """A received object whose file is already durable.

    ``attributes`` maps DICOM keywords to decoded text. ``file`` is the store's relative
    name, ``sha256`` is over the file, ``dataset_sha256`` over the data set as received.
    ``origin`` is ``received`` or ``result``.
    """

    attributes: Mapping[str, str]
    transfer_syntax_uid: str
    file: str
    size: int
    sha256: str
    dataset_sha256: str
    association_id: str = ""
    origin: str = "received"


class Stored(StrEnum):
    """What became of a new instance."""

    added = "added"
    duplicate = "duplicate"  # identical bytes were here already; the new file is not needed
    replaced = "replaced"  # same UID, other bytes: the newest serves, the former file is kept


class Catalogue:
    def __init__(self, db: Database) -> None:
        self.db = db

    def commit(self, batch: Sequence[NewInstance]) -> list[Stored]:
        """Commit instances in one durable transaction; outcome in the same order."""
        with self.db.transaction():
            return [self.add(instance) for instance in batch]

    def add(self, new: NewInstance) -> Stored:
        """Add one instance inside a running transaction."""
        db = self.db
        uid = new.attributes["SOPInstanceUID"]
        now, moment = db.clock.ticks(), iso(db.clock.wall())
        known = db.row(
            "SELECT id, series_id, file, sha256, dataset_sha256, TransferSyntaxUID, association_id FROM instances"
            " WHERE SOPInstanceUID = ?",
            (uid,),
        )
        if (
            known is not None
            and known["dataset_sha256"] == new.dataset_sha256
            and known["TransferSyntaxUID"] == new.transfer_syntax_uid
        ):
            return Stored.duplicate
        series_id = self._series(new, now, moment)
        row: Row = {
            "series_id": series_id,
            **{k: new.attributes.get(k, "") for k in INSTANCE_KEYS},
            "TransferSyntaxUID": new.transfer_syntax_uid,
            "attributes": json.dumps(dict(new.attributes), ensure_ascii=False, separators=(",", ":")),
            "file": new.file,
            "size": new.size,
            "sha256": new.sha256,
            "dataset_sha256": new.dataset_sha256,
            "association_id": new.association_id,
            "received_at": now,
            "received_time": moment,
        }
        if known is None:
            db.insert("instances", row)
        else:
            db.insert(
                "former_instances",
                {
                    "SOPInstanceUID": uid,
                    "TransferSyntaxUID": known["TransferSyntaxUID"],
                    "file": known["file"],
                    "sha256": known["sha256"],
                    "replaced_by_sha256": new.sha256,
                    "association_id": known["association_id"],
                    "replaced_time": moment,
                },
            )
            assignments = ", ".join(f'"{k}" = ?' for k in row)
            db.execute(f"UPDATE instances SET {assignments} WHERE id = ?", (*row.values(), known["id"]))
        if known is not None and known["series_id"] != series_id:  # it moved: its former series has changed too
            db.execute("UPDATE series SET generation = generation + 1 WHERE id = ?", (known["series_id"],))
        if new.origin == "received":
            db.execute(
                "UPDATE series SET generation = generation + 1, last_received_at = ? WHERE id = ?",
                (now, series_id),
            )
        if new.association_id:
            db.execute("UPDATE associations SET instances = instances + 1 WHERE id = ?", (new.association_id,))
        return Stored.added if known is None else Stored.replaced

    def _series(self, new: NewInstance, now: float, moment: str) -> int:
        """Find or make the patient, study and series of an instance; fill what was empty."""
        db, attributes = self.db, new.attributes
        series = db.row(
            "SELECT id, study_id FROM series WHERE SeriesInstanceUID = ?", (attributes["SeriesInstanceUID"],)
        )
        if series is not None:
            return int(series["id"])
        study = db.row("SELECT id FROM studies WHERE StudyInstanceUID = ?", (attributes["StudyInstanceUID"],))
        if study is None:
            patient_keys = {k: attributes.get(k, "") for k in PATIENT_KEYS}
            patient = db.row(
                "SELECT id FROM patients WHERE PatientID = ? AND IssuerOfPatientID = ?",
                (patient_keys["PatientID"], patient_keys["IssuerOfPatientID"]),
            )
            patient_id = int(patient["id"]) if patient else db.insert("patients", patient_keys)
            study_id = db.insert(
                "studies",
                {
                    "patient_id": patient_id,
                    **{k: attributes.get(k, "") for k in STUDY_KEYS},
                    "PatientName": patient_keys["PatientName"],
                    "received_time": moment,
                },
            )
        else:
            study_id = int(study["id"])
        return db.insert(
            "series",
            {
                "study_id": study_id,
                **{k: attributes.get(k, "") for k in SERIES_KEYS},
                "origin": new.origin,
                "last_received_at": now,
                "received_time": moment,
            },
        )

    def instance(self, sop_instance_uid: str) -> Row | None:
        return self.db.row("SELECT * FROM instances WHERE SOPInstanceUID = ?", (sop_instance_uid,))

    def series_instances(self, series_id: int) -> list[Row]:
        return self.db.rows("SELECT * FROM instances WHERE series_id = ? ORDER BY id", (series_id,))

    def first_attributes(self, series_id: int) -> dict[str, str]:
        """All attributes of the instance that arrived first, by keyword."""
        text = self.db.value("SELECT attributes FROM instances WHERE series_id = ? ORDER BY id LIMIT 1", (series_id,))
        found: dict[str, str] = json.loads(text) if text else {}
        return found

    def series_attributes(self, series_id: int) -> Row | None:
        """Study and series columns of one series, by DICOM keyword, and its ids."""
        return self.db.row(
            "SELECT p.PatientID, p.IssuerOfPatientID, p.PatientBirthDate, p.PatientSex, st.*, se.*,"
            " se.id AS series_id, st.id AS study_id"
            " FROM series se JOIN studies st ON st.id = se.study_id JOIN patients p ON p.id = st.patient_id"
            " WHERE se.id = ?",
            (series_id,),
        )

    def open_series(self) -> list[Row]:
        """Series that got instances since they were last selected."""
        return self.db.rows(
            "SELECT id, generation, selected_generation, last_received_at FROM series"
            " WHERE selected_generation < generation ORDER BY id"
        )

    def files_in(self, folder: str) -> set[str]:
        """Names (``folder/file``) in one folder of the object store that a row names."""
        bounds = (f"{folder}/", f"{folder}0")  # "0" follows "/" in ASCII
        return {
            str(row["file"])
            for table in ("instances", "former_instances", "results")
            for row in self.db.rows(f"SELECT file FROM {table} WHERE file >= ? AND file < ?", bounds)
        }

    # Associations: evidence for completeness.

    def association_opened(self, *, association_id: str, receiver: str, peer: str, ae: str, address: str) -> None:
        with self.db.transaction():
            self.db.insert(
                "associations",
                {
                    "id": association_id,
                    "receiver": receiver,
                    "peer": peer,
                    "calling_ae": ae,
                    "address": address,
                    "state": "open",
                    "opened_at": self.db.clock.ticks(),
                    "opened_time": iso(self.db.clock.wall()),
                },
            )

    def association_closed(self, association_id: str, state: str) -> None:
        """``state``: ``released``, ``aborted`` or ``lost``. Only an open one changes."""
        with self.db.transaction():
            self.db.execute(
                "UPDATE associations SET state = ?, closed_at = ? WHERE id = ? AND state = 'open'",
                (state, self.db.clock.ticks(), association_id),
            )

    def associations_lost(self, receiver: str) -> int:
        """A receiver starts anew: what its former self had open was cut."""
        with self.db.transaction():
            return self.db.execute(
                "UPDATE associations SET state = 'lost', closed_at = ? WHERE receiver = ? AND state = 'open'",
                (self.db.clock.ticks(), receiver),
            )

    def series_associations(self, series_id: int) -> list[Row]:
        """The associations that brought instances of a series: state, count, times."""
        return self.db.rows(
            "SELECT a.id, coalesce(a.state, 'lost') AS state, count(*) AS instances, a.closed_at"
            " FROM instances i LEFT JOIN associations a ON a.id = i.association_id"
            " WHERE i.series_id = ? GROUP BY i.association_id",
            (series_id,),
        )

    def counts(self) -> dict[str, Any]:
        return {
            table: int(self.db.value(f"SELECT count(*) FROM {table}"))
            for table in ("patients", "studies", "series", "instances")
        }
