"""ct-lung on phantoms of known size, in every position of the patient."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.errors import BundleError, UnsuitableSeries
from dicomnode.infer import grid
from dicomnode.infer.golden import ReadyModel, open_model
from dicomnode.infer.measure import FractionBelowSpec, MeanSpec, VolumeSpec, measure
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.volume import Volume
from dicomnode.records import Analysis
from tests.infer.infer_case import MODEL, build_script, write_series

SHAPE, SPACING = (26, 110, 160), (10.0, 2.0, 2.0)
HEIGHT = (SHAPE[0] - 1) / 2 * SPACING[0] * 0.85
LUNG_ML = 4 / 3 * math.pi * HEIGHT * 70 * 45 / 1000
BULLA_PERCENT = 100 * (4 / 3 * math.pi * 25 * 20 * 15 / 1000) / LUNG_ML


@cache
def model() -> ReadyModel:
    return open_model(MODEL, OnnxRuntimeCpu(), threads=1)


def phantom(**options: bool) -> np.ndarray:
    return build_script().phantom((SHAPE[0], 160, SHAPE[2]), SPACING, **options)[:, 20:150].copy()


def analyse(hu: np.ndarray) -> Analysis:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *SPACING, 1.0
    affine[0, 3] = -(hu.shape[2] - 1) / 2 * SPACING[2]
    volume = Volume(hu, affine, SPACING, tuple(str(i) for i in range(len(hu))))
    return run_bundle(model().bundle, model().session, volume)


def values(analysis: Analysis) -> dict[str, float]:
    names = {s.number: s.label for s in analysis.segments}
    return {f"{names[m.segment or 0]} {m.key}": m.value for m in analysis.measurements}


def test_volumes_and_densities_match_the_phantom() -> None:
    analysis = analyse(phantom())
    found = values(analysis)
    assert analysis.notes == ()
    # vessels of 12 mm inside the lungs are filled, so the whole ellipsoid counts
    assert found["Right lung volume_ml"] == pytest.approx(LUNG_ML, rel=0.03)
    assert found["Left lung volume_ml"] == pytest.approx(LUNG_ML, rel=0.03)
    assert found["Right lung percent_below_950"] == 0
    assert found["Left lung percent_below_950"] == pytest.approx(BULLA_PERCENT, rel=0.05)
    assert -850 < found["Right lung mean_hu"] < found["Left lung mean_hu"] < -750


def test_trachea_stomach_table_and_outside_are_not_lung() -> None:
    hu = phantom()
    labels = analyse(hu).labels
    assert labels is not None
    middle, row = hu.shape[2] // 2, 40 // 2 + 60
    assert hu[20, row, middle] == -1000
    assert not labels[:, row - 4 : row + 4, middle - 4 : middle + 4].any()
    air = (hu == -1000) & (labels > 0)
    assert not air.any()


def test_measurements_are_those_of_the_labels() -> None:
    hu = phantom()
    analysis = analyse(hu)
    assert analysis.labels is not None
    voxel = SPACING[0] * SPACING[1] * SPACING[2] / 1000
    for segment in analysis.segments:
        inside = hu[analysis.labels == segment.number].astype(float)
        found = {m.key: m.value for m in analysis.measurements if m.segment == segment.number}
        assert found["volume_ml"] == pytest.approx(len(inside) * voxel)
        assert found["mean_hu"] == pytest.approx(inside.mean())
        assert found["percent_below_950"] == pytest.approx(100 * (inside < -950).mean())


@pytest.mark.parametrize(("row", "column"), [(1, 1), (-1, -1), (-1, 1), (1, -1)], ids=["HFS", "HFP", "FFS", "FFP"])
def test_sides_are_the_patients_in_every_position(tmp_path: Path, row: int, column: int) -> None:
    """Only the left lung has a bulla; it stays the left one however the images are turned."""
    paths = write_series(tmp_path, phantom(), SPACING, row_sign=row, column_sign=column)
    analysis = model().analyse(paths)
    found = values(analysis)
    assert found["Left lung percent_below_950"] > 2
    assert found["Right lung percent_below_950"] == 0
    assert found["Left lung volume_ml"] == pytest.approx(LUNG_ML, rel=0.03)
    assert set(analysis.seconds) == {"read", "inference", "postprocess"}
    assert analysis.notes == ()


def test_touching_lungs_are_separated_with_a_note() -> None:
    analysis = analyse(phantom(bridge=True))
    found = values(analysis)
    assert "touch" in analysis.notes[0]
    bridge = 2 * 15 * 12 * 0.8 * HEIGHT / 1000
    for side in ("Right", "Left"):
        assert LUNG_ML * 0.97 < found[f"{side} lung volume_ml"] < (LUNG_ML + bridge) * 1.02
    assert found["Left lung percent_below_950"] > 2


def test_lungs_merged_over_a_wide_area_are_divided_at_the_midline() -> None:
    hu = phantom()
    hu[3:23, 25:60, 40:120] = -820
    analysis = analyse(hu)
    assert len(analysis.segments) == 2
    assert any("divided at the middle" in note or "separated" in note for note in analysis.notes)


@pytest.mark.parametrize("side", ["Left", "Right"])
def test_a_lung_that_is_not_there_keeps_its_number_and_has_no_volume(side: str) -> None:
    hu = phantom()
    half = slice(0, 72) if side == "Left" else slice(88, None)
    region = hu[:, :, half]
    region[(region < -500) & (region > -1000)] = 30
    analysis = analyse(hu)
    numbers = {s.label: s.number for s in analysis.segments}
    assert numbers == {"Right lung": 1, "Left lung": 2}
    assert "Only one lung was found" in analysis.notes
    assert analysis.labels is not None
    assert analysis.numbers_found() == {numbers[f"{side} lung"]} == set(np.unique(analysis.labels)) - {0}
    other = numbers[f"{'Right' if side == 'Left' else 'Left'} lung"]
    assert [(m.key, m.value) for m in analysis.measurements if m.segment == other] == [("volume_ml", 0.0)]


@pytest.mark.parametrize("fill", [-1000, 0, 40])
def test_series_without_lungs_gives_an_empty_answer_with_a_note(fill: int) -> None:
    hu = np.full(SHAPE, fill, np.int16)
    analysis = analyse(hu)
    assert len(analysis.segments) == 2
    assert [(m.key, m.value) for m in analysis.measurements] == [("volume_ml", 0.0)] * 2
    assert analysis.labels is not None
    assert not analysis.labels.any()
    assert any(note.startswith("No ") for note in analysis.notes)


def test_scan_that_ends_inside_the_lungs_says_so() -> None:
    analysis = analyse(phantom()[8:])
    assert any("at the foot side" in note for note in analysis.notes)
    analysis = analyse(phantom()[:18])
    assert any("at the head side" in note for note in analysis.notes)


def test_missing_trachea_is_noted() -> None:
    hu = phantom()
    middle = hu.shape[2] // 2
    hu[:, 66:96, middle - 7 : middle + 7] = 20
    assert any("trachea was not found" in note for note in analyse(hu).notes)


def test_noise_does_not_move_the_volumes() -> None:
    hu = phantom()
    noise = np.random.default_rng(7).normal(0, 40, hu.shape)
    noisy = values(analyse((hu + noise).astype(np.int16)))
    assert noisy["Left lung volume_ml"] == pytest.approx(LUNG_ML, rel=0.03)
    assert noisy["Right lung volume_ml"] == pytest.approx(LUNG_ML, rel=0.03)


def test_same_input_same_bits() -> None:
    hu = phantom(bridge=True)
    first, second = analyse(hu), analyse(hu.copy())
    assert first.labels is not None
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.measurements == second.measurements


def test_progress_runs_through_the_stages(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    paths = write_series(tmp_path, phantom(), SPACING)
    model().analyse(paths, progress=lambda step, share: seen.append((step, share)))
    assert list(dict.fromkeys(step for step, _ in seen)) == ["read", "inference", "postprocess"]
    assert seen[-1] == ("postprocess", 1.0)


def test_contract_of_the_model_is_applied(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableSeries) as caught:
        model().analyse(write_series(tmp_path, phantom()[:10], SPACING))
    assert caught.value.code == "TOO_FEW_SLICES"


def test_steps_in_a_wrong_order_are_a_bundle_error() -> None:
    bundle = model().bundle
    broken = bundle.manifest.model_copy(update={"postprocess": bundle.manifest.postprocess[5:]})
    hu = phantom()
    volume = Volume(hu, np.eye(4), SPACING, tuple(str(i) for i in range(len(hu))))
    with pytest.raises(BundleError, match="two_lungs"):
        run_bundle(type(bundle)(bundle.path, broken, ""), model().session, volume)


ARRAYS = st.lists(st.integers(-1100, 200), min_size=1, max_size=60).map(lambda v: np.array(v, np.int16))


@given(ARRAYS, st.floats(1e-6, 10))
def test_measures_by_definition(hu: np.ndarray, voxel_ml: float) -> None:
    assert measure(VolumeSpec(kind="volume_ml"), hu, voxel_ml) == len(hu) * voxel_ml
    assert measure(MeanSpec(kind="mean"), hu, voxel_ml) == sum(map(int, hu)) / len(hu)
    below = FractionBelowSpec(kind="percent_below", threshold=-950)
    assert measure(below, hu, voxel_ml) == 100 * sum(1 for v in hu if v < -950) / len(hu)


def test_measure_of_nothing_is_an_error_but_for_its_volume() -> None:
    assert measure(VolumeSpec(kind="volume_ml"), np.zeros(0), 1.0) == 0.0
    with pytest.raises(ValueError, match="without voxels"):
        measure(MeanSpec(kind="mean"), np.zeros(0), 1.0)


MASKS = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).random((3, 12, 13)) < 0.6)


@settings(max_examples=30, deadline=None)
@given(MASKS, st.integers(1, 4))
def test_grid_helpers(mask: np.ndarray, step: int) -> None:
    small = mask[:, ::step, ::step]
    big = grid.enlarge(small, step, mask.shape)
    assert big.shape == mask.shape
    np.testing.assert_array_equal(big[:, ::step, ::step], small)
    means = grid.block_mean(mask, step)
    assert means.shape == small.shape
    assert means[0, 0, 0] == pytest.approx(mask[0, :step, :step].mean())
    closed = grid.close_in_plane(mask, step)
    assert not (mask & ~closed).any()
    holes = grid.enclosed(mask)
    assert not (holes & mask).any()
    assert not holes[:, 0].any()
    assert not holes[:, :, -1].any()
    box = grid.bounding_box(mask)
    assert box is not None
    assert mask[box].sum() == mask.sum()
