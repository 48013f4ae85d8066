"""``dicomnode sync retry --all-rejected``: after an outage that parked much, one command."""

from __future__ import annotations

from pathlib import Path

import pytest
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


@pytest.mark.parametrize("what", ["jobs", "deliveries", "commitments", "notifications", "alerts", "sync", "conflicts"])
def test_a_list_of_a_state_that_there_is_not_is_no_empty_list(tmp_path: Path, what: str) -> None:
    """'parked' lists nothing, and whoever asks would think that nothing is."""
    config = tmp_path / "dicomnode.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')
    Database(tmp_path / "data", FakeClock()).close()
    right = {"conflicts": "open", "jobs": "failed", "commitments": "asking"}.get(what, "rejected")
    run = CliRunner().invoke(app, [what, "list", "--state", "parked", "--config", str(config)])
    assert run.exit_code == 2 and right in run.output
    run = CliRunner().invoke(app, [what, "list", "--state", right, "--config", str(config)])
    assert run.exit_code == 0, run.output
