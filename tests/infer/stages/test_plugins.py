"""Python pipelines: an installed package's entry point runs; anything else is refused with a hint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicomnode.errors import BundleError, EngineError
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.stages.golden import case_volume
from dicomnode.infer.stages.plugins import find_pipeline
from tests.infer.infer_case import golden_report
from tests.infer.stages.bundle_case import CODE, golden, manifest, measurement, npy, segment, two_channels, write

SOURCE = '''
import numpy as np
from dicomnode.infer.stages.plugins import PipelineAnswer

class Bright:
    """Voxels above a threshold; the network, where there is one, has the last word."""

    def analyse(self, volume, *, session, parameters, report):
        report("inference", 0.5)
        mask = volume.values > parameters["above"]
        if session is not None:
            y = session.run({"x": volume.values[None, None].astype(np.float32)})["y"][0]
            mask &= y[1] > y[0]
        share = float(mask.mean())
        return PipelineAnswer(
            labels=mask.astype(parameters.get("dtype", "uint8")),
            probabilities={"bright": share} if not parameters.get("forget") else {},
            maps={"p": mask.astype(np.float32)},
            notes=("looked at " + str(mask.size) + " voxels",),
        )

INSTANCE = Bright()

def factory():
    return Bright()

def nonsense():
    return object()

def broken():
    raise RuntimeError("secret of a patient")
'''
POINTS = """[dicomnode.pipelines]
bright = house_bright:Bright
bright-instance = house_bright:INSTANCE
bright-factory = house_bright:factory
nonsense = house_bright:nonsense
broken = house_bright:broken
missing = house_bright_absent:Bright
"""


def install(folder: Path, name: str = "house-bright", version: str = "1.2") -> None:
    """What pip leaves of a package: the module and its metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(POINTS)
    (folder / "house_bright.py").write_text(SOURCE)


@pytest.fixture(autouse=True)
def _house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    find_pipeline.cache_clear()
    yield
    find_pipeline.cache_clear()
    sys.modules.pop("house_bright", None)


VALUES = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 8)).astype(np.int16)
MASK = VALUES > 100


def bundle(folder: Path, name: str = "bright", network: bool = False, **parameters: Any) -> Path:
    share = float((MASK & (VALUES > 300)).mean() if network else MASK.mean())
    labels = (MASK & (VALUES > 300) if network else MASK).astype(np.uint8)
    data = manifest(
        preprocess=[],
        engine={"model": "model.onnx", "input": "x", "outputs": ["y"], "reach": {"kind": "whole"}} if network else None,
        activations=[],
        decision=None,
        postprocess=[],
        pipeline={"name": name, "parameters": {"above": 100, **parameters}},
        outputs={
            "segments": [segment(1, "bright")],
            "measurements": [measurement("volume_ml", kind="volume_ml")],
            "findings": [{"key": "bright", "name": CODE, "threshold": 0.1}],
            "probability_maps": [{"key": "p", "name": CODE}],
        },
        golden=[
            golden(
                labels="golden/labels.npy",
                measurements={"bright.volume_ml": float(labels.sum()) * 0.016},
                findings={"bright": share},
                probability_maps={"p": "golden/p.npy"},
            )
        ],
    )
    files = {"golden/one.npy": npy(VALUES), "golden/labels.npy": npy(labels), "golden/p.npy": npy(labels.astype("<f2"))}
    return write(folder, data, {**files, **({"model.onnx": two_channels(threshold=300)} if network else {})})


@pytest.mark.parametrize("name", ["bright", "bright-instance", "bright-factory"])
@pytest.mark.parametrize("network", [False, True])
def test_installed_pipeline_runs(tmp_path: Path, name: str, network: bool) -> None:
    ready = open_model(bundle(tmp_path, name, network), OnnxRuntimeCpu())
    assert ready.report.passed
    manifest_ = ready.bundle.manifest
    analysis = run_bundle(ready.bundle, ready.session, case_volume(manifest_.golden[0], ready.bundle.read))  # type: ignore[arg-type]
    assert analysis.engine.startswith(f"pipeline {name} (house-bright 1.2)")
    assert ("onnxruntime" in analysis.engine) is network
    np.testing.assert_array_equal(analysis.labels == 1, MASK & (VALUES > 300) if network else MASK)
    assert analysis.findings[0].value is not None
    assert analysis.probability_maps[0].values.dtype == np.float16
    assert analysis.notes == ("looked at 192 voxels",)
    identity = ready.identity
    assert identity.parameters["installed"] == {"distribution": "house-bright", "version": "1.2"}
    assert identity.parameters["pipeline"]["parameters"] == {"above": 100}
    ready.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no installed package offers it"),
        ("nonsense", "no method analyse"),
        ("broken", "cannot be loaded .RuntimeError"),
        ("missing", "cannot be loaded .ModuleNotFoundError"),
    ],
)
def test_others_are_refused_with_a_hint(tmp_path: Path, name: str, message: str) -> None:
    path = bundle(tmp_path, name)
    load_bundle(path)  # data only: whether it can run is asked when it shall
    with pytest.raises(BundleError, match=message) as caught:
        open_model(path, OnnxRuntimeCpu())
    assert caught.value.hint
    assert "secret" not in str(caught.value)


def test_what_is_offered_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"Offered here: .*bright-factory"):
        open_model(bundle(tmp_path, "absent"), OnnxRuntimeCpu())


def test_two_packages_with_one_name(tmp_path: Path) -> None:
    install(tmp_path / "site", "house-other", "9")
    with pytest.raises(BundleError, match=r"house-bright 1\.2, house-other 9"):
        open_model(bundle(tmp_path), OnnxRuntimeCpu())


@pytest.mark.parametrize(
    ("parameters", "message"), [({"dtype": "int32"}, "labels int32"), ({"forget": True}, "must give probabilities")]
)
def test_answers_of_another_shape_do_not_pass(tmp_path: Path, parameters: dict[str, Any], message: str) -> None:
    path = bundle(tmp_path, **parameters)
    report = golden_report(load_bundle(path), OnnxRuntimeCpu())
    assert message in "; ".join(report.cases[0].problems)
    with pytest.raises(EngineError):
        open_model(path, OnnxRuntimeCpu())


def test_code_in_a_bundle_is_still_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    (path / "house.py").write_text("x = 1")
    with pytest.raises(BundleError, match="not allowed"):
        load_bundle(path)
