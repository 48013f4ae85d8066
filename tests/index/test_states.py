"""State tables: every pair of state and event, and back-off."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.errors import IllegalTransition
from dicomnode.index.states import (
    JobEvent,
    JobState,
    SendEvent,
    SendState,
    backoff_seconds,
    next_job_state,
    next_send_state,
)

# Written out by hand, so that a change of the table has to be made twice.
JOBS = {
    "waiting": {
        "ready": "pending",
        "skip": "skipped",
        "bar": "not-run",
        "supersede": "superseded",
        "withdraw": "refused",
    },
    "skipped": {"supersede": "superseded"},
    "not-run": {"hold": "waiting", "supersede": "superseded"},
    "pending": {"hold": "waiting", "lease": "running", "supersede": "superseded", "withdraw": "refused"},
    "running": {
        "finish": "done",
        "refuse": "refused",
        "retry": "pending",
        "give_up": "failed",
        "lose": "pending",
        "supersede": "superseded",
        "withdraw": "refused",
    },
    "failed": {"requeue": "pending", "supersede": "superseded", "withdraw": "refused"},
    "refused": {"requeue": "pending", "supersede": "superseded"},
    "done": {},
    "superseded": {},
}
SENDS = {
    "pending": {"lease": "sending", "withdraw": "rejected"},
    "sending": {"store": "stored", "retry": "pending", "reject": "rejected", "lose": "pending", "withdraw": "rejected"},
    "rejected": {"requeue": "pending"},
    "stored": {"ask": "committing", "commit": "committed", "miss": "pending", "withdraw": "rejected"},
    "committing": {
        "commit": "committed",
        "miss": "pending",
        "unanswered": "stored",
        "withdraw": "rejected",
        "requeue": "pending",
    },
    "committed": {},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(JobState, JobEvent)))
def test_job_transition(state: JobState, event: JobEvent) -> None:
    wanted = JOBS[state].get(event)
    if wanted:
        assert next_job_state(state, event) == wanted
    else:
        with pytest.raises(IllegalTransition, match=f"'{event}' is not possible in state '{state}'"):
            next_job_state(state, event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(SendState, SendEvent)))
def test_send_transition(state: SendState, event: SendEvent) -> None:
    wanted = SENDS[state].get(event)
    if wanted:
        assert next_send_state(state, event) == wanted
    else:
        with pytest.raises(IllegalTransition):
            next_send_state(state, event)


def test_unknown_state_is_illegal() -> None:
    with pytest.raises(IllegalTransition):
        next_job_state("on-fire", JobEvent.lease)
    with pytest.raises(IllegalTransition):
        next_send_state("", SendEvent.lease)


@given(st.integers(-5, 10_000), st.floats(0.001, 100), st.floats(0.001, 10_000))
def test_back_off_grows_and_is_capped(attempts: int, first: float, longest: float) -> None:
    wait, later = backoff_seconds(attempts, first, longest), backoff_seconds(attempts + 1, first, longest)
    assert 0 < wait <= later <= longest
    assert backoff_seconds(1, first, longest) == min(first, longest)
    assert backoff_seconds(10_000, 2.0, 900.0) == 900.0
