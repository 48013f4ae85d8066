"""Policies of pulled versions, with rows as a worker leaves them and the desk of the node."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import BundleError, NodeError, OperatorError
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.model_desk import ModelDesk
from dicomnode.rollout import RunState
from dicomnode.sync import promote
from dicomnode.sync.promote import Promoter
from tests.sync.index_case import FakeClock, make_settings

NAME = "ct-lung"


class Case:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.data_dir = FakeClock(), tmp_path
        self.db = Database(tmp_path, clock=self.clock)
        self.life, self.runs = Life(self.db), Runs(self.db)
        self.vouched, self.verdict = "", None
        monkeypatch.setattr("dicomnode.model_desk.check_clinical_at", lambda path: None)
        self.jobs = 0
        for version in ("1.0.0", "2.0.0"):
            (tmp_path / "models" / NAME / version).mkdir(parents=True)
        self.life.activate(NAME, "1.0.0", who="cli")
        self.pulled("2.0.0")

    def pulled(self, version: str) -> None:
        self.life.stage(NAME, version, who="sync")
        Models(self.db).record_pull(
            {"sha256": version * 8, "name": NAME, "version": version, "state": "placed", "source": "repository"}
        )

    def verify(self, path: Path) -> None:
        if self.verdict:
            raise self.verdict

    def look(self, hours: float = 0.0, **entry: Any) -> str | None:
        """Run once after so many hours; the state of 2.0.0 then."""
        self.clock.now += hours * 3600
        repository = {"metadata_url": "https://m.example/metadata", "root_file": self.data_dir / "root.json"}
        settings = make_settings(
            self.data_dir,
            inference={"models_dir": self.data_dir / "none"},
            cloud={"models": [{"name": NAME, **entry}], "repository": repository},
        )
        self.desk = ModelDesk(settings, self.db, self.verify)
        promoter = Promoter(settings, self.db, self.desk, lambda name, version, sha256: self.vouched)
        asyncio.run(promoter.run_once())
        return self.life.state(NAME, "2.0.0")

    def compared(self, count: int, *, dice: float = 0.99) -> None:
        for _ in range(count):
            self.jobs += 1
            row = self.runs.compare_begin(self.jobs, NAME, "2.0.0", "1.0.0", "shadow")
            self.runs.compare_end(
                row, {"state": "done", "least_dice": dice, "greatest_difference": 0.0, "same_findings": 1}
            )

    def served(self, count: int, state: RunState = "done") -> None:
        for _ in range(count):
            self.jobs += 1
            self.runs.end(self.runs.begin(self.jobs, self.jobs, NAME, "2.0.0", "canary", 1), state, seconds=1.0)

    @property
    def waits(self) -> str | None:
        row = next(r for r in self.life.versions(NAME) if r["version"] == "2.0.0")
        return str(row["waits"]) if row["waits"] else None

    @property
    def active(self) -> str:
        return Models(self.db).active()[NAME]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Case(tmp_path, monkeypatch)
    yield made
    made.db.close()


WAY = {
    "shadow_studies": 3,
    "canary_percent": 20.0,
    "canary_studies": 2,
    "canary_hours": 2.0,
    "approve": True,
}


def test_the_whole_way_with_an_approval(case: Case) -> None:
    assert (case.look(**WAY), case.waits) == ("shadow", None)
    case.compared(2)
    assert (case.look(**WAY), case.waits) == ("shadow", "studies")
    case.compared(1)
    assert (case.look(**WAY), case.waits) == ("shadow", "approval")
    assert [e["kind"] for e in Events(case.db).listing() if "waits" in e["kind"]] == ["model-waits-approval"]
    case.desk.approve(NAME, "2.0.0", who="cli:anna")
    assert (case.look(**WAY), case.waits) == ("canary", None)
    [row] = [r for r in case.life.versions(NAME) if r["state"] == "canary"]
    assert (row["percent"], row["approved_by"]) == (20.0, "cli:anna")
    case.served(2)
    assert (case.look(**WAY), case.waits) == ("canary", "hours")
    assert (case.look(hours=2.0, **WAY), case.active) == ("active", "2.0.0")
    assert case.life.state(NAME, "1.0.0") == "retired"
    assert (case.data_dir / "models" / NAME / "1.0.0").is_dir(), "the one before stays on the disk"
    assert Models(case.db).previous(NAME) == "1.0.0"
    history = [(h["event"], h["who"]) for h in reversed(case.life.history(NAME)) if h["version"] == "2.0.0"]
    assert history == [
        ("stage", "sync"), ("shadow", "sync"), ("approve", "cli:anna"), ("canary", "sync"), ("activate", "sync")
    ]  # fmt: skip


def test_one_that_disagrees_in_the_shadow_stays_there(case: Case) -> None:
    case.look(**WAY)
    case.compared(3, dice=0.5)
    assert (case.look(**WAY), case.waits, case.active) == ("shadow", "worse", "1.0.0")
    case.desk.approve(NAME, "2.0.0", who="cli")
    assert case.look(**WAY) == "shadow", "an approval does not make it better"


def test_one_that_was_rolled_back_does_not_come_again(case: Case) -> None:
    entry = {"canary_percent": 20.0, "canary_hours": 1.0}
    assert case.look(**entry) == "canary"
    case.served(3, "error")
    assert (case.look(hours=2.0, **entry), case.waits) == ("canary", "worse"), "before the worker has judged it"
    case.desk.roll_back(NAME, who="node")
    assert (case.look(hours=2.0, **entry), case.waits, case.active) == ("retired", "rolled-back", "1.0.0")


def test_a_golden_case_that_fails_on_the_way(case: Case) -> None:
    case.verdict = BundleError("verify bundle", "golden case 1 differs")
    assert (case.look(), case.waits, case.active) == ("staged", "failed", "1.0.0")
    row = next(r for r in case.desk.listing() if r["version"] == "2.0.0")
    assert "golden case 1 differs" in row["waits_for"]
    case.verdict = None
    assert case.look() == "active"


def test_a_step_that_failed_is_not_tried_at_once_again(case: Case) -> None:
    tried = []

    class Desk:
        def listing(self) -> list[dict[str, Any]]:
            return []

        def change(self, action: Any, name: str, version: str, **_: Any) -> dict[str, Any]:
            tried.append(action)
            raise OperatorError("verify", "no")

    promoter = Promoter(
        make_settings(
            case.data_dir,
            cloud={
                "models": [{"name": NAME}],
                "repository": {"metadata_url": "https://m/metadata", "root_file": case.data_dir},
            },
        ),
        case.db,
        Desk(),
        lambda *_: "",
    )
    for wait in (0.0, 1.0, promote.PAUSE_SECONDS):
        case.clock.now += wait
        asyncio.run(promoter.run_once())
    assert tried == ["activate", "activate"]


def test_what_an_operator_did_is_not_undone(case: Case) -> None:
    case.look(**WAY)
    case.life.stage(NAME, "2.0.0", who="cli:anna")
    assert (case.look(**WAY), case.waits) == ("staged", "by-hand")
    case.desk.approve(NAME, "2.0.0", who="cli:anna")
    assert case.look(**WAY) == "shadow"


def test_a_repository_that_does_not_stand_for_it_any_more(case: Case) -> None:
    case.vouched = "the repository does not list it any more"
    assert (case.look(), case.waits, case.active) == ("staged", "not-offered", "1.0.0")
    case.vouched = ""
    assert case.look() == "active"
    case.vouched = "the repository vouches for nothing now"
    assert (case.look(), case.waits, case.active) == ("active", None, "2.0.0"), "what serves goes on"


def test_nothing_older_than_what_serves(case: Case) -> None:
    case.life.activate(NAME, "3.0.0", who="cli")
    assert case.look() == "staged"
    assert case.look(version="2.0.0") == "active", "but for a version that the settings name"


def test_approvals_that_are_none(case: Case) -> None:
    case.look(policy="stage")
    for version in ("1.0.0", "9.9.9"):
        with pytest.raises(NodeError, match="approve"):
            case.desk.approve(NAME, version, who="cli")
    assert case.waits == "goal"


@pytest.mark.parametrize("reached", ["shadow", "canary"])
def test_what_a_newer_version_has_overtaken_on_trial_goes(case: Case, reached: str) -> None:
    """The policy looks at the newest alone; the other one would be compared, or serve its share, for ever."""
    way = {"shadow_studies": 3} if reached == "shadow" else {"canary_percent": 20.0, "canary_studies": 2}
    assert case.look(**way) == reached
    (case.data_dir / "models" / NAME / "3.0.0").mkdir()
    case.pulled("3.0.0")
    assert case.look(**way) == "retired" and case.waits is None
    assert case.life.state(NAME, "3.0.0") == reached and case.active == "1.0.0"
    [event] = [e for e in Events(case.db).listing(50) if e["subject"] == f"{NAME}@2.0.0" and "retired" in e["text"]]
    assert "sync" in event["text"]


def test_what_an_operator_has_on_trial_or_an_entry_names_stays(case: Case) -> None:
    way = {"canary_percent": 20.0, "canary_studies": 2}
    case.look(**way)
    case.desk.change("canary", NAME, "2.0.0", who="cli:me", percent=50.0)
    (case.data_dir / "models" / NAME / "3.0.0").mkdir()
    case.pulled("3.0.0")
    assert case.look(**way) == "canary", "it was set by hand"
    assert case.look(version="2.0.0", **way) == "canary"
