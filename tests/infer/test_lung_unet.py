"""ct-lung-unet: its files come from its weights, it works in both precisions, and on what it was not trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.stages.golden import case_volume, run_case
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.volume import read_volume
from tests.infer.infer_case import DATA, ROOT

sys.path.append(str(ROOT))
from scripts import build_ct_lung_unet as builder
from scripts import measure_ct_lung_unet as measuring
from scripts.lungnet import graph

FOLDER = ROOT / "models" / "ct-lung-unet" / "1.0.0"


def test_the_bundle_is_rebuilt_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_bundle(FOLDER).manifest
    shipped = {case.name: (np.load(FOLDER / case.input), np.array(case.affine)) for case in manifest.golden}
    monkeypatch.setattr(builder, "golden_inputs", lambda: shipped)
    builder.build(tmp_path, builder.weights_from(None))
    files = sorted(p.relative_to(FOLDER) for p in FOLDER.rglob("*") if p.is_file())
    assert len(files) == 10
    different = [f.as_posix() for f in files if (tmp_path / f).read_bytes() != (FOLDER / f).read_bytes()]
    assert not different


def test_golden_cases_pass_in_both_precisions_and_fail_with_other_weights() -> None:
    model = open_model(FOLDER, OnnxRuntimeCpu(), threads=1)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.onnx")) < 5_000_000
    manifest = model.bundle.manifest
    assert isinstance(manifest, StagedManifest)
    case = manifest.golden[-1]  # the smallest
    half = OnnxRuntimeCpu().load(model.bundle.read(builder.HALF), threads=1)
    assert not run_case(manifest, model.bundle.read, half, case).problems
    weights = builder.weights_from(None)
    weights["last.0.b"][1] += 1.0
    other = OnnxRuntimeCpu().load(graph.build(weights), threads=1)
    assert run_case(manifest, model.bundle.read, other, case).problems
    model.close()


def test_weights_come_back_out_of_the_graph() -> None:
    weights = builder.weights_from(None)
    again = graph.weights_of(graph.build(weights))
    assert weights.keys() == again.keys()
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_a_phantom_of_another_spacing_is_found() -> None:
    volume, truth = measuring.phantom_volume(64, 128, 2.8, 5.0, 55)
    bundle, session = measuring.opened("ct-lung-unet")
    found, analysis, _ = measuring.timed((bundle, session), volume)
    assert min(measuring.dice(found, truth).values()) > 0.97
    values = {(m.segment, m.key): m.value for m in analysis.measurements}
    for side in (1, 2):
        assert values[side, "volume_ml"] == pytest.approx((found == side).sum() * 2.8 * 2.8 * 5.0 / 1000)


def test_sides_are_the_patients_whatever_the_order_of_slices_rows_and_columns() -> None:
    """Feet first and prone: the golden case turned, with the affine that says so."""
    bundle = load_bundle(FOLDER)
    assert isinstance(bundle.manifest, StagedManifest)
    session = OnnxRuntimeCpu().load(bundle.read(builder.MODEL), threads=1)
    volume = case_volume(bundle.manifest.golden[0], bundle.read)
    wanted = measuring.by_side(run_bundle(bundle, session, volume))
    affine = volume.affine.copy()
    for axis, length in enumerate(volume.values.shape):
        affine[:3, 3] += affine[:3, axis] * (length - 1)
        affine[:3, axis] *= -1
    turned = type(volume)(volume.values[::-1, ::-1, ::-1].copy(), affine, volume.spacing, volume.source_uids)
    found = measuring.by_side(run_bundle(bundle, session, turned))
    assert min(measuring.dice(found[::-1, ::-1, ::-1], wanted).values()) > 0.999


@pytest.mark.slow
def test_on_the_real_ct_it_is_near_ct_lung() -> None:
    files = sorted((DATA / "ct-chest-ricord").glob("*.dcm"))
    if not files:
        pytest.skip("the real chest CT is not here")
    unet, density = measuring.opened("ct-lung-unet"), measuring.opened("ct-lung")
    volume = read_volume(files[::4], unet[0].manifest.input)
    ours, theirs = measuring.timed(unet, volume)[0], measuring.timed(density, volume)[0]
    assert min(measuring.dice(ours, theirs).values()) > 0.93


def test_the_card_tells_what_it_is() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text()
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert manifest["purpose"] == "clinical"
    for words in ("Not a medical device", "procedural phantoms", "Known limits", "measure_ct_lung_unet.py"):
        assert words in card
