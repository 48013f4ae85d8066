"""Several calls at once: in order, no further ahead than the lanes, errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.infer.lanes import in_lanes


@given(st.lists(st.integers()), st.integers(1, 4))
def test_the_answers_in_their_order(items: list[int], lanes: int) -> None:
    assert list(in_lanes(lambda n: n + 1, items, lanes)) == [n + 1 for n in items]


def test_two_calls_are_under_way_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)  # a call alone would wait here in vain
    assert list(in_lanes(lambda n: (meeting.wait(), n)[1], range(4), 2)) == [0, 1, 2, 3]


def test_no_more_is_taken_than_there_are_lanes() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    found = in_lanes(lambda n: n, items(), 2)
    assert next(found) == 0
    assert taken == [0, 1, 2]
    found.close()  # type: ignore[attr-defined]
    assert taken == [0, 1, 2]


def test_an_error_comes_after_the_answers_before_it_and_nothing_is_begun_behind_it() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("broken")
        return number

    found = in_lanes(call, range(9), 1)
    assert next(found) == 0
    with pytest.raises(ValueError, match="broken"):
        next(found)
    assert max(begun) <= 2
