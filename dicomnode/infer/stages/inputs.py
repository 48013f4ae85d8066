"""Further series as inputs of one network: each sampled on the grid that the first one has when it reaches it.

Registration is by geometry alone: the series share a frame of reference (PS3.3 C.7.4.1), which
whoever chooses them makes sure of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy import ndimage

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.contract import InputContract, Strict
from dicomnode.infer.stages.frame import Array, Frame
from dicomnode.infer.stages.intensity import ClipValues, MeanStd, MinMax, Percentiles, ScaleRange, Window, ZScore
from dicomnode.infer.volume import Volume

LEAST_OVERLAP = 0.5
"""Share of the first series' grid that a further one must cover."""

IntensityStep = Annotated[
    ClipValues | Window | ScaleRange | MeanStd | ZScore | MinMax | Percentiles, Field(discriminator="step")
]


class MoreInput(Strict):
    """A further series, which a rule's ``inputs`` choose by ``name``.

    ``input``: what it has to be, as of the first series. ``preprocess``: steps on its values, on
    the grid that the first series has behind its own steps. ``fill``: value beyond its edges.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    input: InputContract
    preprocess: tuple[IntensityStep, ...] = ()
    fill: float = 0.0


def sampled(volume: Volume, onto: Frame, fill: float) -> tuple[Array, float]:
    """``volume`` at the voxel centres of ``onto``, trilinear, float32; and the share of them within it."""
    matrix = np.linalg.inv(volume.affine) @ onto.affine
    values = ndimage.affine_transform(
        volume.values.astype(np.float32, copy=False),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=onto.shape,
        order=1,
        mode="constant",
        cval=fill,
    )
    return values, _covered(matrix, onto.shape, volume.values.shape)


def _covered(matrix: Array, shape: Sequence[int], source: Sequence[int]) -> float:
    """Share of a coarse sample of the grid whose points lie within the source."""
    axes = [np.linspace(0, n - 1, min(n, 16)) for n in shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    at = points @ matrix[:3, :3].T + matrix[:3, 3]
    inside = np.all((at >= -0.5) & (at <= np.array(source) - 0.5), axis=1)
    return float(inside.mean())


def further_channels(specs: Sequence[MoreInput], volumes: Mapping[str, Volume], onto: Frame) -> list[Array]:
    """One array of ``onto``'s shape for each further input, in the manifest's order.

    Raises UnsuitableSeries for one that is missing or covers too little of the first series.
    """
    channels = []
    for spec in specs:
        if spec.name not in volumes:
            raise UnsuitableSeries(
                "prepare inputs",
                "MISSING_INPUT",
                f"the model needs a second series as input '{spec.name}'",
                "Name it under inputs in the rule's step",
            )
        values, covered = sampled(volumes[spec.name], onto, spec.fill)
        if covered < LEAST_OVERLAP:
            raise UnsuitableSeries(
                "prepare inputs",
                "LITTLE_OVERLAP",
                f"the series for input '{spec.name}' covers {covered:.0%} of the first one;"
                f" {LEAST_OVERLAP:.0%} are needed",
                "Use series of the same part of the body",
            )
        frame = Frame(values, onto.affine, owned=True)
        for step in spec.preprocess:
            frame = step.apply(frame)
        channels.append(frame.values)
    return channels
