"""How the volume reaches the network: an identity network must give the volume back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dicomnode.errors import EngineError, UnsuitableSeries
from dicomnode.infer.stages.blending import starts, weight_map
from dicomnode.infer.stages.network import Network, run_network
from tests.infer.stages.stage_case import FakeSession, identity

SHAPES = st.tuples(*[st.integers(1, 11)] * 3)


def network(**reach: object) -> Network:
    more = {k: reach.pop(k) for k in ("flips", "scores", "outputs", "aggregate", "dtype") if k in reach}
    return Network(model="m.onnx", input="x", **{"outputs": ("y",), **more}, reach=reach)


def silent(step: str, share: float) -> None:
    assert step == "inference"
    assert 0 <= share <= 1


def volume(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(8).integers(-1000, 1000, shape).astype(np.int16)


@settings(max_examples=40)
@given(
    SHAPES,
    st.tuples(*[st.integers(3, 6)] * 3),
    st.floats(0, 0.7),
    st.sampled_from(["gaussian", "constant"]),
    st.sampled_from(["monai", "even"]),
    st.integers(1, 4),
    st.sets(st.integers(0, 2)),
)
def test_patches_of_an_identity_are_the_volume(
    shape: tuple, size: tuple, overlap: float, blend: str, placing: str, batch: int, flips: set
) -> None:
    values = volume(shape)
    spec = network(
        kind="patches", size=size, overlap=overlap, blend=blend, placing=placing, batch=batch, flips=tuple(flips)
    )
    session = FakeSession(identity)
    got = run_network(spec, session, values, silent).dense["y"]
    assert got.shape == (1, *shape)
    np.testing.assert_allclose(got[0], values, atol=2e-3)
    assert all(s[0] <= batch and s[2:] == size for s in session.shapes)


@given(SHAPES, st.integers(0, 2), st.integers(1, 5), st.sampled_from([1, 3, 5]), st.booleans())
def test_slices_and_neighbours_of_an_identity_are_the_volume(
    shape: tuple, axis: int, batch: int, channels: int, flip: bool
) -> None:
    values = volume(shape)
    flips = ((axis + 1) % 3,) if flip else ()
    for reach in ({"kind": "slices"}, {"kind": "neighbours", "channels": channels}):
        spec = network(**reach, axis=axis, batch=batch, flips=flips)
        got = run_network(spec, FakeSession(identity), values, silent).dense["y"]
        np.testing.assert_array_equal(got[0], values)


def test_neighbours_are_the_slices_around_and_repeat_at_the_ends() -> None:
    values = np.arange(5, dtype=np.int16)[:, None, None] * np.ones((1, 2, 3), np.int16)
    seen = []

    def look(batch: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(batch[:, :, 0, 0].copy())
        return {"y": batch[:, :1]}

    run_network(network(kind="neighbours", channels=3, batch=2), FakeSession(look), values, silent)
    assert np.concatenate(seen).tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4]]


@given(SHAPES, st.integers(1, 4))
def test_whole_volume_is_padded_and_cut(shape: tuple, multiple: int) -> None:
    session = FakeSession(identity)
    got = run_network(network(kind="whole", multiple=multiple), session, volume(shape), silent).dense["y"]
    np.testing.assert_array_equal(got[0], volume(shape))
    assert all(n % multiple == 0 for n in session.shapes[0][2:])


def test_flips_average_what_the_network_says_of_the_mirrored_input() -> None:
    """A network that adds the column index: over both directions the mean of i and n - 1 - i."""

    def slanted(batch: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": batch + np.arange(batch.shape[-1], dtype=np.float32)}

    values = volume((3, 4, 5))
    for reach in ({"kind": "whole"}, {"kind": "slices"}, {"kind": "patches", "size": (3, 4, 5)}):
        got = run_network(network(**reach, flips=(2,)), FakeSession(slanted), values, silent).dense["y"][0]
        np.testing.assert_allclose(got, values + 2.0, atol=1e-3)
    session = FakeSession(slanted)
    run_network(network(kind="whole", flips=(0, 1, 2)), session, values, silent)
    assert len(session.shapes) == 8


def test_channels_keep_their_order() -> None:
    def two(batch: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": np.concatenate([batch, -2 * batch, batch + 1], axis=1)}

    values = volume((5, 6, 7))
    for reach in ({"kind": "whole"}, {"kind": "slices", "axis": 1}, {"kind": "patches", "size": (4, 4, 4)}):
        got = run_network(network(**reach), FakeSession(two), values, silent).dense["y"]
        np.testing.assert_allclose(got, np.stack([values, -2.0 * values, values + 1.0]), atol=5e-3)


@given(st.integers(1, 200), st.integers(1, 64), st.floats(0, 0.95), st.sampled_from(["monai", "even"]))
def test_windows_cover_everything_and_stay_inside(size: int, window: int, overlap: float, placing: str) -> None:
    found = starts(size, window, overlap, placing)
    covered = np.zeros(max(size, window), bool)
    for at in found:
        covered[at : at + window] = True
    assert covered.all()
    assert found == sorted(found)
    assert found[0] == 0 and found[-1] + window == max(size, window)


def test_windows_are_monais_and_nnunets() -> None:
    assert starts(100, 40, 0.5, "monai") == [0, 20, 40, 60]
    assert starts(101, 40, 0.25, "monai") == [0, 30, 60, 61]
    assert starts(110, 64, 0.5, "even") == [0, 23, 46]  # nnU-Net's own unit test has these numbers
    assert starts(90, 64, 0.5, "even") == [0, 26]


@given(st.tuples(*[st.integers(1, 24)] * 3), st.floats(0.05, 1))
def test_weights_are_positive_symmetric_and_highest_in_the_middle(size: tuple, sigma: float) -> None:
    weights = weight_map(size, "gaussian", sigma)
    assert weights.dtype == np.float32
    assert weights.min() >= np.float32(1e-3)
    np.testing.assert_array_equal(weights, weights[::-1, ::-1, ::-1])
    assert weights.max() == weights[tuple(n // 2 for n in size)]


def test_weights_are_the_gaussian() -> None:
    got = weight_map((9, 8, 8), "gaussian", 0.125)
    i = np.arange(8) - 3.5
    line = np.exp(-(i**2) / 2)
    assert got[4, 3, 4] == pytest.approx(line[3] * line[4], rel=1e-6)
    assert got[0, 0, 0] == np.float32(1e-3)
    assert np.all(weight_map((3, 3, 3), "constant", 0.125) == 1)


def test_blending_weights_sum_to_one() -> None:
    """A network that answers 1: whatever the weights, their normalised sum is 1 everywhere."""
    spec = network(kind="patches", size=(4, 5, 3), overlap=0.6, batch=3)
    got = run_network(spec, FakeSession(lambda x: {"y": np.ones_like(x)}), volume((9, 11, 8)), silent).dense["y"]
    np.testing.assert_allclose(got, 1, atol=1e-6)


def test_scores_are_put_together() -> None:
    def scores(batch: np.ndarray) -> dict[str, np.ndarray]:
        return {"s": batch.reshape(len(batch), -1).max(axis=1, keepdims=True) * [[1.0, -1.0]]}

    values = np.arange(6, dtype=np.int16)[:, None, None] * np.ones((1, 2, 2), np.int16)
    spec = network(kind="slices", batch=4, outputs=(), scores=("s",))
    assert run_network(spec, FakeSession(scores), values, silent).scores["s"].tolist() == [2.5, -2.5]
    spec = network(kind="slices", batch=4, outputs=(), scores=("s",), aggregate="max")
    assert run_network(spec, FakeSession(scores), values, silent).scores["s"].tolist() == [5.0, 0.0]
    spec = network(kind="whole", outputs=(), scores=("s",), flips=(1,))
    assert run_network(spec, FakeSession(scores), values, silent).scores["s"].tolist() == [5.0, -5.0]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (lambda x: {"z": x}, "BUILD_FAILED"),
        (lambda x: {"y": x[..., 1:]}, "BUILD_FAILED"),
        (lambda x: {"y": x[:, 0]}, "BUILD_FAILED"),
        (lambda x: {"y": np.float32(1).reshape(())}, "BUILD_FAILED"),
        (lambda x: {"y": np.where(x > 0, np.nan, x)}, "GOLDEN_MISMATCH"),
    ],
)
@pytest.mark.parametrize("reach", [{"kind": "whole"}, {"kind": "slices"}, {"kind": "patches", "size": (2, 2, 2)}])
def test_wrong_answers_are_errors(answer: object, code: str, reach: dict) -> None:
    with pytest.raises(EngineError) as caught:
        run_network(network(**reach), FakeSession(answer), volume((4, 4, 4)), silent)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_time_and_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsuitableSeries, match="windows"):
        spec = network(kind="patches", size=(2, 2, 2), max_patches=10)
        run_network(spec, FakeSession(identity), volume((9, 9, 9)), silent)
    monkeypatch.setattr("dicomnode.infer.stages.network.MAX_ANSWER_BYTES", 100)
    for reach in ({"kind": "slices"}, {"kind": "patches", "size": (2, 2, 2)}):
        with pytest.raises(UnsuitableSeries, match="limit"):
            run_network(network(**reach), FakeSession(identity), volume((9, 9, 9)), silent)


def test_contradictions_are_refused() -> None:
    for wrong in (
        {"kind": "neighbours", "channels": 2},
        {"kind": "slices", "flips": (0,)},
        {"kind": "patches", "size": (0, 1, 1)},
        {"kind": "patches", "size": (4, 4, 4), "scores": ("s",)},
        {"kind": "whole", "outputs": ()},
        {"kind": "whole", "flips": (1, 1)},
        {"kind": "surprise"},
    ):
        with pytest.raises(ValidationError):
            network(**wrong)


def test_half_precision_input() -> None:
    session = FakeSession(lambda x: {"y": x} if x.dtype == np.float16 else {})
    got = run_network(network(kind="slices", dtype="float16"), session, volume((2, 3, 3)), silent).dense["y"]
    assert got.dtype == np.float16
