"""MONAI bundles become bundles of ours: what is mapped, what is refused, end to end through the command line."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dicomnode import durable
from dicomnode.cli import app
from dicomnode.errors import BundleError, EngineError, NodeError
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.importing.build import import_monai
from dicomnode.infer.importing.config import Expression, resolve
from dicomnode.infer.importing.options import ImportOptions, read_options
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.stages.manifest import StagedManifest
from tests.infer.stages.bundle_case import CODE, mean_score, one_channel, two_channels
from tests.infer.stages.stage_case import make_affine, make_volume

# The layout of configs/inference.json as bundles of MONAI's model zoo have it (UNet for the spleen in CT).
INFERENCE: dict[str, Any] = {
    "imports": ["$import glob"],
    "bundle_root": ".",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "roi": [16, 16, 16],
    "network_def": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2},
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "monai.transforms.Orientationd", "keys": "image", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
            {
                "_target_": "ScaleIntensityRanged", "keys": "image",
                "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1, "clip": True,
            },
            {"_target_": "RandFlipd", "_disabled_": True},
            {"_target_": "EnsureTyped", "keys": "image"},
        ],
    },
    "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
    "inferer": {
        "_target_": "SlidingWindowInferer", "roi_size": "@roi", "sw_batch_size": 4, "overlap": 0.5, "mode": "gaussian",
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                "nearest_interp": False, "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1]},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@bundle_root + '/eval'"},
        ],
    },
}  # fmt: skip
METADATA: dict[str, Any] = {
    "version": "0.5.3",
    "monai_version": "1.3.0",
    "task": "spleen segmentation",
    "description": "Segmentation of the spleen in CT",
    "authors": "somebody",
    "intended_use": "Not for diagnosis",
    "eval_metrics": {"mean_dice": 0.96},
    "references": ["A paper"],
    "network_data_format": {
        "inputs": {"image": {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1}},
        "outputs": {"pred": {"num_channels": 2, "channel_def": {"0": "background", "1": "spleen"}}},
    },
}
OPTIONS: dict[str, Any] = {
    "name": "spleen",
    "manufacturer": "tests",
    "licence": "Apache-2.0",
    "segments": {"spleen": {"key": "spleen", "label": "Spleen", "category": CODE, "type": CODE}},
}


def monai_bundle(folder: Path, inference: Any = None, metadata: Any = None, onnx: bytes | None = None) -> Path:
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(inference or INFERENCE))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata or METADATA))
    (folder / "models" / "model.onnx").write_bytes(onnx or two_channels(threshold=0.7, slope=20))
    return folder


def convert(tmp_path: Path, options: Any = None, **parts: Any) -> StagedManifest:
    made = import_monai(
        monai_bundle(tmp_path / "monai", **parts), ImportOptions.model_validate(options or OPTIONS), tmp_path / "models"
    )
    manifest = load_bundle(made.path).manifest
    assert isinstance(manifest, StagedManifest)
    return manifest


def test_spleen_bundle_is_converted_step_by_step(tmp_path: Path) -> None:
    manifest = convert(tmp_path)
    assert [s.step for s in manifest.preprocess] == ["orient", "resample", "scale_range"]
    orient, resample, scale = (s.model_dump() for s in manifest.preprocess)
    assert orient["axes"] == "RAS"
    assert (resample["spacing_mm"], resample["order"], resample["align"]) == ((1.5, 1.5, 2.0), "linear", "centres")
    assert (scale["low"], scale["high"], scale["out_low"], scale["out_high"], scale["clip"]) == (-57, 164, 0, 1, True)
    assert manifest.engine is not None
    reach = manifest.engine.reach.model_dump()
    assert reach["size"] == (16, 16, 16) and reach["overlap"] == 0.5 and reach["blend"] == "gaussian"
    assert reach["batch"] == 4 and reach["sigma_scale"] == 0.125 and reach["placing"] == "monai"
    assert [a.step for a in manifest.activations] == ["softmax"]
    assert manifest.decision is not None
    assert manifest.decision.model_dump() == {"step": "argmax", "output": "y", "on": "source", "labels": (0, 1)}
    largest = manifest.postprocess[0].model_dump()
    assert (largest["step"], largest["keep"], largest["connectivity"]) == ("largest_components", 1, 26)
    assert largest["segments"] == (1,)
    assert (manifest.identity.name, manifest.identity.version) == ("spleen", "0.5.3")
    assert manifest.input.modality == "CT" and manifest.input.hounsfield
    assert [c.name for c in manifest.golden] == ["small", "large", "extreme"]
    assert all(len(c.statistics["y"]) == 2 for c in manifest.golden)
    assert "mean_dice (stated by the authors): 0.96" in (tmp_path / "models/spleen/0.5.3/MODEL_CARD.md").read_text()


def test_converted_bundle_finds_the_organ(tmp_path: Path) -> None:
    convert(tmp_path)
    ready = open_model(tmp_path / "models" / "spleen" / "0.5.3", OnnxRuntimeCpu())
    z, y, x = np.meshgrid(
        *(np.arange(n) * s for n, s in zip((20, 40, 40), (3.0, 2.0, 2.0), strict=True)), indexing="ij"
    )
    organ = ((z - 30) / 20) ** 2 + ((y - 40) / 25) ** 2 + ((x - 36) / 18) ** 2 <= 1
    volume = make_volume(np.where(organ, 150, 20).astype(np.int16), make_affine(spacing=(3.0, 2.0, 2.0)))
    analysis = run_bundle(ready.bundle, ready.session, volume)
    assert analysis.labels is not None
    dice = 2 * (organ & (analysis.labels == 1)).sum() / (organ.sum() + analysis.labels.sum())
    assert dice > 0.95
    assert analysis.measurements[0].value == pytest.approx(4 / 3 * np.pi * 20 * 25 * 18 / 1000, rel=0.05)


def changed(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        at: Any = config
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def before(*steps: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return changed(["preprocessing", "transforms"], [{"_target_": "Orientationd", "axcodes": "RAS"}, *steps])


def behind(*steps: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return changed(["postprocessing", "transforms"], list(steps))


ARGMAX = {"_target_": "AsDiscreted", "argmax": True}
REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (before({"_target_": "RandGaussianNoised"}), "RandGaussianNoised"),
    (before({"_target_": "Lambdad", "func": "$lambda x: x"}), "Lambdad"),
    (before({"_target_": "Spacingd", "pixdim": "$@a * 2"}), "Spacingd.pixdim is a Python expression"),
    (before({"_target_": "Spacingd", "pixdim": [1, 1]}), "a number or three"),
    (before({"_target_": "Spacingd", "pixdim": 1, "mode": "bicubic"}), "'bicubic' cannot be mapped"),
    (before({"_target_": "Spacingd", "pixdim": 1, "padding_mode": "zeros"}), "padding_mode = 'zeros'"),
    (before({"_target_": "Spacingd", "pixdim": 1, "surprise": 1}), "Spacingd.surprise"),
    (before({"_target_": "NormalizeIntensityd", "subtrahend": 3}), "both subtrahend and divisor"),
    (before({"_target_": "CropForegroundd", "select_fn": "$lambda x: x < 3"}), "select_fn"),
    (before({"_target_": "CropForegroundd", "margin": 4}), "margin = 4"),
    (before({"_target_": "Resized", "spatial_size": [9, 9, 9]}), "'area' cannot be mapped"),
    (before({"_target_": "ScaleIntensityRangePercentilesd", "lower": 1, "upper": 99, "b_min": 0, "b_max": 1,
             "relative": True}), "relative"),
    (before({"_target_": "Spacingd", "pixdim": "@nowhere"}), "'nowhere', which is not there"),
    (changed(["roi"], "@roi"), "refers to itself"),
    (changed(["preprocessing", "transforms"], [{"_target_": "Spacingd", "pixdim": 1}]), "no Orientationd"),
    (changed(["preprocessing", "transforms"], [{"_target_": "Spacingd", "pixdim": 1},
             {"_target_": "Orientationd", "axcodes": "RAS"}]), "comes after"),
    (changed(["preprocessing"], "$build()"), "no list of transforms"),
    (changed(["inferer", "_target_"], "SliceInferer"), "SliceInferer"),
    (changed(["inferer", "padding_mode"], "reflect"), "padding_mode"),
    (changed(["inferer", "roi_size"], [96, 96, -1]), "roi_size"),
    (behind(), "no AsDiscrete"),
    (behind({"_target_": "AsDiscreted", "threshold": True}), "must be a number"),
    (behind({"_target_": "AsDiscreted", "argmax": True, "to_onehot": 2}), "to_onehot = 2"),
    (behind({"_target_": "KeepLargestConnectedComponentd"}, ARGMAX), "before AsDiscrete"),
    (behind(ARGMAX, {"_target_": "MeanEnsembled"}), "MeanEnsembled"),
    (behind(ARGMAX, {"_target_": "KeepLargestConnectedComponentd", "applied_labels": [4]}), "are no segment"),
    (behind({"_target_": "Activationsd", "softmax": True, "sigmoid": True}), "one of softmax, sigmoid"),
    (behind({"_target_": "Activationsd", "sigmoid": True}, {"_target_": "AsDiscreted", "threshold": 0.5}),
     "threshold on 2 channels"),
    (before({"_target_": "Resized", "spatial_size": 9, "mode": "nearest"}), "'nearest' cannot be mapped"),
    (before({"_target_": "Resized", "spatial_size": 9.5, "mode": "trilinear"}), "counts voxels"),
    (before({"_target_": "RandFlipd", "_disabled_": "$1 == 1"}), "_disabled_ is a Python expression"),
    (before({"_target_": "RandFlipd", "_disabled_": "no"}), "RandFlipd before the network"),
    (before({"_target_": "Spacingd", "pixdim": 1, "_mode_": "callable"}), "_mode_ = 'callable'"),
    (changed(["inferer", "with_coord"], True), "with_coord = True"),
    (changed(["inferer", "extra_input_padding"], [1] * 6), "extra_input_padding"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_mapped_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    config = copy.deepcopy(INFERENCE)
    change(config)
    with pytest.raises(BundleError) as caught:
        convert(tmp_path, inference=config)
    assert message in str(caught.value)
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


def test_every_known_transform_becomes_its_step(tmp_path: Path) -> None:
    config = copy.deepcopy(INFERENCE)
    before(
        {"_target_": "SpacingD", "pixdim": [2, 2, -1], "mode": ["nearest"]},
        {"_target_": "CropForegroundd", "source_key": "image", "select_fn": "$lambda x: x > -500"},
        {"_target_": "ScaleIntensityRangePercentiles", "lower": 1, "upper": 99, "b_min": 0, "b_max": 1},
        {"_target_": "NormalizeIntensityDict", "nonzero": True, "channel_wise": True},
        {"_target_": "NormalizeIntensityd", "subtrahend": 0.1, "divisor": [0.5]},
        {"_target_": "ScaleIntensityd", "minv": -1, "maxv": 1},
        {"_target_": "Resized", "spatial_size": [24, 20, -1], "mode": "trilinear"},
        {"_target_": "Resized", "spatial_size": [24, 0, -1], "mode": "nearest-exact"},
        {"_target_": "RandFlipd", "_disabled_": " True "},
        {"_target_": "SpatialPadd", "spatial_size": [16, 16, 16]},
        {"_target_": "DivisiblePadd", "k": 4, "mode": "edge"},
    )(config)
    behind(
        {"_target_": "Activationsd", "sigmoid": True},
        {"_target_": "AsDiscreted", "threshold": 0.4},
        {"_target_": "Invertd", "nearest_interp": True, "transform": "@preprocessing"},
        {"_target_": "RemoveSmallObjectsd", "min_size": 500, "by_measure": True},
        {"_target_": "FillHolesd", "applied_labels": 1},
    )(config)
    config["inferer"] = {"_target_": "SimpleInferer"}
    metadata = copy.deepcopy(METADATA)
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "spleen"}
    manifest = convert(tmp_path, inference=config, metadata=metadata, onnx=one_channel())
    assert [s.step for s in manifest.preprocess] == [
        *(
            "orient",
            "resample",
            "crop_foreground",
            "percentiles",
            "zscore",
            "mean_std",
            "min_max",
            "resize",
            "resize",
            "pad",
            "pad",
        )
    ]
    assert manifest.preprocess[1].model_dump()["spacing_mm"] == (2.0, 2.0, None)
    assert manifest.preprocess[2].model_dump()["above"] == -500
    assert manifest.preprocess[4].model_dump()["over"] == "nonzero"
    decision = manifest.decision.model_dump() if manifest.decision else {}
    assert decision["on"] == "network" and decision["threshold"] == 0.4 and decision["labels"] == (1,)
    small, holes = (s.model_dump() for s in manifest.postprocess)
    assert small["keep"] is None and small["min_ml"] == 0.5
    assert holes["segments"] == (1,)


def test_classification(tmp_path: Path) -> None:
    config = copy.deepcopy(INFERENCE)
    config["inferer"] = {"_target_": "SimpleInferer"}
    behind({"_target_": "Activationsd", "softmax": True})(config)
    options = {k: v for k, v in OPTIONS.items() if k != "segments"}
    options["findings"] = [{"key": "dense", "name": CODE, "index": 1, "threshold": 0.5}]
    manifest = convert(tmp_path, options, inference=config, onnx=mean_score())
    assert manifest.outputs.findings[0].activation == "softmax"
    assert manifest.outputs.findings[0].output == "s"
    assert manifest.engine is not None and manifest.engine.scores == ("s",)
    assert all(0 < c.findings["dense"] < 1 for c in manifest.golden)


def test_missing_codes_and_wrong_facts_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no codes for channel 1 \(spleen\)"):
        convert(tmp_path, {**OPTIONS, "segments": {}})
    with pytest.raises(BundleError, match="liver"):
        convert(tmp_path, {**OPTIONS, "segments": {**OPTIONS["segments"], "liver": OPTIONS["segments"]["spleen"]}})
    two = copy.deepcopy(METADATA)
    two["network_data_format"]["inputs"]["image"]["num_channels"] = 4
    with pytest.raises(BundleError, match="several images or channels"):
        convert(tmp_path, metadata=two)
    with pytest.raises(BundleError, match="semantic version"):
        convert(tmp_path, metadata={**METADATA, "version": "1.0"})
    with pytest.raises(BundleError, match="4 dimensions"):
        convert(tmp_path, onnx=two_channels(dimensions=4))
    with pytest.raises(NodeError, match=r"model\.onnx"):
        convert(tmp_path, onnx=b"nonsense")
    three = copy.deepcopy(METADATA)
    three["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] = "liver"
    more = {**OPTIONS["segments"], "liver": {**OPTIONS["segments"]["spleen"], "key": "liver", "label": "Liver"}}
    with pytest.raises(BundleError, match=r"do not run.*2 channels, not 3"):
        convert(tmp_path, {**OPTIONS, "segments": more}, metadata=three)
    assert not (tmp_path / "models").exists()


def test_same_version_is_not_overwritten(tmp_path: Path) -> None:
    convert(tmp_path)
    manifest = tmp_path / "models" / "spleen" / "0.5.3" / "manifest.json"
    content = manifest.read_bytes()
    with pytest.raises(BundleError, match="there already"):
        convert(tmp_path)
    assert manifest.read_bytes() == content
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["spleen"]


def test_golden_cases_hold_other_engines_to_it(tmp_path: Path) -> None:
    convert(tmp_path)
    path = tmp_path / "models" / "spleen" / "0.5.3"

    class Slightly(OnnxRuntimeCpu):
        def load(self, onnx: bytes, *, threads: int = 0) -> Any:
            return super().load(two_channels(threshold=0.7, slope=20.1), threads=threads)

    with pytest.raises(EngineError, match="channel 1 of output y"):
        open_model(path, Slightly())


OPTIONS_TOML = """
name = "spleen"
manufacturer = "tests"
licence = "Apache-2.0"
[segments.spleen]
key = "spleen"
label = "Spleen"
category = { value = "91723000", scheme = "SCT", meaning = "Anatomical Structure" }
type = { value = "78961009", scheme = "SCT", meaning = "Spleen" }
"""


def test_command_line(tmp_path: Path) -> None:
    folder = monai_bundle(tmp_path / "monai")
    options = tmp_path / "options.toml"
    options.write_text(OPTIONS_TOML)
    arguments = ["models", "import", str(folder), "--options", str(options), "--into", str(tmp_path / "m")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert data["name"] == "spleen" and data["golden"] == ["small", "large", "extreme"]
    assert data["steps"] == ["orient", "resample", "scale_range", "softmax", "argmax", "largest_components"]
    bundle = load_bundle(Path(data["path"]))
    assert bundle.digest == data["digest"]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, BundleError)
    moved = folder / "models" / "other.onnx"
    (folder / "models" / "model.onnx").rename(moved)
    text = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "n"), "--onnx", str(moved)])
    assert text.exit_code == 0
    assert "dicomnode models activate spleen@0.5.3" in text.output


def test_where_the_node_looks_it_is_staged_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version in data_dir/models would serve at once where none was activated."""
    folder = monai_bundle(tmp_path / "monai")
    options = tmp_path / "options.toml"
    options.write_text(OPTIONS_TOML)
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n[inference]\nmodels_dir = "{tmp_path / "models"}"\n')
    (tmp_path / "data").mkdir()
    found: list[Any] = []
    placed = durable.rename_into_place

    def rename(temporary: Path, final: Path) -> None:
        with contextlib.closing(Database(tmp_path / "data")) as db:
            found.append(Life(db).state("spleen", "0.5.3"))
        placed(temporary, final)

    monkeypatch.setattr(durable, "rename_into_place", rename)
    arguments = ["models", "import", str(folder), "--options", str(options), "--config", str(config)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert found == ["staged"]
    result = CliRunner().invoke(app, [*arguments, "--into", str(tmp_path / "elsewhere")])
    assert result.exit_code == 0 and found == ["staged"] * 2, "the node does not look there"
    with contextlib.closing(Database(tmp_path / "data")) as db:
        assert [h["why"] for h in Life(db).history()] == ["imported"]


def test_options_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "o.toml"
    path.write_text('name = "x"\nmanufacturer = "m"\nsurprise = 1\n')
    with pytest.raises(BundleError, match="licence"):
        read_options(path)
    path.write_text("name = ")
    with pytest.raises(BundleError, match="not valid"):
        read_options(path)
    with pytest.raises(BundleError, match="cannot be read"):
        read_options(tmp_path / "absent.toml")


def test_references_and_expressions() -> None:
    config = {"a": {"b": [1, "@c"]}, "c": "$print('never run')", "d": "$@a::b"}
    assert resolve("@a#b", config) == [1, Expression("$print('never run')")]
    assert resolve("@d", config) == [1, Expression("$print('never run')")]
    assert resolve(["%macro"], config) == [Expression("%macro")]
