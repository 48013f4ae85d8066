"""Training examples: three neighbouring slices of a random chest, moved, mirrored and made noisy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from scripts.lungnet.phantoms import LEFT, RIGHT, Chest

F32 = npt.NDArray[np.float32]
Rng = np.random.Generator

WINDOW = (-1400.0, 200.0)
"""HU that become 0 and 1: centre -600, width 1600, as in the bundle's manifest."""


def scaled(hu: F32) -> F32:
    low, high = WINDOW
    return np.clip((hu - np.float32(low)) / np.float32(high - low), 0, 1)


def mirrored(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Labels of a body with its organs the other way round: right is still on the right."""
    table = np.zeros(256, np.uint8)
    table[RIGHT], table[LEFT] = LEFT, RIGHT
    return np.asarray(table[labels[..., ::-1]])


def noise(rng: Rng, shape: tuple[int, ...]) -> F32:
    """Detector noise: white or correlated, sometimes in horizontal streaks, 3 to 90 HU."""
    out = rng.standard_normal(shape).astype(np.float32)
    kind = rng.integers(3)
    if kind == 1:
        out = ndimage.gaussian_filter(out, (0, 0.7, 0.7)) * np.float32(2.2)
    elif kind == 2:
        out = ndimage.gaussian_filter(out, (0, 0.2, 4)) * np.float32(3.5)
    return np.asarray(out * np.float32(np.exp(rng.uniform(np.log(3), np.log(90)))))


def slab(rng: Rng, chest: Chest, index: int, size: tuple[int, int]) -> tuple[F32, npt.NDArray[np.uint8]]:
    """Input float32 (3, rows, columns) and labels uint8 (rows, columns) around slice ``index``."""
    around = np.clip([index - 1, index, index + 1], 0, len(chest.hu) - 1)
    hu = chest.hu[around].astype(np.float32)
    labels = chest.labels[index]
    if rng.random() < 0.5:
        hu, labels = hu[..., ::-1], mirrored(labels)
    angle, scale = np.radians(rng.normal(0, 6)), np.exp(rng.normal(0, 0.08))
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = (np.array(labels.shape) - 1) / 2 + rng.uniform(-8, 8, 2)
    offset = middle - matrix @ ((np.array(size) - 1) / 2)
    planes = [ndimage.affine_transform(p, matrix, offset, size, order=1, mode="constant", cval=-1000.0) for p in hu]
    moved = ndimage.affine_transform(labels, matrix, offset, size, order=0, mode="constant", cval=0)
    image = np.stack(planes)
    image = image * np.float32(rng.normal(1, 0.02)) + np.float32(rng.normal(0, 12)) + noise(rng, image.shape)
    return scaled(image), moved


def batch(rng: Rng, chests: Sequence[Chest], count: int, size: tuple[int, int]) -> tuple[F32, npt.NDArray[np.int64]]:
    """``count`` slabs, three in four from slices with lung: (n, 3, rows, columns), (n, rows, columns)."""
    images, truths = [], []
    for _ in range(count):
        chest = chests[rng.integers(len(chests))]
        index = int(rng.integers(len(chest.hu)))
        if rng.random() < 0.75:
            filled = np.flatnonzero(chest.labels.any(axis=(1, 2)))
            index = int(filled[rng.integers(len(filled))]) if len(filled) else index
        image, truth = slab(rng, chest, index, size)
        images.append(image)
        truths.append(truth)
    return np.stack(images), np.stack(truths).astype(np.int64)
