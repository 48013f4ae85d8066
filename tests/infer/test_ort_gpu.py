"""onnxruntime on the GPU: no silent fallback, pinned copies, the share of memory, what went wrong."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dicomnode.errors import EngineError
from dicomnode.infer import ort_gpu
from dicomnode.infer.cuda import CudaError
from dicomnode.infer.engine import Ok, Rejected
from dicomnode.infer.ort_gpu import OnnxRuntimeGpu, missing_here
from tests.infer import fake_ort
from tests.infer.fake_cuda import FakeCuda
from tests.infer.fake_ort import FakeOrt
from tests.infer.test_engines_contract import ONNX, fake_ort_gpu, hu, reference


def test_the_probe_model_is_one_relu() -> None:
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])  # noqa: E731
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "t", [value("x")], [value("y")])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    assert onnx.load_from_string(ort_gpu.TINY) == model


def test_silent_fallback_to_the_cpu_is_found_in_the_probe_and_at_load() -> None:
    engine = OnnxRuntimeGpu(library=fake_ort.silent_fallback, missing=lambda: None)  # in a child
    answer = engine.probe()
    assert isinstance(answer, Rejected) and answer.code == "PROVIDER_MISSING"
    assert "CPUExecutionProvider" in answer.text
    later = fake_ort_gpu(FakeCuda(), ort := FakeOrt())
    assert later.probe() == Ok()
    ort.providers = ()  # a library went missing since
    with pytest.raises(EngineError) as caught:
        later.load(ONNX)
    assert caught.value.code == "PROVIDER_MISSING"


def test_a_probe_that_crashes() -> None:
    answer = OnnxRuntimeGpu(library=fake_ort.segfault, missing=lambda: None).probe()
    assert isinstance(answer, Rejected) and answer.code == "PROBE_CRASHED" and "SIGSEGV" in answer.text


def test_nothing_is_loaded_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = missing_here()
    assert answer is not None and answer.code == "LIB_MISSING"
    monkeypatch.setattr(ort_gpu, "_installed", lambda name: True)
    answer = missing_here()
    assert answer is not None and answer.code == "VERSION_SKEW"
    monkeypatch.setattr(ort_gpu, "_installed", lambda name: name == "onnxruntime-gpu")
    monkeypatch.setattr(ort_gpu, "driver_library", lambda: None)
    answer = missing_here()
    assert answer is not None and answer.code == "NO_DRIVER"


def test_share_of_memory_and_no_tf32() -> None:
    cuda = FakeCuda()
    engine = fake_ort_gpu(cuda, ort := FakeOrt(cuda))
    engine.load(ONNX).close()
    assert ort.options["gpu_mem_limit"] == str(int(0.8 * cuda.found.memory))
    assert ort.options["use_tf32"] == "0"


def test_buffers_are_kept_and_released() -> None:
    cuda = FakeCuda()
    session = fake_ort_gpu(cuda).load(ONNX)
    for n in range(4):
        batch = hu(n, 2, 1, 16, 16)
        np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))
    assert cuda.calls["pinned"] == 2
    session.close()
    assert not cuda.hosts and not cuda.pending and cuda.balanced


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("Failed to allocate memory for requested buffer of size 99", "OOM"),
        ("CUDA failure 700: an illegal memory access was encountered", "DEVICE_LOST"),
        ("Non-zero status code returned while running Conv node", "RUN_FAILED"),
    ],
)
def test_errors_of_a_run(words: str, code: str) -> None:
    cuda = FakeCuda()
    session = fake_ort_gpu(cuda, FakeOrt(cuda, fail=words)).load(ONNX)
    with pytest.raises(EngineError) as caught:
        session.run({"hu": hu(1, 2, 1, 16, 16)})
    assert caught.value.code == code


def test_errors_of_a_copy() -> None:
    cuda = FakeCuda()
    session = fake_ort_gpu(cuda).load(ONNX)
    cuda.fail["copy_in"] = CudaError("copy to device", 719, "unspecified launch failure")
    with pytest.raises(EngineError) as caught:
        session.run({"hu": hu(1, 2, 1, 16, 16)})
    assert caught.value.code == "DEVICE_LOST"
