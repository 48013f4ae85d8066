"""Measurements of a whole single image: exposure, clipping, noise, position, coverage. Pure.

Grey values run from 0, black, to the white end of what the image can express; "percent" of grey values is of
that range. An image is turned upright first: rows to the feet, columns to the patient's left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dicomnode.infer.contract import Strict
from dicomnode.infer.stages.chest_position import tilt_and_offset
from dicomnode.infer.stages.chest_rotation import Rotation, rotation
from dicomnode.infer.stages.frame import Frame
from dicomnode.infer.stages.lung_fields import UPRIGHT
from dicomnode.infer.stages.picture_field import Box, allowed, field_box
from dicomnode.infer.volume import Volume

Array = npt.NDArray[Any]
_MAD = 0.6744897501960817
"""Median of |x| of a normal distribution with a standard deviation of 1."""

Segments = tuple[Annotated[int, Field(ge=1, le=255)], ...]


class StatedSpec(Strict):
    """A number that the header states, as it is: Exposure Index, its target, KVP."""

    kind: Literal["stated"]
    attribute: Literal["ExposureIndex", "TargetExposureIndex", "KVP", "Exposure", "DistanceSourceToDetector"]


class DeviationSpec(Strict):
    """Deviation Index as stated, else 10 log10(Exposure Index / Target Exposure Index) (IEC 62494-1)."""

    kind: Literal["deviation_index"]


class ClippedSpec(Strict):
    """Share of pixels at the lowest or highest grey value that occurs in the image.

    A picture without clipping has few pixels at its extremes. ``segments``: of these, else of the field.
    """

    kind: Literal["clipped_percent"]
    end: Literal["low", "high"]
    segments: Segments = ()


class GreySpec(Strict):
    """Grey value below which ``percentile`` percent of the pixels lie, in percent of the range.

    ``segments``: of these, else of the field.
    """

    kind: Literal["grey_percent"]
    percentile: float = Field(default=50.0, ge=0, le=100)
    segments: Segments = ()


class ContrastSpec(Strict):
    """Difference of the 95th and the 5th percentile of the field's grey values, in percent of the range."""

    kind: Literal["contrast_percent"]


class NoiseSpec(Strict):
    """Standard deviation of the noise, in percent of the range: median(|I * N|) / (6 x 0.6745).

    N is the difference of two Laplacians (1 -2 1; -2 4 -2; 1 -2 1) of Immerkaer, Computer Vision and Image
    Understanding 1996;64(2):300-302, blind to structure that is locally linear. The median in place of his
    mean (Donoho and Johnstone, Biometrika 1994;81(3):425-455) leaves edges out. Pixels at the extremes do not
    count, nor does what lies outside the field.
    """

    kind: Literal["noise_percent"]


class FieldSpec(Strict):
    """Share of the image within the field (see ``picture_field.CropToField``)."""

    kind: Literal["field_percent"]


class MarginSpec(Strict):
    """Distance of the segments from the field's border on one side of the patient, in percent of the field."""

    kind: Literal["margin_percent"]
    side: Literal["head", "feet", "right", "left"]


class OffsetSpec(Strict):
    """How far the bright strip between the lung fields, spine and mediastinum, lies from the middle of the chest,
    in percent of the chest's width, positive to the patient's left (``chest_position``). It says nothing of the
    side to which the patient was turned: see RotationSpec.
    """

    kind: Literal["midline_offset_percent"]
    right: int = Field(ge=1, le=255)
    left: int = Field(ge=1, le=255)


class TiltSpec(Strict):
    """Angle of that strip with the columns of the image, in degrees, positive where the head leans to the
    patient's left (``chest_position``).
    """

    kind: Literal["tilt_degrees"]
    right: int = Field(ge=1, le=255)
    left: int = Field(ge=1, le=255)


ImageSpec = Annotated[
    StatedSpec | DeviationSpec | ClippedSpec | GreySpec | ContrastSpec | NoiseSpec | FieldSpec | MarginSpec
    | OffsetSpec | TiltSpec,
    Field(discriminator="kind"),
]  # fmt: skip


class RotationSpec(Strict):
    """Whether the side ``forward`` of the patient is turned to the front (``chest_rotation``)."""

    kind: Literal["rotation"]
    forward: Literal["left", "right"]
    right: int = Field(ge=1, le=255)
    left: int = Field(ge=1, le=255)


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image upright: ``values`` (rows, columns), ``labels`` of its segments, ``inside``: bool, what is of
    the field and no padding. ``mm``: between rows, between columns; only their ratio is used.
    """

    values: Array
    labels: npt.NDArray[np.uint8] | None
    inside: npt.NDArray[np.bool_]
    field: Box
    white: float
    facts: Mapping[str, float]
    mm: tuple[float, float]

    def within(self, segments: Segments) -> Array:
        """Grey values of the segments, of the field where none is named; 1-D."""
        if not segments:
            return self.values[self.inside]
        if self.labels is None:
            return self.values[:0, 0]
        return self.values[np.isin(self.labels, segments)]


def view_of(volume: Volume, labels: npt.NDArray[np.uint8] | None) -> ImageView:
    """``volume`` must be a single image; ``labels``: of its shape, None without segments."""
    about = volume.projection
    assert about is not None
    plane = UPRIGHT.apply(Frame(volume.values, volume.affine)).values[0]
    own = None if labels is None else UPRIGHT.apply(Frame(labels, volume.affine)).values[0]
    inside: npt.NDArray[np.bool_] = np.zeros(volume.values.shape, bool)
    box = field_box(volume.values[0], about)
    inside[0][box] = True
    frame = UPRIGHT.apply(Frame(inside, volume.affine))
    rows, columns = (np.flatnonzero(frame.values[0].any(axis=axis)) for axis in (1, 0))
    field = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    inside[0] &= allowed((volume.values.shape[1], volume.values.shape[2]), about)
    mm = (frame.spacing[1], frame.spacing[2])
    return ImageView(plane, own, frame.values[0], field, about.white, about.facts, mm)


def measure_image(specs: Sequence[ImageSpec], view: ImageView) -> list[float | None]:
    """A number for each; None where the image does not have what it takes: a stated value, a segment."""
    positions: dict[tuple[int, int], tuple[float, float] | None] = {}
    for spec in specs:
        if isinstance(spec, OffsetSpec | TiltSpec) and view.labels is not None:
            pair = (spec.right, spec.left)
            if pair not in positions:
                positions[pair] = tilt_and_offset(view.labels, view.values, view.mm, view.field[1], *pair)
    return [_measured(spec, view, positions) for spec in specs]


def rotations(specs: Sequence[RotationSpec], view: ImageView) -> list[Rotation]:
    """An answer for each; not determined where the image shows no lung fields."""
    found: dict[tuple[int, int], Rotation] = {}
    for spec in specs:
        pair = (spec.right, spec.left)
        if pair not in found:
            labels = np.zeros(view.values.shape, np.uint8) if view.labels is None else view.labels
            found[pair] = rotation(labels, view.values, view.mm, view.field[1], *pair)
    return [found[spec.right, spec.left] for spec in specs]


def _measured(
    spec: ImageSpec, view: ImageView, positions: Mapping[tuple[int, int], tuple[float, float] | None]
) -> float | None:
    if isinstance(spec, StatedSpec):
        stated: float | None = view.facts.get(spec.attribute)
        return stated
    if isinstance(spec, DeviationSpec):
        return _deviation(view.facts)
    if isinstance(spec, FieldSpec):
        rows, columns = view.field
        return 100.0 * float((rows.stop - rows.start) * (columns.stop - columns.start)) / view.values.size
    if isinstance(spec, MarginSpec):
        return _margin(spec.side, view)
    if isinstance(spec, OffsetSpec | TiltSpec):
        found = positions.get((spec.right, spec.left))
        return None if found is None else found[isinstance(spec, OffsetSpec)]
    return _of_grey(spec, view)


def _of_grey(spec: ClippedSpec | GreySpec | ContrastSpec | NoiseSpec, view: ImageView) -> float | None:
    if isinstance(spec, NoiseSpec):
        return _noise(view)
    values = view.within(spec.segments if isinstance(spec, ClippedSpec | GreySpec) else ())
    if not values.size:
        return None
    if isinstance(spec, ClippedSpec):
        whole = view.values[view.inside]
        extreme = whole.min() if spec.end == "low" else whole.max()
        return 100.0 * int(np.count_nonzero(values == extreme)) / values.size
    if isinstance(spec, GreySpec):
        return 100.0 * float(np.percentile(values, spec.percentile)) / view.white
    low, high = np.percentile(values, (5, 95))
    return 100.0 * float(high - low) / view.white


def _deviation(facts: Mapping[str, float]) -> float | None:
    stated = facts.get("DeviationIndex")
    if stated is not None:
        return stated
    index, target = facts.get("ExposureIndex", 0.0), facts.get("TargetExposureIndex", 0.0)
    return 10.0 * math.log10(index / target) if index > 0 and target > 0 else None


def _noise(view: ImageView) -> float | None:
    values = view.values.astype(np.float32, copy=False)
    if min(values.shape) < 3:
        return None
    once = values[2:] - 2 * values[1:-1] + values[:-2]
    twice = once[:, 2:] - 2 * once[:, 1:-1] + once[:, :-2]
    centre = values[1:-1, 1:-1]
    whole = values[view.inside]
    counted = view.inside[1:-1, 1:-1] & (centre > whole.min()) & (centre < whole.max()) if whole.size else None
    if counted is None or not counted.any():
        return None
    return 100.0 * float(np.median(np.abs(twice[counted]))) / (6.0 * _MAD) / view.white


def _margin(side: str, view: ImageView) -> float | None:
    if view.labels is None or not view.labels.any():
        return None
    axis = 0 if side in ("head", "feet") else 1
    field = view.field[axis]
    at = np.flatnonzero(view.labels.any(axis=1 - axis))
    distance: int = int(at[0]) - field.start if side in ("head", "right") else field.stop - 1 - int(at[-1])
    return 100.0 * max(0, distance) / float(field.stop - field.start)
