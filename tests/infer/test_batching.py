"""Splitting and joining batches, and halving them while memory is too small."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.errors import EngineError
from dicomnode.infer.batching import RESTORE_SECONDS, CappedSession, join, split
from dicomnode.infer.streaming import stream


@given(length=st.integers(1, 40), limit=st.integers(1, 12))
def test_split_and_join_are_inverse(length: int, limit: int) -> None:
    batch = {"x": np.arange(length * 2).reshape(length, 2), "y": np.arange(length)}
    parts = split(batch, limit)
    assert all(1 <= len(p["x"]) <= limit for p in parts)
    np.testing.assert_array_equal(join(parts)["x"], batch["x"])
    np.testing.assert_array_equal(join(parts)["y"], batch["y"])


def test_inputs_of_different_length_stay_whole() -> None:
    batch = {"x": np.zeros((6, 2)), "factor": np.zeros(1)}
    assert split(batch, 2) == [batch]


class Doubling:
    """Doubles its input; has memory for ``room`` rows. ``overlap`` takes one batch ahead, as TensorRT does."""

    engine = "doubling 1"

    def __init__(self, room: int, code: str = "OOM", overlap: bool = False) -> None:
        self.room, self.code, self.sizes = room, code, []
        if overlap:
            self.stream = self._stream

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(inputs["x"]))
        if len(inputs["x"]) > self.room:
            raise EngineError("run model", self.code, "too much")
        return {"y": inputs["x"] * 2}

    def _stream(self, batches):
        before = None
        for batch in batches:
            now = self.run(batch)
            if before is not None:
                yield before
            before = now
        if before is not None:
            yield before

    def close(self) -> None:
        self.room = -1


@given(
    room=st.integers(1, 9),
    cap=st.integers(1, 16),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    overlap=st.booleans(),
)
def test_whatever_fits_every_batch_comes_whole_once_and_in_order(
    room: int, cap: int, lengths: list[int], overlap: bool
) -> None:
    inner = Doubling(room, overlap=overlap)
    session = CappedSession(inner, cap)
    batches = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    found = list(stream(session, ({"x": b} for b in batches)))
    assert len(found) == len(batches)
    for batch, out in zip(batches, found, strict=True):
        np.testing.assert_array_equal(out["y"], batch * 2)
    assert max(inner.sizes) <= cap and session.batch <= cap


def test_the_smaller_batch_stays_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [1000.0]
    monkeypatch.setattr("dicomnode.infer.batching.time.monotonic", lambda: moment[0])
    inner = Doubling(3)
    session = CappedSession(inner, 8)
    session.run({"x": np.arange(8)})
    assert session.batch == 2
    inner.sizes.clear()
    session.run({"x": np.arange(8)})
    assert inner.sizes == [2, 2, 2, 2]
    moment[0] += RESTORE_SECONDS
    session.run({"x": np.arange(8)})
    assert session.batch == 2, "it is still too much"
    inner.room = 8  # another program has ended
    session.run({"x": np.arange(8)})
    assert inner.sizes[-1] == 2
    moment[0] += RESTORE_SECONDS
    session.run({"x": np.arange(8)})
    assert (inner.sizes[-1], session.batch) == (8, 8)


def test_one_row_that_does_not_fit_is_oom() -> None:
    with pytest.raises(EngineError) as caught:
        CappedSession(Doubling(0), 8).run({"x": np.arange(5)})
    assert caught.value.code == "OOM"


@pytest.mark.parametrize("code", ["DEVICE_LOST", "SHAPE", "RUN_FAILED", "BUILD_FAILED"])
def test_other_errors_are_not_tried_again(code: str) -> None:
    inner = Doubling(2, code)
    with pytest.raises(EngineError) as caught:
        CappedSession(inner, 8).run({"x": np.arange(8)})
    assert caught.value.code == code and inner.sizes == [8]
