"""What a desired state may not do, however it is asked for: identity, versions, releases."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dicomnode.desired import check_rules, read_desired
from dicomnode.errors import SettingsError
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates, ServingRules, serving_settings
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.index.life import Change, Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.trust import Offer, Trust, Trusted
from tests.sync.test_fleet import NODE, RULE, Case, models, run, settings_of

__all__ = ["models"]

READ = frozenset(HEADER_KEYS)
KEPT = {"name": "ours", "match": {"Modality": "CT"}, "models": ["ct-lung"], "cloud_identity": "kept"}
REMOVED = {"name": "children", "match": {"InstitutionName": "Kids"}, "models": ["ct-lung"]}


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([KEPT, REMOVED], None),
        ([KEPT | {"send_to": ["pacs"], "priority": "stat"}, REMOVED, RULE], None),
        ([KEPT | {"cloud_identity": "removed"}], None),
        ([KEPT | {"match": {}}, REMOVED], "operator's to say"),
        ([KEPT | {"models": ["ct-two"]}, REMOVED], "operator's to say"),
        ([KEPT | {"results": ["SC"]}, REMOVED], "operator's to say"),
        ([KEPT], "'children' removes identity"),
        ([KEPT, REMOVED | {"match": {"InstitutionName": "Nobody"}}], "'children' removes identity"),
    ],
)
def test_the_cloud_keeps_identity_only_where_the_operator_does(
    tmp_path: Path, rules: list[dict[str, Any]], reason: str | None
) -> None:
    desired = read_desired({"rules": rules}).rules
    assert desired is not None
    settings = settings_of(tmp_path, rules=[KEPT, REMOVED])
    if reason is None:
        assert check_rules(settings, desired, READ).rules == desired
    else:
        with pytest.raises(SettingsError, match=reason):
            check_rules(settings, desired, READ)


@pytest.mark.parametrize(
    ("rule", "later", "reason"),
    [
        (KEPT, {"rules": [KEPT | {"cloud_identity": "removed"}]}, "operator's to say"),
        (KEPT | {"send_to": ["pacs"]}, {"rules": [KEPT], "peers": []}, "pacs"),
    ],
)
def test_what_the_operator_takes_back_ends_with_the_next_start(
    tmp_path: Path, rule: dict[str, Any], later: dict[str, Any], reason: str
) -> None:
    before, after = settings_of(tmp_path, rules=[KEPT]), settings_of(tmp_path, **later)
    db = Database(tmp_path / "data")
    DesiredStates(db).decide(1, "d", {"rules": [rule]}, "applied")
    [served] = ServingRules(before, db)()
    assert served.cloud_identity == "kept" and list(served.send_to) == rule.get("send_to", [])
    assert serving_settings(after, db).rules == after.rules
    assert Events(db).listing() == [], "who only looks writes nothing"
    for _ in range(2):  # two processes
        assert ServingRules(after, db)() == after.rules
    [event] = Events(db).listing(kind="desired-rules-refused")
    assert event["severity"] == "error" and reason in event["text"]
    db.close()


def test_rules_pin_no_version_that_is_held_back(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        case.desk.change("activate", "ct-lung", "1.0.0", who="op")
        case.desk.change("stage", "ct-lung", "1.1.0", who="op")
        in_steps = {k: v for k, v in RULE.items() if k != "models"} | {
            "steps": [{"name": "a", "model": "ct-lung@1.1.0"}]
        }
        for refused in (RULE | {"models": ["ct-lung@1.1.0"]}, in_steps):
            case.storage.desire(NODE, {"rules": [refused]})
            await case.desired.run_once()
            assert "ct-lung@1.1.0 is not the active version" in case.report()["reason"]
        for reference in ("ct-lung@1.0.0", "ct-two@1.0.0"):  # active, and pinned by the operator
            case.storage.desire(NODE, {"rules": [RULE | {"models": [reference]}]})
            await case.desired.run_once()
            assert case.report()["applied"] is True, reference
        case.storage.desire(NODE, {"models": {"ct-lung": "1.1.0"}, "rules": [RULE | {"models": ["ct-lung@1.1.0"]}]})
        await case.desired.run_once()
        assert case.report()["applied"] is True, "it becomes active with the same state"
        rules = ServingRules(case.settings, case.db)
        assert [r.name for r in rules()] == ["theirs"]
        Life(case.db).roll_back("ct-lung", "1.1.0", "1.0.0", Change("node", "slow", automatic=True))
        assert rules() == case.settings.rules, "what was rolled back is not served by a pin"
        [event] = Events(case.db).listing(kind="desired-rules-refused")
        assert "ct-lung@1.1.0" in event["text"]

    own = {"name": "pins", "match": {"Modality": "PT"}, "models": ["ct-two@1.0.0"]}
    run(tmp_path, models, main, rules=[own])


def test_a_model_serves_only_where_its_repository_and_its_trial_say_so(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        life = Life(case.db)

        async def refused(name: str, version: str) -> str:
            case.storage.desire(NODE, {"models": {name: version}})
            await case.desired.run_once()
            return str(case.report().get("reason", ""))

        case.desk.change("activate", "ct-two", "2.0.0", who="op")
        assert "1.0.0 is older than 2.0.0" in await refused("ct-two", "1.0.0")
        assert await refused("ct-two", "2.0.0") == ""
        case.desk.change("shadow", "ct-one", "2.0.0", who="op")
        life.wait_for("ct-one", "2.0.0", "worse", "dice: 0.5")
        assert "worse than what serves: dice: 0.5" in await refused("ct-one", "2.0.0")
        life.wait_for("ct-one", "2.0.0", None, None)
        pull = {"sha256": "a" * 64, "name": "ct-one", "version": "2.0.0", "state": "placed", "source": "repository"}
        Models(case.db).record_pull(pull)
        assert "vouches for nothing now" in await refused("ct-one", "2.0.0")
        trust, ends = Trust(case.db, case.settings.cloud.repository.metadata_url), case.clock.wall() + timedelta(days=1)
        trust.good(Trusted({}, ends, [Offer("ct-one", "2.0.0", "x", "b" * 64, 1)]))
        assert "does not list it" in await refused("ct-one", "2.0.0"), "of the same version, another archive"
        assert Models(case.db).active() == {"ct-two": "2.0.0", "ct-one": "1.0.0"}
        trust.good(Trusted({}, ends, [Offer("ct-one", "2.0.0", "x", "a" * 64, 1)]))
        assert await refused("ct-one", "2.0.0") == ""
        assert Models(case.db).active()["ct-one"] == "2.0.0"

    run(tmp_path, models, main)


def test_a_part_that_this_version_does_not_know_is_refused_with_those_that_it_does() -> None:
    """The reason is read at the cloud, by somebody who has another version's description before them."""
    with pytest.raises(
        SettingsError, match="peers: this version does not know it; a state has models, rules, log_level"
    ):
        read_desired({"peers": []})
    with pytest.raises(SettingsError, match=r"rules\.0\.colour: unknown key"):
        read_desired({"rules": [{"name": "x", "models": ["m"], "colour": "red"}]})
