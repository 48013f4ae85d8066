"""What a MONAI bundle does not say and a DICOM result needs: the options file of ``models import``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dicomnode.errors import BundleError
from dicomnode.infer.contract import Strict
from dicomnode.infer.importing.config import MAX_CONFIG_BYTES, refuse
from dicomnode.infer.manifest import CodeEntry
from dicomnode.infer.stages.manifest import FindingEntry, Key, MeasurementEntry, ProbabilityMapEntry


class SegmentOptions(Strict):
    """Codes of one channel of the output; see ``SegmentEntry`` of the manifest."""

    key: Key
    label: str = Field(min_length=1, max_length=64)
    category: CodeEntry
    type: CodeEntry
    type_modifier: CodeEntry | None = None
    anatomic_region: CodeEntry | None = None
    rgb: tuple[int, int, int] = (255, 0, 0)


class InputOptions(Strict):
    """The input contract; what is left out follows from the modality of the metadata."""

    modality: str | None = None
    sop_classes: tuple[str, ...] | None = None
    hounsfield: bool | None = None
    min_slices: int = Field(default=8, ge=2)
    slice_spacing_mm: tuple[float, float] = (0.3, 10.0)
    pixel_spacing_mm: tuple[float, float] = (0.1, 5.0)


class ImportOptions(Strict):
    """``segments`` by channel number or by the channel's name in metadata.json (channel_def)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    manufacturer: str = Field(min_length=1, max_length=64)
    licence: str = Field(min_length=1)
    intended_use: str | None = None
    version: str | None = None
    orientation: str | None = None
    input: InputOptions = InputOptions()
    segments: dict[str, SegmentOptions] = Field(default_factory=dict)
    measurements: tuple[MeasurementEntry, ...] | None = None
    findings: tuple[FindingEntry, ...] = ()
    probability_maps: tuple[ProbabilityMapEntry, ...] = ()


VOLUME: dict[str, Any] = {
    "key": "volume_ml",
    "compute": {"kind": "volume_ml"},
    "name": {"value": "118565006", "scheme": "SCT", "meaning": "Volume"},
    "unit": {"value": "ml", "scheme": "UCUM", "meaning": "milliliter"},
}
"""The measurement where the options name none."""


def read_options(path: Path) -> ImportOptions:
    """Options from TOML or JSON (by suffix); raises BundleError naming the key."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise refuse(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return ImportOptions.model_validate(content)
    except OSError as cause:
        raise refuse(f"{path.name} cannot be read ({cause.strerror})", "Give a TOML or JSON file") from cause
    except ValidationError as cause:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors()[:5])
        raise BundleError("read options", details, "See config/monai-import.example.toml") from cause
    except (ValueError, RecursionError) as cause:
        raise refuse(f"{path.name} is not valid ({cause})") from cause
