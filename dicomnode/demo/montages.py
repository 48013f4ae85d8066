"""Pictures of what came back: the SEG over the images that were sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dicomnode.demo.montage import overlay_montage, save_png
from dicomnode.demo.objects import Number, Placed, place_seg
from dicomnode.demo.phantom import Phantom
from dicomnode.infer.contract import InputContract
from dicomnode.infer.volume import read_volume

_ANY_SERIES = {
    "modality": "CT",
    "sop_classes": ("1.2.840.10008.5.1.4.1.1.2",),
    "min_slices": 2,
    "slice_spacing_mm": (0.1, 50.0),
    "pixel_spacing_mm": (0.05, 10.0),
    "hounsfield": True,
}
"""The job has judged the series; here it only has to be read."""


def legend(placed: Placed, numbers: list[Number], truth_ml: dict[str, float]) -> dict[int, str]:
    """One line per segment: its volume from the SR and, for the phantom, the true one."""
    lines = {}
    for segment in placed.segments:
        volume = next((n.value for n in numbers if n.segment == segment.number and n.unit.lower() == "ml"), None)
        text = segment.label if volume is None else f"{segment.label}: {volume:,.0f} ml"
        true = truth_ml.get(segment.label.casefold())
        if volume is not None and true:
            text += f"   (true {true:,.0f} ml, {100 * (volume - true) / true:+.2f} %)"
        lines[segment.number] = text
    return lines


def draw_phantom(phantom: Phantom, placed: Placed, numbers: list[Number], subtitle: str, path: Path) -> Path:
    truth = {t.name.casefold(): t.volume_ml for t in phantom.truth.values()}
    picture = overlay_montage(
        phantom.hu,
        placed.labels,
        phantom.spacing,
        colours={s.number: s.rgb for s in placed.segments},
        title_lines=("Procedural thorax phantom", subtitle),
        legend=legend(placed, numbers, truth),
        first_z=phantom.position(0)[2],
    )
    return save_png(picture, path)


def draw_series(sources: list[Path], seg: Any, numbers: list[Number], titles: tuple[str, str], path: Path) -> Path:
    """The same for a series of the user's. Raises NodeError when the SEG does not lie on it."""
    volume = read_volume(sources, InputContract.model_validate(_ANY_SERIES))
    placed = place_seg(seg, volume.affine, volume.values.shape)
    hu = np.clip(volume.values, -1024, 3071).astype(np.int16)
    labels, first = placed.labels, float(volume.affine[2, 3])
    if volume.affine[2, 0] < 0:  # the picture wants slices that run to the head
        first += volume.affine[2, 0] * (len(hu) - 1)
        hu, labels = hu[::-1], labels[::-1]
    picture = overlay_montage(
        hu,
        labels,
        volume.spacing,
        colours={s.number: s.rgb for s in placed.segments},
        title_lines=titles,
        legend=legend(placed, numbers, {}),
        first_z=first,
    )
    return save_png(picture, path)
