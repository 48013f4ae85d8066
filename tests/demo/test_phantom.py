"""The phantom is what it says: volumes, sides, bytes, and a valid CT object."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from dicomnode.demo import phantom as module
from dicomnode.demo.anatomy import LEFT_LUNG, RIGHT_LUNG, Ellipsoid, LungDetail
from dicomnode.demo.phantom import Phantom, thorax, to_datasets, write_series
from dicomnode.geometry import SlicePlane, analyse_stack

SMALL = {"slices": 24, "rows": 96, "columns": 96, "pixel_spacing": 3.73, "slice_spacing": 13.4}
CLOCK = datetime(2026, 3, 4, 5, 6, 7)


@pytest.fixture(scope="module")
def small() -> Phantom:
    return thorax(**SMALL, seed=7)


@pytest.fixture(scope="module")
def middle() -> Phantom:
    return thorax(slices=64, rows=192, columns=192, pixel_spacing=1.86, slice_spacing=5.0, seed=3)


def test_arrays_keep_their_contract(small: Phantom) -> None:
    assert small.hu.shape == small.labels.shape == (24, 96, 96)
    assert (small.hu.dtype, small.labels.dtype) == (np.int16, np.uint8)
    assert set(np.unique(small.labels)) == {0, RIGHT_LUNG, LEFT_LUNG}
    assert small.hu.min() >= -1024
    assert small.spacing == (13.4, 3.73, 3.73)


def test_truth_is_what_is_in_the_arrays(small: Phantom) -> None:
    voxel_ml = 3.73 * 3.73 * 13.4 / 1000
    for label, truth in small.truth.items():
        inside = small.labels == label
        assert truth.label == label
        assert truth.voxels == np.count_nonzero(inside)
        assert truth.volume_ml == pytest.approx(truth.voxels * voxel_ml)
        assert truth.emphysema_ml == pytest.approx(truth.emphysema_voxels * voxel_ml)
        assert truth.voxels_below_950 == np.count_nonzero(inside & (small.hu < -950))
        assert truth.mean_hu == pytest.approx(float(small.hu[inside].mean()))


def test_volume_does_not_depend_on_the_sampling(small: Phantom, middle: Phantom) -> None:
    for label in (RIGHT_LUNG, LEFT_LUNG):
        assert small.truth[label].volume_ml == pytest.approx(middle.truth[label].volume_ml, rel=0.02)


def test_emphysema_has_the_analytic_volume_of_its_ellipsoids(monkeypatch: pytest.MonkeyPatch) -> None:
    spots = [
        Ellipsoid((-75, -10, 40), (22, 17, 25), 30, -985),
        Ellipsoid((75, 0, 40), (18, 18, 18), 0, -985),
    ]
    monkeypatch.setattr(module, "lung_detail", lambda seed: LungDetail([], spots))
    found = thorax(slices=64, rows=192, columns=192, pixel_spacing=1.86, slice_spacing=5.0).truth
    for label, spot in ((RIGHT_LUNG, spots[0]), (LEFT_LUNG, spots[1])):
        expected = 4 / 3 * np.pi * np.prod(spot.radii) / 1000
        assert found[label].emphysema_ml == pytest.approx(expected, rel=0.03)


def test_noise_moves_few_voxels_over_the_emphysema_threshold(middle: Phantom) -> None:
    for truth in middle.truth.values():
        assert truth.emphysema_voxels > 0.01 * truth.voxels
        assert truth.voxels_below_950 == pytest.approx(truth.emphysema_voxels, rel=0.03)


def test_lungs_are_complete_and_each_is_one_piece(middle: Phantom) -> None:
    labelled = middle.labels > 0
    for axis in range(3):
        ends = np.take(labelled, [0, -1], axis=axis)
        assert not ends.any()
    for label in (RIGHT_LUNG, LEFT_LUNG):
        parts, count = ndimage.label(middle.labels == label)
        sizes = np.bincount(parts.ravel())[1:]
        assert count >= 1
        assert sizes.max() / sizes.sum() > 0.99


def test_right_lung_is_at_small_columns_and_liver_below_it(small: Phantom) -> None:
    columns = {n: np.argwhere(small.labels == n)[:, 2] for n in (RIGHT_LUNG, LEFT_LUNG)}
    assert columns[RIGHT_LUNG].max() < 48 <= columns[LEFT_LUNG].min()
    assert columns[RIGHT_LUNG].size > columns[LEFT_LUNG].size  # the heart lies to the left
    bottom = small.hu[1, 35:55]
    assert 80 < np.median(bottom[:, 20:40]) < 140  # liver: right, and slice 0 is at the feet


def test_couch_and_spine_are_at_the_back(middle: Phantom) -> None:
    spine = middle.hu[:, 118:135, 92:100]
    front = middle.hu[:, 60:77, 92:100]
    assert spine.mean() > front.mean() + 50
    assert middle.hu[32, 165].mean() > -960  # couch below the patient
    assert middle.hu[32, 8].mean() < -960  # air above


def test_trachea_is_air_with_a_wall(middle: Phantom) -> None:
    index = round(90 / 5 + 31.5)
    row = middle.hu[index, round(11 / 1.86 + 95.5), 80:112]
    assert row.min() < -900
    assert row[3:8].min() > -300  # between trachea and right lung
    assert not middle.labels[index, :, 92:100].any()


def test_a_threshold_segmenter_agrees_with_the_truth(middle: Phantom) -> None:
    tissue, _ = ndimage.label(middle.hu > -400)
    body = tissue == np.bincount(tissue.ravel())[1:].argmax() + 1
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in body])
    parts, _ = ndimage.label(filled & (middle.hu < -400))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    for part in np.argsort(sizes)[-2:]:
        lung = np.stack([ndimage.binary_fill_holes(plane) for plane in parts == part])
        label = int(np.bincount(middle.labels[lung], minlength=3)[1:].argmax()) + 1
        assert np.count_nonzero(lung) == pytest.approx(middle.truth[label].voxels, rel=0.02)


def test_seed_decides_everything(small: Phantom) -> None:
    again, other = thorax(**SMALL, seed=7), thorax(**SMALL, seed=8)
    assert np.array_equal(again.hu, small.hu)
    assert again.truth == small.truth
    assert not np.array_equal(other.hu, small.hu)
    assert other.truth[RIGHT_LUNG].volume_ml == small.truth[RIGHT_LUNG].volume_ml


@pytest.mark.parametrize("wrong", [{"slices": 0}, {"columns": 0}, {"pixel_spacing": 0.0}, {"slice_spacing": -1.0}])
def test_an_impossible_grid_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        thorax(**{**SMALL, **wrong})


def test_written_series_reads_back_as_the_same_volume(small: Phantom, tmp_path: Path) -> None:
    paths = write_series(small, tmp_path / "new" / "series", clock=CLOCK)
    read = [pydicom.dcmread(path) for path in paths]
    stored = np.stack([ds.pixel_array for ds in read])
    hu = stored * float(read[0].RescaleSlope) + float(read[0].RescaleIntercept)
    assert np.array_equal(hu, small.hu)
    planes = [
        SlicePlane(ds.SOPInstanceUID, tuple(ds.ImagePositionPatient), tuple(ds.ImageOrientationPatient)) for ds in read
    ]
    report = analyse_stack(planes)
    assert report.contiguous
    assert report.order == tuple(ds.SOPInstanceUID for ds in read)
    assert report.normal == (0.0, 0.0, 1.0)
    assert report.spacing == pytest.approx(13.4)
    assert [float(v) for v in read[5].PixelSpacing] == [3.73, 3.73]
    for index, plane in enumerate(planes):
        assert plane.position == pytest.approx(small.position(index), abs=1e-4)


def test_uids_derive_from_the_seed_and_can_be_given(small: Phantom) -> None:
    first, again = list(to_datasets(small, clock=CLOCK)), list(to_datasets(small, clock=datetime(2027, 1, 1)))
    assert [ds.SOPInstanceUID for ds in first] == [ds.SOPInstanceUID for ds in again]
    assert len({ds.SOPInstanceUID for ds in first}) == 24
    assert len({(ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID) for ds in first}) == 1
    other = next(to_datasets(small, patient_id="SOMEONE-ELSE", clock=CLOCK))
    assert other.StudyInstanceUID != first[0].StudyInstanceUID
    given = next(to_datasets(small, study_uid="2.25.1", series_uid="2.25.2", clock=CLOCK))
    assert (given.StudyInstanceUID, given.SeriesInstanceUID) == ("2.25.1", "2.25.2")
    assert (given.StudyDate, given.StudyTime) == ("20260304", "050607")


@pytest.mark.peers
def test_dciodvfy_finds_no_error(small: Phantom, tmp_path: Path) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("dciodvfy is missing: install dicom3tools")
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    path = write_series(small, tmp_path)[12]
    found = subprocess.run([program, "-new", str(path)], capture_output=True, text=True, check=False)
    lines = (found.stdout + found.stderr).splitlines()
    assert "CTImage" in lines
    assert [line for line in lines if line.startswith("Error")] == []
    assert found.returncode == 0
