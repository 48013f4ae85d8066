"""Resampling against SimpleITK on the same grid; sizes; the way back; the cap."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.stages.frame import Frame, restore
from dicomnode.infer.stages.orient import Orient
from dicomnode.infer.stages.resample import Resample, Resize, axis_to_size, axis_to_spacing, resample_array
from tests.infer.stages.stage_case import make_affine, make_frame, on_grid, phantom, to_sitk

AFFINE = make_affine(spacing=(2.5, 0.7, 0.8), origin=(-10, 3, 40))
VALUES = phantom()
RANGE = float(np.ptp(VALUES))
ITK = {"nearest": sitk.sitkNearestNeighbor, "linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline}
TOLERANCE = {"nearest": 0.0, "linear": 1e-3, "bspline": 5e-3}
TARGETS = [(1.0, 1.0, 1.0), (3.0, 0.5, 2.0), (2.5, 1.4, 0.8), (5.0, None, 0.4)]


@pytest.mark.parametrize("order", ["nearest", "linear", "bspline"])
@pytest.mark.parametrize("align", ["centres", "edges"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("axes", ["SPL", "RAS"])
def test_same_as_simpleitk(order: str, align: str, target: tuple, axes: str) -> None:
    frame = Orient(step="orient", axes=axes).apply(make_frame(VALUES, AFFINE))
    out = Resample(step="resample", spacing_mm=target, order=order, align=align).apply(frame)
    wanted = on_grid(to_sitk(frame.values.astype(np.float32), frame.affine), out, ITK[order], np.nan)
    known = ~np.isnan(wanted)  # SimpleITK gives the default beyond half a voxel outside
    assert known.mean() > 0.8
    places = places_in(out, frame)
    if order == "bspline":  # beyond the outer centres it mirrors, SimpleITK does otherwise
        known &= np.all((places >= -1e-9) & (places <= np.array(frame.shape) - 1 + 1e-9), axis=-1)
    if order == "nearest":  # SimpleITK computes places in mm: half-way ones fall either way
        known &= np.all(np.abs(places % 1 - 0.5) > 1e-6, axis=-1)
    diff = np.abs(out.values.astype(np.float32) - wanted)[known]
    assert diff.max(initial=0.0) <= TOLERANCE[order] * RANGE
    assert out.values.dtype == (np.int16 if order == "nearest" else np.float32)


def places_in(out: Frame, frame: Frame) -> np.ndarray:
    """Index in ``frame`` of each voxel of ``out``."""
    index = np.stack(np.meshgrid(*map(np.arange, out.shape), indexing="ij"), axis=-1)
    points = index @ out.affine[:3, :3].T + out.affine[:3, 3]
    return (points - frame.affine[:3, 3]) @ np.linalg.inv(frame.affine[:3, :3]).T


def test_sizes() -> None:
    centres = axis_to_spacing(100, 0.7, 1.5, "centres")  # MONAI: round(99 * 0.7 / 1.5) + 1
    assert (centres.target, centres.offset) == (47, 0.0)
    edges = axis_to_spacing(100, 0.7, 1.5, "edges")  # nnU-Net: round(70 / 1.5)
    assert edges.target == 47
    assert edges.step == pytest.approx(100 / 47)
    assert axis_to_spacing(100, 1.5, 1.5 + 1e-9, "edges").same
    assert axis_to_size(512, 224).target == 224
    # the outer edges coincide: first voxel's lower edge and last voxel's upper edge
    assert edges.offset - edges.step / 2 == pytest.approx(-0.5)
    assert edges.offset + (edges.target - 0.5) * edges.step == pytest.approx(99.5)


@given(
    st.tuples(*[st.integers(2, 9)] * 3),
    st.tuples(*[st.floats(0.4, 4.0)] * 3),
    st.sampled_from(["centres", "edges"]),
)
def test_linear_field_survives_there_and_back(shape: tuple, target: tuple, align: str) -> None:
    """Linear interpolation is exact on a linear field; only beyond the outer centres it is held."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    values = (index @ [3.0, -2.0, 1.0]).astype(np.float32)
    frame = make_frame(values, make_affine(spacing=(2.0, 1.0, 0.5)))
    out = Resample(step="resample", spacing_mm=target, align=align).apply(frame)
    at = np.stack(np.meshgrid(*map(np.arange, out.shape), indexing="ij"), axis=-1)
    where = (at @ out.affine[:3, :3].T + out.affine[:3, 3]) @ np.linalg.inv(frame.affine[:3, :3]).T
    held = np.clip(where, 0, np.array(shape) - 1)
    np.testing.assert_allclose(out.values, held @ [3.0, -2.0, 1.0], atol=1e-4)
    assert restore(out.undo, out.values, "linear").shape == shape


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_labels_survive_finer_sampling(a: int, b: int, c: int) -> None:
    """To a whole fraction of the spacing and back by nearest neighbour is the identity."""
    labels = np.random.default_rng(a * 16 + b * 4 + c).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    fine = Resample(step="resample", spacing_mm=(1 / a, 1 / b, 1 / c), order="nearest").apply(make_frame(labels))
    np.testing.assert_array_equal(restore(fine.undo, fine.values, "nearest"), labels)


def test_labels_keep_their_type_and_values() -> None:
    labels = np.random.default_rng(1).choice([0, 7, 200], (6, 8, 9)).astype(np.uint8)
    out = Resize(step="resize", size=(11, None, 5), order="nearest").apply(make_frame(labels))
    assert out.values.dtype == np.uint8
    assert out.shape == (11, 8, 5)
    assert set(np.unique(out.values)) <= {0, 7, 200}


@pytest.mark.parametrize("order", ["nearest", "linear"])
def test_memory_layout_changes_nothing(order: str) -> None:
    maps = (axis_to_size(24, 10), axis_to_size(30, 41), axis_to_size(28, 28))
    plain = resample_array(VALUES, maps, order)
    turned = np.ascontiguousarray(VALUES.transpose(2, 0, 1)).transpose(1, 2, 0)
    np.testing.assert_allclose(resample_array(turned, maps, order), plain, atol=1e-3)  # rounding of float32
    flipped = np.ascontiguousarray(VALUES[::-1, :, ::-1])[::-1, :, ::-1]
    np.testing.assert_allclose(resample_array(flipped, maps, order), plain, atol=1e-3)


def test_too_large_is_refused_before_it_is_made() -> None:
    frame = make_frame(np.broadcast_to(np.int16(0), (4000, 4000, 4000)))
    with pytest.raises(UnsuitableSeries, match="the limit is") as caught:
        Resample(step="resample", spacing_mm=(0.1, 0.1, 0.1)).apply(frame)
    assert caught.value.code == "TOO_LARGE"
    with pytest.raises(UnsuitableSeries):
        Resample(step="resample", spacing_mm=(0.5, 0.5, 0.5), max_voxels=1000).apply(make_frame(VALUES, AFFINE))


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 12)] * 3))
def test_spline_is_scipys(shape: tuple, size: tuple) -> None:
    """Axis by axis the same as scipy's spline in three dimensions at once, also beyond the outer centres."""
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 100
    maps = tuple(axis_to_size(n, m) for n, m in zip(shape, size, strict=True))
    wanted = ndimage.affine_transform(
        values.astype(float), [m.step for m in maps], [m.offset for m in maps], size, order=3, mode="mirror"
    )
    np.testing.assert_allclose(resample_array(values, maps, "bspline"), wanted, atol=2e-2)
