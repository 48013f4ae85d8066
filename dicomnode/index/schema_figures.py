"""Indices for what the dashboard, /metrics and ``status`` ask with each look, as migration m0035 makes them.

Without them a look reads the rows themselves, which hold whole records: with a week of results
waiting for the cloud that took 20 ms of each.
"""

from __future__ import annotations

from sqlite_utils import Database


def create_figures(db: Database) -> None:
    """See :meth:`dicomnode.index.cloud_outbox.CloudOutbox.lanes`, :meth:`dicomnode.index.operation.Figures.waiting`."""
    db.execute(
        "CREATE INDEX idx_sync_items_waiting ON sync_items(priority, size, created_at, state)"
        " WHERE state IN ('pending', 'sending')"
    )
    for table in ("sync_items", "deliveries"):
        db.execute(f"CREATE INDEX idx_{table}_figures ON {table}(destination, state, created_at)")
