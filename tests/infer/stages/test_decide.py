"""Activations against scipy, decisions against the plain formula, on either grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy import special

from dicomnode.errors import EngineError
from dicomnode.infer.stages.decide import Argmax, MaskFrom, Sigmoid, Softmax, Threshold
from dicomnode.infer.stages.extent import CropForeground
from dicomnode.infer.stages.frame import restore
from dicomnode.infer.stages.resample import Resample
from tests.infer.stages.stage_case import make_frame, make_volume

LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), *[st.integers(1, 4)] * 3), elements=st.floats(-90, 90, width=32)
)


@given(LOGITS)
def test_activations_are_scipys(logits: np.ndarray) -> None:
    soft = Softmax(step="softmax", output="y").apply(logits)
    np.testing.assert_allclose(soft, special.softmax(logits.astype(float), axis=0), atol=1e-6)
    np.testing.assert_allclose(soft.sum(axis=0), 1, atol=1e-5)
    sig = Sigmoid(step="sigmoid", output="y").apply(logits)
    np.testing.assert_allclose(sig, special.expit(logits.astype(float)), atol=1e-6)
    assert soft.dtype == sig.dtype == np.float32


@given(LOGITS)
def test_decisions_on_an_unchanged_grid(logits: np.ndarray) -> None:
    volume = make_volume(np.zeros(logits.shape[1:], np.int16))
    for on in ("source", "network"):
        got = Argmax(step="argmax", output="y", on=on).apply(volume, logits, ()).labels
        np.testing.assert_array_equal(got, logits.argmax(axis=0))
        probabilities = special.expit(logits)
        got = Threshold(step="threshold", output="y", threshold=0.5, on=on).apply(volume, probabilities, ()).labels
        wanted = np.where(probabilities.max(axis=0) >= 0.5, probabilities.argmax(axis=0) + 1, 0)
        np.testing.assert_array_equal(got, wanted)


@given(LOGITS)
def test_structures_that_overlap_are_said_to(logits: np.ndarray) -> None:
    volume = make_volume(np.zeros(logits.shape[1:], np.int16))
    probabilities = special.expit(logits)
    state = Threshold(step="threshold", output="y", threshold=0.5).apply(volume, probabilities, ())
    reached = (probabilities >= 0.5).sum(axis=0)
    if not (reached > 1).any():
        assert state.notes == ()
        return
    share = (reached > 1).sum() / (reached > 0).sum()
    assert state.notes == (
        f"Structures overlap in {share:.1%} of what was marked; each voxel was given to the most probable one",
    )


def test_labels_of_channels() -> None:
    channels = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    volume = make_volume(np.zeros((3, 1, 1), np.int16))
    state = Argmax(step="argmax", output="y", labels=(0, 7, 2)).apply(volume, channels, ())
    assert state.labels is not None
    assert state.labels.ravel().tolist() == [0, 7, 2]
    assert state.mask.ravel().tolist() == [False, True, True]
    with pytest.raises(EngineError, match="3 channels"):
        Argmax(step="argmax", output="y", labels=(0, 1)).apply(volume, channels, ())


def test_source_decision_is_smoother_than_network_decision() -> None:
    """A sphere decided on a grid three times coarser: probabilities carry sub-voxel borders back."""
    z, y, x = np.meshgrid(*[np.arange(30.0) - 14.5] * 3, indexing="ij")
    distance = np.sqrt(z**2 + y**2 + x**2) - 10
    truth = distance < 0
    volume = make_volume(np.zeros(truth.shape, np.int16))
    coarse = Resample(step="resample", spacing_mm=(3, 3, 3)).apply(make_frame((-distance).astype(np.float32)))
    channels = special.expit(coarse.values)[np.newaxis]
    dice = {}
    for on in ("source", "network"):
        labels = Threshold(step="threshold", output="y", on=on).apply(volume, channels, coarse.undo).labels
        assert labels is not None
        dice[on] = 2 * (truth & (labels == 1)).sum() / (truth.sum() + labels.sum())
    assert dice["source"] > 0.97
    assert dice["source"] > dice["network"] + 0.02


def test_outside_of_a_crop_is_background() -> None:
    values = np.zeros((4, 5, 6), np.int16)
    values[1:3, 2:4, 2:5] = 5
    frame = CropForeground(step="crop_foreground").apply(make_frame(values))
    channels = np.stack([np.full(frame.shape, -9.0), np.full(frame.shape, 9.0)]).astype(np.float32)
    for decision in (
        Argmax(step="argmax", output="y"),
        Argmax(step="argmax", output="y", on="network"),
        Threshold(step="threshold", output="y", labels=(3, 1)),
    ):
        labels = decision.apply(make_volume(values), channels, frame.undo).labels
        np.testing.assert_array_equal(labels, values > 0)


def test_mask_for_the_mask_steps() -> None:
    values = np.zeros((2, 3, 4), np.int16)
    air = np.zeros((1, 2, 3, 4), np.uint8)
    air[0, 1] = 1
    state = MaskFrom(step="from_output", output="y").begin(make_volume(values), air, ())
    np.testing.assert_array_equal(state.mask, air[0].astype(bool))
    assert state.labels is None
    with pytest.raises(EngineError, match="2 channels"):
        MaskFrom(step="from_output", output="y").begin(make_volume(values), np.concatenate([air, air]), ())


def test_wrong_grid_is_an_error() -> None:
    with pytest.raises(EngineError):
        Argmax(step="argmax", output="y").apply(make_volume(np.zeros((3, 3, 3), np.int16)), np.zeros((2, 3, 3, 4)), ())
    with pytest.raises(ValidationError):
        Threshold(step="threshold", output="y", threshold=0)
    assert restore((), np.zeros((1, 1, 1)), "linear").shape == (1, 1, 1)
