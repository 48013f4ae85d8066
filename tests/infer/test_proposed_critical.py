"""What a bundle proposes as critical counts for the rules that take it up, and for no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Models
from dicomnode.infer.golden import ReadyModel
from dicomnode.orders import dump
from dicomnode.select.rules import order_of
from dicomnode.settings import Rule
from tests.infer.life_case import add_series, add_version, boxes, settings_of, worker_on


@pytest.mark.parametrize(("taken", "critical"), [(True, ["volume_ml"]), (False, [])])
def test_the_rule_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool, critical: list[str]) -> None:
    def propose(manifest: dict[str, Any]) -> None:
        manifest["outputs"]["critical"] = {"volume_ml": {"max": 150}}  # boxes() says 100 and 200 ml

    add_version(tmp_path, "1.0.0", propose)
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    db = Database(tmp_path / "data")
    worker = worker_on(settings_of(tmp_path), db)
    Models(db).activate("ct-lung", "1.0.0")
    job = add_series(db)
    rule = Rule(name="r", models=("ct-lung",), send_to=("pacs",), critical={"*": True} if taken else {})
    db.execute("UPDATE jobs SET wishes = ? WHERE id = ?", (dump(order_of(rule)), job))
    assert worker.run_once()
    shown = Jobs(db).show(job)
    assert shown is not None and shown["state"] == "done"
    assert (shown["critical"] or []) == critical
    db.close()
