"""Which place takes a job: properties of the score and the choice."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dicomnode.infer.placement import (
    CPU_FIT,
    LOCALITY,
    Candidate,
    Weights,
    decide,
    resource_fit,
    score,
    told,
)

unit = st.floats(0, 1, allow_nan=False)
weight = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0])
weights = st.tuples(weight, weight, weight, weight).filter(any).map(lambda w: Weights(*w))
names = st.text("abcdefgh", min_size=1, max_size=3)
candidate = st.builds(Candidate, names, unit, unit, unit, unit, st.sampled_from(["", "", "", "away"]))
candidates = st.lists(candidate, max_size=6, unique_by=lambda c: c.name)


@given(candidates, weights, st.floats(0.1, 1))
def test_what_is_chosen_may_take_the_job_and_is_the_best_that_may(
    given_candidates: list[Candidate], w: Weights, most: float
) -> None:
    decision = decide(given_candidates, w, most)
    able = [c for c in given_candidates if not c.unavailable and c.load <= most]
    if not able:
        assert decision.chosen == "" and decision.refusal
        assert all(c.name in decision.refusal for c in given_candidates)
        return
    chosen = next(c for c in given_candidates if c.name == decision.chosen)
    assert chosen in able and decision.refusal == ""
    assert score(chosen, w) >= max(score(c, w) for c in able) - 1e-8


@given(candidates, weights, st.floats(0.1, 1), st.randoms())
def test_the_order_of_the_candidates_does_not_matter(
    given_candidates: list[Candidate], w: Weights, most: float, rng: random.Random
) -> None:
    shuffled = list(given_candidates)
    rng.shuffle(shuffled)
    assert decide(given_candidates, w, most) == decide(shuffled, w, most)


@given(candidate, weights, st.sampled_from([0.125, 0.5, 2.0, 64.0]))
def test_only_the_proportions_of_the_weights_count(c: Candidate, w: Weights, factor: float) -> None:
    scaled = Weights(w.locality * factor, w.fit * factor, w.load * factor, w.cost * factor)
    assert score(c, scaled) == pytest.approx(score(c, w), abs=1e-12)
    assert 0 <= score(c, w) <= 1 + 1e-12


@given(candidate, weights, unit, st.sampled_from(["locality", "fit", "load", "cost"]))
def test_each_term_only_ever_helps_or_only_ever_harms(c: Candidate, w: Weights, other: float, term: str) -> None:
    better, worse = max(other, getattr(c, term)), min(other, getattr(c, term))
    if term in ("load", "cost"):
        better, worse = worse, better
    high, low = score(replace(c, **{term: better}), w), score(replace(c, **{term: worse}), w)
    assert high >= low - 1e-12
    if getattr(w, term) > 0 and abs(better - worse) > 1e-6:
        assert high > low


@given(candidates, weights, st.floats(0.1, 1), unit)
def test_a_worse_rival_changes_nothing(given_candidates: list[Candidate], w: Weights, most: float, x: float) -> None:
    decision = decide(given_candidates, w, most)
    assume(decision.chosen)
    best = next(c for c in given_candidates if c.name == decision.chosen)
    rival = Candidate("zzzz", best.locality * x, best.fit * x, best.load, best.cost)
    assert decide([*given_candidates, rival], w, most).chosen == decision.chosen


def test_an_overloaded_one_is_never_taken_however_good_it_is() -> None:
    busy = Candidate("busy", 1, 1, 0.91, 0)
    poor = Candidate("poor", 0, 0, 0.9, 1)
    decision = decide([busy, poor], Weights(), 0.9)
    assert decision.chosen == "poor"
    assert decide([busy], Weights(), 0.9).refusal == "busy: load 91% is above 90%"
    assert decide([replace(busy, load=math.nan)], Weights(), 1.0).chosen == ""
    assert decide([], Weights(), 0.9).refusal == "there is no engine or endpoint"


def test_ties_go_to_the_nearer_then_the_idler_then_by_name() -> None:
    flat = Weights(1, 0, 1, 0)
    near, far = Candidate("b", 0.5, 1, 0.5, 0), Candidate("a", 0.4, 1, 0.4, 0)
    assert decide([far, near], flat, 0.9).chosen == "b"
    only_cost = Weights(0, 0, 0, 1)
    assert decide([Candidate("a", 1, 1, 0.4, 0), Candidate("b", 1, 1, 0.3, 0)], only_cost, 0.9).chosen == "b"
    assert decide([Candidate("b", 1, 1, 0.3, 0), Candidate("a", 1, 1, 0.3, 0)], only_cost, 0.9).chosen == "a"


def test_the_default_weights_as_the_issue_names_them() -> None:
    """A GPU in the building before this box's CPU; this box's GPU before both; a far GPU last."""
    cpu = resource_fit(accelerated=False)
    assert cpu == CPU_FIT
    lan, wan = Candidate("lan", LOCALITY["lan"], 1, 0, 0), Candidate("wan", LOCALITY["wan"], 1, 0, 0)
    here = Candidate("local", LOCALITY["host"], cpu, 0, 0)
    decision = decide([lan, wan, here], Weights(), 0.9)
    assert [c.name for c in decision.candidates] == ["lan", "local", "wan"]
    assert [round(c.score, 2) for c in decision.candidates] == [0.88, 0.85, 0.72]
    assert decide([lan, replace(here, fit=1.0)], Weights(), 0.9).chosen == "local"
    assert decide([replace(lan, load=0.5), here], Weights(), 0.9).chosen == "local"


def test_memory_that_is_short_lowers_the_fit() -> None:
    assert resource_fit(accelerated=True, needed_bytes=100, free_bytes=50) == 0.5
    assert resource_fit(accelerated=True, needed_bytes=100, free_bytes=5000) == 1.0
    assert resource_fit(accelerated=True, needed_bytes=100, free_bytes=None) == 1.0


@given(candidates, weights)
def test_a_decision_can_be_stored_and_told(given_candidates: list[Candidate], w: Weights) -> None:
    stored = json.loads(json.dumps(decide(given_candidates, w, 0.9).as_dict()))
    lines = told({**stored, "tried": [{"name": "gpu9", "cause": "it went away"}]})
    assert len(lines) == len(given_candidates) + 1 and lines[-1] == "gpu9 failed: it went away"
    assert sum(", chosen" in line for line in lines) == (1 if stored["chosen"] else 0)


def test_weights_that_weigh_nothing_are_refused() -> None:
    for values in ((0, 0, 0, 0), (1, -0.1, 0, 0)):
        with pytest.raises(ValueError, match="weights"):
            Weights(*values)
