"""What is stored: associations, patients, studies, series, instances.

:meth:`Catalogue.commit` is the step after which a C-STORE may be answered with success.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import apsw

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row
from dicomnode.index.keys import (
    INSTANCE_KEYS,
    PATIENT_KEYS,
    REQUEST_KEYS,
    REQUEST_SEQUENCE,
    SERIES_KEYS,
    STUDY_KEYS,
)
from dicomnode.index.names import name_keys


@dataclass(frozen=True, slots=True)
class NewInstance:
    """A received object whose file is already durable.

    ``attributes`` maps DICOM keywords to decoded text. ``file`` is the store's relative
    name, ``dataset_sha256`` is over the data set as received, ``sha256`` over it and
    then the file meta information (:func:`dicomnode.durable.sha256_object`).
    ``origin`` is ``received`` or ``result``. ``received_at`` is node time just before it was
    acknowledged, where that came before the commit; else 0. Of two objects with one UID the
    later one serves, whichever is committed first.
    """

    attributes: Mapping[str, str]
    transfer_syntax_uid: str
    file: str
    size: int
    sha256: str
    dataset_sha256: str
    association_id: str = ""
    origin: str = "received"
    received_at: float = 0.0


class Stored(StrEnum):
    """What became of a new instance."""

    added = "added"
    duplicate = "duplicate"  # identical bytes were here already; the new file is not needed
    replaced = "replaced"  # same UID, other bytes: the newest serves, the former file is kept
    former = "former"  # same UID, other bytes, but what serves was received later: this file is kept as a former one


MAX_KNOWN = 4096
"""Series whose ids a process remembers."""
MAX_REQUESTS = 64
"""Items of Request Attributes Sequence that are kept of one series."""

_COLUMNS = (
    "series_id",
    *INSTANCE_KEYS,
    "TransferSyntaxUID",
    "attributes",
    "file",
    "size",
    "sha256",
    "dataset_sha256",
    "association_id",
    "received_at",
    "received_time",
)
_INSERT = (
    f"INSERT INTO instances ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
    " ON CONFLICT(SOPInstanceUID) DO NOTHING"
)
_REPLACE = f"UPDATE instances SET {', '.join(f'{column} = ?' for column in _COLUMNS)} WHERE id = ?"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class _Series:
    """A row of ``series``; ``requests`` are the texts of its Request Attributes Sequence that were looked at."""

    id: int
    requests: set[str]


@dataclass(slots=True)
class _Adding:
    """What one transaction has done so far; rows that count are updated once, at its end."""

    now: float
    moment: str
    remembered: Mapping[str, _Series]
    series: dict[str, _Series] = field(default_factory=dict)
    received: Counter[tuple[int, str]] = field(default_factory=Counter)
    associations: Counter[str] = field(default_factory=Counter)


def _storable(new: NewInstance) -> NewInstance:
    """Lone surrogates, which a sender's character set can make, are no text for SQLite: U+003F for them."""
    odd = {key: text for key, text in new.attributes.items() if not text.isascii()}
    clean = {key: text.encode("utf-8", "replace").decode() for key, text in odd.items()}
    return new if clean == odd else replace(new, attributes={**new.attributes, **clean})


class _Stale(Exception):
    """A remembered series is not there any more."""


class Catalogue:
    """Thread-safe. Ids of series are remembered, since a thousand instances of one come in a row."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._remembered: dict[str, _Series] = {}

    def commit(self, batch: Sequence[NewInstance], *, sync: bool = True) -> list[Stored]:
        """Commit instances in one transaction; outcome in the same order.

        Without ``sync`` the rows are visible but not durable yet: something else must hold the
        objects until a later transaction is (:mod:`dicomnode.receive.journal`).
        """
        try:
            return self._commit(batch, sync, self._remembered)
        except (_Stale, apsw.ConstraintError):
            self._remembered.clear()
            return self._commit(batch, sync, {})

    def _commit(self, batch: Sequence[NewInstance], sync: bool, remembered: Mapping[str, _Series]) -> list[Stored]:
        with self.db.transaction(sync=sync):
            adding = self._begin(remembered)
            outcomes = [self._add(instance, adding) for instance in batch]
            self._settle(adding)
        if len(self._remembered) > MAX_KNOWN:
            self._remembered.clear()
        self._remembered.update(adding.series)  # what was rolled back is never remembered
        return outcomes

    def add(self, new: NewInstance) -> Stored:
        """Add one instance inside a running transaction."""
        adding = self._begin({})
        outcome = self._add(new, adding)
        self._settle(adding)
        return outcome

    def _begin(self, remembered: Mapping[str, _Series]) -> _Adding:
        return _Adding(self.db.clock.ticks(), iso(self.db.clock.wall()), remembered)

    def _add(self, new: NewInstance, adding: _Adding) -> Stored:
        new = _storable(new)
        attributes = new.attributes
        series = self._series(new, adding)
        value = attributes.get
        row = (
            series.id,
            *[value(key, "") for key in INSTANCE_KEYS],
            new.transfer_syntax_uid,
            _encode(attributes),
            new.file,
            new.size,
            new.sha256,
            new.dataset_sha256,
            new.association_id,
            new.received_at or adding.now,
            adding.moment,
        )
        outcome = Stored.added if self.db.execute(_INSERT, row) == 1 else self._replace(new, row, adding)
        if outcome in (Stored.duplicate, Stored.former):
            return outcome
        if new.origin == "received":
            adding.received[series.id, attributes["SeriesInstanceUID"]] += 1
        if new.association_id:
            adding.associations[new.association_id] += 1
        return outcome

    def _replace(self, new: NewInstance, row: Sequence[Any], adding: _Adding) -> Stored:
        """Put other bytes in the place of a known instance, unless they are the same or were received before it."""
        db, uid = self.db, new.attributes["SOPInstanceUID"]
        known = db.row(
            "SELECT id, series_id, file, sha256, dataset_sha256, TransferSyntaxUID, association_id, received_at"
            " FROM instances WHERE SOPInstanceUID = ?",
            (uid,),
        )
        if known is None:
            raise _Stale
        received = new.received_at or adding.now
        if (known["dataset_sha256"], known["TransferSyntaxUID"]) == (new.dataset_sha256, new.transfer_syntax_uid):
            # It was acknowledged again: what came in between must not take its place when a journal is replayed.
            db.execute("UPDATE instances SET received_at = max(received_at, ?) WHERE id = ?", (received, known["id"]))
            return Stored.duplicate
        if known["received_at"] > received:
            theirs = (new.transfer_syntax_uid, new.file, new.sha256, known["sha256"], new.association_id)
            self._keep_former(uid, theirs, adding)
            return Stored.former
        former = (known["TransferSyntaxUID"], known["file"], known["sha256"], new.sha256, known["association_id"])
        self._keep_former(uid, former, adding)
        db.execute(_REPLACE, (*row, known["id"]))
        if known["series_id"] != row[0]:  # it moved: its former series has changed too
            db.execute("UPDATE series SET generation = generation + 1 WHERE id = ?", (known["series_id"],))
        return Stored.replaced

    def _keep_former(self, uid: str, values: tuple[str, ...], adding: _Adding) -> None:
        names = ("TransferSyntaxUID", "file", "sha256", "replaced_by_sha256", "association_id")
        row = {"SOPInstanceUID": uid, **dict(zip(names, values, strict=True)), "replaced_time": adding.moment}
        self.db.insert("former_instances", row)

    def _settle(self, adding: _Adding) -> None:
        """Count what came, by series and association. Raises _Stale when a remembered series is gone."""
        for (series_id, uid), count in adding.received.items():
            changed = self.db.execute(
                "UPDATE series SET generation = generation + ?, last_received_at = ?"
                " WHERE id = ? AND SeriesInstanceUID = ?",
                (count, adding.now, series_id, uid),
            )
            if not changed:
                raise _Stale
        for association_id, count in adding.associations.items():
            self.db.execute("UPDATE associations SET instances = instances + ? WHERE id = ?", (count, association_id))

    def _series(self, new: NewInstance, adding: _Adding) -> _Series:
        """The series of an instance, made with its study and patient where it is new."""
        uid = new.attributes["SeriesInstanceUID"]
        series = adding.series.get(uid) or adding.remembered.get(uid)
        if series is None:
            known = self.db.value("SELECT id FROM series WHERE SeriesInstanceUID = ?", (uid,))
            series = _Series(int(known) if known is not None else self._make_series(new, adding), set())
            adding.series[uid] = series
        requests = new.attributes.get(REQUEST_SEQUENCE, "")
        if requests and requests not in series.requests:
            self._keep_requests(series.id, requests)
            adding.series[uid] = _Series(series.id, {*series.requests, requests})
        return adding.series.get(uid, series)

    def _make_series(self, new: NewInstance, adding: _Adding) -> int:
        db, attributes = self.db, new.attributes
        study_id = db.value("SELECT id FROM studies WHERE StudyInstanceUID = ?", (attributes["StudyInstanceUID"],))
        if study_id is None:
            study_id = self._make_study(attributes, adding)
        return db.insert(
            "series",
            {
                "study_id": int(study_id),
                **{k: attributes.get(k, "") for k in SERIES_KEYS},
                "origin": new.origin,
                "last_received_at": adding.now,
                "received_time": adding.moment,
            },
        )

    def _make_study(self, attributes: Mapping[str, str], adding: _Adding) -> int:
        db = self.db
        patient = {k: attributes.get(k, "") for k in PATIENT_KEYS}
        patient_id = db.value(
            "SELECT id FROM patients WHERE PatientID = ? AND IssuerOfPatientID = ?",
            (patient["PatientID"], patient["IssuerOfPatientID"]),
        )
        if patient_id is None:
            patient_id = db.insert("patients", patient)
            self._keep_name("patient", patient_id, patient["PatientName"])
        study_id = db.insert(
            "studies",
            {
                "patient_id": int(patient_id),
                **{k: attributes.get(k, "") for k in STUDY_KEYS},
                "PatientName": patient["PatientName"],
                "received_time": adding.moment,
            },
        )
        self._keep_name("study", study_id, patient["PatientName"])
        return study_id

    def _keep_name(self, owner: Literal["patient", "study"], owner_id: int, name: str) -> None:
        for form, key in name_keys(name):
            self.db.insert(f"{owner}_names", {"form": form.value, "key": key, f"{owner}_id": owner_id})

    def _keep_requests(self, series_id: int, text: str) -> None:
        """Add the items of a Request Attributes Sequence that the series does not have yet."""
        names = ", ".join(REQUEST_KEYS)
        held = self.db.rows(f"SELECT {names} FROM series_requests WHERE series_id = ?", (series_id,))
        for item in json.loads(text):
            row = {key: item.get(key, "") for key in REQUEST_KEYS}
            if any(row.values()) and row not in held and len(held) < MAX_REQUESTS:
                held.append(row)
                self.db.insert("series_requests", {"series_id": series_id, **row})

    def instance(self, sop_instance_uid: str) -> Row | None:
        return self.db.row("SELECT * FROM instances WHERE SOPInstanceUID = ?", (sop_instance_uid,))

    def series_instances(self, series_id: int) -> list[Row]:
        return self.db.rows("SELECT * FROM instances WHERE series_id = ? ORDER BY id", (series_id,))

    def instances_after(self, series_id: int, last_id: int, limit: int) -> list[Row]:
        """Instances of a series that got their row after the one with ``last_id``, in that order."""
        return self.db.rows(
            "SELECT id, SOPInstanceUID, file, size, sha256 FROM instances WHERE series_id = ? AND id > ?"
            " ORDER BY id LIMIT ?",
            (series_id, last_id, limit),
        )

    def first_attributes(self, series_id: int) -> dict[str, str]:
        """All attributes of the instance that arrived first, by keyword."""
        text = self.db.value(
            "SELECT attributes FROM instances WHERE id = (SELECT min(id) FROM instances WHERE series_id = ?)",
            (series_id,),
        )
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
        sql = "SELECT file FROM {} WHERE substr(file, 1, 2) = substr(?1, 1, 2) AND file >= ?1 AND file < ?2"
        bounds = (f"{folder}/", f"{folder}0")  # "0" follows "/" in ASCII
        return {
            str(row["file"])
            for table in ("instances", "former_instances", "results")
            for row in self.db.rows(sql.format(table), bounds)
        }

    def file_of(self, sop_instance_uid: str) -> str:
        """Relative name of the file that serves an instance; empty when it is not held."""
        return str(self.db.value("SELECT file FROM instances WHERE SOPInstanceUID = ?", (sop_instance_uid,)) or "")

    def mend_file(self, sop_instance_uid: str, *, file: str, size: int, sha256: str) -> None:
        """Another file with the same data set serves an instance from now on."""
        with self.db.transaction():
            self.db.execute(
                "UPDATE instances SET file = ?, size = ?, sha256 = ? WHERE SOPInstanceUID = ?",
                (file, size, sha256, sop_instance_uid),
            )

    def hash_of(self, sop_instance_uid: str) -> str:
        return str(self.db.value("SELECT sha256 FROM instances WHERE SOPInstanceUID = ?", (sop_instance_uid,)) or "")

    def holding(self, sop_instance_uid: str, sha256: str) -> list[str]:
        """The files of an instance with just this hash: the one that serves, and former ones."""
        return [
            str(row["file"])
            for table in ("instances", "former_instances")
            for row in self.db.rows(
                f"SELECT file FROM {table} WHERE SOPInstanceUID = ? AND sha256 = ?", (sop_instance_uid, sha256)
            )
        ]

    def received_at(self, sop_instance_uid: str) -> float:
        """Node time at which what serves was acknowledged last; 0 when nothing serves."""
        sql = "SELECT received_at FROM instances WHERE SOPInstanceUID = ?"
        return float(self.db.value(sql, (sop_instance_uid,)) or 0.0)

    # Associations: evidence for completeness. After a power cut a lost row means a lost association.

    def association_opened(self, *, association_id: str, receiver: str, peer: str, ae: str, address: str) -> None:
        with self.db.transaction(sync=False):
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
        with self.db.transaction(sync=False):
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
