"""A phantom of known truth in every kind of acquisition, from DICOM files to labels and measurements.

SimpleITK reads the same files; where it cannot (tilted gantry) the analytic phantom is the truth.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from dicomnode.infer.contract import InputContract
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.run import prepare, run_staged
from dicomnode.infer.volume import Volume, read_volume
from tests.infer.infer_case import write_series
from tests.infer.stages.bundle_case import golden, manifest, measurement, segment, two_channels
from tests.infer.stages.stage_case import FakeSession

BIG, SMALL = (np.array([-14.0, 6.0, 10.0]), 13.0), (np.array([22.0, -16.0, -14.0]), 7.0)
SQUEEZE = np.array([1.0, 1.35, 0.8])
"""The bodies are ellipsoids, so that an exchanged axis shows."""


def hounsfield(points: np.ndarray) -> np.ndarray:
    """HU at LPS points (..., 3): two soft-edged ellipsoids of 500 HU in -500 HU."""
    depth = np.max([radius - np.linalg.norm((points - c) / SQUEEZE, axis=-1) for c, radius in (BIG, SMALL)], axis=0)
    return np.rint(np.clip(depth / 1.5, -1, 1) * 500)


def turned(x: float, y: float, z: float) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", (x, y, z), degrees=True).as_matrix()


AXES = {  # rows of: direction along a row, direction along a column
    "axial": ([1, 0, 0], [0, 1, 0]),
    "feet-first supine": ([-1, 0, 0], [0, 1, 0]),
    "prone": ([-1, 0, 0], [0, -1, 0]),
    "feet-first prone": ([1, 0, 0], [0, -1, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "oblique": (turned(20, -25, 10)[:, 0], turned(20, -25, 10)[:, 1]),
    "double oblique sagittal": (turned(15, 10, -20)[:, 1], -turned(15, 10, -20)[:, 2]),
}
CASES = [
    *[(name, (2.0, 1.5, 1.5), 0.0, False) for name in AXES],
    ("axial", (2.0, 1.5, 1.5), 0.0, True),
    ("axial", (5.0, 0.9, 1.3), 0.0, False),
    ("coronal", (4.0, 1.0, 1.6), 0.0, True),
    ("axial", (2.0, 1.5, 1.5), 18.0, False),
    ("axial", (2.0, 1.5, 1.5), -22.0, True),
]


def series(folder: Path, axes: str, spacing: tuple[float, float, float], tilt: float, flipped: bool) -> list[Path]:
    """The phantom as DICOM files around the isocentre, covering 72 mm; ``flipped``: last slice first."""
    row, column = (np.array(v, float) for v in AXES[axes])
    normal = np.cross(row, column)
    if tilt:  # the images lean, the table moves along the old normal
        t = np.radians(tilt)
        table, column = normal, np.cos(t) * column + np.sin(t) * normal
    else:
        table = normal
    step = table * spacing[0]
    shape = tuple(int(np.ceil(72 / s)) for s in spacing)
    basis = np.stack([step, column * spacing[1], row * spacing[2]], axis=1)
    origin = -basis @ ((np.array(shape) - 1) / 2)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    hu = hounsfield(index @ basis.T + origin)
    numbers = list(range(shape[0]))[:: -1 if flipped else 1]

    def place(file: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [round(float(v), 9) for v in (*row, *column)]
        ds.ImagePositionPatient = [round(float(v), 6) for v in origin + numbers[file] * step]
        ds.InstanceNumber = file + 1

    paths = write_series(folder, hu[numbers], spacing, edit=place)
    random.Random(7).shuffle(paths)
    return paths


CONTRACT = InputContract(
    modality="CT",
    sop_classes=("1.2.840.10008.5.1.4.1.1.2",),
    min_slices=3,
    slice_spacing_mm=(0.3, 10.0),
    pixel_spacing_mm=(0.3, 2.0),
    hounsfield=True,
)
MEASUREMENTS = [
    measurement("volume_ml", kind="volume_ml"),
    measurement("mean_hu", kind="mean"),
    measurement("feret_mm", kind="feret_mm"),
]
STRAIGHTEN = {"step": "straighten", "fill": -500}
ORIENT = {"step": "orient", "axes": "RAS"}
RESAMPLE = {"step": "resample", "spacing_mm": [1.5, 1.5, 1.5]}


def staged(preprocess: list[dict], reach: dict, **more: object) -> StagedManifest:
    data = manifest(
        preprocess=preprocess,
        engine={"model": "model.onnx", "input": "x", "outputs": ["y"], "reach": reach},
        outputs={"segments": [segment(1, "body")], "measurements": MEASUREMENTS},
        files={n: "0" * 64 for n in ("model.onnx", "golden/one.npy")},
        golden=[golden(labels="golden/one.npy")],
        **more,
    )
    return StagedManifest.model_validate(data)


def points_of(volume: Volume) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, volume.values.shape), indexing="ij"), axis=-1)
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize(("axes", "spacing", "tilt", "flipped"), CASES, ids=str)
def test_labels_and_measurements(
    tmp_path: Path, axes: str, spacing: tuple[float, float, float], tilt: float, flipped: bool
) -> None:
    paths = series(tmp_path, axes, spacing, tilt, flipped)
    volume = read_volume(paths, CONTRACT)
    points = points_of(volume)
    np.testing.assert_allclose(volume.values, hounsfield(points), atol=1.01)  # slices are where they say
    big = np.linalg.norm((points - BIG[0]) / SQUEEZE, axis=-1) < BIG[1]

    # the network on the acquired grid, whatever its axes: the same voxels as SimpleITK's
    plain = run_staged(
        staged([ORIENT], {"kind": "patches", "size": [32, 32, 32]}), OnnxRuntimeCpu().load(two_channels()), volume
    )
    assert plain.labels is not None
    if tilt:  # the network looks across slices: it is shown a straight stack, and its answer is brought back
        assert dice(plain.labels == 1, big) > 0.97
        assert any(f"tilted by {abs(tilt):.0f} degrees" in note for note in plain.notes)
    else:
        np.testing.assert_array_equal(plain.labels == 1, (volume.values > 0) & big)
        compare_with_simpleitk(tmp_path, volume, plain.labels, {m.key: m.value for m in plain.measurements})

    # resampled to 1.5 mm, in a turned grid, and back
    steps = [STRAIGHTEN, ORIENT, RESAMPLE]
    network = OnnxRuntimeCpu().load(two_channels(slope=0.01))
    moved = run_staged(staged(steps, {"kind": "patches", "size": [32, 32, 32]}), network, volume)
    assert moved.labels is not None
    assert dice(moved.labels == 1, big) > 0.93 if spacing[0] > 3 else dice(moved.labels == 1, big) > 0.96
    values = {m.key: m.value for m in moved.measurements}
    assert values["volume_ml"] == pytest.approx(4 / 3 * np.pi * BIG[1] ** 3 * np.prod(SQUEEZE) / 1000, rel=0.05)
    assert values["feret_mm"] == pytest.approx(2 * BIG[1] * SQUEEZE.max(), abs=1.0 + max(spacing))  # centre to centre
    centre = points[moved.labels == 1].mean(axis=0)
    assert np.abs(centre - BIG[0]).max() < 0.6

    # a network that moves everything two voxels towards the patient's right
    shifting = FakeSession(lambda x: {"y": np.concatenate([np.zeros_like(x), np.roll(x, 2, axis=2)], axis=1)})
    right = run_staged(staged(steps, {"kind": "whole"}), shifting, volume)
    assert right.labels is not None
    shift = points[right.labels == 1].mean(axis=0) - centre
    np.testing.assert_allclose(shift, right_of(volume, axes) * 3.0, atol=0.5)


@pytest.mark.parametrize("first", [[], [STRAIGHTEN]], ids=["unsaid", "said"])
def test_network_sees_a_tilted_patient_straight(tmp_path: Path, first: list[dict]) -> None:
    volume = read_volume(series(tmp_path, "axial", (2.0, 1.5, 1.5), 20.0, False), CONTRACT)
    seen = prepare(staged([*first, ORIENT, RESAMPLE], {"kind": "whole"}), volume)
    columns = seen.affine[:3, :3]
    np.testing.assert_allclose(columns.T @ columns, np.diag([1.5**2] * 3), atol=1e-4)
    grid = np.stack(np.meshgrid(*map(np.arange, seen.shape), indexing="ij"), axis=-1)
    truth = hounsfield(grid @ columns.T + seen.affine[:3, 3])
    inside = seen.values > -499 if not first else truth > -499
    assert np.mean(np.abs(seen.values - truth)[inside] > 150) < 0.02  # linear interpolation of soft edges


def test_a_network_of_single_slices_gets_them_as_they_are(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path, "axial", (2.0, 1.5, 1.5), 20.0, False), CONTRACT)
    seen = prepare(staged([], {"kind": "slices"}), volume)
    np.testing.assert_array_equal(seen.values, volume.values)
    assert seen.notes == ()


def right_of(volume: Volume, axes: str) -> np.ndarray:
    """Unit vector of the grid axis closest to the patient's right; exactly that unless oblique."""
    columns = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    best = int(np.abs(columns[0]).argmax())
    return -columns[:, best] * np.sign(columns[0, best])


def compare_with_simpleitk(folder: Path, volume: Volume, labels: np.ndarray, got: dict[str, float]) -> None:
    """Threshold, largest piece and statistics of the same files, read by SimpleITK."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    pieces = sitk.RelabelComponent(sitk.ConnectedComponent(image > 0))
    largest = pieces == 1
    reference = sitk.GetArrayFromImage(largest).astype(bool)
    at = np.argwhere(reference)[:, ::-1]
    places = np.array([image.TransformContinuousIndexToPhysicalPoint([float(v) for v in p]) for p in at[::25]])
    index = np.rint((places - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T).astype(int)
    assert labels[tuple(index.T)].all()
    assert int(reference.sum()) == int(np.count_nonzero(labels))
    statistics = sitk.LabelIntensityStatisticsImageFilter()
    statistics.ComputeFeretDiameterOn()
    statistics.Execute(sitk.Cast(largest, sitk.sitkUInt8), image)
    assert got["volume_ml"] == pytest.approx(statistics.GetPhysicalSize(1) / 1000, rel=1e-4)
    assert got["mean_hu"] == pytest.approx(statistics.GetMean(1), rel=1e-6)
    assert got["feret_mm"] == pytest.approx(statistics.GetFeretDiameter(1), rel=1e-4)
