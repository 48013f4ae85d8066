"""When is a series complete: decision table and properties."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.geometry import StackReport
from dicomnode.index.procedure import WITHHELD, StepState
from dicomnode.select.completeness import AssociationEvidence, Evidence, decide
from dicomnode.select.steps import Standing

QUIET = 10.0
WHOLE = StackReport(("1", "2", "3"), (0.0, 0.0, 1.0), 1.0, {})
GAP = StackReport(("1", "2", "3"), (0.0, 0.0, 1.0), 1.0, {"GAP": "1 gap(s) between slices"})
SINGLE = StackReport(("1",), (0.0, 0.0, 1.0), 0.0, {})


MIXED = StackReport(("1", "2", "3"), (0.0, 0.0, 1.0), 1.0, {"MIXED_ORIENTATION": "1 of 3 slices are oriented"})
STEP = 60.0
LISTED = Standing(exact=True, ended=True, states=("COMPLETED",))
ENDED = Standing(ended=True, states=("COMPLETED",))
SHORT = Standing(missing=2, states=("COMPLETED",), age_seconds=1e6)
RUNNING = Standing(running=True, age_seconds=1e6)
WRONG = Standing(withheld=True)


def evidence(
    *states: str,
    count: int = 3,
    expected: int | None = None,
    stack: StackReport | None = WHOLE,
    silent: float = 0.0,
    step: Standing | None = None,
) -> Evidence:
    associations = [AssociationEvidence(s, count) for s in states]
    return Evidence(count, associations, expected, stack, silent, step or Standing())


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        (evidence("open"), None),
        (evidence("open", expected=3), "expected-count"),
        (evidence("open", expected=2), None),
        (evidence("open", expected=4), None),
        (evidence("open", expected=0), None),
        (evidence("released"), "contiguous geometry: 3 slices"),
        (evidence("released", expected=4), None),
        (evidence("released", "open"), None),
        (evidence("released", "aborted"), None),
        (evidence("lost"), None),
        (evidence("released", stack=GAP), None),
        (evidence("released", stack=SINGLE), None),
        (evidence("released", stack=None), "association-released"),
        (evidence("released", stack=None, expected=4), None),
        (evidence("released", "released", count=1), None),  # one association per image: more may come
        (evidence(silent=9.999), None),
        (evidence("open", silent=10.0), "an association is still open"),
        (evidence("aborted", silent=10.0), "1 association(s) ended without release"),
        (evidence("released", stack=GAP, silent=11.0), "1 gap(s) between slices"),
        (evidence("released", expected=4, silent=10.0), "3 of 4 stated instances arrived"),
    ],
)
def test_decision_table(given_: Evidence, reason: str | None) -> None:
    verdict = decide(given_, QUIET)
    assert verdict.complete is (reason is not None)
    if reason is None:
        assert verdict.wait_seconds == pytest.approx(QUIET - given_.silent_seconds) and not verdict.reason
    else:
        assert reason in verdict.reason and verdict.wait_seconds == 0.0


@pytest.mark.parametrize(
    ("given_", "reason", "wait"),
    [
        # A list that is exactly here is enough, whatever else is open.
        (evidence("open", step=LISTED), "procedure-step: it is completed, and the 3 instance", 0),
        (evidence("lost", "open", stack=GAP, expected=5, step=LISTED), "procedure-step: it is completed", 0),
        (evidence("open", count=1, stack=SINGLE, step=LISTED), "procedure-step", 0),
        # One that is not keeps it waiting, whatever else speaks for it, and in the end is told.
        (evidence("released", step=SHORT), None, STEP),
        (evidence("open", expected=3, step=SHORT), None, STEP),
        (evidence("released", stack=None, silent=59.0, step=SHORT), None, 1.0),
        (
            evidence("released", silent=STEP, step=SHORT),
            "2 instance(s) that the procedure step lists did not arrive",
            0,
        ),
        # A running step keeps silence from ending it, and only silence.
        (evidence("open", silent=QUIET, step=RUNNING), None, STEP - QUIET),
        (evidence("open", silent=STEP, step=RUNNING), "the procedure step is still in progress", 0),
        (evidence("released", step=RUNNING), "contiguous geometry", 0),
        (evidence("open", expected=3, step=RUNNING), "expected-count", 0),
        # The end of a step without a list: only where nothing speaks against it.
        (evidence("released", stack=MIXED), None, QUIET),
        (evidence("released", stack=MIXED, step=ENDED), "the step is completed", 0),
        (evidence("released", stack=GAP, step=ENDED), None, QUIET),
        (evidence("released", stack=MIXED, expected=4, step=ENDED), None, QUIET),
        (evidence("released", "open", stack=MIXED, step=ENDED), None, QUIET),
        (evidence("released", "aborted", stack=MIXED, step=ENDED), None, QUIET),
        (evidence("released", "released", count=1, step=ENDED), None, QUIET),  # one association per image
        (evidence("released", count=1, stack=SINGLE, step=ENDED), None, QUIET),
        # The wrong worklist entry.
        (evidence("released", step=WRONG), WITHHELD, 0),
    ],
)
def test_procedure_steps(given_: Evidence, reason: str | None, wait: float) -> None:
    verdict = decide(given_, QUIET, STEP)
    assert verdict.complete is (reason is not None) and (reason or "") in verdict.reason
    assert verdict.wait_seconds == pytest.approx(wait)
    assert verdict.analyse is (given_.standing is not WRONG)


def test_no_time_for_steps_leaves_the_quiet_period_as_it_was() -> None:
    assert decide(evidence("open", silent=QUIET, step=SHORT), QUIET, 0.0).complete
    assert decide(evidence("open", silent=QUIET, step=RUNNING), QUIET, 0.0).complete
    assert decide(evidence("released", step=SHORT), QUIET, 0.0).wait_seconds == QUIET


STANDING = st.builds(
    Standing,
    withheld=st.booleans(),
    missing=st.integers(0, 3),
    exact=st.booleans(),
    ended=st.booleans(),
    running=st.booleans(),
    states=st.lists(st.sampled_from([s.value for s in StepState]), max_size=2).map(tuple),
    age_seconds=st.floats(0, 100),
).map(lambda s: dataclasses.replace(s, exact=s.exact and not s.missing and not s.running))
EVIDENCE = st.builds(
    Evidence,
    instances=st.integers(1, 300),
    associations=st.lists(
        st.builds(AssociationEvidence, st.sampled_from(["open", "released", "aborted", "lost"]), st.integers(1, 300)),
        max_size=4,
    ),
    expected=st.none() | st.integers(0, 300),
    stack=st.sampled_from([None, WHOLE, GAP, SINGLE]),
    silent_seconds=st.floats(0, 30),
    standing=st.just(Standing()) | STANDING,
)


@given(EVIDENCE)
def test_never_complete_while_open_unless_the_count_is_reached(found: Evidence) -> None:
    verdict = decide(found, QUIET, STEP)
    reached = found.standing.settled or (found.expected is not None and 0 < found.expected == found.instances)
    if any(a.state != "released" for a in found.associations) and found.silent_seconds < QUIET and not reached:
        assert not verdict.complete


@given(EVIDENCE, st.floats(0, 30))
def test_silence_never_turns_complete_into_waiting(found: Evidence, more: float) -> None:
    later = dataclasses.replace(found, silent_seconds=found.silent_seconds + more)
    if decide(found, QUIET, STEP).complete:
        assert decide(later, QUIET, STEP).complete


@given(EVIDENCE)
def test_wait_is_bounded_and_enough(found: Evidence) -> None:
    verdict = decide(found, QUIET, STEP)
    assert 0.0 <= verdict.wait_seconds <= STEP
    assert bool(verdict.reason) is verdict.complete
    more = verdict.wait_seconds + 1e-6
    aged = dataclasses.replace(found.standing, age_seconds=found.standing.age_seconds + more)
    later = dataclasses.replace(found, silent_seconds=found.silent_seconds + more, standing=aged)
    assert decide(later, QUIET, STEP).complete


@given(EVIDENCE)
def test_never_complete_early_while_listed_instances_are_missing(found: Evidence) -> None:
    standing = found.standing
    if standing.missing and not standing.withheld and min(found.silent_seconds, standing.age_seconds) < STEP:
        assert not decide(found, QUIET, STEP).complete


@given(EVIDENCE)
def test_a_running_step_only_makes_it_wait_longer(found: Evidence) -> None:
    running = dataclasses.replace(found.standing, running=True, exact=False, ended=False)
    if decide(dataclasses.replace(found, standing=running), QUIET, STEP).complete:
        assert decide(found, QUIET, STEP).complete


@given(EVIDENCE)
def test_without_steps_nothing_changes(found: Evidence) -> None:
    alone = dataclasses.replace(found, standing=Standing())
    assert decide(alone, QUIET, STEP) == decide(alone, QUIET)
