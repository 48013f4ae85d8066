"""Tables of what arrived, and files of earlier versions brought up to them.

All of it is apart by ``site``: two hospitals may use the same id, the same UID or the same name of a node.
"""

from __future__ import annotations

from typing import Any

import apsw

_TABLES = {
    "objects": (
        "site TEXT NOT NULL DEFAULT '', SOPInstanceUID TEXT NOT NULL, SOPClassUID TEXT, SeriesInstanceUID TEXT,"
        " StudyInstanceUID TEXT, Modality TEXT, PatientID TEXT, PatientIdentityRemoved TEXT, TransferSyntaxUID TEXT,"
        " file TEXT NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL, puts INTEGER NOT NULL DEFAULT 1,"
        " differing INTEGER NOT NULL DEFAULT 0, received_time TEXT NOT NULL,"
        " PRIMARY KEY (site, SOPInstanceUID)) WITHOUT ROWID"
    ),
    "records": (
        "site TEXT NOT NULL DEFAULT '', type TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL,"
        " node TEXT NOT NULL, study TEXT, data TEXT NOT NULL, changed_time TEXT NOT NULL,"
        " received_time TEXT NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL DEFAULT '',"
        " PRIMARY KEY (site, type, id)) WITHOUT ROWID"
    ),
    "keys": (
        "site TEXT NOT NULL DEFAULT '', key TEXT NOT NULL, digest TEXT NOT NULL, outcome TEXT NOT NULL,"
        " version INTEGER NOT NULL, PRIMARY KEY (site, key)) WITHOUT ROWID"
    ),
    "conflicts": (
        "id INTEGER PRIMARY KEY, type TEXT NOT NULL, record_id TEXT NOT NULL, node TEXT NOT NULL,"
        " cloud_version INTEGER, cloud_data TEXT, edge_version INTEGER, edge_base INTEGER, edge_data TEXT,"
        " state TEXT NOT NULL, time TEXT NOT NULL, key TEXT NOT NULL DEFAULT '', site TEXT NOT NULL DEFAULT '')"
    ),
    "nodes": (
        "site TEXT NOT NULL DEFAULT '', name TEXT NOT NULL, heartbeat TEXT, heartbeat_time TEXT,"
        " generation INTEGER NOT NULL DEFAULT 0, desired TEXT, report TEXT, report_time TEXT,"
        " PRIMARY KEY (site, name)) WITHOUT ROWID"
    ),
    "arrivals": (
        "seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, name TEXT NOT NULL, study TEXT,"
        " time TEXT NOT NULL, site TEXT NOT NULL DEFAULT '')"
    ),
    "series": (
        "site TEXT NOT NULL, node TEXT NOT NULL, labels TEXT NOT NULL, samples INTEGER NOT NULL DEFAULT 0,"
        " value REAL, sample_ms INTEGER NOT NULL, received_time TEXT NOT NULL,"
        " PRIMARY KEY (site, node, labels)) WITHOUT ROWID"
    ),
}
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS objects_study ON objects(StudyInstanceUID)",
    "CREATE UNIQUE INDEX IF NOT EXISTS records_seq ON records(seq)",
    "CREATE INDEX IF NOT EXISTS records_site ON records(site, seq)",
    "CREATE INDEX IF NOT EXISTS arrivals_site ON arrivals(site, seq)",
    "CREATE INDEX IF NOT EXISTS conflicts_record ON conflicts(site, type, record_id)",
)


def prepare(connection: Any) -> None:
    """Make what is not there; a table of an earlier version is made anew with its rows, in one transaction."""
    pattern = apsw.Connection(":memory:")
    connection.execute("BEGIN IMMEDIATE")
    try:
        for table, columns in _TABLES.items():
            held = _columns(connection, table)
            pattern.execute(f"CREATE TABLE {table} ({columns}")
            if held and set(held) != set(_columns(pattern, table)):
                connection.execute(f"ALTER TABLE {table} RENAME TO former")
                connection.execute(f"CREATE TABLE {table} ({columns}")
                names = ", ".join(c for c in held if c in _columns(connection, table))
                connection.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM former")
                connection.execute("DROP TABLE former")
            else:
                connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns}")
        for statement in ("DROP INDEX IF EXISTS conflicts_record", *_INDEXES):
            connection.execute(statement)
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _columns(connection: Any, table: str) -> list[str]:
    return [str(row[0]) for row in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]
