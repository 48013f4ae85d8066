"""The schema as a list of recorded migrations (sqlite-utils). Never edit one that shipped.

Columns that hold DICOM attributes are named by keyword and hold the decoded text as in the
data set, multiple values joined by a backslash. ``*_at`` columns are node time in seconds
(:mod:`dicomnode.clock`), ``*_time`` columns are ISO 8601 for people.
"""

from __future__ import annotations

from typing import Any

from sqlite_utils import Database, Migrations

from dicomnode.index.keys import INSTANCE_KEYS, PATIENT_KEYS, REQUEST_KEYS, SERIES_KEYS, STUDY_KEYS
from dicomnode.index.names import name_keys
from dicomnode.index.schema_alerts import create_alerts
from dicomnode.index.schema_cloud import create_cloud_outbox, create_issuers
from dicomnode.index.schema_commitment import create_commitments
from dicomnode.index.schema_desired import create_desired
from dicomnode.index.schema_figures import create_figures
from dicomnode.index.schema_life import create_model_life, create_removals
from dicomnode.index.schema_priors import create_companions, create_priors
from dicomnode.index.schema_procedure import create_procedure_steps
from dicomnode.index.schema_records import create_corrected, create_records, create_refused
from dicomnode.index.schema_trust import create_trust

migrations: Any = Migrations("dicomnode")


def _text(keys: tuple[str, ...]) -> dict[str, Any]:
    return dict.fromkeys(keys, str)


@migrations()
def m0001_boots(db: Database) -> None:
    db["boots"].create({"boot_id": str, "base": float, "last_at": float}, pk="boot_id")


@migrations()
def m0002_catalogue(db: Database) -> None:
    db["associations"].create(
        {
            "id": str,
            "receiver": str,
            "peer": str,
            "calling_ae": str,
            "address": str,
            "state": str,
            "instances": int,
            "opened_at": float,
            "opened_time": str,
            "closed_at": float,
        },
        pk="id",
        not_null={"state"},
        defaults={"instances": 0},
    )
    db["associations"].create_index(["state"])
    db["patients"].create({"id": int, **_text(PATIENT_KEYS)}, pk="id", not_null={"PatientID"})
    db["patients"].create_index(["PatientID", "IssuerOfPatientID"], unique=True)
    db["patients"].create_index(["PatientName"])
    db["studies"].create(
        {"id": int, "patient_id": int, **_text(STUDY_KEYS), "PatientName": str, "received_time": str},
        pk="id",
        foreign_keys=[("patient_id", "patients", "id")],
        not_null={"StudyInstanceUID", "patient_id"},
    )
    db["studies"].create_index(["StudyInstanceUID"], unique=True)
    for key in ("patient_id", "StudyDate", "AccessionNumber"):
        db["studies"].create_index([key])
    db["series"].create(
        {
            "id": int,
            "study_id": int,
            **_text(SERIES_KEYS),
            "origin": str,
            "generation": int,
            "selected_generation": int,
            "selected_reason": str,
            "last_received_at": float,
            "received_time": str,
        },
        pk="id",
        foreign_keys=[("study_id", "studies", "id")],
        not_null={"SeriesInstanceUID", "study_id", "generation", "selected_generation"},
        defaults={"generation": 0, "selected_generation": 0},
    )
    db["series"].create_index(["SeriesInstanceUID"], unique=True)
    db["series"].create_index(["study_id"])
    db.execute("CREATE INDEX idx_series_open ON series(id) WHERE selected_generation < generation")
    db["instances"].create(
        {
            "id": int,
            "series_id": int,
            **_text(INSTANCE_KEYS),
            "TransferSyntaxUID": str,
            "attributes": str,
            "file": str,
            "size": int,
            "sha256": str,
            "dataset_sha256": str,
            "association_id": str,
            "received_at": float,
            "received_time": str,
        },
        pk="id",
        foreign_keys=[("series_id", "series", "id")],
        not_null={"SOPInstanceUID", "series_id", "file", "sha256"},
    )
    db["instances"].create_index(["SOPInstanceUID"], unique=True)
    db["instances"].create_index(["series_id"])
    db["instances"].create_index(["file"])
    db["former_instances"].create(
        {
            "id": int,
            "SOPInstanceUID": str,
            "TransferSyntaxUID": str,
            "file": str,
            "sha256": str,
            "replaced_by_sha256": str,
            "association_id": str,
            "replaced_time": str,
        },
        pk="id",
    )


@migrations()
def m0003_work(db: Database) -> None:
    db["jobs"].create(
        {
            "id": int,
            "series_id": int,
            "model": str,
            "rules": str,
            "destinations": str,
            "priority": int,
            "revision": int,
            "inputs_sha256": str,
            "generation": int,
            "reason": str,
            "state": str,
            "model_version": str,
            "model_digest": str,
            "identity": str,
            "attempts": int,
            "next_at": float,
            "lease_owner": str,
            "lease_until": float,
            "last_error": str,
            "notes": str,
            "summary": str,
            "seconds": str,
            "last_received_at": float,
            "created_at": float,
            "created_time": str,
            "started_at": float,
            "finished_at": float,
            "finished_time": str,
        },
        pk="id",
        foreign_keys=[("series_id", "series", "id")],
        not_null={"series_id", "model", "state", "revision", "priority"},
        defaults={"attempts": 0, "next_at": 0.0},
    )
    db["jobs"].create_index(["state", "priority", "id"])
    db["jobs"].create_index(["series_id", "model", "revision"], unique=True)
    db["job_inputs"].create(
        {"job_id": int, "SOPInstanceUID": str, "sha256": str},
        pk=("job_id", "SOPInstanceUID"),
        foreign_keys=[("job_id", "jobs", "id")],
    )
    db["results"].create(
        {
            "id": int,
            "job_id": int,
            "kind": str,
            "SOPClassUID": str,
            "SOPInstanceUID": str,
            "SeriesInstanceUID": str,
            "TransferSyntaxUID": str,
            "file": str,
            "sha256": str,
            "created_time": str,
        },
        pk="id",
        foreign_keys=[("job_id", "jobs", "id")],
    )
    db["results"].create_index(["SOPInstanceUID"], unique=True)
    db["results"].create_index(["job_id"])
    for table in ("deliveries", "sync_items"):
        db[table].create(
            {
                "id": int,
                "result_id": int,
                "job_id": int,
                "study_id": int,
                "destination": str,
                "state": str,
                "attempts": int,
                "next_at": float,
                "lease_owner": str,
                "lease_until": float,
                "last_error": str,
                "created_at": float,
                "created_time": str,
                "finished_at": float,
                "finished_time": str,
            },
            pk="id",
            foreign_keys=[("result_id", "results", "id"), ("job_id", "jobs", "id")],
            not_null={"result_id", "destination", "state"},
            defaults={"attempts": 0, "next_at": 0.0},
        )
        db[table].create_index(["result_id", "destination"], unique=True)
        db[table].create_index(["state", "destination", "id"])


@migrations()
def m0004_operation(db: Database) -> None:
    db["events"].create(
        {"id": int, "time": str, "at": float, "severity": str, "kind": str, "subject": str, "text": str},
        pk="id",
    )
    db["processes"].create(
        {
            "name": str,
            "pid": int,
            "state": str,
            "started_time": str,
            "beat_at": float,
            "detail": str,
            "metrics": str,
        },
        pk="name",
    )
    db["models"].create({"name": str, "version": str, "previous_version": str, "activated_time": str}, pk="name")
    db["model_pulls"].create(
        {
            "sha256": str,
            "name": str,
            "version": str,
            "state": str,
            "attempts": int,
            "next_at": float,
            "last_error": str,
            "finished_time": str,
        },
        pk="sha256",
        defaults={"attempts": 0, "next_at": 0.0},
    )


@migrations()
def m0005_query(db: Database) -> None:
    """What C-FIND looks for without reading every row; see :mod:`dicomnode.index.names`."""
    for table, owner, owners in (("study_names", "study_id", "studies"), ("patient_names", "patient_id", "patients")):
        db.execute(
            f"CREATE TABLE {table} (form INTEGER NOT NULL, key TEXT NOT NULL,"
            f" {owner} INTEGER NOT NULL REFERENCES {owners}(id) ON DELETE CASCADE,"
            f" PRIMARY KEY (form, key, {owner})) WITHOUT ROWID"
        )
        db.execute(f"CREATE INDEX idx_{table}_{owner} ON {table}({owner})")
        for owner_id, name in db.execute(f"SELECT id, PatientName FROM {owners}").fetchall():
            for form, key in name_keys(name or ""):
                db.execute(f"INSERT INTO {table} VALUES (?, ?, ?)", (form.value, key, owner_id))
    columns = ", ".join(f'"{key}" TEXT' for key in REQUEST_KEYS)
    db.execute(
        "CREATE TABLE series_requests (id INTEGER PRIMARY KEY,"
        f" series_id INTEGER NOT NULL REFERENCES series(id) ON DELETE CASCADE, {columns})"
    )
    for key in ("series_id", "RequestedProcedureID", "ScheduledProcedureStepID", "AccessionNumber", "StudyInstanceUID"):
        db["series_requests"].create_index([key])
    db.execute("CREATE INDEX idx_studies_odd_date ON studies(StudyDate) WHERE length(StudyDate) NOT IN (0, 8)")
    # It counts instances and lists the SOP classes of a study without their rows, which are wide.
    db.execute("DROP INDEX idx_instances_series_id")
    db["instances"].create_index(["series_id", "SOPClassUID"])
    # Random file names would touch another page of an index for each instance; the folder is one for a series.
    db.execute("DROP INDEX idx_instances_file")
    db.execute("CREATE INDEX idx_instances_folder ON instances(substr(file, 1, 2))")


@migrations()
def m0006_commitment(db: Database) -> None:
    """Storage commitment in both roles; see :mod:`dicomnode.index.commitment`."""
    create_commitments(db)


@migrations()
def m0007_procedure_steps(db: Database) -> None:
    create_procedure_steps(db)


@migrations()
def m0008_journals(db: Database) -> None:
    db["journals"].create({"mark": str, "retired": int}, pk="mark", not_null={"retired"})


@migrations()
def m0009_peer_certificates(db: Database) -> None:
    """See :mod:`dicomnode.index.seen`; ``ends_at`` is Unix time, as it stands in the certificate."""
    db["peer_certificates"].create(
        {"process": str, "peer": str, "ends_at": float, "seen_time": str},
        pk=("process", "peer"),
        not_null={"ends_at"},
    )


@migrations()
def m0010_placement(db: Database) -> None:
    """Which engine or endpoint took the job, and the scores: JSON, see :mod:`dicomnode.infer.placement`."""
    db["jobs"].add_column("placement", str)


@migrations()
def m0011_orders(db: Database) -> None:
    """What each job was asked for, fallbacks of deliveries, and alerts of critical findings."""
    db["jobs"].add_column("wishes", str)
    db["jobs"].add_column("critical", str)
    db["jobs"].add_column("report_owed", int, not_null_default=0)
    db.execute("CREATE INDEX idx_jobs_report_owed ON jobs(id) WHERE report_owed > 0")
    for table in ("deliveries", "sync_items"):
        db[table].add_column("priority", int, not_null_default=1)
    db["deliveries"].add_column("fallback_result_id", int)
    db["deliveries"].add_column("instead_of", str)
    create_alerts(db)


@migrations()
def m0012_model_life(db: Database) -> None:
    """States of model versions, their history, attempts by version and comparisons; see :mod:`dicomnode.index.life`."""
    create_model_life(db)


@migrations()
def m0013_chains(db: Database) -> None:
    """Steps of rules: what a job waits for; see :mod:`dicomnode.index.chain`."""
    db["jobs"].add_column("step", str, not_null_default="")
    db["jobs"].add_column("needs", str)
    db.execute("DROP INDEX idx_jobs_series_id_model_revision")
    db["jobs"].create_index(["series_id", "model", "step", "revision"], unique=True)


@migrations()
def m0014_waits(db: Database) -> None:
    """How often a job, or the report of its failure, waited for what was away; and what an attempt ran on.

    Such a wait is no attempt. Only attempts on the same engine and precision are compared in time.
    """
    db["jobs"].add_column("waits", int, not_null_default=0)
    db["model_runs"].add_column("engine", str)


@migrations()
def m0015_priors(db: Database) -> None:
    """Earlier studies that jobs wish for; see :mod:`dicomnode.index.prior`."""
    create_priors(db)


@migrations()
def m0016_companions(db: Database) -> None:
    """Further series as inputs of one job; see :mod:`dicomnode.index.companions`."""
    create_companions(db)


@migrations()
def m0017_cloud_outbox(db: Database) -> None:
    """Records beside objects, classes and streams; see :mod:`dicomnode.index.cloud_rows`."""
    create_cloud_outbox(db)


@migrations()
def m0018_settled_runs(db: Database) -> None:
    """Whether an attempt ran on the engine that its version stays on; see :class:`dicomnode.rollout.Run`."""
    db["model_runs"].add_column("settled", int, not_null_default=1)


@migrations()
def m0020_trust(db: Database) -> None:
    """Models from a signed repository; see :mod:`dicomnode.index.trust`."""
    create_trust(db)


@migrations()
def m0023_records(db: Database) -> None:
    """Records changed at both ends, and their conflicts; see :mod:`dicomnode.index.records`."""
    create_records(db)


@migrations()
def m0030_desired(db: Database) -> None:
    """What the cloud desires of this node; see :mod:`dicomnode.index.desired`."""
    create_desired(db)


@migrations()
def m0031_corrected(db: Database) -> None:
    create_corrected(db)


@migrations()
def m0032_refused_records(db: Database) -> None:
    """Records of the cloud that were not taken, and why; see :mod:`dicomnode.index.records`."""
    create_refused(db)


@migrations()
def m0033_suspects(db: Database) -> None:
    """``suspect``: an item that goes alone (it may break a batch or end the process). ``trying``: it is being tried
    alone. ``strikes``, ``ended``: what speaks against it. See :mod:`dicomnode.index.cloud_outbox`."""
    for column in ("suspect", "trying", "strikes", "ended"):
        db["sync_items"].add_column(column, int, not_null_default=0)


@migrations()
def m0034_pictures(db: Database) -> None:
    """Of key images, whether their source may show identity (:class:`dicomnode.burned_in.Shows`); "" of others."""
    db["results"].add_column("shows", str, not_null_default="")


@migrations()
def m0035_figures(db: Database) -> None:
    create_figures(db)


@migrations()
def m0040_sharing(db: Database) -> None:
    """Series that shared the batches of a network with a job's; see :mod:`dicomnode.index.sharing`."""
    for table in ("jobs", "model_runs"):
        db[table].add_column("batch_studies", int, not_null_default=0)


@migrations()
def m0041_issuers(db: Database) -> None:
    create_issuers(db)


@migrations()
def m0042_removals(db: Database) -> None:
    """Versions of models whose folders are on their way off the disk; see :mod:`dicomnode.index.removals`."""
    create_removals(db)
