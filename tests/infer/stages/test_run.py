"""A bundle of schema 2 from folder to Analysis, its golden gate, and ct-lung in the new schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicomnode.errors import EngineError
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import golden_volume, open_model
from dicomnode.infer.manifest import Manifest
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.stages.golden import finding_problems, statistics
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.network import Answers
from dicomnode.infer.stages.run import run_staged
from tests.infer.infer_case import MODEL, golden_report
from tests.infer.stages.bundle_case import CODE, golden, manifest, mean_score, npy, segment, two_channels, write
from tests.infer.stages.stage_case import make_volume

CPU = OnnxRuntimeCpu()


def ball(shape: tuple[int, int, int] = (16, 40, 36), at: tuple[float, ...] = (30.0, 40.0, 36.0)) -> np.ndarray:
    """A ball of 20 mm at ``at`` on the golden grid of 4 x 2 x 2 mm, 500 HU in -500 HU."""
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, (4.0, 2.0, 2.0), strict=True)), indexing="ij")
    return np.where((z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 <= 20**2, 500, -500).astype(np.int16)


def build(folder: Path, data: dict[str, Any], onnx: bytes, cases: dict[str, np.ndarray]) -> Path:
    """Write the bundle with golden cases as the CPU engine gives them now."""
    files = {"model.onnx": onnx, **{f"golden/{n}.npy": npy(v) for n, v in cases.items()}}
    listed = {name: "0" * 64 for name in files}
    outputs = data["outputs"]
    golden_cases = []
    for name, values in cases.items():
        case = golden(name)
        placeholder = {
            **case,
            **({"labels": case["input"]} if outputs.get("segments") else {}),
            "findings": {f["key"]: 0.5 for f in outputs.get("findings", ())},
            "probability_maps": {p["key"]: case["input"] for p in outputs.get("probability_maps", ())},
        }
        parsed = StagedManifest.model_validate({**data, "files": listed, "golden": [placeholder]})
        kept: dict[str, Any] = {}

        def inspect(answers: Answers, kept: dict[str, Any] = kept) -> None:
            kept.update(statistics(answers))

        volume = make_volume(values, np.array(case["affine"]))
        analysis = run_staged(parsed, CPU.load(onnx), volume, inspect=inspect)
        case["statistics"] = kept
        if analysis.labels is not None:
            case["labels"] = f"golden/{name}.labels.npy"
            files[case["labels"]] = npy(analysis.labels)
            case["measurements"] = {f"lesion.{m.key}": m.value for m in analysis.measurements}
        case["findings"] = {f.key: f.probability for f in analysis.findings}
        case["probability_maps"] = {}
        for found in analysis.probability_maps:
            case["probability_maps"][found.key] = f"golden/{name}.{found.key}.npy"
            files[f"golden/{name}.{found.key}.npy"] = npy(found.values)
        golden_cases.append(case)
    return write(folder, {**data, "golden": golden_cases}, files)


def test_slices_of_a_multi_frame_object_keep_their_frame_numbers() -> None:
    """Without them the writer of results refuses two slices of one instance."""
    parsed = StagedManifest.model_validate(
        {
            **manifest(),
            "files": {"model.onnx": "0" * 64, "golden/one.npy": "0" * 64},
            "golden": [{**golden("one"), "labels": "golden/one.npy"}],
        }
    )
    volume = replace(make_volume(ball(), np.diag([4.0, 2.0, 2.0, 1.0])), source_frames=tuple(range(16, 0, -1)))
    analysis = run_staged(parsed, CPU.load(two_channels()), volume)
    assert analysis.source_frames == tuple(range(16, 0, -1)) and len(analysis.source_uids) == 16


CASES = {"one": ball(), "two": ball((12, 30, 30), (20.0, 30.0, 24.0))}
MAPS = [{"key": "p_lesion", "name": CODE, "output": "y", "channel": 1}]


def segmentation() -> dict[str, Any]:
    data = manifest()
    data["outputs"]["probability_maps"] = MAPS
    return data


def classification() -> dict[str, Any]:
    return manifest(
        preprocess=[{"step": "window", "center": 0, "width": 2000}, {"step": "resize", "size": [8, 16, 16]}],
        engine={"model": "model.onnx", "input": "x", "scores": ["s"], "reach": {"kind": "whole"}},
        activations=[],
        decision=None,
        postprocess=[],
        outputs={
            "findings": [
                {"key": "dense", "name": CODE, "output": "s", "index": 0, "activation": "softmax", "threshold": 0.6},
                {"key": "thin", "name": CODE, "output": "s", "index": 1, "activation": "sigmoid",
                 "calibration": {"kind": "temperature", "temperature": 0.25}, "threshold": 0.5, "text": "test"},
                {"key": "plain", "name": CODE, "output": "s", "index": 0, "activation": "sigmoid"},
            ]
        },
    )  # fmt: skip


def test_segmentation_bundle_runs_and_passes_its_gate(tmp_path: Path) -> None:
    path = build(tmp_path, segmentation(), two_channels(), CASES)
    ready = open_model(path, CPU)
    assert ready.report.passed
    analysis = run_bundle(ready.bundle, ready.session, golden_volume_of(ready.bundle, 0))
    truth = CASES["one"] > 0
    assert analysis.labels is not None
    assert analysis.labels.dtype == np.uint8 and analysis.labels.flags.c_contiguous
    dice = 2 * (truth & (analysis.labels == 1)).sum() / (truth.sum() + analysis.labels.sum())
    assert dice > 0.97
    values = {m.key: m.value for m in analysis.measurements}
    assert values["volume_ml"] == pytest.approx(4 / 3 * np.pi * 20**3 / 1000, rel=0.04)
    assert values["diameter_mm"] == pytest.approx(40, abs=2.5)
    found = analysis.probability_maps[0]
    assert found.values.dtype == np.float16 and found.values.shape == truth.shape
    assert float(found.values[truth].mean()) > float(found.values[~truth].mean()) + 0.1
    assert analysis.findings == ()
    assert ready.identity.parameters["schema_version"] == 2


def golden_volume_of(bundle: Any, index: int) -> Any:
    from dicomnode.infer.stages.golden import case_volume

    return case_volume(bundle.manifest.golden[index], bundle.read)


def test_classification_bundle(tmp_path: Path) -> None:
    path = build(tmp_path, classification(), mean_score(), CASES)
    ready = open_model(path, CPU)
    analysis = run_bundle(ready.bundle, ready.session, golden_volume_of(ready.bundle, 0))
    assert analysis.labels is None and analysis.segments == ()
    mean = float(np.mean((CASES["one"].astype(float) + 1000) / 2000))
    by_key = {f.key: f for f in analysis.findings}
    assert list(by_key) == ["dense", "thin", "plain"]
    assert by_key["plain"].probability == pytest.approx(1 / (1 + np.exp(-mean)), abs=0.01)
    assert by_key["plain"].value is None and by_key["plain"].threshold is None
    assert by_key["dense"].probability == pytest.approx(1 / (1 + np.exp(-2 * mean)), abs=0.01)
    assert by_key["dense"].value is not None and by_key["dense"].value.value == "52101004"
    assert by_key["thin"].probability == pytest.approx(1 / (1 + np.exp(4 * mean)), abs=0.01)
    assert by_key["thin"].value is not None and by_key["thin"].value.meaning == "Absent"
    assert by_key["thin"].text == "test"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("seg", lambda c: c["measurements"].update({"lesion.volume_ml": 1.0}), "volume_ml is"),
        ("seg", lambda c: c["measurements"].pop("lesion.feret_mm"), "other measurements"),
        ("seg", lambda c: c["statistics"]["y"][1].__setitem__(0, 0.5), "channel 1 of output y"),
        ("seg", lambda c: c["statistics"]["y"].pop(), "2 channels, expected 1"),
        ("seg", lambda c: c.update(labels="golden/zero.npy"), "another label"),
        ("seg", lambda c: c.update(probability_maps={"p_lesion": "golden/flat.npy"}), "map p_lesion differ"),
        ("cls", lambda c: c["findings"].update(dense=c["findings"]["dense"] + 0.011), "dense is"),
        ("cls", lambda c: c["findings"].update(thin=0.99, dense=0.1), "ranks above"),
    ],
)
def test_gate_sees_it(tmp_path: Path, kind: str, change: Any, message: str) -> None:
    data, onnx = (segmentation(), two_channels()) if kind == "seg" else (classification(), mean_score())
    path = build(tmp_path, data, onnx, {"one": CASES["two"]})
    written = json.loads((path / "manifest.json").read_text())
    extra = {
        "golden/zero.npy": npy(np.zeros((12, 30, 30), np.uint8)),
        "golden/flat.npy": npy(np.zeros((12, 30, 30), np.float16)),
    }
    change(written["golden"][0])
    files = {n: (path / n).read_bytes() for n in written["files"]}
    path = write(tmp_path / "b", written, {**files, **(extra if kind == "seg" else {})})
    report = golden_report(load_bundle(path), CPU)
    assert not report.passed
    assert message in "; ".join(report.cases[0].problems)
    with pytest.raises(EngineError) as caught:
        open_model(path, CPU)
    assert caught.value.code == "GOLDEN_MISMATCH"


def test_a_golden_case_that_is_no_series_for_the_steps_is_a_problem_of_the_case(tmp_path: Path) -> None:
    """It was an exception that only a worker expects: the bundle could be neither judged nor refused."""
    data = segmentation()
    path = build(tmp_path, data, two_channels(), {"one": CASES["two"]})
    written = json.loads((path / "manifest.json").read_text())
    written["preprocess"][1]["max_voxels"] = 10
    files = {n: (path / n).read_bytes() for n in written["files"]}
    report = golden_report(load_bundle(write(tmp_path / "b", written, files)), CPU)
    assert not report.passed and "the limit is 10" in report.cases[0].problems[0]


def test_other_network_of_the_same_shape_does_not_pass(tmp_path: Path) -> None:
    path = build(tmp_path, segmentation(), two_channels(), CASES)
    written = json.loads((path / "manifest.json").read_text())
    files = {n: (path / n).read_bytes() for n in written["files"]}
    for onnx, message in (
        (two_channels(slope=1.01), "channel 1"),
        (two_channels(slope=0.0), "expected|channel 1|Dice"),
    ):
        other = write(tmp_path / message[:3], written, {**files, "model.onnx": onnx})
        with pytest.raises(EngineError, match=message):
            open_model(other, CPU)


def test_ranking() -> None:
    case = StagedManifest.model_validate(
        {**classification(), "files": {"model.onnx": "0" * 64, "golden/one.npy": "0" * 64},
         "golden": [golden(findings={"dense": 0.505, "thin": 0.5, "plain": 0.1})]}
    ).golden[0]  # fmt: skip
    assert finding_problems(case, {"dense": 0.501, "thin": 0.5009, "plain": 0.1}) == []
    assert finding_problems(case, {"dense": 0.5, "thin": 0.501, "plain": 0.1}) == ["thin ranks above dense"]


def staged_ct_lung() -> StagedManifest:
    """models/ct-lung, said in schema 2."""
    old = json.loads((MODEL / "manifest.json").read_text())
    first, *rest = old["postprocess"]
    return StagedManifest.model_validate(
        {
            **{k: old[k] for k in ("identity", "licence", "intended_use", "input", "files")},
            "schema_version": 2,
            "preprocess": [old["preprocess"][0]],
            "engine": {
                "model": "model.onnx", "input": "hu", "outputs": ["air"], "reach": {"kind": "slices", "batch": 16}
            },
            "decision": first,
            "postprocess": rest,
            "outputs": old["outputs"],
            "golden": old["golden"],
        }
    )  # fmt: skip


def test_ct_lung_in_schema_2_gives_the_same_bytes() -> None:
    bundle = load_bundle(MODEL)
    assert isinstance(bundle.manifest, Manifest)
    staged = staged_ct_lung()
    session = CPU.load(bundle.read("model.onnx"))
    for case in bundle.manifest.golden:
        volume = golden_volume(bundle, case)
        old, new = run_bundle(bundle, session, volume), run_staged(staged, session, volume)
        assert old.labels is not None and new.labels is not None
        np.testing.assert_array_equal(new.labels, old.labels)
        assert new.measurements == old.measurements
        assert new.segments == old.segments
        assert new.notes == old.notes


def test_labels_that_are_no_segment_are_an_error() -> None:
    data = {**manifest(), "files": {n: "0" * 64 for n in ("model.onnx", "golden/one.npy")}}
    data["golden"] = [golden(labels="golden/one.npy")]
    data["decision"] = {"step": "argmax", "output": "y", "labels": [0, 9]}
    parsed = StagedManifest.model_validate(data)
    with pytest.raises(EngineError, match="no segment"):
        run_staged(parsed, CPU.load(two_channels()), make_volume(CASES["two"], np.array(golden()["affine"])))


def test_map_without_activation_is_an_error() -> None:
    data = {**segmentation(), "activations": [], "files": {n: "0" * 64 for n in ("model.onnx", "golden/one.npy")}}
    data["golden"] = [golden(labels="golden/one.npy", probability_maps={"p_lesion": "golden/one.npy"})]
    parsed = StagedManifest.model_validate(data)
    with pytest.raises(EngineError, match="activation"):
        run_staged(parsed, CPU.load(two_channels(slope=5)), make_volume(CASES["two"], np.array(golden()["affine"])))


def test_segments_not_found_keep_their_number() -> None:
    data = {**manifest(), "files": {n: "0" * 64 for n in ("model.onnx", "golden/one.npy")}}
    data["golden"] = [golden(labels="golden/one.npy")]
    data["outputs"] = {**data["outputs"], "segments": [segment(1, "a"), segment(2, "b")]}
    data["decision"] = {"step": "argmax", "output": "y", "labels": [0, 2]}
    analysis = run_staged(
        StagedManifest.model_validate(data),
        CPU.load(two_channels()),
        make_volume(CASES["two"], np.array(golden()["affine"])),
    )
    assert [(s.number, s.label) for s in analysis.segments] == [(1, "a"), (2, "b")]
    assert analysis.labels is not None
    assert set(np.unique(analysis.labels)) == {0, 2}
    assert [(m.key, m.value) for m in analysis.measurements if m.segment == 1] == [("volume_ml", 0.0)]
    assert len([m for m in analysis.measurements if m.segment == 2]) == 4
