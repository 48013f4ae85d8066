"""An analysis in two halves is the analysis in one; and whether rows of a batch are independent is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicomnode.errors import EngineError
from dicomnode.infer.batching import CappedSession
from dicomnode.infer.begun import begin_series, halves
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.independence import rows_independent
from dicomnode.infer.joint import run_together
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import analyse_series
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.records import Analysis
from tests.infer.sharing_case import network, study, triage

CPU = OnnxRuntimeCpu()
REACHES: dict[str, dict[str, Any]] = {
    "slices": {"reach": {"kind": "slices", "axis": 0, "batch": 1}},
    "flips": {"reach": {"kind": "slices", "axis": 0, "batch": 4}, "flips": [1, 2]},
    "neighbours": {"reach": {"kind": "neighbours", "channels": 1, "axis": 0}},
}


def changed(folder: Path, **engine: Any) -> Path:
    """The classifier called in another way; its golden answers are not those of the flips."""
    common = {"model": "model.onnx", "input": "x", "outputs": ["y"], "scores": ["s"]}
    return triage(folder, engine={**common, **engine})


def as_plain(analysis: Analysis) -> Any:
    assert analysis.labels is not None
    return replace(analysis, labels=None, seconds={}), analysis.labels.tobytes()


@pytest.mark.parametrize("name", REACHES)
def test_both_halves_make_the_whole_also_in_company(tmp_path: Path, name: str) -> None:
    bundle = load_bundle(changed(tmp_path / "models", **REACHES[name]))
    session = CappedSession(CPU.load(bundle.read("model.onnx"), threads=1), 16)
    series = [study(number, images=images).write(tmp_path / str(number)) for number, images in ((1, 1), (2, 3), (3, 2))]
    whole = [as_plain(analyse_series(bundle, session, paths)) for paths in series]
    assert len({labels for _, labels in whole}) == 3
    begun = [begin_series(bundle, paths) for paths in series]
    assert [b.rows for b in begun] == [n * (4 if name == "flips" else 1) for n in (1, 3, 2)]
    for one, wanted in zip(begun, whole, strict=True):  # each by itself
        (results,) = run_together(session, [one.calls], 16)
        assert as_plain(one.finish(session, results)) == wanted
    together = run_together(session, [b.calls for b in begun], 16)
    for one, results, wanted in zip(begun, together, whole, strict=True):
        analysis = one.finish(session, results, seconds=1.0)
        assert as_plain(analysis) == wanted, "bit for bit, on the same engine"
        assert {"read", "inference", "postprocess"} == analysis.seconds.keys()
        assert analysis.seconds["inference"] > 1.0


def test_answers_of_another_number_or_shape_are_refused(tmp_path: Path) -> None:
    bundle = load_bundle(triage(tmp_path / "models"))
    session = CPU.load(bundle.read("model.onnx"), threads=1)
    begun = begin_series(bundle, study(1).write(tmp_path / "1"))
    with pytest.raises(EngineError, match="differ in number"):
        begun.finish(session, [])
    with pytest.raises(EngineError, match="has shape"):
        begun.finish(session, [{"y": np.zeros((2, 1, 16, 16), np.float32), "s": np.zeros((1, 2), np.float32)}])
    with pytest.raises(EngineError, match="not finite"):
        begun.finish(session, [{"y": np.full((1, 1, 16, 16), np.nan, np.float32), "s": np.zeros((1, 2), np.float32)}])


def test_what_calls_its_network_itself_or_for_many_rows_has_no_halves(tmp_path: Path) -> None:
    manifest = load_bundle(triage(tmp_path / "models")).manifest
    assert isinstance(manifest, StagedManifest) and manifest.engine is not None
    assert halves(manifest) is manifest

    def with_reach(**reach: Any) -> StagedManifest:
        kept = manifest.model_dump(mode="json", exclude_none=True)
        kept["engine"] |= {"reach": reach, "scores": []}
        kept["outputs"]["findings"] = []
        kept["golden"][0] |= {"findings": {}}
        return StagedManifest.model_validate(kept)

    assert halves(with_reach(kind="patches", size=[1, 8, 8])) is None
    assert halves(with_reach(kind="whole")) is not None
    assert halves(manifest.model_copy(update={"pipeline": object()})) is None
    assert halves(object()) is None


class Spoiling:
    """A session whose answers to a batch are changed by ``spoil``."""

    engine, batch = "spoiling 1", 16

    def __init__(self, within: Any, spoil: Any) -> None:
        self.within, self.spoil = within, spoil

    def run(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        outputs = {name: array.copy() for name, array in self.within.run(inputs).items()}
        return self.spoil(outputs) if len(inputs["x"]) > 1 else outputs

    def close(self) -> None:
        self.within.close()


def noisy(share: float) -> Any:
    return lambda o: {**o, "s": o["s"] + share * np.abs(o["s"]).max()}


def raises(code: str) -> Any:
    def spoil(outputs: Any) -> Any:
        raise EngineError("run model", code, "spoilt")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "independent"),
    [
        (lambda o: o, True),
        (noisy(1e-4), True),
        (noisy(0.05), False),
        (lambda o: {**o, "y": o["y"][::-1]}, False),
        (lambda o: {**o, "y": np.roll(o["y"], 1, axis=0)}, False),
        (lambda o: {**o, "s": o["s"][:1]}, False),
        (lambda o: {**o, "s": np.full_like(o["s"], np.nan)}, False),
        (lambda o: {"y": o["y"]}, False),
        (raises("OOM"), False),
        (raises("RUN_FAILED"), False),
    ],
)
def test_rows_are_independent_where_company_changes_nothing(tmp_path: Path, spoil: Any, independent: bool) -> None:
    bundle = load_bundle(triage(tmp_path / "models"))
    session = Spoiling(CPU.load(bundle.read("model.onnx"), threads=1), spoil)
    assert rows_independent(bundle, session) is independent


def test_a_device_that_is_lost_meanwhile_is_told(tmp_path: Path) -> None:
    bundle = load_bundle(triage(tmp_path / "models"))
    session = Spoiling(CPU.load(bundle.read("model.onnx"), threads=1), raises("DEVICE_LOST"))
    with pytest.raises(EngineError, match="DEVICE_LOST"):
        rows_independent(bundle, session)


@pytest.mark.parametrize(("kind", "independent"), [({}, True), ({"mixes": True}, False), ({"one_row": True}, False)])
def test_a_graph_shows_by_its_golden_input_whether_it_mixes(
    tmp_path: Path, kind: dict[str, bool], independent: bool
) -> None:
    bundle = load_bundle(triage(tmp_path / "models", onnx=network(**kind)))
    session = CappedSession(CPU.load(bundle.read("model.onnx"), threads=1), 16)
    assert rows_independent(bundle, session) is independent
    assert not rows_independent(bundle, CappedSession(session, 1)), "with room for one row there is nothing to share"


def test_eight_bits_with_the_scale_of_the_whole_batch_are_never_shared(tmp_path: Path) -> None:
    """Golden rows may be too much alike to show it: a bright patient would take the steps from a dark one."""
    bundle = load_bundle(triage(tmp_path / "models", onnx=network(quantised=True)))
    session = CappedSession(CPU.load(bundle.read("model.onnx"), threads=1), 16)
    dark = np.random.default_rng(1).random((1, 1, 16, 16)).astype(np.float32)
    bright = np.full((1, 1, 16, 16), 50.0, np.float32)
    alone, beside = session.run({"x": dark})["s"], session.run({"x": np.concatenate([dark, bright])})["s"]
    assert np.abs(beside[0] - alone[0]).max() > 0.04, "of a logit"
    assert not rows_independent(bundle, session)


def test_without_the_worker_s_session_nothing_is_shared(tmp_path: Path) -> None:
    model = open_model(triage(tmp_path / "models"), CPU, threads=1)
    assert not model.shares and model.most_rows == 1
