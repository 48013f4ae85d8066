"""What ct-lung-unet is trained on: right stays right, truth follows every deformation, values stay HU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from scripts.lungnet import phantoms, slabs, store  # noqa: E402
from scripts.lungnet.anatomy import SHAPE, Fields, axes  # noqa: E402
from scripts.lungnet.phantoms import LEFT, RIGHT, Chest  # noqa: E402


@pytest.fixture(scope="module")
def body() -> Fields:
    """Two ellipsoid lungs in an elliptic body: enough for what is done with the demo's anatomy."""
    z, y, x = axes()
    shells = [np.sqrt(((z + 18) / 120) ** 2 + (y / 65) ** 2 + ((x - c) / 45) ** 2) for c in (-60, 60)]
    pleura = (np.minimum(*shells) - 1) * 45
    skin = ((x / 150) ** 2 + (y / 105) ** 2 <= 1) & (z > -999)
    none = np.zeros(SHAPE, np.float32)
    tissue = np.where(skin, 40.0, -1000.0)
    return Fields(*(np.asarray(f, np.float32) for f in (tissue, pleura, none, none, skin)))


@pytest.fixture(scope="module")
def made(body: Fields) -> list[Chest]:
    return [phantoms.chest(np.random.default_rng(seed), body) for seed in (3, 4)]


def test_chests_are_bodies_with_two_known_lungs(made: list[Chest]) -> None:
    for chest in made:
        assert chest.hu.shape == chest.labels.shape == SHAPE
        assert chest.hu.min() >= -1024 and chest.hu.max() <= 3071
        middle = [np.argwhere(chest.labels == side)[:, 2].mean() for side in (RIGHT, LEFT)]
        assert middle[0] < middle[1]  # columns grow to the patient's left
        assert (
            np.median(chest.hu[chest.labels > 0]) < -300 < np.median(chest.hu[(chest.labels == 0) & (chest.hu > -900)])
        )
    assert not np.array_equal(made[0].labels, made[1].labels)


def test_the_same_seed_gives_the_same_chest(body: Fields, made: list[Chest]) -> None:
    again = phantoms.chest(np.random.default_rng(3), body)
    assert np.array_equal(again.hu, made[0].hu) and np.array_equal(again.labels, made[0].labels)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(10, 90))
def test_waves_are_smooth_and_of_unit_size(seed: int, knot_mm: float) -> None:
    field = phantoms.waves(np.random.default_rng(seed), knot_mm)
    assert field.shape == SHAPE and np.isfinite(field).all()
    assert 0.3 < field.std() < 2.5
    assert np.abs(np.diff(field, axis=2)).max() < 12 * 2.5 / knot_mm  # no step from voxel to voxel


def test_a_mirrored_body_has_its_right_lung_on_the_right() -> None:
    labels = np.array([[RIGHT, RIGHT, 0, LEFT]], np.uint8)
    assert slabs.mirrored(labels).tolist() == [[RIGHT, 0, LEFT, LEFT]]
    assert np.array_equal(slabs.mirrored(slabs.mirrored(labels)), labels)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_slabs_keep_truth_on_the_dark_blocks(seed: int, index: int) -> None:
    """Blocks of lung in tissue: after every move the truth lies on what is dark, right before left."""
    hu = np.full((6, 60, 80), 40, np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    hu[:, 20:40, 10:30] = hu[:, 20:40, 50:70] = -850
    labels[:, 20:40, 10:30], labels[:, 20:40, 50:70] = RIGHT, LEFT
    image, truth = slabs.slab(np.random.default_rng(seed), Chest(hu, labels), index, (64, 96))
    assert image.shape == (3, 64, 96) and truth.shape == (64, 96)
    assert image.min() >= 0 and image.max() <= 1
    assert image[1][truth > 0].mean() < 0.5
    sides = [np.argwhere(truth == side)[:, 1].mean() for side in (RIGHT, LEFT)]
    assert sides[0] < sides[1]


def test_chests_are_made_once(tmp_path: Path, body: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    chest = Chest(np.zeros((2, 2, 2), np.int16), np.ones((2, 2, 2), np.uint8))
    asked: list[int] = []

    def fake(seed: int) -> Fields:
        asked.append(seed)
        return body

    monkeypatch.setattr(store, "fields", fake)
    monkeypatch.setattr(store, "chest", lambda rng, body: chest)
    paths = store.make(tmp_path, 5, 7, lambda _: None)
    assert asked == [1, 2, 0]  # three bodies
    assert store.make(tmp_path, 5, 7, pytest.fail) == paths
    assert np.array_equal(store.load(paths[4]).labels, chest.labels)
