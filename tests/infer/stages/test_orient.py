"""Orientation and tilt: against SimpleITK, and back without a trace."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from dicomnode.infer.stages.frame import restore
from dicomnode.infer.stages.orient import Orient, Straighten, closest_axes
from tests.infer.stages.stage_case import make_affine, make_frame, on_grid, to_sitk

CODES = [
    "".join(letters)
    for order in permutations(["LR", "PA", "SI"])
    for letters in product(*order)
]  # fmt: skip
VALUES = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


def oblique(degrees: tuple[float, float, float], order: tuple[int, ...] = (2, 1, 0)) -> np.ndarray:
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()[:, list(order)]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("degrees", [(0, 0, 0), (10, -20, 15), (0, 0, 90), (180, 0, 0)], ids=str)
def test_same_as_simpleitk(code: str, degrees: tuple[float, float, float]) -> None:
    affine = make_affine(oblique(degrees), (2.0, 0.7, 0.8), (-30, 12, 5))
    turned = Orient(step="orient", axes=code).apply(make_frame(VALUES, affine))
    wanted = sitk.DICOMOrient(to_sitk(VALUES, affine), code[::-1])
    np.testing.assert_array_equal(turned.values, sitk.GetArrayFromImage(wanted))
    reference = to_sitk(turned.values, turned.affine)
    np.testing.assert_allclose(reference.GetOrigin(), wanted.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(reference.GetDirection(), wanted.GetDirection(), atol=1e-9)


@given(
    st.sampled_from(CODES),
    st.tuples(*[st.floats(-180, 180)] * 3),
    st.permutations([0, 1, 2]),
    st.tuples(*[st.integers(1, 5)] * 3),
)
def test_undone_exactly(
    code: str, degrees: tuple[float, float, float], order: list[int], shape: tuple[int, int, int]
) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, shape, np.int16)
    frame = make_frame(values, make_affine(oblique(degrees, tuple(order)), (3, 1, 2)))
    turned = Orient(step="orient", axes=code).apply(frame)
    np.testing.assert_array_equal(restore(turned.undo, turned.values, "nearest"), values)
    # each voxel keeps its place in the patient
    index = np.array([*(np.array(turned.shape) - 1), 1.0])
    point = turned.affine @ index
    source = np.rint(np.linalg.solve(frame.affine, point)[:3]).astype(int)
    assert values[tuple(source)] == turned.values[-1, -1, -1]


def test_axes_are_a_permutation_even_half_way() -> None:
    for degrees in product((0, 45, 90), repeat=3):
        assert sorted(axis for axis, _ in closest_axes(make_affine(oblique(degrees)))) == [0, 1, 2]


@pytest.mark.parametrize("axes", ["RA", "RRS", "XYZ", "RLS", "ras"])
def test_nonsense_is_refused(axes: str) -> None:
    with pytest.raises(ValidationError, match="three directions"):
        Orient(step="orient", axes=axes)


def tilted(shape: tuple[int, int, int], spacing: tuple[float, float, float], degrees: float) -> np.ndarray:
    """Gantry tilt: images turned about x, the table still moves along z."""
    affine = np.eye(4)
    t = np.radians(degrees)
    affine[:3, 0] = [0, 0, spacing[0]]
    affine[:3, 1] = np.array([0, np.cos(t), np.sin(t)]) * spacing[1]
    affine[:3, 2] = [spacing[2], 0, 0]
    return affine


def sphere(shape: tuple[int, int, int], affine: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return np.linalg.norm(points - centre, axis=-1) - radius


def test_straighten_gives_right_angles_and_keeps_the_place() -> None:
    shape = (20, 40, 40)
    affine = tilted(shape, (2.0, 1.0, 1.0), 20.0)
    centre = affine[:3, :3] @ np.array([10, 20, 20.0])
    field = np.clip(-sphere(shape, affine, centre, 12.0), -3, 3).astype(np.float32)
    straight = Straighten(step="straighten", fill=-3.0).apply(make_frame(field, affine))
    columns = straight.affine[:3, :3]
    np.testing.assert_allclose(columns.T @ columns, np.diag(np.diag(columns.T @ columns)), atol=1e-9)
    truth = np.clip(-sphere(straight.shape, straight.affine, centre, 12.0), -3, 3)
    assert np.abs(straight.values - truth).max() < 0.35  # linear interpolation of a kinked field
    assert np.mean((straight.values > 0) != (truth > 0)) < 2e-3
    back = restore(straight.undo, (straight.values > 0).astype(np.uint8), "nearest")
    assert back.shape == shape
    assert np.mean(back != (field > 0)) < 1e-2


@given(st.floats(-30, 30), st.floats(-25, 25))
def test_straighten_and_back_restores_a_linear_field(tilt: float, other: float) -> None:
    shape = (6, 9, 8)
    affine = tilted(shape, (2.0, 1.0, 1.0), tilt)
    affine[:3, 0] += [np.sin(np.radians(other)), 0, 0]
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    values = (index @ [5.0, 2.0, -3.0]).astype(np.float32)
    straight = Straighten(step="straighten").apply(make_frame(values, affine))
    back = restore(straight.undo, straight.values, "linear")
    assert back.shape == shape
    inner = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(back[inner], values[inner], atol=1e-3)


def test_straight_stack_is_left_alone() -> None:
    frame = make_frame(VALUES, make_affine(oblique((5, 10, 20)), (2, 1, 1)))
    assert Straighten(step="straighten").apply(frame) is frame


def test_straightened_is_where_simpleitk_reads_it() -> None:
    """A straight volume, sampled by SimpleITK along tilted slices, comes back by straighten."""
    z, y, x = np.meshgrid(np.arange(40.0), np.arange(60.0), np.arange(30.0), indexing="ij")
    smooth = (100 * np.sin(z / 9) + 80 * np.cos(y / 11) + 3 * x).astype(np.float32)
    image = to_sitk(smooth, make_affine())
    shape, affine = (12, 30, 30), tilted((12, 30, 30), (2.0, 1.0, 1.0), 15.0)
    affine[:3, 3] = [0, 12, 4]
    slices = []
    for k in range(shape[0]):
        one = affine.copy()
        one[:3, 3] = affine[:3, 3] + k * affine[:3, 0]
        one[:3, 0] = np.cross(one[:3, 2], one[:3, 1])
        slices.append(on_grid(image, make_frame(np.zeros((1, *shape[1:]), np.uint8), one), sitk.sitkLinear, -999)[0])
    straight = Straighten(step="straighten", fill=-999.0).apply(make_frame(np.stack(slices), affine))
    truth = on_grid(image, straight, sitk.sitkLinear, -999)
    both = (straight.values > -900) & (truth > -900)
    both[:, :6], both[:, -6:] = False, False
    assert both.sum() > 5000
    assert np.abs(straight.values - truth)[both].max() < 0.6
