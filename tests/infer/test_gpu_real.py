"""On a real NVIDIA GPU: golden cases and agreement of the engines with the reference (``-m gpu``).

Skipped with the reason where an engine cannot serve. The figures belong into README with GPU,
driver and versions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dicomnode.infer.choice import EngineChoice, engine_text
from dicomnode.infer.engine import Engine, Limits, Rejected
from dicomnode.infer.golden import golden_volume, open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.ort_gpu import OnnxRuntimeGpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.trt import TensorRt
from tests.infer.infer_case import MODEL
from tests.infer.unet_case import unet

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
LIMITS = Limits(max_batch=8)


def usable(engine: Engine) -> Engine:
    answer = engine.probe()
    if isinstance(answer, Rejected):
        pytest.skip(f"{engine.name} {answer.code}: {answer.text}")
    return engine


@pytest.fixture(params=["tensorrt", "onnxruntime-gpu"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    made = TensorRt(tmp_path, LIMITS) if request.param == "tensorrt" else OnnxRuntimeGpu(LIMITS)
    return usable(made)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def test_golden_cases_and_masks_of_the_shipped_model(engine: Engine) -> None:
    model = open_model(MODEL, engine)  # raises on a golden case out of tolerance
    reference = open_model(MODEL, OnnxRuntimeCpu())
    for case in model.bundle.manifest.golden:
        volume = golden_volume(model.bundle, case)
        found = run_bundle(model.bundle, model.session, volume)
        wanted = run_bundle(reference.bundle, reference.session, volume)
        for segment in wanted.segments:
            assert dice(found.labels == segment.number, wanted.labels == segment.number) >= 0.999
        for ours, theirs in zip(found.measurements, wanted.measurements, strict=True):
            assert abs(ours.value - theirs.value) <= 1e-3 * max(abs(theirs.value), 1.0)
    model.close()


def test_a_network_of_many_layers_agrees_for_every_shape(engine: Engine) -> None:
    """Two resolutions, skip connection, softmax: batches and shapes in turn, so that graphs are recaptured."""
    onnx = unet()
    session, reference = engine.load(onnx), OnnxRuntimeCpu().load(onnx)
    rng = np.random.default_rng(0)
    for shape in [(8, 1, 64, 64), (8, 1, 64, 64), (8, 1, 64, 64), (3, 1, 64, 64), (2, 1, 128, 96), (8, 1, 64, 64)]:
        batch = rng.normal(size=shape).astype(np.float32)
        found, wanted = session.run({"x": batch})["p"], reference.run({"x": batch})["p"]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        assert dice(found[:, 1] > 0.5, wanted[:, 1] > 0.5) >= 0.999
    session.close()


def test_the_choice_on_this_box_and_its_cache(tmp_path: Path) -> None:
    usable(TensorRt(tmp_path, LIMITS))
    for _ in range(2):  # the second time from the cache
        engines = (TensorRt(tmp_path, LIMITS), OnnxRuntimeGpu(LIMITS), OnnxRuntimeCpu())
        opened = EngineChoice("auto", engines, limits=LIMITS).open(MODEL, build=True)
        assert engine_text(opened.model) == "tensorrt fp32"
        opened.model.close()
    assert len(list((tmp_path / "engines").glob("*.plan"))) == 1
