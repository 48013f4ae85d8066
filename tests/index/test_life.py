"""The life of a model version: every pair of state and event, the pointer, the history."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dicomnode.errors import IllegalTransition, NodeError, OperatorError
from dicomnode.index.database import Database
from dicomnode.index.life import Change, Life
from dicomnode.index.model_states import ModelEvent, ModelState, next_model_state
from dicomnode.index.operation import Models

# Written out by hand, so that a change of the table has to be made twice.
TABLE = {
    "staged": {"shadow": "shadow", "canary": "canary", "activate": "active", "retire": "retired"},
    "shadow": {"stage": "staged", "canary": "canary", "activate": "active", "retire": "retired"},
    "canary": {
        "stage": "staged",
        "shadow": "shadow",
        "canary": "canary",
        "activate": "active",
        "roll_back": "retired",
        "retire": "retired",
    },
    "active": {"displace": "retired", "roll_back": "retired"},
    "retired": {"stage": "staged", "activate": "active"},
}
BY_HAND = Change("me", "a test")


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ModelState, ModelEvent)))
def test_transition(state: ModelState, event: ModelEvent) -> None:
    wanted = TABLE[state].get(event)
    if wanted:
        assert next_model_state(state, event) == wanted
    else:
        with pytest.raises(IllegalTransition, match=f"'{event}' is not possible in state '{state}'"):
            next_model_state(state, event)


def test_unknown_state_is_illegal() -> None:
    with pytest.raises(IllegalTransition):
        next_model_state("beta", ModelEvent.activate)


def states(db: Database) -> dict[str, str]:
    return {r["version"]: r["state"] for r in Life(db).versions("m")}


def test_the_whole_life_is_on_record(db: Database) -> None:
    life = Life(db)
    life.activate("m", "1.0.0", who="ann", why="first")
    life.stage("m", "2.0.0", who="ann")
    life.shadow("m", "2.0.0", who="bob", why="look at it")
    life.canary("m", "2.0.0", percent=10, peers=["ct1"], who="bob")
    life.canary("m", "2.0.0", percent=50, who="bob", why="going well")
    assert Models(db).active() == {"m": "1.0.0"}
    life.activate("m", "2.0.0", who="ann", why="good")
    assert states(db) == {"1.0.0": "retired", "2.0.0": "active"}
    assert Models(db).active() == {"m": "2.0.0"} and Models(db).previous("m") == "1.0.0"
    told = [(r["version"], r["event"], r["from_state"], r["to_state"], r["who"], r["why"]) for r in life.history("m")]
    assert told == [
        ("2.0.0", "activate", "canary", "active", "ann", "good"),
        ("1.0.0", "displace", "active", "retired", "ann", "2.0.0 was activated"),
        ("2.0.0", "canary", "canary", "canary", "bob", "going well"),
        ("2.0.0", "canary", "shadow", "canary", "bob", ""),
        ("2.0.0", "shadow", "staged", "shadow", "bob", "look at it"),
        ("2.0.0", "stage", None, "staged", "ann", ""),
        ("1.0.0", "activate", "staged", "active", "ann", "first"),
        ("1.0.0", "stage", None, "staged", "ann", "first"),
    ]
    assert [(r["percent"], r["peers"]) for r in life.history("m")[2:4]] == [(50.0, []), (10.0, ["ct1"])]


def test_a_roll_back_returns_and_marks_what_it_left(db: Database) -> None:
    life = Life(db)
    life.activate("m", "1.0.0", who="me")
    life.activate("m", "2.0.0", who="me")
    life.roll_back("m", "2.0.0", "1.0.0", Change("node", "errors: many", automatic=True))
    assert Models(db).active() == {"m": "1.0.0"} and states(db) == {"1.0.0": "active", "2.0.0": "retired"}
    assert [r["version"] for r in life.versions("m") if r["faulty"]] == ["2.0.0"]
    assert life.served_before("m") == [] and Models(db).previous("m") is None, "it is no way back"
    [last] = life.rolled_back()
    assert (last["name"], last["version"], last["why"]) == ("m", "2.0.0", "errors: many")
    with pytest.raises(IllegalTransition):  # two saw the same and the other was quicker
        life.roll_back("m", "2.0.0", "1.0.0", Change("node", automatic=True))
    life.activate("m", "2.0.0", who="me")  # an operator may try again
    assert not [r for r in life.versions("m") if r["faulty"]]
    with pytest.raises(OperatorError, match="no earlier version"):
        life.roll_back("m", "2.0.0", None, BY_HAND)
    assert Models(db).active() == {"m": "2.0.0"} and states(db)["2.0.0"] == "active"


def test_what_serves_is_never_taken_away(db: Database) -> None:
    life = Life(db)
    life.activate("m", "1.0.0", who="me")
    for change in (life.retire, life.stage, life.shadow):
        with pytest.raises(IllegalTransition):
            change("m", "1.0.0", who="me")
    with pytest.raises(IllegalTransition):
        life.canary("m", "1.0.0", percent=5, who="me")
    assert Models(db).active() == {"m": "1.0.0"} and states(db) == {"1.0.0": "active"}
    life.canary("m", "2.0.0", percent=5, who="me")
    with pytest.raises(OperatorError, match=r"m 2\.0\.0 is one already"):
        life.canary("m", "3.0.0", percent=5, who="me")
    for percent in (-1.0, 101.0, 0.0):
        with pytest.raises(OperatorError):
            life.canary("m", "2.0.0", percent=percent, who="me")
    assert states(db) == {"1.0.0": "active", "2.0.0": "canary"}


def test_a_change_that_fails_half_way_leaves_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(db)
    life.activate("m", "1.0.0", who="me")
    before = (states(db), Models(db).active(), len(life.history("m")))
    monkeypatch.setattr(Life, "_point", lambda *_: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        life.activate("m", "2.0.0", who="me")
    assert (states(db), Models(db).active(), len(life.history("m"))) == before


def test_many_that_activate_at_once_leave_one_active(db: Database) -> None:
    versions = [f"{n}.0.0" for n in range(1, 6)]

    def activate(version: str) -> None:
        for _ in range(4):
            Life(db).activate("m", version, who="me")

    threads = [threading.Thread(target=activate, args=(v,)) for v in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [v for v, s in states(db).items() if s == "active"] == [Models(db).active()["m"]]


class Lives(RuleBasedStateMachine):
    """Whatever is asked for in whatever order: one active version, and the pointer names it."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.db = Database(Path(self.folder.name))
        self.life = Life(self.db)
        self.activated = False

    @rule(action=st.sampled_from(["stage", "shadow", "canary", "activate", "retire"]), version=st.sampled_from("123"))
    def ask(self, action: str, version: str) -> None:
        options = {"percent": 10.0} if action == "canary" else {}
        try:
            getattr(self.life, action)("m", version, who="me", **options)
        except NodeError:
            return
        self.activated |= action == "activate"

    @rule(version=st.sampled_from("123"), back_to=st.sampled_from(["1", "2", "3", None]))
    def go_back(self, version: str, back_to: str | None) -> None:
        try:
            self.life.roll_back("m", version, back_to, BY_HAND)
        except NodeError:
            return

    @invariant()
    def one_is_active(self) -> None:
        active = [v for v, s in states(self.db).items() if s == "active"]
        pointer = Models(self.db).active().get("m")
        assert active == ([pointer] if pointer else [])
        assert bool(active) == self.activated
        assert len([s for s in states(self.db).values() if s == "canary"]) <= 1
        assert Models(self.db).previous("m") != pointer or pointer is None
        for version, state in states(self.db).items():
            last = self.db.value("SELECT to_state FROM model_history WHERE version = ? ORDER BY id DESC", (version,))
            assert last == state

    def teardown(self) -> None:
        self.db.close()
        self.folder.cleanup()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
