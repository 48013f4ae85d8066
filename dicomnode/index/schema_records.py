"""Tables of records that are changed at both ends; see :mod:`dicomnode.index.records`."""

from __future__ import annotations

from sqlite_utils import Database

_STATEMENTS = (
    # The change that serves here; the last one that both ends had; what the node itself said last.
    "ALTER TABLE records ADD COLUMN key TEXT",
    "ALTER TABLE records ADD COLUMN common_key TEXT",
    "ALTER TABLE records ADD COLUMN common_time TEXT",
    "ALTER TABLE records ADD COLUMN reported TEXT",
    # On what an item builds, which conflicts it decides (JSON list of keys), what the cloud made of it:
    # stored, conflict, or taken once its other side was looked at.
    "ALTER TABLE sync_items ADD COLUMN base_key TEXT",
    "ALTER TABLE sync_items ADD COLUMN settles TEXT",
    "ALTER TABLE sync_items ADD COLUMN outcome TEXT",
    "CREATE INDEX idx_sync_items_record ON sync_items(type, record_id) WHERE record_id IS NOT NULL",
    "CREATE INDEX idx_sync_items_conflict ON sync_items(id) WHERE outcome = 'conflict'",
    # What came from the cloud, as it came; state: new, taken, refused.
    "CREATE TABLE cloud_records (type TEXT NOT NULL, cloud_id TEXT NOT NULL, version INTEGER NOT NULL,"
    " key TEXT NOT NULL, node TEXT NOT NULL, data TEXT NOT NULL, changed_time TEXT NOT NULL, settled TEXT NOT NULL,"
    " seq INTEGER NOT NULL, state TEXT NOT NULL, PRIMARY KEY (type, cloud_id)) WITHOUT ROWID",
    "CREATE INDEX idx_cloud_records_new ON cloud_records(seq) WHERE state = 'new'",
    "CREATE TABLE record_feeds (address TEXT PRIMARY KEY, after_seq INTEGER NOT NULL) WITHOUT ROWID",
    # Both sides of every conflict, in the form that they have at home; state: open, decided.
    "CREATE TABLE record_conflicts (id INTEGER PRIMARY KEY, type TEXT NOT NULL, record_id TEXT NOT NULL,"
    " strategy TEXT NOT NULL, outcome TEXT NOT NULL, why TEXT NOT NULL, fields TEXT NOT NULL, keys TEXT NOT NULL,"
    " edge_version INTEGER NOT NULL, edge_time TEXT NOT NULL, edge_data TEXT NOT NULL,"
    " cloud_version INTEGER NOT NULL, cloud_time TEXT NOT NULL, cloud_data TEXT NOT NULL, cloud_node TEXT NOT NULL,"
    " common_version INTEGER NOT NULL, common_data TEXT, state TEXT NOT NULL, decided_as TEXT, decided_by TEXT,"
    " created_at FLOAT NOT NULL, created_time TEXT NOT NULL, decided_time TEXT)",
    "CREATE INDEX idx_record_conflicts_record ON record_conflicts(type, record_id)",
    "CREATE INDEX idx_record_conflicts_open ON record_conflicts(created_at) WHERE state = 'open'",
)


_CORRECTED = (
    # Studies that somebody corrected, among all that the node told of.
    "CREATE INDEX idx_records_corrected ON records(record_id) WHERE type = 'study' AND data <> reported",
)


def create_corrected(db: Database) -> None:
    for statement in _CORRECTED:
        db.execute(statement)


def create_records(db: Database) -> None:
    for statement in _STATEMENTS:
        db.execute(statement)


def create_refused(db: Database) -> None:
    """What of the cloud's feed was left out, for people to look at; ``address`` is empty where it was decided on."""
    db.execute(
        "CREATE TABLE refused_records (address TEXT NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL,"
        " cloud_id TEXT NOT NULL, why TEXT NOT NULL, time TEXT NOT NULL,"
        " PRIMARY KEY (address, seq, type, cloud_id)) WITHOUT ROWID"
    )
    db.execute("CREATE INDEX idx_refused_records_time ON refused_records(time)")
