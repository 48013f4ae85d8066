"""Steps of rules: conditions, and what becomes of a step in whatever order the others end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.chains import OPEN, Fate, Known, Needs, When, circle, decide, dump, holds, in_order, load

SUMMARY: dict[str, Any] = {
    "segments": ["Left lung", "Nodule"],
    "measurements": [
        {"key": "volume_ml", "segment": "Left lung", "value": 2000.0, "unit": "ml"},
        {"key": "volume_ml", "segment": "Nodule", "value": 0.5, "unit": "ml"},
        {"key": "mean_hu", "segment": "Nodule", "value": float("nan"), "unit": "[hnsf'U]"},
    ],
    "findings": [
        {"key": "bleed", "answer": "Present", "code": "52101004", "positive": True, "probability": 0.8},
        {"key": "shift", "answer": None, "code": None, "positive": False, "probability": None},
    ],
}


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"measurement": "volume_ml", "minimum": 2000}, True),
        ({"measurement": "volume_ml", "minimum": 2001}, False),
        ({"measurement": "volume_ml", "maximum": 0.5}, True),
        ({"measurement": "volume_ml", "segment": "left LUNG", "maximum": 0.5}, False),
        ({"measurement": "volume_ml", "segment": "Liver", "minimum": 0}, False),
        ({"measurement": "mean_hu", "minimum": -2000}, False),
        ({"measurement": "no_such", "minimum": -2000}, False),
        ({"finding": "bleed", "value": "*"}, True),
        ({"finding": "bleed", "value": "present"}, True),
        ({"finding": "bleed", "value": "52101004"}, True),
        ({"finding": "bleed", "value": "Absent"}, False),
        ({"finding": "bleed", "minimum": 0.8}, True),
        ({"finding": "bleed", "maximum": 0.7}, False),
        ({"finding": "shift", "value": "*"}, False),
        ({"finding": "shift", "minimum": 0}, False),
        ({"segment": "nodule"}, True),
        ({"segment": "Liver"}, False),
        ({"segment": "Liver", "found": False}, True),
        ({"segment": "Nodule", "found": False}, False),
        ({"ended": ("done",)}, True),
        ({"ended": ("failed", "refused")}, False),
    ],
)
def test_condition(when: dict[str, Any], expected: bool) -> None:
    condition = When("a", **when)
    assert holds(condition, Known("done", SUMMARY)) is expected
    assert holds(condition, Known("done")) is (expected if "ended" in when else when.get("found") is False)
    assert load(dump(Needs(("b",), (condition,)), {"a": 7})) == (Needs(("b",), (condition,)), {"a": 7})
    assert "2000.0" not in condition.text and "a" in condition.text


@pytest.mark.parametrize(
    ("states", "fate", "word"),
    [
        (("done", "done"), Fate.run, ""),
        (("done", "running"), Fate.wait, ""),
        (("failed", "pending"), Fate.wait, ""),
        (("failed", "done"), Fate.bar, "a, which it follows, ended as failed"),
        (("skipped", "refused"), Fate.bar, "b, which it follows, ended as refused"),
        (("skipped", "done"), Fate.skip, "a, which it follows, was skipped"),
        (("not-run", "done"), Fate.bar, "ended as not-run"),
        (("superseded", "done"), Fate.bar, "ended as superseded"),
        (("done", None), Fate.bar, "b, which it follows, does not exist"),
    ],
)
def test_what_it_follows(states: tuple[str | None, ...], fate: Fate, word: str) -> None:
    known = {name: Known(state) for name, state in zip("ab", states, strict=True) if state}
    decision = decide(Needs(("a", "b")), known)
    assert decision.fate is fate and word in decision.reason


def test_another_model_after_one_that_refused() -> None:
    needs = Needs(when=(When("a", ended=("refused", "failed")),))
    assert decide(needs, {"a": Known("refused")}).fate is Fate.run
    assert decide(needs, {"a": Known("done")}).fate is Fate.skip
    assert decide(needs, {"a": Known("running")}).fate is Fate.wait


ENDS = st.sampled_from(["done", "failed", "refused"])


@st.composite
def chains(draw: st.DrawFn) -> dict[str, Needs]:
    """Steps of one rule without circles: each may follow any that were drawn before, written in any order."""
    names = [f"s{n}" for n in range(draw(st.integers(1, 7)))]
    made: dict[str, Needs] = {}
    for place, name in enumerate(names):
        others = st.sampled_from(names[:place]) if place else st.nothing()
        after = draw(st.lists(others, max_size=3, unique=True)) if place else []
        conditions = [
            {"measurement": "volume_ml", "minimum": 1000.0},
            {"segment": "Liver"},
            {"ended": ("failed", "skipped")},
        ]
        when = draw(st.lists(st.tuples(others, st.sampled_from(conditions)), max_size=2)) if place else []
        made[name] = Needs(tuple(after), tuple(When(step, **c) for step, c in when))  # type: ignore[arg-type]
    order = draw(st.permutations(names))
    return {name: made[name] for name in order}


@given(chains(), st.data())
def test_every_step_ends_once_behind_its_inputs(chain: dict[str, Needs], data: st.DataObject) -> None:
    ends = {name: data.draw(ENDS) for name in chain}

    def played(pick: Any) -> dict[str, str]:
        state = {name: "waiting" if needs.any else "pending" for name, needs in chain.items()}
        runs = dict.fromkeys(chain, 0)
        for _ in range(2 * len(chain) + 1):
            for name in [n for n in chain if state[n] == "waiting"]:
                known = {o: Known(state[o], SUMMARY if state[o] == "done" else {}) for o in chain}
                fate = decide(chain[name], known).fate
                if fate is Fate.wait:
                    continue
                assert not any(state[other] in OPEN for other in chain[name].steps), "an input is not known yet"
                state[name] = {Fate.run: "pending", Fate.skip: "skipped", Fate.bar: "not-run"}[fate]
            ready = [n for n in chain if state[n] == "pending"]
            if ready:
                name = pick(ready)
                runs[name] += 1
                state[name] = ends[name]
        assert not set(state.values()) & OPEN, "it does not end"
        assert all(n == 1 if state[name] in ("done", "failed", "refused") else n == 0 for name, n in runs.items())
        return state

    assert played(lambda ready: data.draw(st.sampled_from(ready))) == played(lambda ready: ready[0])


@given(chains())
def test_order_has_each_behind_what_it_follows(chain: dict[str, Needs]) -> None:
    follows = {name: needs.steps for name, needs in chain.items()}
    order = in_order(follows)
    assert sorted(order) == sorted(chain) and circle(follows) == ()
    assert all(order.index(other) < order.index(name) for name in chain for other in follows[name])


def test_circle_is_named() -> None:
    assert set(circle({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]})) == {"a", "b", "c"}
