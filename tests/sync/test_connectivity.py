"""Which endpoint is used and what the line is called: properties over any course of events."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dicomnode.sync.connectivity import RETURN_AFTER, Health, Limits, Link, choose, failed, link, succeeded

LIMITS = Limits()
events = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["fail", "probe", "send", "wait"]),
        st.floats(0.001, 20),
        st.floats(0, 2000),
    ),
    max_size=60,
)


def course(steps, limits: Limits = LIMITS, count: int = 3):
    """Every state that ``steps`` lead through: (health, now)."""
    health, now = [Health()] * count, 1000.0
    yield list(health), now
    for number, what, latency, seconds in steps:
        if what == "fail":
            health[number] = failed(health[number], now, limits)
        elif what == "wait":
            now += seconds
        else:
            health[number] = succeeded(health[number], latency, proven=what == "send")
        yield list(health), now


@given(events)
def test_what_is_chosen_may_be_used_and_is_the_best(steps) -> None:
    for health, now in course(steps):
        chosen = choose(health, now)
        usable = [i for i, h in enumerate(health) if h.usable(now)]
        assert (chosen is None) == (not usable)
        if chosen is None:
            continue
        assert chosen in usable
        well = [i for i in usable if health[i].well]
        if 0 in well:
            assert chosen == 0, "the primary when it is well"
        elif well:
            assert chosen in well
            assert health[chosen].latency == min(health[i].latency for i in well)
        assert choose(health, now, "always") is None


@given(events)
def test_the_state_says_what_is_so(steps) -> None:
    for health, now in course(steps):
        state, chosen = link(health, now, LIMITS), choose(health, now)
        if state is Link.online:
            assert chosen == 0 and health[0].well
        if state is Link.offline:
            assert chosen is None or health[chosen].successes == 0
        if chosen is not None and health[chosen].well:
            assert state is not Link.offline, "somebody takes results"
        assert link(health, now, Limits("always")) is Link.offline
        assert link(health, now, Limits("never")) is not Link.offline
        assert link([], now, LIMITS) is Link.offline


@given(events, st.floats(0.001, 4))
def test_the_primary_is_taken_again_once_it_answers(steps, latency: float) -> None:
    *_, (health, now) = course(steps)
    for _ in range(RETURN_AFTER):
        health[0] = succeeded(health[0], latency)
    assert choose(health, now) == 0
    health[0] = failed(health[0], now, LIMITS)
    assert choose(health, now) != 0, "left alone at once when it fails"
    assert choose([failed(h, now, LIMITS) for h in health], now) is None


@given(st.integers(1, 200))
def test_back_off_grows_to_its_cap_and_never_ends(count: int) -> None:
    health, now, waits = Health(), 0.0, []
    for _ in range(count):
        health = failed(health, now, LIMITS)
        waits.append(health.not_before - now)
        now = health.not_before
        assert health.usable(now)
    assert waits == sorted(waits) and waits[0] == LIMITS.first and max(waits) <= LIMITS.longest
    never = failed(Health(failures=50), 0.0, Limits("never"))
    assert never.not_before <= 30, "with offline_mode = never it is tried twice a minute"
    assert failed(Health(), 5.0, LIMITS, 600.0).not_before == 605, "Retry-After counts"


def test_one_good_probe_is_no_proof_after_a_failure() -> None:
    health = failed(succeeded(Health(), 0.1), 0.0, LIMITS)
    once = succeeded(health, 0.1)
    assert not once.well and succeeded(once, 0.1).well
    assert succeeded(health, 0.1, proven=True).well, "something was taken"
    assert link([once], 10.0, LIMITS) is Link.degraded
    assert link([succeeded(Health(), 9.0)], 10.0, LIMITS) is Link.degraded, "slow"


def test_every_change_of_state_is_possible() -> None:
    seen = set()
    well, slow, bad = succeeded(Health(), 0.1, proven=True), succeeded(Health(), 60.0), failed(Health(), 0.0, LIMITS)
    states = {link([h], 1.0, LIMITS) for h in (well, slow, bad)}
    assert states == set(Link)
    for one, other in itertools.permutations((well, slow, bad), 2):
        seen.add((link([one], 1.0, LIMITS), link([other], 1.0, LIMITS)))
    assert len(seen) == 6


def test_of_those_that_are_not_well_one_that_has_not_failed_is_tried_first() -> None:
    assert choose([Health(failures=1), Health()], 10.0) == 1
    assert choose([Health(), Health()], 10.0) == 0
    assert choose([Health(failures=1), Health(failures=9)], 10.0) == 0
    assert choose([Health(failures=1), Health(not_before=11.0)], 10.0) == 0
