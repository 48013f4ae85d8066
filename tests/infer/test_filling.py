"""Answers are written where they belong, whatever way the engine takes; what is wrong with one is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from dicomnode.errors import EngineError
from dicomnode.infer.batching import CappedSession
from dicomnode.infer.filling import FINITE_STEP, Answers, Call, calls, fill, finite, streamed
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.slabs import Slabs
from dicomnode.infer.steps import Cast, Clip

STEPS = [Clip(step="clip", low=-50, high=40), Cast(step="cast", dtype="float32")]


def network(op: str = "Neg", output: int = TensorProto.FLOAT, **more: Any) -> bytes:
    """y = op(x) of slabs (slices, 1, rows, columns)."""
    shape = ["n", 1, "r", "c"]
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], **more)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", output, None if op == "GlobalMaxPool" else shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def done(session: Any, values: np.ndarray, slices: int, names: Sequence[str] = ("y",)) -> dict[str, np.ndarray]:
    answers = Answers(names, values.shape)
    todo = calls("x", values, slices, Slabs(STEPS), answers)
    assert sum(1 for _ in fill(session, todo)) == len(todo)
    return answers.whole


@given(
    count=st.integers(1, 23),
    slices=st.integers(1, 9),
    threads=st.integers(1, 3),
    cap=st.integers(1, 12),
    kind=st.sampled_from([TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT32, TensorProto.BOOL]),
)
def test_every_slice_has_its_own_answer(count: int, slices: int, threads: int, cap: int, kind: int) -> None:
    """Straight from the engine, streamed because a type cannot be bound (BOOL), in parts because of the cap."""
    values = np.arange(count * 6, dtype=np.int16).reshape(count, 2, 3) - 40
    onnx = network("Cast", kind, to=kind)
    session = CappedSession(OnnxRuntimeCpu().load(onnx, threads=threads), cap)
    wanted = values.clip(-50, 40).astype(helper.tensor_dtype_to_np_dtype(kind))
    if kind == TensorProto.UINT8:
        wanted = values.clip(-50, 40).astype(np.float32).astype(np.int32).astype(np.uint8)
    np.testing.assert_array_equal(done(session, values, slices)["y"], wanted)


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize(("count", "threads"), [(2, 1), (12, 2)])
@pytest.mark.parametrize(
    ("onnx", "names", "code", "words"),
    [
        (network("Log"), ("y",), "GOLDEN_MISMATCH", "output y is not finite"),
        (network("GlobalMaxPool"), ("y",), "BUILD_FAILED", "dimensions"),
        (network(), ("y", "z"), "BUILD_FAILED", "no output z"),
    ],
    ids=["not finite", "another shape", "no such output"],
)
def test_an_answer_that_is_none(
    onnx: bytes, names: tuple[str, ...], code: str, words: str, count: int, threads: int, capped: bool
) -> None:
    session: Any = OnnxRuntimeCpu().load(onnx, threads=threads)
    values = np.arange(count * 6, dtype=np.int16).reshape(count, 2, 3) - 30
    with pytest.raises(EngineError, match=words) as caught:
        done(CappedSession(session, 16) if capped else session, values, 4, names)
    assert caught.value.code == code


class Filler:
    """Fills slabs of up to ``room`` slices; after ``fails_at`` calls its memory is too small for more than one."""

    engine = "filler 1"

    def __init__(self, fails_at: int, code: str = "OOM") -> None:
        self.fails_at, self.code, self.sizes = fails_at, code, []

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(inputs["x"]))
        if len(inputs["x"]) > 1:
            raise EngineError("run model", self.code, "too much")
        return {"y": -inputs["x"]}

    def fill(self, todo: Sequence[Call]) -> Iterator[None]:
        for number, call in enumerate(todo):
            if number == self.fails_at:
                raise EngineError("run model", self.code, "too much")
            call.take({"y": -call.make()["x"]})
            yield

    def close(self) -> None:
        self.fails_at = -1


@given(count=st.integers(4, 20), fails_at=st.integers(0, 4))
def test_what_is_left_after_too_little_memory_is_done_in_smaller_parts(count: int, fails_at: int) -> None:
    assume(count - 4 * fails_at != 1)  # one slice cannot be done in parts
    values = np.arange(count * 6, dtype=np.int16).reshape(count, 2, 3) - 40
    inner = Filler(fails_at)
    session: Any = CappedSession(inner, 16)
    np.testing.assert_array_equal(done(session, values, 4)["y"], -values.clip(-50, 40))
    assert (session.batch == 1) == bool(inner.sizes) == (fails_at < -(-count // 4))
    if inner.sizes:
        assert inner.sizes.count(1) == count - 4 * fails_at, "what was filled before is not computed again"


def test_another_fault_is_told() -> None:
    values = np.zeros((9, 2, 3), np.int16)
    with pytest.raises(EngineError, match="too much"):
        done(CappedSession(Filler(1, "DEVICE_LOST"), 16), values, 4)


FLOATS = hnp.arrays(
    st.sampled_from(["f2", "f4", "f8"]), st.integers(0, 40), elements=st.floats(allow_nan=True, width=16)
)


@given(FLOATS)
def test_finite_is_what_looking_at_each_says(values: np.ndarray) -> None:
    assert finite(values) == bool(np.isfinite(values).all())


def test_finite_at_the_ends_of_its_steps_and_of_floats() -> None:
    big = np.full(FINITE_STEP + 3, np.finfo(np.float32).max, np.float32)
    assert finite(big) and finite(-big), "their sum is no float32"
    for at in (0, FINITE_STEP - 1, FINITE_STEP, len(big) - 1):
        for bad in (np.nan, np.inf, -np.inf):
            some = np.zeros_like(big)
            some[at] = bad
            assert not finite(some)
    both = np.zeros(9, np.float32)
    both[2], both[5] = np.inf, -np.inf
    assert not finite(both) and finite(np.zeros((3, 0), np.float32)) and finite(np.full(3, 255, np.uint8))


@pytest.mark.parametrize("way", [fill, streamed])
def test_no_more_slabs_are_held_than_are_on_their_way(way: Callable[..., Iterator[None]]) -> None:
    session = OnnxRuntimeCpu().load(network(), threads=2)
    slabs = Slabs(STEPS)
    values = np.zeros((64, 4, 4), np.int16)
    made: dict[int, np.ndarray] = {}  # held, so that no address comes twice
    real = slabs._memory

    def counted(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        slab = real(shape, dtype)
        made.setdefault(slab.ctypes.data, slab)
        return slab

    slabs._memory = counted  # type: ignore[method-assign]
    assert sum(1 for _ in way(session, calls("x", values, 2, slabs, Answers(["y"], values.shape)))) == 32
    assert len(made) <= 6, "their memory is used again"
