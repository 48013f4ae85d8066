"""Measurements against SimpleITK and under turns of the grid."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import pdist

from dicomnode.infer.measure import FractionBelowSpec, MeanSpec, VolumeSpec
from dicomnode.infer.stages.measures import (
    DiameterSpec,
    FeretSpec,
    FractionAboveSpec,
    PercentileSpec,
    StandardDeviationSpec,
    diameter_in_plane,
    feret,
    measure_segment,
)
from dicomnode.infer.stages.orient import Orient
from tests.infer.stages.stage_case import make_affine, make_frame, phantom, to_sitk
from tests.infer.stages.test_orient import CODES, oblique, tilted

MASKS = hnp.arrays(bool, st.tuples(*[st.integers(1, 6)] * 3)).filter(lambda m: bool(m.any()))
AFFINE = make_affine(oblique((12, -8, 30)), (2.5, 0.7, 0.9), (-100, 20, 7))
SPECS = [
    VolumeSpec(kind="volume_ml"),
    MeanSpec(kind="mean"),
    FractionBelowSpec(kind="percent_below", threshold=-50),
    FractionAboveSpec(kind="percent_above", threshold=-50),
    StandardDeviationSpec(kind="standard_deviation"),
    PercentileSpec(kind="percentile", percentile=15),
    FeretSpec(kind="feret_mm"),
    FeretSpec(kind="feret_mm", largest_only=True),
]


def blob() -> tuple[np.ndarray, np.ndarray]:
    values = phantom((14, 20, 18), seed=4)
    return values, values > 300


def test_values_are_simpleitks() -> None:
    values, mask = blob()
    statistics = sitk.LabelIntensityStatisticsImageFilter()
    statistics.ComputeFeretDiameterOn()
    image = to_sitk(values, AFFINE)
    statistics.Execute(to_sitk(mask.astype(np.uint8), AFFINE), image)

    def got(spec: object) -> float:
        return measure_segment(spec, values, mask, AFFINE)  # type: ignore[arg-type]

    assert got(SPECS[0]) == pytest.approx(statistics.GetPhysicalSize(1) / 1000, rel=1e-6)
    assert got(SPECS[1]) == pytest.approx(statistics.GetMean(1), rel=1e-9)
    n = int(mask.sum())
    assert got(SPECS[4]) == pytest.approx(statistics.GetStandardDeviation(1) * np.sqrt((n - 1) / n), rel=1e-9)
    assert got(SPECS[6]) == pytest.approx(statistics.GetFeretDiameter(1), rel=1e-6)
    inside = values[mask].astype(float)
    assert got(SPECS[5]) == pytest.approx(np.percentile(inside, 15))
    assert got(FractionAboveSpec(kind="percent_above", threshold=800)) == pytest.approx(100 * np.mean(inside > 800))
    assert got(SPECS[2]) + got(SPECS[3]) + 100 * np.mean(inside == -50) == pytest.approx(100)


def test_diameter_is_the_largest_of_simpleitks_pieces() -> None:
    _, mask = blob()
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.ComputeFeretDiameterOn()
    best = 0.0
    for plane in mask.astype(np.uint8):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((0.9, 0.7))
        shape.Execute(sitk.ConnectedComponent(image, True))
        best = max([best, *(shape.GetFeretDiameter(label) for label in shape.GetLabels())])
    assert diameter_in_plane(mask, AFFINE) == pytest.approx(best, rel=1e-6)


@given(MASKS)
def test_feret_is_the_largest_distance(mask: np.ndarray) -> None:
    points = np.argwhere(mask) @ AFFINE[:3, :3].T
    wanted = float(pdist(points).max()) if len(points) > 1 else 0.0
    assert feret(mask, AFFINE) == pytest.approx(wanted, abs=1e-9)
    assert diameter_in_plane(mask, AFFINE) <= wanted + 1e-9


@given(st.sampled_from(CODES))
def test_turning_the_grid_changes_no_measurement(code: str) -> None:
    values, mask = blob()
    turn = Orient(step="orient", axes=code)
    moved, where = turn.apply(make_frame(values, AFFINE)), turn.apply(make_frame(mask, AFFINE))
    for spec in SPECS:
        before = measure_segment(spec, values, mask, AFFINE)
        assert measure_segment(spec, moved.values, where.values, moved.affine) == pytest.approx(before, rel=1e-9)


def test_known_bodies() -> None:
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (41, 81, 81)), indexing="ij")
    affine = make_affine(spacing=(1.0, 0.5, 0.5))
    ball = (z * 1.0) ** 2 + (y * 0.5) ** 2 + (x * 0.5) ** 2 <= 15**2
    assert diameter_in_plane(ball, affine) == pytest.approx(30, abs=0.6)
    assert feret(ball, affine) == pytest.approx(30, abs=0.6)
    assert measure_segment(SPECS[0], ball, ball, affine) == pytest.approx(4 / 3 * np.pi * 15**3 / 1000, rel=0.01)
    two = np.zeros((1, 40, 40), bool)
    two[0, 5, 5:15] = True
    two[0, 30, 30:35] = True  # the distance between the two is no diameter
    assert diameter_in_plane(two, affine) == pytest.approx(4.5)
    assert feret(two, affine) > 17
    assert measure_segment(SPECS[7], two, two, affine) == pytest.approx(4.5)
    dot = np.zeros((2, 2, 2), bool)
    dot[1, 1, 1] = True
    assert diameter_in_plane(dot, affine) == 0.0


def test_tilted_gantry_has_a_slanted_voxel() -> None:
    affine = tilted((4, 4, 4), (3.0, 1.0, 1.0), 25.0)
    cube = np.ones((4, 4, 4), bool)
    assert measure_segment(SPECS[0], cube, cube, affine) == pytest.approx(64 * 3 * np.cos(np.radians(25)) / 1000)
    assert feret(cube, affine) == pytest.approx(float(pdist(np.argwhere(cube) @ affine[:3, :3].T).max()))


@pytest.mark.parametrize("spec", [*SPECS, DiameterSpec(kind="diameter_in_plane_mm")], ids=lambda s: s.kind)
def test_empty_has_no_measurement_but_a_volume_of_0(spec: object) -> None:
    if isinstance(spec, VolumeSpec):
        assert measure_segment(spec, np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool), AFFINE) == 0.0
        return
    with pytest.raises(ValueError):
        measure_segment(spec, np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool), AFFINE)  # type: ignore[arg-type]
