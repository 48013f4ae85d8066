"""Crop and pad: undone exactly; the body against truth; MONAI's rules by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.infer.stages.extent import CropForeground, CropToBody, Pad, find_body
from dicomnode.infer.stages.frame import restore
from tests.infer.stages.stage_case import make_affine, make_frame

SHAPE = st.tuples(*[st.integers(1, 6)] * 3)


@given(
    SHAPE,
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from(["constant", "edge"]),
)
def test_pad_is_undone_exactly(shape: tuple, size: tuple, multiple: tuple, mode: str) -> None:
    values = np.random.default_rng(5).integers(-500, 500, shape, np.int16)
    frame = make_frame(values, make_affine(spacing=(2, 3, 4), origin=(1, 2, 3)))
    out = Pad(step="pad", size=size, multiple=multiple, mode=mode, value=-1024.0).apply(frame)
    assert all(n % m == 0 and n >= s for n, m, s in zip(out.shape, multiple, size, strict=True))
    np.testing.assert_array_equal(restore(out.undo, out.values, "nearest"), values)
    before = [(t - n) // 2 for t, n in zip(out.shape, shape, strict=True)]
    np.testing.assert_allclose(out.affine @ [*before, 1], frame.affine @ [0, 0, 0, 1])
    if mode == "constant" and out.shape != shape:
        assert out.values.sum(dtype=int) == values.sum(dtype=int) - 1024 * (out.values.size - values.size)


@given(SHAPE, st.integers(0, 3), st.data())
def test_crop_is_undone_exactly(shape: tuple, margin: int, data: st.DataObject) -> None:
    values = np.zeros(shape, np.int16)
    for _ in range(data.draw(st.integers(1, 4))):
        values[tuple(data.draw(st.integers(0, n - 1)) for n in shape)] = 9
    frame = make_frame(values)
    out = CropForeground(step="crop_foreground", margin=margin).apply(frame)
    hits = np.argwhere(values > 0)
    low, high = np.maximum(hits.min(0) - margin, 0), np.minimum(hits.max(0) + 1 + margin, shape)
    assert out.shape == tuple(high - low)
    np.testing.assert_array_equal(restore(out.undo, out.values, "nearest"), values)
    np.testing.assert_allclose((out.affine @ [0, 0, 0, 1])[:3], (frame.affine @ [*low, 1])[:3])


def test_nothing_to_crop_to() -> None:
    frame = make_frame(np.zeros((3, 4, 5), np.int16))
    assert CropForeground(step="crop_foreground").apply(frame).values is frame.values
    air = make_frame(np.full((3, 4, 5), -1000, np.int16))
    out = CropToBody(step="crop_to_body").apply(air)
    assert out.shape == (3, 4, 5)
    assert "No body" in out.notes[0]


def test_body_with_lungs_without_table() -> None:
    spacing = (5.0, 2.0, 2.0)
    z, y, x = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip((20, 120, 150), spacing, strict=True)), indexing="ij"
    )
    hu = np.full(z.shape, -1000, np.int16)
    body = (x / 110) ** 2 + (y / 70) ** 2 <= 1
    hu[body] = 40
    hu[((np.abs(x) - 50) / 30) ** 2 + (y / 45) ** 2 <= 1] = -850
    hu[(y > 90) & (y < 94)] = 100  # the table: one voxel thick on the coarse grid
    frame = make_frame(hu, make_affine(spacing=spacing))
    found = find_body(frame, -500)
    dice = 2 * (found & body).sum() / (found.sum() + body.sum())
    assert dice > 0.95
    out = CropToBody(step="crop_to_body", margin_mm=4).apply(frame)
    rows = np.flatnonzero(body.any(axis=(0, 2)))
    kept = out.undo[0].box[1]
    assert kept.start <= rows[0] and rows[-1] < kept.stop
    assert kept.stop < np.flatnonzero((hu == 100).any(axis=(0, 2)))[-1] + 4
    labels = np.ones(out.shape, np.uint8)
    back = restore(out.undo, labels, "nearest")
    assert back.shape == hu.shape
    assert back.sum() == labels.size
