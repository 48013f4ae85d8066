"""Packed morphology gives scipy's masks, to the voxel."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dicomnode.infer.bits import Bits
from dicomnode.infer.grid import IN_PLANE, IN_PLANE_BOX


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 27)))
    share = draw(st.sampled_from([0.02, 0.2, 0.5, 0.8, 0.98]))
    return np.random.default_rng(draw(st.integers(0, 2**32))).random(shape) < share


def steps(function, mask, crosses, squares, **options):
    for structure, count in ((IN_PLANE, crosses), (IN_PLANE_BOX, squares)):
        if count:
            mask = function(mask, structure, iterations=count, **options)
    return mask


@settings(max_examples=300, deadline=None)
@given(masks(), st.integers(0, 3), st.integers(0, 3))
def test_in_plane(mask, crosses, squares):
    bits = Bits.of(mask)
    assert np.array_equal(bits.mask(), mask)
    how = {"crosses": crosses, "squares": squares}
    assert np.array_equal(bits.dilated(**how).mask(), steps(ndimage.binary_dilation, mask, crosses, squares))
    for border in (False, True):
        wanted = steps(ndimage.binary_erosion, mask, crosses, squares, border_value=int(border))
        assert np.array_equal(bits.eroded(**how, border=border).mask(), wanted)
    assert np.array_equal(bits.mask(), mask), "the packed mask itself was changed"


@settings(max_examples=200, deadline=None)
@given(masks(), st.integers(0, 3))
def test_across_slices(mask, count):
    bits = Bits.of(mask)
    line = np.zeros((3, 3, 3), bool)
    line[:, 1, 1] = True
    wanted = ndimage.binary_dilation(mask, line, iterations=count) if count else mask
    assert np.array_equal(bits.along(count).mask(), wanted)
    assert np.array_equal(bits.spread().mask(), ndimage.binary_dilation(mask))
