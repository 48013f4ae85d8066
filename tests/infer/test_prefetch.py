"""One item is made ahead, in order, and nothing more; what making it raises comes in its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.infer.prefetch import prefetched
from dicomnode.infer.steps import Clip


@given(st.lists(st.integers()))
def test_the_items_in_their_order(items: list[int]) -> None:
    assert list(prefetched(items)) == items


def test_the_next_is_made_while_the_present_one_is_used_and_no_further_one() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    found = prefetched(items())
    assert next(found) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    found.close()  # type: ignore[attr-defined]
    assert not made[2].is_set()


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    found = prefetched(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)


@given(st.integers(-40000, 40000), st.integers(0, 80000), st.booleans())
def test_clip_of_whole_numbers_is_that_of_floats(low: int, span: int, fraction: bool) -> None:
    values = np.array([[[-32768, -1025, -1, 0, 1, 3071, 32767]]], np.int16)
    clip = Clip(step="clip", low=low + 0.5 * fraction, high=low + span + 1.0)
    found = clip.apply(values)
    assert np.array_equal(
        found.astype(np.float32), np.clip(values.astype(np.float64), clip.low, clip.high).astype("f4")
    )
    if not fraction and low >= -32768 and clip.high <= 32767:
        assert found.dtype == np.int16
