"""An index with results to send, without any other stage; used by the tests of sync and admin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from dicomnode import durable
from dicomnode.cloud_settings import CloudPlan
from dicomnode.identity import derived_uid
from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Request, Result
from dicomnode.settings import Settings
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.sender import CloudSender

CANARY, CANARY_ID = "CANARY^PATIENT", "CANARY-ID"


@dataclass
class FakeClock:
    """Time that only tests move."""

    now: float = 1_000_000.0
    start: datetime = field(default_factory=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))

    def ticks(self) -> float:
        return self.now

    def wall(self) -> datetime:
        return self.start + timedelta(seconds=self.now - 1_000_000.0)


def make_settings(data_dir: Path, **sections: Any) -> Settings:
    """The rule of :func:`add_job` lets identity leave, for items that were allowed to; see :func:`as_they_are`."""
    node = {"node": {"data_dir": data_dir, "reserve_mb": 1}, "http": {"port": 0}}
    rule = {"name": "chest-ct", "models": ["ct-lung"], "cloud_identity": "kept"}
    return Settings(**{**node, "rules": [rule], **sections})


def secondary_capture(rows: int = 8) -> tuple[Dataset, bytes]:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = SecondaryCaptureImageStorage
    study, series, instance = (derived_uid("test", generate_uid()) for _ in range(3))  # 2.25, as the node's own are
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study, series, instance
    ds.PatientName, ds.PatientID, ds.Modality = CANARY, "CANARY-ID", "OT"
    ds.ConversionType, ds.StudyDate, ds.StudyTime, ds.AccessionNumber = "WSD", "20260102", "030405", ""
    ds.ReferringPhysicianName, ds.StudyID, ds.PatientBirthDate, ds.PatientSex = "", "", "", ""
    ds.SeriesNumber, ds.InstanceNumber = 1, 1
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = rows, rows, 1, "MONOCHROME2"
    ds.BurnedInAnnotation, ds.BitsAllocated, ds.BitsStored = "NO", 8, 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = bytes(rows * rows)
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return ds, buffer.getvalue()


def new_instance(store: durable.ObjectStore, origin: str) -> NewInstance:
    ds, data = secondary_capture()
    name = store.new_name(ds.SeriesInstanceUID)
    store.stage(name, [data])
    digest = hashlib.sha256(data).hexdigest()
    keys = [
        "SOPInstanceUID",
        "SOPClassUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "PatientID",
        "PatientName",
        "Modality",
    ]
    return NewInstance(
        attributes={k: str(ds[k].value) for k in keys},
        transfer_syntax_uid=str(ExplicitVRLittleEndian),
        file=name,
        size=len(data),
        sha256=digest,
        dataset_sha256=digest,
        origin=origin,
    )


def add_job(db: Database, data_dir: Path, *, destinations: tuple[str, ...] = (), reason: str = "quiet") -> int:
    """A received instance and a waiting job on its series."""
    store = durable.ObjectStore(data_dir)
    store.prepare()
    source = new_instance(store, "received")
    Catalogue(db).commit([source])
    series = db.row(
        "SELECT id, generation FROM series WHERE SeriesInstanceUID = ?", (source.attributes["SeriesInstanceUID"],)
    )
    assert series is not None
    request = Request("ct-lung", ("chest-ct",), destinations, "routine")
    return Jobs(db).select(series["id"], series["generation"], reason, [request])[0]


TO_CLOUD = CloudPlan("cloud")


def add_results(
    db: Database,
    data_dir: Path,
    count: int = 1,
    *,
    cloud: CloudPlan = TO_CLOUD,
    destinations: tuple[str, ...] = (),
) -> list[str]:
    """A finished job with ``count`` results in the outboxes; their SOPInstanceUIDs."""
    job_id = add_job(db, data_dir, destinations=destinations)
    jobs, store = Jobs(db), durable.ObjectStore(data_dir)
    leased = jobs.lease("worker", 60.0)
    assert leased is not None
    results = [Result("SR", new_instance(store, "result")) for _ in range(count)]
    jobs.finish(job_id, "worker", Outcome(results), cloud=cloud)
    return [r.instance.attributes["SOPInstanceUID"] for r in results]


def add_objects(
    db: Database, data_dir: Path, objects: Sequence[tuple[str, bytes]], cloud: CloudPlan = TO_CLOUD
) -> None:
    """A finished job with these results, (kind, Part 10 file), in the outbox."""
    job_id = add_job(db, data_dir)
    store = durable.ObjectStore(data_dir)
    assert Jobs(db).lease("worker", 60.0) is not None
    results = []
    for kind, part10 in objects:
        ds = dcmread(BytesIO(part10), stop_before_pixels=True)
        name = store.new_name(str(ds.SeriesInstanceUID))
        store.stage(name, [part10])
        keys = ("SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality")
        attributes = {k: str(ds[k].value) for k in keys}
        digest = hashlib.sha256(part10).hexdigest()
        syntax = str(ds.file_meta.TransferSyntaxUID)
        new = NewInstance(attributes, syntax, name, len(part10), digest, digest, origin="result")
        results.append(Result(kind, new))
    Jobs(db).finish(job_id, "worker", Outcome(results), cloud=cloud)


def states(db: Database, table: str = "sync_items") -> list[str]:
    return [r["state"] for r in db.rows(f"SELECT state FROM {table} ORDER BY id")]


def sender_of(settings: Settings, db: Database) -> CloudSender:
    """As the sidecar has it."""
    return CloudSender(settings, db, Endpoints(settings, db), Departures(settings, db))


def as_they_are(db: Database) -> None:
    """What waits leaves with patient identity, as a rule with cloud_identity = "kept" has it."""
    if db.value("SELECT 1 FROM jobs LIMIT 1") is None:
        add_job(db, db.data_dir)
    made_by = "coalesce(job_id, (SELECT min(id) FROM jobs))"
    db._connection().execute(f"UPDATE sync_items SET identified = 1, job_id = {made_by}")
