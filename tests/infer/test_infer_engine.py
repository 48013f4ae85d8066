"""Choice of the engine, and the CPU engine itself."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import pytest

from dicomnode.errors import EngineError
from dicomnode.infer.engine import Ok, Rejected, choose_engine
from dicomnode.infer.ort import OnnxRuntimeCpu
from tests.infer.infer_case import MODEL, FakeEngine

ONNX = (MODEL / "model.onnx").read_bytes()


def test_auto_falls_back_and_says_why() -> None:
    engine, rejections = choose_engine("auto")
    assert engine.name == "onnxruntime-cpu"
    assert [(r.engine, r.code) for r in rejections] == [
        ("tensorrt", "LIB_MISSING"),
        ("onnxruntime-gpu", "LIB_MISSING"),
    ]


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime-gpu", "nonsense"])
def test_named_engine_that_cannot_serve_is_an_error(name: str) -> None:
    with pytest.raises(EngineError) as caught:
        choose_engine(name)
    assert caught.value.code == "LIB_MISSING"


def test_none_can_serve() -> None:
    bad = FakeEngine(lambda hu: hu, Rejected("fake", "NO_DRIVER", "no driver"))
    with pytest.raises(EngineError, match="NO_DRIVER"):
        choose_engine("auto", [bad])
    assert choose_engine("fake", [FakeEngine(lambda hu: hu)])[1] == ()


def test_missing_library_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    engine = OnnxRuntimeCpu()
    answer = engine.probe()
    assert isinstance(answer, Rejected)
    assert answer.code == "LIB_MISSING"
    assert engine.version == ""
    with pytest.raises(EngineError):
        engine.load(ONNX)


def test_library_without_cpu_provider_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    answer = OnnxRuntimeCpu().probe()
    assert isinstance(answer, Rejected)
    assert answer.code == "PROVIDER_MISSING"


def test_session_runs_and_names_itself() -> None:
    assert OnnxRuntimeCpu().probe() == Ok()
    session = OnnxRuntimeCpu().load(ONNX, threads=1)
    hu = np.zeros((2, 1, 5, 5), np.float32)
    hu[0] = -900
    air = session.run({"hu": hu})["air"]
    assert air.dtype == np.uint8
    assert air[0].all()
    assert not air[1].any()
    assert session.engine == f"onnxruntime-cpu {onnxruntime.__version__}"
    with pytest.raises(EngineError):
        session.run({"wrong": hu})
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run({"hu": hu})


def test_garbage_model_is_an_engine_error() -> None:
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeCpu().load(b"not a model")
    assert caught.value.code == "BUILD_FAILED"


def test_threads_and_slabs_change_no_voxel() -> None:
    """Dyadic weights on integers: exact sums, whatever the order of additions."""
    hu = np.random.default_rng(1).integers(-1024, 3072, (9, 1, 65, 67)).astype(np.float32)
    one = OnnxRuntimeCpu().load(ONNX, threads=1).run({"hu": hu})["air"]
    two = OnnxRuntimeCpu().load(ONNX, threads=2)
    np.testing.assert_array_equal(one, two.run({"hu": hu})["air"])
    parts = [two.run({"hu": hu[i : i + 1]})["air"] for i in range(len(hu))]
    np.testing.assert_array_equal(one, np.concatenate(parts))
    pad = np.pad(hu[:, 0].astype(np.int64), ((0, 0), (1, 1), (1, 1)), mode="edge")
    total = sum(
        w * v * pad[:, r : r + 65, c : c + 67] for r, w in enumerate((1, 2, 1)) for c, v in enumerate((1, 2, 1))
    )
    np.testing.assert_array_equal(one[:, 0], total < -500 * 16)
