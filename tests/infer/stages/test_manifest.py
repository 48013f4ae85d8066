"""Manifest schema 2: what is accepted, and what is refused in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dicomnode.errors import BundleError
from dicomnode.infer.manifest import Manifest, parse_manifest
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.orders import Condition
from tests.infer.infer_case import MODEL
from tests.infer.stages.bundle_case import CODE, golden, manifest

FILES = {name: "0" * 64 for name in ("model.onnx", "golden/one.npy", "golden/one.labels.npy", "MODEL_CARD.md")}


def complete() -> dict[str, Any]:
    data = manifest(files=FILES, golden=[golden(labels="golden/one.labels.npy")])
    return json.loads(json.dumps(data))  # no shared parts


def test_both_schemas_are_read() -> None:
    assert isinstance(parse_manifest((MODEL / "manifest.json").read_bytes()), Manifest)
    parsed = parse_manifest(json.dumps(complete()).encode())
    assert isinstance(parsed, StagedManifest)
    parameters = parsed.parameters()
    assert parameters["preprocess"][1]["align"] == "centres"  # defaults are part of the provenance
    assert parameters["engine"]["reach"]["sigma_scale"] == 0.125
    assert json.loads(json.dumps(parameters)) == parameters


def _classification(m: dict[str, Any]) -> None:
    m["engine"].update(outputs=[], scores=["s"], reach={"kind": "whole"})
    m.update(activations=[], decision=None, postprocess=[])
    m["outputs"] = {"findings": [{"key": "haemorrhage", "name": CODE, "output": "s", "activation": "sigmoid"}]}
    m["golden"] = [golden(findings={"haemorrhage": 0.5})]


def test_a_bundle_may_propose_what_is_critical() -> None:
    data = complete()
    data["outputs"]["critical"] = {"volume_ml": {"min": 1.5}}
    parsed = parse_manifest(json.dumps(data).encode())
    assert [e.condition(k) for k, e in parsed.outputs.critical.items()] == [Condition("volume_ml", 1.5)]
    old = json.loads((MODEL / "manifest.json").read_text())
    old["outputs"]["critical"] = {"volume_ml": {"max": 800}}
    assert parse_manifest(json.dumps(old).encode()).outputs.critical["volume_ml"].max == 800
    old["outputs"]["critical"] = {"gone": {"max": 800}}
    with pytest.raises(BundleError, match="gone must be"):
        parse_manifest(json.dumps(old).encode())


def test_classification_alone_is_accepted() -> None:
    data = complete()
    _classification(data)
    assert isinstance(parse_manifest(json.dumps(data).encode()), StagedManifest)


def _swap_pad(m: dict[str, Any]) -> None:
    m["preprocess"].insert(0, {"step": "pad", "size": [9, 9, 9]})


def _crop(m: dict[str, Any]) -> None:
    m["preprocess"].insert(1, {"step": "crop_to_body"})


def _mask(m: dict[str, Any], threshold: float) -> None:
    m["decision"] = {"step": "from_output", "output": "y", "threshold": threshold}
    m["postprocess"] = [{"step": "two_lungs"}]


def test_what_the_outside_of_a_crop_cannot_be_taken_for_is_accepted() -> None:
    for change in (lambda m: _mask(m, 0.5), lambda m: m["decision"].update(labels=[1, 0], on="network")):
        data = complete()
        _crop(data)
        change(data)
        assert isinstance(parse_manifest(json.dumps(data).encode()), StagedManifest)


REFUSED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(surprise=1), "surprise"),
    (lambda m: m["preprocess"].append({"step": "run_python"}), "run_python"),
    (lambda m: m["preprocess"][1].update(spacing=1), "spacing"),
    (lambda m: m["preprocess"].append({"step": "orient", "axes": "RAS"}), "orient occurs twice"),
    (lambda m: m["preprocess"].append({"step": "straighten"}), "straighten must come before"),
    (lambda m: m["preprocess"].append({"step": "crop_to_body"}), "put it before the normalisation"),
    (_swap_pad, "put pad after it"),
    (lambda m: m.update(decision=None), "segments need one of argmax"),
    (lambda m: m["decision"].update(output="z"), "decision: z is not among engine.outputs"),
    (lambda m: m["activations"].append({"step": "sigmoid", "output": "y"}), "y gets two"),
    (lambda m: m["postprocess"].append({"step": "two_lungs"}), "works on the mask"),
    (lambda m: m.update(decision={"step": "from_output", "output": "y"}), "needs labels"),
    (lambda m: m.update(decision={"step": "from_output", "output": "y"}, postprocess=[]), "no step makes labels"),
    (lambda m: m["engine"].update(model="absent.onnx"), "absent.onnx is used but not listed"),
    (lambda m: m.update(engine=None), "needs a network"),
    (lambda m: m.update(pipeline={"name": "x"}), "leave it out"),
    (lambda m: m["outputs"].update(segments=[]), "name at least one segment"),
    (lambda m: m["outputs"]["segments"][0].update(number=2), "without holes"),
    (lambda m: m["golden"][0].pop("labels"), "labels are needed"),
    (lambda m: m["golden"][0].update(findings={"a": 0.5}), "findings must have"),
    (lambda m: m["golden"][0].update(statistics={"z": [[0, 1]]}), "golden.statistics: z"),
    (lambda m: m["golden"][0].update(probability_tolerance=0.5), "probability_tolerance"),
    (lambda m: m["outputs"].update(probability_maps=[{"key": "p", "name": CODE, "output": "s"}]), "s is not among"),
    (lambda m: m["golden"].clear(), "golden"),
    (lambda m: m["outputs"].update(critical={"nothing": {"min": 1}}), "critical.nothing must be"),
    (lambda m: m["outputs"].update(critical={"volume_ml": {"value": "*"}}), "critical.volume_ml must be"),
    (lambda m: m["outputs"].update(critical={"volume_ml": {}}), "give min, max or both"),
    (lambda m: m["preprocess"][1].update(spacing_mm=[1, 0, 1]), "spacing_mm"),
    (lambda m: m["preprocess"][1].update(spacing_mm=[1, -2, None]), "spacing_mm"),
    (lambda m: m["preprocess"].insert(1, {"step": "resize", "size": [9, 0, None]}), "size"),
    (lambda m: (_crop(m), m["decision"].update(labels=[1, 0])), "argmax takes the outside of a crop"),
    (lambda m: (_crop(m), _mask(m, 0.0)), "threshold above 0"),
    (lambda m: m["engine"].update(scores=["s"]), "overlapping patches"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_mistakes_are_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = complete()
    change(data)
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(data).encode())
    assert message in str(caught.value)
