"""Inputs of golden cases: bodies of known make-up, so that a network has something to answer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage


def body(shape: tuple[int, int, int], seed: int, *, hounsfield: bool, extreme: bool = False) -> npt.NDArray[np.int16]:
    """int16 (slices, rows, columns): an elliptic body with organs, bone, gas and texture.

    In HU, or from 0 to about 1000 where ``hounsfield`` is False. ``extreme`` adds metal (the
    largest int16) and padding of -3024. The same seed gives the same values.
    """
    random = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    air, soft, organs = (-1000.0, 30.0, (60.0, 110.0, 160.0, -850.0, 700.0)) if hounsfield else (
        0.0, 300.0, (420.0, 560.0, 780.0, 40.0, 950.0)
    )  # fmt: skip
    values = np.full(shape, air)
    inside = (y / 0.85) ** 2 + (x / 0.95) ** 2 <= 1
    values[inside] = soft
    for value in organs * 2:
        centre, radius = random.uniform(-0.6, 0.6, 3), random.uniform(0.12, 0.4, 3)
        organ = sum(((g - c) / r) ** 2 for g, c, r in zip((z, y, x), centre, radius, strict=True)) <= 1
        values[organ & inside] = value
    texture = ndimage.gaussian_filter(random.standard_normal(shape), 1.0)
    values += texture * (40 if hounsfield else 25) / max(float(texture.std()), 1e-6)
    if not hounsfield:
        np.maximum(values, 0, out=values)
    if extreme:
        values[:, :2] = -3024
        values[shape[0] // 2, shape[1] // 2 : shape[1] // 2 + 2, shape[2] // 2] = 32767
    return np.asarray(np.rint(np.clip(values, -32768, 32767)), np.int16)
