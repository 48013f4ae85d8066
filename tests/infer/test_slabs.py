"""Slabs are what the steps say, in memory that is used again only when its slab is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.pipeline import infer
from dicomnode.infer.slabs import Slabs
from dicomnode.infer.steps import Cast, Clip, PreStep
from dicomnode.infer.volume import Volume
from tests.infer.infer_case import MODEL

EXTREMES = [-32768, -3024, -1025, -1024, -500, -1, 0, 1, 3071, 3072, 32767]


def one_by_one(steps: list[PreStep], values: np.ndarray) -> np.ndarray:
    for step in steps:
        values = step.apply(values)
    return values[:, np.newaxis]


@given(
    source=st.sampled_from(["i2", "u2", "i4", "f4"]),
    target=st.sampled_from(["float32", "float16", "int16", "uint8"]),
    low=st.sampled_from([-1024.0, -1000.5, 0.0, -70000.0]),
    high=st.sampled_from([3071.0, 240.0, 99.5]),
    clips=st.integers(0, 2),
)
@pytest.mark.filterwarnings("ignore:.*cast.*:RuntimeWarning")
def test_the_same_values_as_step_by_step(source: str, target: str, low: float, high: float, clips: int) -> None:
    numbers = [n for n in EXTREMES if np.can_cast(np.min_scalar_type(n), source) or source == "f4"]
    values = np.resize(np.array(numbers, source), (3, 4, 5))
    steps: list[PreStep] = [Clip(step="clip", low=low, high=high)] * clips
    steps.append(Cast(step="cast", dtype=target))  # type: ignore[arg-type]
    slab = Slabs(steps).make(values)
    wanted = one_by_one(steps, values)
    assert slab.dtype == wanted.dtype == np.dtype(target) and slab.flags.c_contiguous
    np.testing.assert_array_equal(slab, wanted)


def test_without_a_cast_the_values_keep_their_type() -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    slab = Slabs([Clip(step="clip", low=3, high=9)]).make(values)
    assert slab.dtype == np.int16
    np.testing.assert_array_equal(slab, values.clip(3, 9)[:, np.newaxis])
    np.testing.assert_array_equal(Slabs([]).make(values), values[:, np.newaxis])


def test_memory_is_used_again_only_when_its_slab_is_done() -> None:
    slabs = Slabs([Cast(step="cast", dtype="float32")])
    values = np.arange(4 * 3 * 2, dtype=np.int16).reshape(4, 3, 2)
    first, second = slabs.make(values), slabs.make(values + 1)
    assert not np.shares_memory(first, second)
    slabs.done(first)
    third = slabs.make(values[:3] + 2)  # the last slab of a series is shorter
    assert np.shares_memory(first, third)
    np.testing.assert_array_equal(third, (values[:3] + 2)[:, np.newaxis])
    np.testing.assert_array_equal(second, (values + 1)[:, np.newaxis])
    slabs.done(third)
    longer = slabs.make(np.zeros((9, 3, 2), np.int16))
    assert longer.shape == (9, 1, 3, 2) and not np.shares_memory(longer, third)


class ReadsLate:
    """Takes two batches ahead and looks at one only when its answer is due, as a GPU may that copies."""

    engine = "late 1"

    def stream(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Mapping[str, np.ndarray]]:
        held: deque[np.ndarray] = deque()
        for batch in batches:
            held.append(batch["hu"])
            if len(held) > 2:
                yield {"air": held.popleft().astype(np.uint8)}
        while held:
            yield {"air": held.popleft().astype(np.uint8)}


def test_no_slab_is_overwritten_before_its_answer_is_here() -> None:
    manifest = load_bundle(MODEL).manifest
    values = np.repeat(np.arange(200, dtype=np.int16), 4).reshape(200, 2, 2)
    volume = Volume(values, np.eye(4), (1.0, 1.0, 1.0), tuple(f"2.25.{n + 1}" for n in range(200)))
    found = infer(manifest, ReadsLate(), volume)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found["air"], values)
