"""The way of a pulled version from staged to active: what it waits for, and what it never does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.ladder import Facts, Goal, Move, Plan, Wait, next_move
from dicomnode.settings import ModelPull

FULL = Plan("activate", 20, 24.0, 10.0, 30, 48.0, approve=True)
ORDER = ["staged", "shadow", "canary", "active"]
BECOMES = {"shadow": "shadow", "canary": "canary", "activate": "active"}

goals = st.sampled_from(["stage", "shadow", "canary", "activate"])
plans = st.builds(
    Plan,
    goals,
    st.integers(0, 3),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from([0.0, 10.0]),
    st.integers(0, 3),
    st.sampled_from([0.0, 5.0]),
    st.booleans(),
)
facts = st.builds(
    Facts,
    st.sampled_from([*ORDER, "retired"]),
    st.booleans(),
    st.sampled_from([0.0, 4.9, 5.0, 100.0]),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(["", "cli:x"]),
    st.sampled_from(["", "disagreement"]),
    st.sampled_from(["", "withdrawn"]),
    st.booleans(),
)


def code(plan: Plan, **what: Any) -> str:
    found = next_move(plan, Facts(**what))
    return found.action if isinstance(found, Move) else found.code if isinstance(found, Wait) else "none"


def test_the_whole_way() -> None:
    assert code(FULL, state="staged") == "shadow"
    assert code(FULL, state="shadow", studies=19, hours=100) == "studies"
    assert code(FULL, state="shadow", studies=20, hours=23.9) == "hours"
    assert code(FULL, state="shadow", studies=20, hours=24) == "approval"
    assert code(FULL, state="shadow", studies=20, hours=24, approved=True) == "canary"
    assert code(FULL, state="canary", studies=29, hours=48, approved=True) == "studies"
    assert code(FULL, state="canary", studies=30, hours=48, approved=True) == "activate"
    assert code(FULL, state="active") == "none"


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ({"state": "shadow", "verdict": "disagreement: 40 %"}, "worse"),
        ({"state": "canary", "verdict": "errors"}, "worse"),
        ({"state": "staged", "faulty": True}, "rolled-back"),
        ({"state": "retired", "faulty": True}, "rolled-back"),
        ({"state": "retired"}, "retired"),
        ({"state": "staged", "by_hand": "cli:me"}, "by-hand"),
        ({"state": "staged", "not_offered": "withdrawn"}, "not-offered"),
        ({"state": "staged", "alone": True}, "approval"),
        ({"state": "staged", "alone": True, "approved": True}, "activate"),
        ({"state": "shadow", "alone": True, "approved": True}, "activate"),
    ],
)
def test_what_holds_it(what: dict[str, Any], wanted: str) -> None:
    assert code(FULL, **{"studies": 99, "hours": 99.0, "approved": False} | what) == wanted


@pytest.mark.parametrize(("goal", "ends"), [("stage", "staged"), ("shadow", "shadow"), ("canary", "canary")])
def test_a_policy_ends_where_it_says(goal: Goal, ends: str) -> None:
    plan = Plan(goal, 1, 1.0, 10.0, 1, 1.0)
    assert code(plan, state=ends, studies=9, hours=9.0, approved=True) == "goal"


@given(plans, facts)
def test_what_no_policy_does(plan: Plan, now: Facts) -> None:
    found = next_move(plan, now)
    if not isinstance(found, Move):
        return
    assert not (now.faulty or now.by_hand or now.not_offered)
    assert now.state in ORDER[:3]
    assert found.action == "shadow" or now.approved or not plan.approve, "nobody is served without the approval"
    assert not (now.verdict and now.state != "staged"), "what is worse does not go on"
    assert ORDER.index(BECOMES[found.action]) > ORDER.index(now.state), "only upwards"
    height = {"stage": 0, "shadow": 1, "canary": 2, "activate": 3}
    assert height[found.action] <= height[plan.goal]
    if found.action == "activate" and plan.canary and not now.alone:
        assert now.state == "canary", "a canary is not passed over"
    if found.action in ("canary", "activate") and plan.shadow and not now.alone:
        assert now.state != "staged", "the shadow is not passed over"


@given(plans)
def test_every_policy_comes_to_an_end(plan: Plan) -> None:
    """With all that it waits for, a version gets exactly as far as its policy says, in a few steps."""
    seen = ["staged"]
    while isinstance(found := next_move(plan, Facts(seen[-1], hours=99.0, studies=99, approved=True)), Move):
        seen.append(BECOMES[found.action])
        assert len(seen) <= 4
    assert all(ORDER.index(a) < ORDER.index(b) for a, b in pairwise(seen))
    if plan.goal == "activate":
        assert seen[-1] == "active"
    if plan.at_once:
        assert seen == ["staged", "active"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"url": "https://x/y.zip"}, "belong together"),
        ({"url": "https://x/y.zip", "sha256": "0" * 64}, "version is missing"),
        ({"policy": "canary"}, "needs canary_percent"),
        ({"canary_percent": 10}, "canary_studies or canary_hours"),
        ({"canary_hours": 10}, "need canary_percent"),
        ({"policy": "stage", "begin_as": "staged"}, "former name"),
        ({"policy": "all"}, "Input should be"),
    ],
)
def test_entries_that_are_wrong(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelPull(name="m", **entry)


def test_the_former_name_of_policy() -> None:
    made = [ModelPull(name="m", begin_as=b).plan.goal for b in ("staged", "shadow", "active")]
    assert made == ["stage", "shadow", "activate"]
