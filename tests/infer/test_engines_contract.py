"""Every engine against the same contract; those for GPUs on fakes that own numpy device memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicomnode.errors import EngineError
from dicomnode.infer import ort
from dicomnode.infer.engine import Engine, Limits, Ok, Session
from dicomnode.infer.isolated import inline
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.ort_gpu import OnnxRuntimeGpu
from dicomnode.infer.streaming import stream
from dicomnode.infer.trt import TensorRt
from dicomnode.infer.trt_build import Toolkit
from tests.infer.fake_cuda import FakeCuda
from tests.infer.fake_ort import FakeOrt
from tests.infer.fake_trt import FakeTrt
from tests.infer.infer_case import MODEL
from tests.infer.unet_case import unet

ONNX = (MODEL / "model.onnx").read_bytes()


def fake_tensorrt(folder: Path, version: str = "10.4.0", **options: Any) -> tuple[TensorRt, FakeTrt]:
    trt = FakeTrt(version, **options)
    engine = TensorRt(
        folder, Limits(max_batch=8), open_tools=lambda: Toolkit(trt, trt.cuda), run_child=inline, missing=lambda: None
    )
    return engine, trt


def fake_ort_gpu(cuda: FakeCuda | None, ort: FakeOrt | None = None) -> OnnxRuntimeGpu:
    def open_cuda() -> FakeCuda:
        if cuda is None:
            raise ImportError("no binding")
        return cuda

    ort = ort or FakeOrt(cuda)
    return OnnxRuntimeGpu(library=lambda: ort, cuda=open_cuda, run_child=inline, missing=lambda: None)


MAKERS: dict[str, Callable[[Path], Engine]] = {
    "onnxruntime-cpu": lambda folder: OnnxRuntimeCpu(),
    "onnxruntime-gpu": lambda folder: fake_ort_gpu(FakeCuda()),
    "onnxruntime-gpu without binding": lambda folder: fake_ort_gpu(None),
    "tensorrt 8.6": lambda folder: fake_tensorrt(folder, "8.6.0")[0],
    "tensorrt 10.4": lambda folder: fake_tensorrt(folder, "10.4.0")[0],
    "tensorrt 11": lambda folder: fake_tensorrt(folder, "11.3.0")[0],
}


@pytest.fixture(params=MAKERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return MAKERS[request.param](tmp_path)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    assert engine.probe() == Ok()
    made = engine.load(ONNX, threads=2)
    yield made
    made.close()


def hu(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3072, shape).astype(np.float32)


def reference(batch: np.ndarray) -> np.ndarray:
    return OnnxRuntimeCpu().load(ONNX, threads=1).run({"hu": batch})["air"]


def test_same_voxels_as_the_reference_for_one_batch_after_another(session: Session) -> None:
    batches = [hu(n, 4, 1, 16, 24) for n in range(5)] + [hu(9, 2, 1, 32, 8), hu(10, 4, 1, 16, 24)]
    found = [out["air"] for out in stream(session, ({"hu": b} for b in batches))]
    for batch, air in zip(batches, found, strict=True):
        assert air.dtype == np.uint8
        np.testing.assert_array_equal(air, reference(batch))


def test_outputs_belong_to_the_caller(session: Session) -> None:
    batch = hu(1, 2, 1, 16, 16)
    first = session.run({"hu": batch})["air"]
    kept = first.copy()
    first[:] = 7
    second = session.run({"hu": hu(2, 2, 1, 16, 16)})["air"]
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], kept)
    np.testing.assert_array_equal(second, reference(hu(2, 2, 1, 16, 16)))


def test_wrong_inputs_are_engine_errors_and_the_session_goes_on(session: Session) -> None:
    with pytest.raises(EngineError):
        session.run({"wrong": hu(1, 2, 1, 16, 16)})
    with pytest.raises(EngineError):
        session.run({"hu": hu(1, 2, 1, 16, 16).astype(np.float64)})
    batch = hu(3, 2, 1, 16, 16)
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))


def test_a_closed_session_says_so(engine: Engine) -> None:
    engine.probe()
    session = engine.load(ONNX)
    assert session.engine.startswith(engine.name)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run({"hu": hu(1, 2, 1, 16, 16)})


def test_garbage_is_an_engine_error(engine: Engine) -> None:
    engine.probe()
    with pytest.raises((EngineError, Exception)) as caught:
        engine.load(b"not a model")
    assert type(caught.value).__name__ in ("EngineError", "BundleError")


def test_a_session_may_move_to_another_thread(session: Session) -> None:
    """The builder thread opens it and proves it, the worker's thread uses it."""
    batch, found = hu(4, 3, 1, 16, 16), []
    thread = threading.Thread(target=lambda: found.append(session.run({"hu": batch})["air"]))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], reference(batch))
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))


def test_a_network_of_many_layers(engine: Engine) -> None:
    engine.probe()
    onnx = unet()
    session, wanted = engine.load(onnx), OnnxRuntimeCpu().load(onnx)
    for shape in ((4, 1, 16, 24), (2, 1, 32, 32)):
        batch = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found = session.run({"x": batch})["p"]
        np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(found, wanted.run({"x": batch})["p"], rtol=1e-3, atol=1e-4)
    session.close()


def test_a_more_urgent_job_between_two_batches_uses_the_same_session(session: Session) -> None:
    """Streams are nested then; each gets its own outputs, whichever slots the other one had taken."""
    outer = [hu(n, 4, 1, 16, 16) for n in range(6)]
    inner = [hu(20 + n, 2, 1, 32, 16) for n in range(4)]
    for number, air in enumerate(stream(session, ({"hu": b} for b in outer))):
        np.testing.assert_array_equal(air["air"], reference(outer[number]))
        if number in (1, 3, 5):
            found = list(stream(session, ({"hu": b} for b in inner)))
            for batch, out in zip(inner, found, strict=True):
                np.testing.assert_array_equal(out["air"], reference(batch))


def test_batches_of_a_stream_share_the_threads_and_a_single_one_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    open_session = ort._opened

    def opening(library: Any, onnx: bytes, threads: int) -> Any:
        opened.append(threads)
        return open_session(library, onnx, threads)

    monkeypatch.setattr(ort, "_opened", opening)
    session = OnnxRuntimeCpu().load(ONNX, threads=4)
    batches = [{"hu": hu(n, 2, 1, 16, 16)} for n in range(3)]
    session.run(batches[0])
    assert len(list(stream(session, batches[:1]))) == 1 and not list(stream(session, []))
    assert opened == [4]
    for _ in range(2):
        for batch, found in zip(batches, stream(session, iter(batches)), strict=True):
            np.testing.assert_array_equal(found["air"], reference(batch["hu"]))
    assert [n for n in opened if n != 1] == [4, 2], "the second one once; the reference has one thread"
    session.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream(session, batches))
