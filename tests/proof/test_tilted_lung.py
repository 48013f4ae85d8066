"""The lung models under a tilted gantry: the phantom of known truth, cut along leaning slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from scipy import ndimage

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import analyse_series
from tests.infer.infer_case import MODEL, build_script, write_series

FINE, SPACING = (80, 110, 160), (3.0, 2.0, 2.0)
HEIGHT = (FINE[0] - 1) / 2 * SPACING[0] * 0.85
LUNG_ML = 4 / 3 * np.pi * HEIGHT * 70 * 45 / 1000
STEP = 5.0


def leaning(folder: Path, degrees: float) -> tuple[list[Path], np.ndarray]:
    """Slices turned about the patient's x axis, the table moving along z; and the LPS points of their voxels."""
    t = np.radians(degrees)
    rows, columns = FINE[1], FINE[2]
    reach = HEIGHT + 30 + rows * SPACING[1] / 2 * abs(np.sin(t))
    count = int(2 * reach / STEP)
    down = np.array([0, np.cos(t), -np.sin(t)]) * SPACING[1]
    right = np.array([SPACING[2], 0, 0])
    origin = -(count - 1) / 2 * np.array([0, 0, STEP]) - (rows - 1) / 2 * down - (columns - 1) / 2 * right
    n, r, c = np.meshgrid(np.arange(count), np.arange(rows), np.arange(columns), indexing="ij")
    points = origin + n[..., None] * np.array([0, 0, STEP]) + r[..., None] * down + c[..., None] * right
    phantom = build_script().phantom((FINE[0], 160, FINE[2]), SPACING)
    places = [points[..., 2 - axis] / SPACING[axis] + (phantom.shape[axis] - 1) / 2 for axis in range(3)]
    hu = ndimage.map_coordinates(phantom.astype(np.float32), places, order=1, mode="nearest")

    def place(index: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(float(down[1] / 2), 9), round(float(down[2] / 2), 9)]
        ds.ImagePositionPatient = [round(float(v), 6) for v in origin + index * np.array([0, 0, STEP])]

    return write_series(folder, np.rint(hu), (STEP, *SPACING[1:]), edit=place), points


@pytest.mark.parametrize("degrees", [20.0, -20.0])
def test_lungs_are_where_they_are_and_as_large(tmp_path: Path, degrees: float) -> None:
    paths, points = leaning(tmp_path, degrees)
    analysis = open_model(MODEL, OnnxRuntimeCpu(), threads=1).analyse(paths)
    assert analysis.labels is not None
    found = {(m.segment, m.key): m.value for m in analysis.measurements}
    for number, side in ((1, -1), (2, 1)):  # right, left: LPS x grows to the patient's left
        inside = (points[..., 2] / HEIGHT) ** 2 + (points[..., 1] / 70) ** 2 + ((points[..., 0] - side * 60) / 45) ** 2
        truth, marked = inside <= 1, analysis.labels == number
        assert 2 * (truth & marked).sum() / (truth.sum() + marked.sum()) > 0.96
        assert found[number, "volume_ml"] == pytest.approx(LUNG_ML, rel=0.04)
    assert -850 < found[1, "mean_hu"] < -825 < found[2, "mean_hu"] < -775  # with vessels of 40 HU


def test_a_network_that_looks_across_slices_finds_them_too(tmp_path: Path) -> None:
    """It is shown a straight stack (``stages.run.prepare``) and loses next to nothing by it."""
    paths, points = leaning(tmp_path, 20.0)
    bundle = load_bundle(MODEL.parents[1] / "ct-lung-unet" / "1.0.0")
    analysis = analyse_series(bundle, OnnxRuntimeCpu().load(bundle.read("model.onnx")), paths)
    assert analysis.labels is not None
    for number, side in ((1, -1), (2, 1)):
        inside = (points[..., 2] / HEIGHT) ** 2 + (points[..., 1] / 70) ** 2 + ((points[..., 0] - side * 60) / 45) ** 2
        truth, marked = inside <= 1, analysis.labels == number
        assert 2 * (truth & marked).sum() / (truth.sum() + marked.sum()) > 0.985
    assert any("tilted by 20 degrees" in note for note in analysis.notes)


def test_a_steep_tilt_is_refused_with_its_reason(tmp_path: Path) -> None:
    paths, _ = leaning(tmp_path, 33.0)
    with pytest.raises(UnsuitableSeries, match=r"tilted by 33 degrees from axial; the model takes up to 30"):
        open_model(MODEL, OnnxRuntimeCpu(), threads=1).analyse(paths)
