"""Outlines, orientation and pictures: what is drawn lies where it was found, and the right way up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dicomnode.encode.contours import outlines
from dicomnode.encode.picture import Caption, Display, grey, render, size_for, window_for
from dicomnode.encode.upright import letters_of, opposite, turn_for
from dicomnode.geometry import orientation_of

masks = arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@given(masks)
def test_an_outline_encloses_exactly_the_mask(mask: np.ndarray) -> None:
    """The signed areas of all outlines add up to the pixels, and even-odd filling gives them back."""
    polygons = outlines(mask, most=1000)
    filled = np.zeros(mask.shape, bool)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    for polygon in polygons:
        assert np.array_equal(polygon[0], polygon[-1]) and len(polygon) >= 5
        steps = np.diff(polygon, axis=0)
        assert ((steps == 0).sum(axis=1) == 1).all(), "along the edges of pixels, turning at each point"
        for (x0, y0), (x1, y1) in itertools.pairwise(polygon):
            if x0 == x1:  # a vertical edge toggles all to its right
                filled ^= (y > min(y0, y1)) & (y < max(y0, y1)) & (x > x0)
    assert np.array_equal(filled, mask)


def test_pixels_that_touch_by_a_corner_have_outlines_of_their_own() -> None:
    for mask in (np.eye(3, dtype=bool), np.eye(3, dtype=bool)[::-1]):
        assert [len(p) for p in outlines(mask)] == [5, 5, 5]


def test_the_smallest_outlines_are_left_out() -> None:
    mask = np.zeros((9, 9), bool)
    mask[0, ::2] = True
    mask[4:8, 2:6] = True
    mask[5, 6] = True
    assert len(outlines(mask, most=1)[0]) > 5 and len(outlines(mask)) == 6


unit = st.sampled_from([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)])


@given(unit, unit)
def test_every_acquisition_is_shown_the_same_way_up(row: tuple[int, ...], column: tuple[int, ...]) -> None:
    if not np.any(np.cross(row, column)):
        return
    turn = turn_for([*row, *column])
    normal = int(np.argmax(np.abs(np.cross(row, column))))
    assert (letters_of(turn.right), letters_of(turn.down)) == {0: ("P", "F"), 1: ("L", "F"), 2: ("L", "P")}[normal]
    # A pixel that lies farther along ``right`` in the patient lies farther right in the picture.
    rows, columns = np.mgrid[:3, :4]
    place = rows[..., None] * np.array(column) + columns[..., None] * np.array(row)
    shown = turn.apply(place)
    assert np.all(np.diff(shown @ np.array(turn.right), axis=1) > 0)
    assert np.all(np.diff(shown @ np.array(turn.down), axis=0) > 0)


def test_letters_of_oblique_and_unknown_directions() -> None:
    assert letters_of((0.8, 0.6, 0.0)) == "LP" and opposite("LP") == "RA" and letters_of(None) == ""
    assert orientation_of(["R", "F"]) == [-1, 0, 0, 0, 0, -1]
    assert orientation_of(["L", "L"]) is orientation_of(["", "F"]) is orientation_of(None) is None
    assert turn_for([float("nan")] * 6).right is None


def picture(labels: np.ndarray | None = None, **changes: object) -> tuple[np.ndarray, float]:
    values = np.zeros((40, 40), np.int16)
    values[:, 20:] = 1000
    options = {
        "display": Display(window=(500.0, 1000.0)),
        "spacing": (2.0, 1.0),
        "turn": turn_for([1, 0, 0, 0, 1, 0]),
        "colours": {1: (0, 255, 0)},
        "caption": Caption(["line"]),
    }
    return render(values, labels, **{**options, **changes})  # type: ignore[arg-type]


def test_proportions_are_those_of_the_patient() -> None:
    pixels, mm = picture()
    assert mm == pytest.approx(80 / 512)
    assert size_for(40, 40, (2.0, 1.0))[:2] == (256, 512)
    assert size_for(3000, 2000, (0.1, 0.1))[:2] == (683, 1024)
    assert pixels.shape[1] == 512


def test_outlines_have_their_colour_and_place() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[10:20, 5:10] = 1
    pixels, _ = picture(labels)
    green = np.argwhere((pixels == (0, 255, 0)).all(axis=2))
    scale, left, top = 512 / 80, (512 - 256) // 2, 44
    assert green.min(axis=0) == pytest.approx([top + 20 * scale, left + 5 * scale], abs=2)
    assert green.max(axis=0) == pytest.approx([top + 40 * scale, left + 10 * scale], abs=2)
    flipped, _ = picture(labels[:, ::-1], turn=turn_for([-1, 0, 0, 0, 1, 0]))
    again = np.argwhere((flipped == (0, 255, 0)).all(axis=2))
    assert np.array_equal(green, again), "turned back, it lies at the same place"


def test_the_mark_stands_above_and_within_the_image() -> None:
    pixels, _ = picture()
    amber = (np.abs(pixels.astype(int) - (255, 191, 0)) < 12).all(axis=2)
    assert amber[:40].sum() > 500, "above"
    assert amber[44 + 480 : 44 + 512].sum() > 100, "within, at the lower right"


def test_window_inversion_and_choice() -> None:
    values = np.array([[-1000.0, -1.0, 100.0, 2000.0]], np.float32)
    assert grey(values, (50.0, 101.0)).tolist() == [[0, 0, 255, 255]]
    plain, _ = picture()
    inverted, _ = picture(display=Display(window=(500.0, 1000.0), inverted=True))
    middle = 44 + 256
    assert plain[middle, 150, 0] < 10 < 240 < inverted[middle, 150, 0]
    lungs = np.full((10, 10), -850, np.float32) + np.arange(10)
    inside = np.ones((10, 10), bool)
    assert window_for(lungs, inside, (-600.0, 1500.0)) == (-600.0, 1500.0)
    centre, width = window_for(lungs, inside, (40.0, 400.0))  # all of it would be black
    assert centre == pytest.approx(-845.5, abs=1) and width < 20
