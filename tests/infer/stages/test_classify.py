"""Calibration: the formulas, monotony, refusals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import special

from dicomnode.infer.stages.classify import Isotonic, Platt, Temperature, probability

LOGITS = st.lists(st.floats(-50, 50), min_size=2, max_size=6).map(np.array)


@given(LOGITS, st.floats(0.2, 5))
def test_formulas(logits: np.ndarray, temperature: float) -> None:
    scaled = Temperature(kind="temperature", temperature=temperature)
    assert probability(logits, 1, "softmax", None) == pytest.approx(special.softmax(logits)[1], abs=1e-12)
    assert probability(logits, 0, "softmax", scaled) == pytest.approx(special.softmax(logits / temperature)[0])
    assert probability(logits, 0, "sigmoid", scaled) == pytest.approx(special.expit(logits[0] / temperature))
    platt = Platt(kind="platt", slope=1.7, offset=-0.4)
    assert probability(logits, 1, "sigmoid", platt) == pytest.approx(special.expit(1.7 * logits[1] - 0.4))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10), st.data())
def test_isotonic_keeps_the_ranking(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6))
    xs = sorted(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count, unique=True)))
    ys = sorted(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    table = Isotonic(kind="isotonic", scores=xs, probabilities=ys)
    got = [probability(np.array([v]), 0, "none", table) for v in sorted(values)]
    assert all(a <= b + 1e-12 for a, b in pairwise(got))
    assert probability(np.array([xs[0]]), 0, "none", table) == pytest.approx(ys[0])


def test_no_probability_is_refused() -> None:
    for score in (1.5, -0.2, float("nan")):
        with pytest.raises(ValueError, match="no probability"):
            probability(np.array([score]), 0, "none", None)


def test_wrong_tables_are_refused() -> None:
    for scores, probabilities in (((0, 1), (0.5, 0.4)), ((0, 0), (0, 1)), ((0, 1), (0, 0.5, 1)), ((0, 1), (0, 1.2))):
        with pytest.raises(ValidationError):
            Isotonic(kind="isotonic", scores=scores, probabilities=probabilities)
    with pytest.raises(ValidationError):
        Temperature(kind="temperature", temperature=0)
    with pytest.raises(ValidationError):
        Platt(kind="platt", slope=-1, offset=0)
