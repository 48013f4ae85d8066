"""On a real NVIDIA GPU: golden cases and agreement of the engines with the reference (``-m gpu``).

Skipped with the reason where an engine cannot serve. The figures belong into README with GPU,
driver and versions (``scripts/bench --inference``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dicomnode.infer.bundle import Bundle, load_bundle
from dicomnode.infer.choice import FP16_FILE, EngineChoice, engine_text
from dicomnode.infer.engine import Engine, Limits, Rejected, Session
from dicomnode.infer.golden import check_golden, golden_volume, model_file, open_model
from dicomnode.infer.manifest import Manifest
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.ort_gpu import OnnxRuntimeGpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.stages.golden import case_volume
from dicomnode.infer.trt import TensorRt
from dicomnode.infer.volume import Volume
from tests.infer.infer_case import MODEL, ROOT
from tests.infer.unet_case import unet

sys.path.append(str(ROOT / "scripts"))
from benchmarks import graphs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
LIMITS = Limits(max_batch=8)
LEARNED = ROOT / "models" / "ct-lung-unet" / "1.0.0"
QUALITY = ROOT / "models" / "cxr-quality" / "1.1.0"
BUNDLES = ["ct-lung", "ct-lung-unet", "cxr-quality", graphs.UNET3D, graphs.DENSENET]


def usable(engine: Engine) -> Engine:
    answer = engine.probe()
    if isinstance(answer, Rejected):
        pytest.skip(f"{engine.name} {answer.code}: {answer.text}")
    return engine


@pytest.fixture(params=["tensorrt", "onnxruntime-gpu"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    made = TensorRt(tmp_path, LIMITS) if request.param == "tensorrt" else OnnxRuntimeGpu(LIMITS)
    return usable(made)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = graphs.write_bundles(tmp_path_factory.mktemp("graphs"))
    return {"ct-lung": MODEL, "ct-lung-unet": LEARNED, "cxr-quality": QUALITY, **made}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def volumes(bundle: Bundle) -> list[Volume]:
    manifest = bundle.manifest
    if isinstance(manifest, Manifest):
        return [golden_volume(bundle, case) for case in manifest.golden]
    return [case_volume(case, bundle.read) for case in manifest.golden]


def agrees(bundle: Bundle, session: Session, least: float) -> None:
    """Masks, measurements and probabilities are those of the reference."""
    name = model_file(bundle)
    assert name is not None
    reference = OnnxRuntimeCpu().load(bundle.read(name))
    for volume in volumes(bundle):
        found, wanted = run_bundle(bundle, session, volume), run_bundle(bundle, reference, volume)
        for segment in wanted.segments:
            assert dice(found.labels == segment.number, wanted.labels == segment.number) >= least
        for ours, theirs in zip(found.measurements, wanted.measurements, strict=True):
            assert abs(ours.value - theirs.value) <= 1e-3 * max(abs(theirs.value), 1.0)
        for ours, theirs in zip(found.findings, wanted.findings, strict=True):
            assert abs((ours.probability or 0) - (theirs.probability or 0)) <= 0.01


@pytest.mark.parametrize("name", BUNDLES)
def test_golden_cases_and_results_of_every_bundle(engine: Engine, name: str, bundles: dict[str, Path]) -> None:
    model = open_model(bundles[name], engine)  # raises on a golden case out of tolerance
    agrees(model.bundle, model.session, 0.99 if name == graphs.UNET3D else 0.999)  # random weights decide by a hair
    model.close()


@pytest.mark.parametrize("name", ["ct-lung-unet", graphs.DENSENET])
def test_half_precision_of_the_bundles_that_ship_it(tmp_path: Path, name: str, bundles: dict[str, Path]) -> None:
    engine = usable(TensorRt(tmp_path, LIMITS))
    assert isinstance(engine, TensorRt)
    bundle = load_bundle(bundles[name])
    onnx = bundle.read(FP16_FILE)
    engine.build(onnx, "fp16")
    session = engine.load(onnx, precision="fp16")
    assert check_golden(bundle, session).passed
    agrees(bundle, session, 0.999)
    session.close()


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
    for path, wanted in ((MODEL, "tensorrt fp32"), (LEARNED, "tensorrt fp16")):
        for _ in range(2):  # the second time from the cache
            engines = (TensorRt(tmp_path, LIMITS), OnnxRuntimeGpu(LIMITS), OnnxRuntimeCpu())
            opened = EngineChoice("auto", engines, limits=LIMITS).open(path, build=True)
            assert engine_text(opened.model) == wanted
            opened.model.close()
    assert len(list((tmp_path / "engines").glob("*.plan"))) == 2
