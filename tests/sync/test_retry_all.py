"""``dicomnode sync retry --all-rejected``: after an outage that parked much, one command."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from dicomnode.cli import app
from dicomnode.index.database import Database
from dicomnode.index.procedure import WITHHELD
from tests.sync.index_case import FakeClock, add_results, states


def test_all_that_is_parked_goes_again_but_for_what_was_withheld(tmp_path: Path) -> None:
    config = tmp_path / "dicomnode.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')
    db = Database(tmp_path / "data", FakeClock())
    add_results(db, tmp_path / "data", 4)
    for number, cause in enumerate(["HTTP 400", None, WITHHELD], start=1):
        db._connection().execute(
            "UPDATE sync_items SET state = 'rejected', last_error = ?, attempts = 9 WHERE id = ?", (cause, number)
        )
    run = CliRunner().invoke(app, ["sync", "retry", "--all-rejected", "--config", str(config)])
    assert run.exit_code == 0 and "items sent again: 2" in run.output
    assert states(db) == ["pending", "pending", "rejected", "pending"]
    assert db.value("SELECT attempts FROM sync_items WHERE id = 1") == 0
    db.close()
    for wrong in ([], ["1", "--all-rejected"]):
        assert CliRunner().invoke(app, ["sync", "retry", *wrong, "--config", str(config)]).exit_code == 2
