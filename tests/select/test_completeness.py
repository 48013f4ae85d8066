"""When is a series complete: decision table and properties."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.geometry import StackReport
from dicomnode.select.completeness import AssociationEvidence, Evidence, decide

QUIET = 10.0
WHOLE = StackReport(("1", "2", "3"), (0.0, 0.0, 1.0), 1.0, {})
GAP = StackReport(("1", "2", "3"), (0.0, 0.0, 1.0), 1.0, {"GAP": "1 gap(s) between slices"})
SINGLE = StackReport(("1",), (0.0, 0.0, 1.0), 0.0, {})


def evidence(
    *states: str, count: int = 3, expected: int | None = None, stack: StackReport | None = WHOLE, silent: float = 0.0
) -> Evidence:
    return Evidence(count, [AssociationEvidence(s, count) for s in states], expected, stack, silent)


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
)


@given(EVIDENCE)
def test_never_complete_while_open_unless_the_count_is_reached(found: Evidence) -> None:
    verdict = decide(found, QUIET)
    reached = found.expected is not None and 0 < found.expected == found.instances
    if any(a.state != "released" for a in found.associations) and found.silent_seconds < QUIET and not reached:
        assert not verdict.complete


@given(EVIDENCE, st.floats(0, 30))
def test_silence_never_turns_complete_into_waiting(found: Evidence, more: float) -> None:
    later = dataclasses.replace(found, silent_seconds=found.silent_seconds + more)
    if decide(found, QUIET).complete:
        assert decide(later, QUIET).complete


@given(EVIDENCE)
def test_wait_is_bounded_and_enough(found: Evidence) -> None:
    verdict = decide(found, QUIET)
    assert 0.0 <= verdict.wait_seconds <= QUIET
    assert bool(verdict.reason) is verdict.complete
    later = dataclasses.replace(found, silent_seconds=found.silent_seconds + verdict.wait_seconds + 1e-6)
    assert decide(later, QUIET).complete
