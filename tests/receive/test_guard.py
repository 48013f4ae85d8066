"""Connections are counted, in total and by address; repeated complaints are held back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dicomnode.receive.guard import ConnectionCounter, Throttle


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60))
def test_connections_are_counted(events: list[tuple[bool, str]]) -> None:
    counter = ConnectionCounter(5, 3)
    model = dict.fromkeys("abc", 0)
    for arrives, address in events:
        if arrives:
            allowed = sum(model.values()) < 5 and model[address] < 3
            assert counter.admit(address) is allowed
            model[address] += allowed
        elif model[address]:
            counter.leave(address)
            model[address] -= 1
        assert counter.total() == sum(model.values())


def test_the_same_complaint_passes_once() -> None:
    throttle = Throttle(seconds=3600.0, most=2)
    assert [throttle.passes(("a", "x")), throttle.passes(("a", "x")), throttle.passes(("a", "y"))] == [
        True,
        False,
        True,
    ]
    assert throttle.passes(("b", "x")), "a full list is begun anew"
