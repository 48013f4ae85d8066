"""Largest components and holes against SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy import ndimage

from dicomnode.infer.stages.components import fill_holes, keep_largest
from dicomnode.infer.stages.decide import FillHoles, KeepLargest
from dicomnode.infer.steps import State
from tests.infer.stages.stage_case import make_affine, make_volume

MASKS = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 1)
)


def state_of(labels: np.ndarray, spacing: tuple[float, float, float] = (2.0, 1.0, 1.0)) -> State:
    volume = make_volume(np.zeros(labels.shape, np.int16), make_affine(spacing=spacing))
    box = tuple(slice(0, n) for n in labels.shape)
    return State(volume, {}, box, labels != 0, labels=labels)  # type: ignore[arg-type]


@given(MASKS, st.integers(1, 3), st.sampled_from([6, 26]))
def test_sizes_kept_are_simpleitks(mask: np.ndarray, keep: int, connectivity: int) -> None:
    got = keep_largest(mask, keep, 0, connectivity, None)
    pieces = sitk.ConnectedComponent(sitk.GetImageFromArray(mask), connectivity == 26)
    sizes = np.sort(np.bincount(sitk.GetArrayFromImage(pieces).ravel())[1:])[::-1]
    assert got.sum() == sizes[:keep].sum()
    assert np.all(mask[got > 0])
    structure = ndimage.generate_binary_structure(3, 1 if connectivity == 6 else 3)
    assert ndimage.label(got, structure)[1] == min(keep, len(sizes))
    np.testing.assert_array_equal(keep_largest(got, keep, 0, connectivity, None), got)


@given(MASKS, st.integers(1, 6))
def test_small_pieces_go_as_simpleitk_relabels(mask: np.ndarray, least: int) -> None:
    pieces = sitk.ConnectedComponent(sitk.GetImageFromArray(mask))
    wanted = sitk.GetArrayFromImage(sitk.RelabelComponent(pieces, minimumObjectSize=least)) > 0
    np.testing.assert_array_equal(keep_largest(mask, None, least, 6, None) > 0, wanted)


@given(MASKS)
def test_holes_are_simpleitks(mask: np.ndarray) -> None:
    wanted = sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(mask), False, 1))
    np.testing.assert_array_equal(fill_holes(mask, False, None, None), wanted)
    planes = [sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(p), False, 1)) for p in mask]
    np.testing.assert_array_equal(fill_holes(mask, True, None, None), np.stack(planes))


def test_each_segment_by_itself() -> None:
    labels = np.zeros((3, 9, 9), np.uint8)
    labels[:, :4, :4] = 1
    labels[0, 8, 8] = 1
    labels[1, 1, 1] = 0  # a hole in 1
    labels[:, 5:, :4] = 2
    labels[1, 6, 1] = 1  # a piece of 1 inside 2: no hole of 2
    labels[2, 0, 8] = 2
    got = KeepLargest(step="largest_components", segments=(1,)).apply(state_of(labels)).labels
    assert got is not None
    assert got[0, 8, 8] == 0 and got[2, 0, 8] == 2 and got[1, 6, 1] == 0
    filled = FillHoles(step="fill_holes").apply(state_of(labels)).labels
    assert filled is not None
    assert filled[1, 1, 1] == 1 and filled[1, 6, 1] == 1
    assert np.count_nonzero(filled != labels) == 1


def test_limits_are_in_millilitres() -> None:
    labels = np.zeros((2, 5, 9), np.uint8)
    labels[0, 0, :4] = 1  # 4 voxels of 2 mm3
    labels[0, 4, :3] = 1
    for min_ml, left in ((0.0079, 4), (0.008, 4), (0.0081, 0), (0.006, 7)):
        got = KeepLargest(step="largest_components", keep=None, min_ml=min_ml).apply(state_of(labels)).labels
        assert np.count_nonzero(got) == left
    ring = np.ones((3, 5, 5), np.uint8)
    ring[1, 2, 1:3] = 0
    for max_ml, filled in ((0.0039, 0), (0.0041, 2)):
        got = FillHoles(step="fill_holes", max_ml=max_ml).apply(state_of(ring)).labels
        assert np.count_nonzero(got) - np.count_nonzero(ring) == filled
    with pytest.raises(ValidationError, match="keep or min_ml"):
        KeepLargest(step="largest_components", keep=None)


def test_input_is_not_changed() -> None:
    labels = np.random.default_rng(2).integers(0, 3, (4, 6, 6)).astype(np.uint8)
    labels.flags.writeable = False
    KeepLargest(step="largest_components").apply(state_of(labels))
    FillHoles(step="fill_holes").apply(state_of(labels))
