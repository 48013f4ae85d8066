"""Calls of several studies in shared batches: each gets the answers that it gets alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.errors import EngineError
from dicomnode.infer.batching import CappedSession
from dicomnode.infer.joint import Call, call_of, plan, run_together

shapes = st.sampled_from([(("x", "<f4", (1, 4, 4)),), (("x", "<f4", (1, 4, 5)),), (("x", "<f2", (1, 4, 4)),)])
calls = st.builds(Call, rows=st.integers(0, 20), shape=shapes)
studies_of_calls = st.lists(st.lists(calls, max_size=4), max_size=8)


@given(studies=studies_of_calls, limit=st.integers(1, 16))
def test_every_call_is_in_one_batch_of_its_shape(studies: list[list[Call]], limit: int) -> None:
    batches = plan(studies, limit)
    parts = [(p.study, p.call) for batch in batches for p in batch]
    assert sorted(parts) == [(s, c) for s, some in enumerate(studies) for c in range(len(some))]
    for batch in batches:
        assert len({studies[p.study][p.call].shape for p in batch}) == 1
        assert sum(p.rows for p in batch) <= limit or len(batch) == 1
        assert len(batch) == 1 or all(p.rows for p in batch)
        assert [(p.study, p.call) for p in batch] == sorted((p.study, p.call) for p in batch)


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=20), limit=st.integers(5, 16))
def test_no_two_batches_of_a_shape_could_be_one(counts: list[int], limit: int) -> None:
    batches = plan([[Call(n, ())] for n in counts], limit)
    rows = [sum(p.rows for p in batch) for batch in batches]
    assert all(a + batch[0].rows > limit for a, batch in zip(rows, batches[1:], strict=False))


class Doubling:
    """Gives twice the input and a score for each row; ``answer`` may spoil that."""

    engine = "doubling 1"

    def __init__(self, answer: Any = None) -> None:
        self.sizes: list[int] = []
        self.answer = answer

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(inputs["x"]))
        outputs = {"y": inputs["x"] * 2, "s": inputs["x"].sum(axis=(1, 2))}
        return outputs if self.answer is None else self.answer(outputs)

    def close(self) -> None:
        self.sizes.clear()


def studies_of(*counts: tuple[int, int]) -> list[list[dict[str, np.ndarray]]]:
    """One call each: rows and width."""
    random = np.random.default_rng(1)
    return [[{"x": random.normal(size=(rows, 2, width)).astype(np.float32)}] for rows, width in counts]


@pytest.mark.parametrize("capped", [False, True])
def test_answers_come_back_to_whom_they_belong(capped: bool) -> None:
    within = Doubling()
    session: Any = CappedSession(within, 8) if capped else within
    studies = studies_of((1, 3), (2, 3), (1, 4), (3, 3), (4, 3), (1, 4))
    between: list[int] = []
    answers = run_together(session, studies, 8, lambda: between.append(len(within.sizes)))
    assert within.sizes == [6, 2, 4], "rows of one shape up to the limit, in the order of the studies"
    assert len(between) == 3
    for given_, got in zip(studies, answers, strict=True):
        np.testing.assert_array_equal(got[0]["y"], given_[0]["x"] * 2)
        np.testing.assert_array_equal(got[0]["s"], given_[0]["x"].sum(axis=(1, 2)))


def test_several_calls_of_a_study_keep_their_order() -> None:
    (a,), (b,), (c,) = studies_of((1, 3), (1, 4), (1, 3))
    answers = run_together(Doubling(), [[a, b], [c]], 4)
    assert [x["y"].shape for x in answers[0]] == [(1, 2, 3), (1, 2, 4)]
    np.testing.assert_array_equal(answers[1][0]["y"], c["x"] * 2)


def test_inputs_that_differ_in_rows_stay_by_themselves() -> None:
    odd = {"x": np.zeros((2, 1), np.float32), "factor": np.zeros(1, np.float32)}
    assert call_of(odd).rows == 0
    assert [len(batch) for batch in plan([[call_of(odd)], [call_of(odd)]], 16)] == [1, 1]


@pytest.mark.parametrize(
    "answer",
    [lambda o: {"y": o["y"][:1]}, lambda o: {"s": np.float32(1.0)}, lambda o: {"y": np.concatenate([o["y"]] * 2)}],
)
def test_an_answer_without_a_row_for_each_is_refused(answer: Any) -> None:
    with pytest.raises(EngineError, match="for a batch of 2 rows"):
        run_together(Doubling(answer), studies_of((1, 3), (1, 3)), 4)
