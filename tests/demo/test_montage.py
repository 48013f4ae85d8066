"""The montage shows labels where they are, the right way round, with true proportions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dicomnode.demo import montage as module
from dicomnode.demo.montage import montage_size, overlay_montage, save_png

BLUE, ORANGE = (60, 150, 255), (255, 130, 50)
COLOURS = {1: BLUE, 2: ORANGE}
Volume = tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]


@pytest.fixture
def volume() -> Volume:
    """Two boxes: label 1 at small columns and reaching higher, label 2 at large columns."""
    hu = np.full((20, 60, 80), 40, np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    labels[4:18, 20:45, 15:35] = 1
    labels[4:12, 20:45, 45:65] = 2
    hu[labels > 0] = -860
    return hu, labels


def where(image: Image.Image, colour: tuple[int, int, int]) -> npt.NDArray[np.intp]:
    """Positions (y, x) of the pixels of exactly this colour."""
    return np.argwhere((np.asarray(image) == colour).all(axis=2))


def test_size_follows_the_grid_and_the_texts(volume: Volume) -> None:
    for columns, rows, titles in ((4, 3, ()), (2, 5, ("one",)), (1, 1, ("one", "two", "three"))):
        image = overlay_montage(
            *volume, (5.0, 2.0, 2.0), colours=COLOURS, columns=columns, rows=rows, title_lines=titles
        )
        assert image.mode == "RGB"
        assert image.size == montage_size(columns, rows, len(titles), 2)


def test_right_of_the_patient_is_at_the_left_of_each_axial_tile(volume: Volume) -> None:
    image = overlay_montage(*volume, (5.0, 2.0, 2.0), colours=COLOURS, columns=1, rows=1)
    tile = image.crop((0, 60, 8 + module._TILE[0], 52 + module._TILE[1]))
    right, left = where(tile, BLUE), where(tile, ORANGE)
    assert right.size
    assert left.size
    assert right[:, 1].max() < left[:, 1].min()


def test_head_is_up_and_right_is_left_in_the_coronal_view(volume: Volume) -> None:
    image = overlay_montage(*volume, (5.0, 2.0, 2.0), colours=COLOURS, columns=1, rows=1)
    x = 2 * 8 + module._TILE[0]
    tile = image.crop((x, 52, x + module._VIEW[0], 52 + module._VIEW[1]))
    right, left = where(tile, BLUE), where(tile, ORANGE)
    assert right[:, 0].min() < left[:, 0].min()  # label 1 reaches higher
    assert right[:, 1].max() < left[:, 1].min()
    height, width = np.ptp(right[:, 0]) + 1, np.ptp(right[:, 1]) + 1
    assert height / width == pytest.approx((14 * 5.0) / (20 * 2.0), rel=0.05)


def test_outline_and_tint_are_where_the_label_is() -> None:
    hu = np.full((40, 40), -600, np.int16)
    labels = np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = 1
    tile = module._view(hu, labels, (1.0, 1.0), (160, 160), colours={1: BLUE}, window=(-600, 1500))
    found = where(tile, BLUE)
    assert found.min() == pytest.approx(40, abs=1)
    assert found.max() == pytest.approx(119, abs=1)
    inside, outside = np.asarray(tile)[80, 80], np.asarray(tile)[10, 10]
    assert tuple(outside) == (127, 127, 127)
    assert inside[2] > inside[0]


def test_a_label_without_a_colour_is_not_drawn(volume: Volume) -> None:
    image = overlay_montage(*volume, (5.0, 2.0, 2.0), colours={1: BLUE})
    assert where(image, BLUE).size
    assert not where(image, ORANGE).size


def test_a_volume_without_labels_is_shown_plain(volume: Volume) -> None:
    hu, labels = volume
    image = overlay_montage(hu, np.zeros_like(labels), (5.0, 2.0, 2.0), colours={}, legend={1: "nothing found"})
    assert image.size == montage_size(4, 3, 0, 1)


def test_texts_change_the_picture(volume: Volume) -> None:
    plain = overlay_montage(*volume, (5.0, 2.0, 2.0), colours=COLOURS, title_lines=("",))
    for changed in (
        {"title_lines": ("CT",)},
        {"title_lines": ("",), "legend": {1: "right lung 2010 ml", 2: "left lung"}},
        {"title_lines": ("",), "first_z": -100.0},
        {"title_lines": ("",), "banner": "other words"},
        {"title_lines": ("",), "window": module.SOFT_TISSUE_WINDOW},
    ):
        other = overlay_montage(*volume, (5.0, 2.0, 2.0), colours=COLOURS, **changed)
        assert other.size == plain.size
        assert other.tobytes() != plain.tobytes()


def test_axial_tiles_run_from_head_to_feet_inside_the_labelled_range(volume: Volume) -> None:
    indices = module._axial_indices(volume[1], 5)
    assert indices == sorted(indices, reverse=True)
    assert min(indices) >= 4
    assert max(indices) < 18
    assert module._axial_indices(volume[1][:1], 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "spacing", "columns"),
    [((20, 60, 79), (5.0, 2.0, 2.0), 4), ((20, 60, 80), (0.0, 2.0, 2.0), 4), ((20, 60, 80), (5.0, 2.0, 2.0), 0)],
)
def test_impossible_arguments_are_refused(
    volume: Volume, shape: tuple[int, int, int], spacing: tuple[float, float, float], columns: int
) -> None:
    with pytest.raises(ValueError, match="have to be"):
        overlay_montage(volume[0], np.zeros(shape, np.uint8), spacing, colours=COLOURS, columns=columns)


def test_png_keeps_every_pixel(volume: Volume, tmp_path: Path) -> None:
    image = overlay_montage(*volume, (5.0, 2.0, 2.0), colours=COLOURS)
    path = save_png(image, tmp_path / "montage.png")
    with Image.open(path) as read:
        assert read.format == "PNG"
        assert read.tobytes() == image.tobytes()
