"""Where the windows of a sliding window lie and how much each voxel of one counts. Pure."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Placing = Literal["monai", "even"]


def starts(size: int, window: int, overlap: float, placing: Placing) -> list[int]:
    """First indices of windows of ``window`` voxels that cover ``size`` >= ``window`` voxels.

    ``monai``: every int(window * (1 - overlap)) voxels, the last moved back to the edge
    (MONAI's sliding_window_inference). ``even``: at most that far apart and evenly spread
    (nnU-Net's compute_steps_for_sliding_window).
    """
    if size <= window:
        return [0]
    if placing == "even":
        count = int(np.ceil((size - window) / (window * (1 - overlap)))) + 1
        count = min(count, size - window + 1)  # no window twice
        return [int(np.round((size - window) / (count - 1) * i)) for i in range(count)]
    interval = max(1, int(window * (1 - overlap)))
    count = -(-(size - window) // interval) + 1
    return [min(i * interval, size - window) for i in range(count)]


def weight_map(window: tuple[int, int, int], blend: str, sigma_scale: float) -> npt.NDArray[np.float32]:
    """Weights of one window, float32, all positive.

    ``constant``: 1 everywhere. ``gaussian``: product of exp(-d^2 / 2 s^2) per axis with d the
    distance from the centre in voxels and s = ``sigma_scale`` * size, at least 1e-3
    (MONAI's compute_importance_map; nnU-Net uses the same 1/8).
    """
    if blend == "constant":
        return np.ones(window, np.float32)
    axes = []
    for size in window:
        distance = np.arange(size, dtype=np.float64) - (size - 1) / 2
        axes.append(np.exp(-(distance**2) / (2 * (sigma_scale * size) ** 2)))
    whole = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return np.asarray(np.maximum(whole, 1e-3), np.float32)
