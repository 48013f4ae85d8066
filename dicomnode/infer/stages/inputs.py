"""Further series, and masks of earlier steps, as inputs of one network, on the grid that the first series has there.

Registration is by geometry alone: the series share a frame of reference (PS3.3 C.7.4.1), which
whoever chooses them makes sure of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator
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
    """A further series, which a rule's ``inputs`` choose by ``name``, or a mask, which its ``masks`` do.

    ``input``: what the series has to be, as of the first one; without it the input is the mask that
    an earlier step of the rule found on the first series, 0 or 1. ``preprocess``: steps on its
    values, on the grid that the first series has behind its own steps. ``fill``: value beyond its
    edges. ``apply``: it is a channel; or the first series gets ``fill`` ``outside`` the mask.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    input: InputContract | None = None
    preprocess: tuple[IntensityStep, ...] = ()
    fill: float = 0.0
    apply: Literal["channel", "outside"] = "channel"

    @model_validator(mode="after")
    def _mask(self) -> Self:
        if self.apply == "outside" and (self.input is not None or self.preprocess):
            raise ValueError("apply outside is for a mask: leave input and preprocess out")
        return self


@dataclass(frozen=True, slots=True)
class SegMask:
    """The mask of an earlier step: its SEG, None where nothing was found; ``segment``: of this label alone."""

    path: Path | None
    segment: str = ""


def mask_volume(mask: SegMask, volume: Volume) -> Volume:
    """The mask as int16 0 and 1 on the grid of the series that it was found on.

    What the mask has on images that the volume leaves out is left out. Raises ValueError, KeyError or
    AttributeError for a SEG that is not one of this node's.
    """
    from dicomnode.infer.compare import masks_of_seg, planes_of

    values = np.zeros(volume.values.shape, np.int16)
    if mask.path is not None:
        place = {plane: index for index, plane in enumerate(planes_of(volume.source_uids, volume.source_frames))}
        for label, planes in masks_of_seg(mask.path).items():
            if not mask.segment or label.casefold() == mask.segment.casefold():
                for plane in planes.keys() & place.keys():
                    values[place[plane]][planes[plane]] = 1
    return replace(volume, values=values)


def sampled(volume: Volume, onto: Frame, fill: float, order: int = 1) -> tuple[Array, float]:
    """``volume`` at the voxel centres of ``onto``, float32; and the share of them within it.

    ``order``: 1 trilinear, 0 nearest.
    """
    matrix = np.linalg.inv(volume.affine) @ onto.affine
    values = ndimage.affine_transform(
        volume.values.astype(np.float32, copy=False),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=onto.shape,
        order=order,
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


def further_channels(
    specs: Sequence[MoreInput], volumes: Mapping[str, Volume], onto: Frame
) -> tuple[Array, list[Array]]:
    """The first series' values, and an array of their shape for each further channel, in the manifest's order.

    Raises UnsuitableSeries for one that is missing or covers too little of the first series.
    """
    first, channels = onto.values, []
    for spec in specs:
        if spec.name not in volumes:
            raise UnsuitableSeries(
                "prepare inputs",
                "MISSING_INPUT",
                f"the model needs a {'mask' if spec.input is None else 'further series'} as input '{spec.name}'",
                f"Name it under {'masks' if spec.input is None else 'inputs'} in the rule's step",
            )
        if spec.input is None:
            values, _ = sampled(volumes[spec.name], onto, 0.0, order=0)
            if spec.apply == "outside":
                first = np.where(values > 0, first, np.float32(spec.fill))
            else:
                channels.append(_prepared(spec, values, onto))
            continue
        values, covered = sampled(volumes[spec.name], onto, spec.fill)
        if covered < LEAST_OVERLAP:
            raise UnsuitableSeries(
                "prepare inputs",
                "LITTLE_OVERLAP",
                f"the series for input '{spec.name}' covers {covered:.0%} of the first one;"
                f" {LEAST_OVERLAP:.0%} are needed",
                "Use series of the same part of the body",
            )
        channels.append(_prepared(spec, values, onto))
    return first, channels


def _prepared(spec: MoreInput, values: Array, onto: Frame) -> Array:
    frame = Frame(values, onto.affine, owned=True)
    for step in spec.preprocess:
        frame = step.apply(frame)
    return frame.values
