"""A look at the node reads indices, not the rows, however much waits."""

from __future__ import annotations

from typing import Any

import pytest

from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Figures
from dicomnode.index.outbox import Outbox


def plans(db: Database, monkeypatch: pytest.MonkeyPatch, look: Any) -> list[str]:
    """How SQLite carries out each statement of ``look``."""
    asked: list[tuple[str, Any]] = []
    rows = db.rows
    monkeypatch.setattr(db, "rows", lambda sql, parameters=(): asked.append((sql, parameters)) or rows(sql, parameters))
    look()
    monkeypatch.undo()
    return [str(r["detail"]) for sql, given in asked for r in db.rows(f"EXPLAIN QUERY PLAN {sql}", given)]


def test_figures_of_the_outboxes_are_read_from_indices_alone(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plans(db, monkeypatch, CloudOutbox(db).lanes) == [
        "SCAN sync_items USING COVERING INDEX idx_sync_items_waiting"
    ]
    for table in ("sync_items", "deliveries"):
        found = plans(db, monkeypatch, lambda t=table: Figures(db).waiting(t))
        assert found == [f"SCAN {table} USING COVERING INDEX idx_{table}_figures"]


@pytest.mark.parametrize("state", [None, "done"])
def test_the_newest_are_chosen_by_number_before_they_are_read(
    db: Database, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    for look, name in (
        (Jobs(db).listing, "j"),
        (Outbox(db, "deliveries").listing, "d"),
        (CloudOutbox(db).listing, "d"),
    ):
        found = plans(db, monkeypatch, lambda look=look: look(10, state))
        assert any(f"SEARCH {name} USING INTEGER PRIMARY KEY" in line for line in found), found
