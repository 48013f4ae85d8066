"""Several series as inputs of one network: on one grid, as channels or as inputs of their own; golden cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from onnx import TensorProto, helper
from pydantic import ValidationError

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.stages.inputs import MoreInput, further_channels, sampled
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.network import Network, run_network
from dicomnode.infer.stages.run import run_staged
from dicomnode.infer.volume import Volume
from tests.infer.infer_case import golden_report
from tests.infer.stages.bundle_case import golden, manifest, npy, onnx_bytes, two_channels, write
from tests.infer.stages.stage_case import make_affine, make_frame, make_volume, on_grid, phantom, to_sitk

CPU = OnnxRuntimeCpu()
OBLIQUE = np.array([[0.8, 0.6, 0.0], [-0.36, 0.48, 0.8], [0.48, -0.64, 0.6]]).T
REACHES: list[dict[str, Any]] = [
    {"kind": "slices", "batch": 3},
    {"kind": "slices", "axis": 1, "batch": 5},
    {"kind": "patches", "size": [8, 8, 8]},
    {"kind": "whole", "multiple": 8},
]


def test_sampling_agrees_with_simpleitk_on_an_oblique_grid() -> None:
    values = phantom()
    volume = make_volume(values, make_affine(OBLIQUE, (1.5, 0.9, 0.8), (3.0, -4.0, 5.0)))
    onto = make_frame(np.zeros((14, 12, 10), np.int16), make_affine(spacing=(2.0, 1.1, 1.2), origin=(8.0, 2.0, 14.0)))
    got, covered = sampled(volume, onto, -7.0)
    wanted = on_grid(to_sitk(values, volume.affine), onto, sitk.sitkLinear, -7.0)
    matrix = np.linalg.inv(volume.affine) @ onto.affine
    at = np.stack(np.meshgrid(*map(np.arange, onto.shape), indexing="ij"), axis=-1) @ matrix[:3, :3].T + matrix[:3, 3]
    within = np.all((at >= 0) & (at <= np.array(values.shape) - 1), axis=-1)
    assert 0.2 < within.mean() < 1.0 and covered == pytest.approx(within.mean(), abs=0.1)
    assert np.abs(got - wanted)[within].max() < 1e-3 * np.ptp(values)
    assert (got[~within] == -7.0).all()


class Echo:
    """Gives the difference of its two series back, whichever way they come."""

    engine = "echo"

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def run(self, inputs: Any) -> Any:
        assert tuple(inputs) == self.names and all(v.dtype == np.float32 for v in inputs.values())
        parts = list(inputs.values()) if len(inputs) > 1 else np.split(inputs["x"], 2, axis=1)
        return {"y": parts[0] - parts[1]}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("inputs", [(), ("x", "flair")])
def test_channels_or_inputs_of_their_own(reach: dict[str, Any], inputs: tuple[str, ...]) -> None:
    first, second = phantom(seed=1).astype(np.float32), phantom(seed=2).astype(np.float32)
    spec = Network(model="m", input="x", inputs=inputs, outputs=("y",), reach=reach, flips=(2,))
    answers = run_network(spec, Echo(inputs or ("x",)), first, lambda *_: None, [second])
    assert answers.dense["y"].shape == (1, *first.shape)
    np.testing.assert_allclose(answers.dense["y"][0], first - second, atol=1e-2)


def test_neighbours_of_each_series_are_channels() -> None:
    first, second = phantom(seed=1), phantom(seed=2)
    shapes = []

    class Session(Echo):
        def run(self, inputs: Any) -> Any:
            shapes.append(inputs["x"].shape)
            return {"y": inputs["x"][:, 1:2] - inputs["x"][:, 4:5]}

    spec = Network(model="m", input="x", outputs=("y",), reach={"kind": "neighbours", "channels": 3, "batch": 24})
    answers = run_network(spec, Session(("x",)), first, lambda *_: None, [second])
    assert shapes == [(24, 6, 30, 28)]
    np.testing.assert_array_equal(answers.dense["y"][0], first.astype(np.float32) - second.astype(np.float32))


def spec(**more: Any) -> MoreInput:
    return MoreInput(name="flair", input=manifest()["input"], **more)


def test_its_own_steps_and_its_own_grid() -> None:
    second = make_volume(
        np.full((20, 20, 20), 300, np.int16), make_affine(spacing=(2.0, 2.0, 2.0), origin=(-5, -5, -5))
    )
    onto = make_frame(np.zeros((10, 12, 14), np.int16))
    scale = {"step": "scale_range", "low": 0, "high": 600, "out_low": -1, "out_high": 1}
    _, (channel,) = further_channels([spec(preprocess=[scale])], {"flair": second}, onto)
    assert channel.shape == (10, 12, 14)
    np.testing.assert_allclose(channel, 0.0, atol=1e-6)


@pytest.mark.parametrize(("shift", "code"), [(100.0, "LITTLE_OVERLAP"), (None, "MISSING_INPUT")])
def test_what_is_refused(shift: float | None, code: str) -> None:
    volumes = {} if shift is None else {"flair": make_volume(phantom(), make_affine(origin=(shift, 0, 0)))}
    with pytest.raises(UnsuitableSeries) as error:
        further_channels([spec()], volumes, make_frame(phantom()))
    assert error.value.code == code


def two_series(separate: bool) -> tuple[dict[str, Any], bytes]:
    """A lesion is where the first series is above the second: logits (0, x0 - x1)."""
    data = manifest(
        preprocess=[{"step": "orient", "axes": "RAS"}, {"step": "resample", "spacing_mm": [2.0, 2.0, 2.0]}],
        more_inputs=[{"name": "flair", "input": manifest()["input"], "preprocess": [], "fill": 0.0}],
    )
    concat = helper.make_node("Concat", ["zero", "d"], ["y"], axis=1)
    zero = helper.make_node("Mul", ["d", "nil"], ["zero"])
    if not separate:
        nodes = [
            helper.make_node("Split", ["x"], ["a", "b"], axis=1),
            helper.make_node("Sub", ["a", "b"], ["d"]),
            zero,
            concat,
        ]
        return data, onnx_bytes(nodes, ["y"], 5, {"nil": np.float32(0)})
    data["engine"] = {**data["engine"], "inputs": ["x", "flair"]}
    free = [f"d{i}" for i in range(5)]
    graph = helper.make_graph(
        [helper.make_node("Sub", ["x", "flair"], ["d"]), zero, concat],
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, free) for name in ("x", "flair")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("nil", TensorProto.FLOAT, [], [0.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return data, bytes(model.SerializeToString(deterministic=True))


def bundle(folder: Path, separate: bool, spoil: bool = False) -> tuple[Path, Volume, dict[str, Volume]]:
    first = np.full((16, 40, 36), -100, np.int16)
    first[5:11, 12:28, 10:26] = 400
    other = np.zeros((12, 20, 20), np.int16)
    affine, coarse = np.array(golden()["affine"]), make_affine(spacing=(6.0, 4.5, 4.0), origin=(-2.0, -2.0, -2.0))
    data, onnx = two_series(separate)
    case = golden()
    case["more"] = {"flair": {"input": "golden/flair.npy", "affine": coarse.tolist()}}
    files = {"model.onnx": onnx, "golden/one.npy": npy(first), "golden/flair.npy": npy(other)}
    listed = dict.fromkeys(files, "0" * 64)
    parsed = StagedManifest.model_validate({**data, "files": listed, "golden": [{**case, "labels": "golden/one.npy"}]})
    volume, more = make_volume(first, affine), {"flair": make_volume(other, coarse)}
    analysis = run_staged(parsed, CPU.load(onnx), volume, more=more)
    assert analysis.labels is not None
    np.testing.assert_array_equal(analysis.labels, (first > 0).astype(np.uint8))
    case |= {"labels": "golden/labels.npy", "measurements": {f"lesion.{m.key}": m.value for m in analysis.measurements}}
    files["golden/labels.npy"] = npy(analysis.labels)
    if spoil:
        files["golden/flair.npy"] = npy(np.full_like(other, 1000))
    return write(folder, {**data, "golden": [case]}, files), volume, more


@pytest.mark.parametrize("separate", [False, True])
def test_bundle_with_two_series_passes_its_golden_case(tmp_path: Path, separate: bool) -> None:
    path, _, _ = bundle(tmp_path, separate)
    model = open_model(path, CPU)
    assert model.report.passed
    assert "more_inputs" in model.identity.parameters
    model.close()


def test_golden_case_sees_the_further_input(tmp_path: Path) -> None:
    path, _, _ = bundle(tmp_path, separate=False, spoil=True)
    assert not golden_report(load_bundle(path), CPU).passed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more_inputs": [spec().model_dump(mode="json")] * 2}, "more_inputs: names must differ"),
        ({"more_inputs": [spec().model_dump(mode="json")]}, "more must have an input for each of more_inputs"),
        ({"engine": {**manifest()["engine"], "inputs": ["x", "z"]}}, "engine.inputs: one for the first series"),
        ({"engine": {**manifest()["engine"], "inputs": ["z"]}}, "inputs: begins with input"),
    ],
)
def test_manifest_that_makes_no_sense(change: dict[str, Any], said: str) -> None:
    files = {"model.onnx": "0" * 64, "golden/one.npy": "0" * 64}
    with pytest.raises(ValidationError, match=said):
        StagedManifest.model_validate(
            {**manifest(**change), "files": files, "golden": [{**golden(), "labels": "golden/one.npy"}]}
        )


def test_results_of_bundles_with_one_series_keep_their_identity() -> None:
    files = {"model.onnx": "0" * 64, "golden/one.npy": "0" * 64}
    parsed = StagedManifest.model_validate(
        {**manifest(), "files": files, "golden": [{**golden(), "labels": "golden/one.npy"}]}
    )
    assert "more_inputs" not in parsed.parameters() and "inputs" not in parsed.parameters()["engine"]


def masked(folder: Path, name: str, more_inputs: list[dict[str, Any]]) -> Path:
    """A bundle that labels what is above 0 HU, with a golden case; with a mask only within it."""
    values = np.full((16, 40, 36), -100, np.int16)
    values[5:11, 12:28, 10:26] = 400
    inside = np.zeros_like(values)
    inside[:, :, :18] = 1
    data = manifest(
        preprocess=[{"step": "resample", "spacing_mm": [4.0, 2.0, 2.0]}],
        engine={"model": "model.onnx", "input": "x", "outputs": ["y"], "reach": {"kind": "whole"}},
        more_inputs=more_inputs,
    )
    data["identity"] = {**data["identity"], "name": name}
    onnx = two_channels()
    case = golden()
    files = {"model.onnx": onnx, "golden/one.npy": npy(values)}
    if more_inputs:
        case["more"] = {"lung": {"input": "golden/lung.npy", "affine": case["affine"]}}
        files["golden/lung.npy"] = npy(inside)
    listed = dict.fromkeys(files, "0" * 64)
    parsed = StagedManifest.model_validate({**data, "files": listed, "golden": [{**case, "labels": "golden/one.npy"}]})
    affine = np.array(case["affine"])
    analysis = run_staged(
        parsed,
        CPU.load(onnx),
        make_volume(values, affine),
        more={"lung": make_volume(inside, affine)} if more_inputs else {},
    )
    assert analysis.labels is not None
    wanted = (values > 0) & (inside > 0) if more_inputs else values > 0
    np.testing.assert_array_equal(analysis.labels, wanted.astype(np.uint8))
    case |= {"labels": "golden/labels.npy", "measurements": {f"lesion.{m.key}": m.value for m in analysis.measurements}}
    files["golden/labels.npy"] = npy(analysis.labels)
    return write(folder, {**data, "golden": [case]}, files)


OUTSIDE = [{"name": "lung", "apply": "outside", "fill": -1000.0}]


def test_mask_blanks_what_lies_outside_it(tmp_path: Path) -> None:
    model = open_model(masked(tmp_path, "masked", OUTSIDE), CPU)
    assert model.report.passed
    model.close()


def test_mask_as_a_channel() -> None:
    onto = make_frame(np.zeros((6, 8, 10), np.int16), make_affine(spacing=(2.0, 2.0, 2.0)))
    mask = np.zeros((12, 16, 20), np.int16)
    mask[:6] = 1
    first, (channel,) = further_channels([MoreInput(name="lung")], {"lung": make_volume(mask)}, onto)
    assert first is onto.values and set(np.unique(channel)) == {0.0, 1.0}
    assert channel[:3].all() and not channel[3:].any()


@pytest.mark.parametrize("more", [{"input": manifest()["input"]}, {"preprocess": [{"step": "min_max"}]}])
def test_only_a_mask_blanks(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="apply outside is for a mask"):
        MoreInput(name="x", apply="outside", **more)
