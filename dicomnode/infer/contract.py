"""What a model asks of its input series: typed, part of the manifest."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Purpose = Literal["clinical", "benchmark"]
"""What a bundle may be used for; see ``purpose``."""


class Strict(BaseModel):
    """Frozen; refuses unknown keys and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class InputContract(Strict):
    """Which series the model takes. Lengths in mm, angles in degrees."""

    modality: str
    sop_classes: tuple[str, ...] = Field(min_length=1)
    orientation: Literal["any", "axial"] = "any"
    max_tilt_degrees: float = Field(default=30.0, ge=0, le=90)
    min_slices: int = Field(ge=2)
    max_slices: int = Field(default=4000, le=20000)
    max_voxels: int = Field(default=1 << 30, ge=1, le=1 << 34)
    slice_spacing_mm: tuple[float, float]
    pixel_spacing_mm: tuple[float, float]
    hounsfield: bool
