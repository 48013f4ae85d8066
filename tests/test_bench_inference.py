"""scripts/bench --inference: its verdicts, the networks with random weights, the double as another engine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from benchmarks import agreement, eager, gpu, graphs, inference, overhead, seg_encoding, subjects  # noqa: E402
from benchmarks.report import Figures, Goal, Section  # noqa: E402
from benchmarks.tools import Bench  # noqa: E402

from dicomnode.errors import BundleError  # noqa: E402
from dicomnode.infer.bundle import load_bundle  # noqa: E402
from dicomnode.infer.golden import open_model  # noqa: E402
from dicomnode.infer.ort import OnnxRuntimeCpu  # noqa: E402
from dicomnode.infer.purpose import check_clinical_at  # noqa: E402
from dicomnode.records import Analysis, Code, Measurement, SegmentDefinition  # noqa: E402

THING = Code("123037004", "SCT", "Anatomical Structure")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return graphs.write_bundles(tmp_path_factory.mktemp("graphs"), small=True)


def subject(path: Path) -> subjects.Subject:
    volume = subjects.volume_of(graphs.golden_input(), (3.0, 2.0, 2.0))
    return subjects.Subject(path.parent.name, load_bundle(path), volume)


@pytest.mark.parametrize("name", [graphs.UNET3D, graphs.DENSENET])
def test_random_networks_are_sound_and_refused_for_studies(small: dict[str, Path], name: str) -> None:
    model = open_model(small[name], OnnxRuntimeCpu())
    assert model.report.passed
    with pytest.raises(BundleError, match="for benchmarks only"):
        check_clinical_at(small[name])
    half = OnnxRuntimeCpu().load(model.bundle.read("fp16mixed.onnx"))
    shape = (1, 1, 16, 16, 16) if name == graphs.UNET3D else (2, 3, 32, 32)
    batch = np.random.default_rng(1).uniform(0, 1, shape).astype(np.float32)
    whole, narrow = model.session.run({"x": batch})["y"], half.run({"x": batch})["y"]
    assert 0 < np.abs(whole - narrow).max() < 0.02 * np.abs(whole).max()
    model.close()


def test_random_networks_are_the_same_each_time(small: dict[str, Path], tmp_path: Path) -> None:
    again = graphs.write_bundles(tmp_path, small=True)
    for name, path in small.items():
        files = sorted(p.relative_to(path) for p in path.rglob("*.onnx"))
        assert files
        assert all((path / f).read_bytes() == (again[name] / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", [graphs.UNET3D, graphs.DENSENET])
def test_the_bare_loop_gets_the_tensors_of_the_worker(small: dict[str, Path], tmp_path: Path, name: str) -> None:
    section = overhead.measure(Bench(tmp_path, quick=True, repeat=2), [subject(small[name])])
    row = section.tables[0].rows[0]
    assert row["tensors"] == (2 * 5 * 5 if name == graphs.UNET3D else 3)  # windows of 16; batches of 8
    assert [goal.what for goal in section.goals] == [f"worker against a bare onnxruntime loop ({name})"]


def test_overhead() -> None:
    assert overhead.overhead(1.05, 1.0) == pytest.approx(0.05)
    assert overhead.overhead(0.5, 1.0) == -0.5


def analysis(labels: np.ndarray, value: float = 100.0) -> Analysis:
    present = [int(n) for n in np.unique(labels) if n]
    return Analysis(
        labels=labels,
        source_uids=("1",),
        segments=tuple(SegmentDefinition(n, f"segment {n}", THING, THING) for n in present),
        measurements=tuple(Measurement("v", THING, value, THING, n) for n in present),
        engine="test",
    )


def test_agreement_sees_masks_measurements_and_what_is_missing() -> None:
    labels = np.zeros((1, 40, 50), np.uint8)
    labels[0, :20], labels[0, 20:] = 1, 2
    other = labels.copy()
    other[0, 0, :4] = 0
    same = agreement.compare(analysis(labels), analysis(labels))
    assert (same.dice, same.difference, same.good) == (1.0, 0.0, True)
    near = agreement.compare(analysis(other), analysis(labels))
    assert near.dice == pytest.approx(2 * 996 / 1996) and not near.good
    off = agreement.compare(analysis(labels, 100.2), analysis(labels))
    assert off.difference == pytest.approx(0.002) and not off.good
    assert agreement.compare(analysis(np.minimum(labels, 1)), analysis(labels)).dice == 0.0
    bare = replace(analysis(labels), measurements=())
    assert agreement.compare(bare, analysis(labels)).difference == 1.0


def test_segments_are_compared_by_label_not_by_number() -> None:
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, :2], labels[0, 2:] = 1, 2
    turned = analysis(np.array([0, 2, 1], np.uint8)[labels])
    swapped = replace(turned, segments=tuple(replace(s, label=f"segment {3 - s.number}") for s in turned.segments))
    assert agreement.compare(swapped, analysis(labels)).dice == 1.0


def test_other_settings_and_the_kserve_double_agree(small: dict[str, Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path, quick=True, repeat=1)
    section = agreement.measure(bench, [subject(small[graphs.DENSENET])])
    names = [row["other engine"] for row in section.tables[0].rows]
    assert names[:2] == ["onnxruntime, no optimisation, 1 thread", "KServe v2 double over HTTP"]
    assert all(goal.met for goal in section.goals)


@given(st.floats(0.001, 10), st.floats(0.001, 10))
def test_gpu_goals_are_ratios_of_medians(first: float, second: float) -> None:
    found = {g.what: g for g in gpu.goals({("ct-lung-unet", gpu.RT): first, ("ct-lung-unet", gpu.ORT): second}, "T4")}
    goal = found.pop(f"ct-lung-unet: {gpu.RT} against {gpu.ORT} (T4)")
    assert goal.met == (second / first >= 2.0)
    assert all(g.met is None for g in found.values())


def test_without_a_gpu_nothing_is_claimed(
    tmp_path: Path, small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "")
    bench = Bench(tmp_path, quick=True, repeat=1)
    section = gpu.measure(bench, [subject(small[graphs.DENSENET])])
    assert {g.met for g in section.goals} == {None}
    assert "no NVIDIA driver" in bench.skipped[0]


def test_seg_is_measured_on_two_lungs_of_the_right_size(tmp_path: Path) -> None:
    labels = seg_encoding.lungs(31, 64)
    assert set(np.unique(labels)) == {0, 1, 2}
    assert 0.05 < (labels > 0).mean() < 0.4
    assert labels[:, :, :32].max() == 1 and (labels[:, :, 32:] == 2).sum() == (labels == 2).sum()
    section = seg_encoding.measure(Bench(tmp_path, quick=True, repeat=1))
    ours, theirs = section.tables[0].rows
    assert ours["frames"] == theirs["frames"] > 20
    assert section.goals[0].met is None  # the goal is for the full size


def test_part_of_a_volume_keeps_its_slices() -> None:
    volume = subjects.volume_of(np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7), (1.0, 1.0, 1.0))
    cut = subjects.part(volume, (3, 100, 2))
    assert cut.values.shape == (3, 6, 2)
    assert cut.source_uids == volume.source_uids[1:4]
    np.testing.assert_array_equal(cut.values, volume.values[1:4, :, 2:4])


def test_parts_are_one_section() -> None:
    goal = Goal("w", "g", "m", True)
    parts = {"a": Section([Figures("t", [])], [goal], {"x": 1}), "b": Section([], [goal], {"y": 2})}
    whole = inference.joined(parts)
    assert (len(whole.tables), len(whole.goals), whole.samples) == (1, 2, {"a": {"x": 1}, "b": {"y": 2}})


@pytest.mark.parametrize("name", [graphs.UNET3D, graphs.DENSENET])
def test_eager_torch_computes_the_same(small: dict[str, Path], name: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is no dependency: scripts/requirements/train.txt")
    onnx = (small[name] / "model.onnx").read_bytes()
    shape = (1, 1, 16, 16, 16) if name == graphs.UNET3D else (2, 3, 32, 32)
    batch = np.random.default_rng(1).uniform(0, 1, shape).astype(np.float32)
    found = eager.EagerTorch(onnx, "cpu").run({"x": batch})["y"]
    np.testing.assert_allclose(found, OnnxRuntimeCpu().load(onnx).run({"x": batch})["y"], rtol=1e-3, atol=1e-4)
