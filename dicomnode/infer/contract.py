"""What a model asks of its input series: typed, part of the manifest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

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


Intent = Literal["FOR PRESENTATION", "FOR PROCESSING"]


class ProjectionContract(Strict):
    """Which single images the model takes; each image of a series is an input of its own.

    ``values``: grey values after the Modality LUT, 0 at the black end of what the image can express
    (``modality``), or as its first VOI LUT or window shows them, 0 black to 1 white (``displayed``).
    ``views`` and ``body_parts``: View Position and Body Part Examined; an image that states another one is
    left out, one that states none is taken. ``intents``: Presentation Intent Type, FOR PRESENTATION where
    the image states none; of a series with both only images of the one named first.
    ``needs_spacing``: only images whose pixels have a size, in mm within ``pixel_spacing_mm``.
    ``max_images`` and ``max_pixels`` (of one image) bound memory.
    """

    kind: Literal["projection"]
    modalities: tuple[str, ...] = Field(min_length=1)
    sop_classes: tuple[str, ...] = Field(min_length=1)
    intents: tuple[Intent, ...] = ("FOR PRESENTATION",)
    views: tuple[str, ...] = ()
    body_parts: tuple[str, ...] = ()
    values: Literal["modality", "displayed"] = "modality"
    needs_spacing: bool = False
    pixel_spacing_mm: tuple[float, float] = (0.01, 5.0)
    min_side: int = Field(default=16, ge=2)
    max_images: int = Field(default=32, ge=1, le=255)
    max_pixels: int = Field(default=1 << 26, ge=1, le=1 << 28)


def _kind(value: Any) -> str:
    given = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "projection" if given is not None else "volume"


AnyContract = Annotated[
    Annotated[InputContract, Tag("volume")] | Annotated[ProjectionContract, Tag("projection")], Discriminator(_kind)
]
