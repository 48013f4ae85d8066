"""Steps on arrays of known content."""

import numpy as np

from dicomnode.infer import grid


def test_closing_does_not_grow_into_the_edge_of_a_tight_array():
    mask = np.zeros((1, 40, 60), bool)
    mask[0] = (np.arange(60)[None, :] - 29.5) ** 2 / 29.5**2 + (np.arange(40)[:, None] - 19.5) ** 2 / 19.5**2 <= 1
    closed = grid.close_in_plane(mask, 7)
    wide = np.pad(mask, ((0, 0), (30, 30), (30, 30)))
    assert np.array_equal(closed, grid.close_in_plane(wide, 7)[:, 30:-30, 30:-30])
