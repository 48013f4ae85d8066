"""Measurements of segments, by name. Pure functions on arrays; the manifest gives the codes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Array = npt.NDArray[Any]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VolumeSpec(_Spec):
    """Number of voxels times the volume of a voxel, in ml."""

    kind: Literal["volume_ml"]


class MeanSpec(_Spec):
    """Arithmetic mean of the values inside the segment, in their own unit (HU for CT)."""

    kind: Literal["mean"]


class FractionBelowSpec(_Spec):
    """Share of the segment's voxels with a value strictly below ``threshold``, in percent."""

    kind: Literal["percent_below"]
    threshold: float


MeasureSpec = Annotated[VolumeSpec | MeanSpec | FractionBelowSpec, Field(discriminator="kind")]


def measure(spec: VolumeSpec | MeanSpec | FractionBelowSpec, values: Array, voxel_ml: float) -> float:
    """One number from ``values``, the 1-D array of the segment's voxels; without any only a volume, of 0.

    Sums are exact for integers (int64) and pairwise in float64 otherwise, so the result does
    not depend on the machine.
    """
    if isinstance(spec, VolumeSpec):
        return values.size * voxel_ml
    if values.size == 0:
        raise ValueError("a segment without voxels has no other measurement than its volume")
    if isinstance(spec, MeanSpec):
        kind = np.int64 if values.dtype.kind in "iu" else np.float64
        return float(values.sum(dtype=kind)) / values.size
    return 100.0 * int(np.count_nonzero(values < spec.threshold)) / values.size
