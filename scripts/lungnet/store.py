"""The chests of a training run, made once and kept in a scratch folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from scripts.lungnet.anatomy import Fields, fields
from scripts.lungnet.phantoms import Chest, chest

BODIES = 3
"""Vessel trees that the chests share; everything else differs from chest to chest."""


def load(path: Path) -> Chest:
    with np.load(path) as held:
        return Chest(held["hu"], held["labels"])


def make(folder: Path, count: int, seed: int, say: Callable[[str], None] = print) -> list[Path]:
    """Chests ``seed``, ``seed + 1`` ... as files; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"chest-{seed + i:05d}.npz" for i in range(count)]
    bodies: dict[int, Fields] = {}
    for number, path in enumerate(paths, start=seed):
        if path.exists():
            continue
        body = number % BODIES
        if body not in bodies:
            bodies[body] = fields(body)
        made = chest(np.random.default_rng([number, 11]), bodies[body])
        part = path.with_suffix(".part.npz")
        np.savez(part, hu=made.hu, labels=made.labels)
        part.replace(path)
        say(f"{path.name}: {np.count_nonzero(made.labels)} voxels of lung")
    return paths
