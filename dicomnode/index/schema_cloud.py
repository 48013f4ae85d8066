"""Tables of what goes to the cloud; see :mod:`dicomnode.index.cloud_rows`."""

from __future__ import annotations

from sqlite_utils import Database

_SYNC_ITEMS = """
CREATE TABLE sync_items_new (
    id INTEGER PRIMARY KEY,
    result_id INTEGER REFERENCES results(id),
    job_id INTEGER REFERENCES jobs(id),
    study_id INTEGER REFERENCES studies(id),
    destination TEXT NOT NULL,
    type TEXT NOT NULL DEFAULT 'result',
    record_id TEXT,
    version INTEGER,
    base_version INTEGER,
    idempotency_key TEXT,
    data TEXT,
    changed_time TEXT,
    identified INTEGER NOT NULL DEFAULT 0,
    stream TEXT NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_at FLOAT NOT NULL DEFAULT 0.0,
    lease_owner TEXT,
    lease_until FLOAT,
    last_error TEXT,
    created_at FLOAT,
    created_time TEXT,
    finished_at FLOAT,
    finished_time TEXT,
    priority INTEGER NOT NULL DEFAULT 1
)
"""
_KEPT = (
    "id, result_id, job_id, study_id, destination, state, attempts, next_at, lease_owner, lease_until, last_error,"
    " created_at, created_time, finished_at, finished_time, priority"
)


def create_issuers(db: Database) -> None:
    """Of pseudonyms of patients, the issuer of the Patient ID; NULL: which part of ``original`` it is is not known.

    Without a ^ there is none. Of the others the key tells: :meth:`dicomnode.index.mapping.PseudonymRows.tell_apart`.
    """
    db.execute("ALTER TABLE pseudonyms ADD COLUMN issuer TEXT")
    db.execute("UPDATE pseudonyms SET issuer = '' WHERE kind = 'patient' AND instr(original, '^') = 0")
    db.execute("CREATE INDEX idx_pseudonyms_unread ON pseudonyms(pseudonym) WHERE kind = 'patient' AND issuer IS NULL")


def create_cloud_outbox(db: Database) -> None:
    """``sync_items`` takes records as well as objects; what waits in it stays, with its ids.

    ``stream``: items of one stream are sent in their order. ``size``: bytes that wait, of the stored
    object or of ``data``. ``identified``: a rule lets it leave with patient identity.
    """
    db.execute(_SYNC_ITEMS)
    db.execute(
        f"INSERT INTO sync_items_new ({_KEPT}, stream, size) SELECT {_KEPT}, 'study/' || study_id,"
        " coalesce((SELECT i.size FROM results r JOIN instances i ON i.SOPInstanceUID = r.SOPInstanceUID"
        " WHERE r.id = sync_items.result_id), 0) FROM sync_items"
    )
    db.execute("DROP TABLE sync_items")
    db.execute("ALTER TABLE sync_items_new RENAME TO sync_items")
    db["sync_items"].create_index(["result_id", "destination"], unique=True)
    db["sync_items"].create_index(["idempotency_key"], unique=True)
    db["sync_items"].create_index(["state", "priority", "id"])
    db["sync_items"].create_index(["job_id"])
    db.execute("CREATE INDEX idx_sync_items_open ON sync_items(stream, id) WHERE state IN ('pending', 'sending')")
    db.execute(
        "CREATE TABLE records (type TEXT NOT NULL, record_id TEXT NOT NULL, version INTEGER NOT NULL,"
        " data TEXT NOT NULL, changed_time TEXT NOT NULL, common_version INTEGER NOT NULL DEFAULT 0,"
        " common_data TEXT, PRIMARY KEY (type, record_id)) WITHOUT ROWID"
    )
    # See dicomnode.index.mapping.
    db.execute(
        "CREATE TABLE pseudonyms (pseudonym TEXT PRIMARY KEY, kind TEXT NOT NULL, original TEXT NOT NULL,"
        " created_time TEXT NOT NULL) WITHOUT ROWID"
    )
