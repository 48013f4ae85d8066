"""The typed manifest of a model bundle; an unknown key is an error.

``manifest.json`` names everything that shapes a result: what goes in, which steps run with
which parameters, what comes out under which codes, and the digest of every other file of
the folder. Steps are chosen by name from this program; a bundle contains no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dicomnode.errors import BundleError
from dicomnode.infer.contract import InputContract, Purpose, Strict
from dicomnode.infer.measure import MeasureSpec
from dicomnode.infer.steps import PostStep, PreStep
from dicomnode.orders import Condition
from dicomnode.records import Code, SegmentDefinition

if TYPE_CHECKING:
    from dicomnode.infer.stages.manifest import StagedManifest

MAX_MANIFEST_BYTES = 1 << 20
SEMVER = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?")
FILE_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,63}/){0,3}[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=rf"^{FILE_NAME.pattern}$")]


class CodeEntry(Strict):
    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field(min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)

    def code(self) -> Code:
        return Code(self.value, self.scheme, self.meaning)


class Identity(Strict):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    version: str
    manufacturer: str = Field(min_length=1, max_length=64)
    device_uid: str = Field(pattern=r"^[0-2](\.(0|[1-9]\d*))+$", max_length=64)
    description: str

    @field_validator("version")
    @classmethod
    def _semantic(cls, value: str) -> str:
        if not SEMVER.fullmatch(value):
            raise ValueError("must be a semantic version such as 1.0.0")
        return value


class EngineSpec(Strict):
    """How the volume reaches the network: slabs of whole slices along axis 0.

    ``input`` takes (slices, 1, rows, columns); each tensor in ``outputs`` has one value per
    voxel in the same shape. ``slab_slices`` bounds memory; slices are independent of each
    other, so it does not change the result.
    """

    model: FileName
    input: str
    outputs: tuple[str, ...] = Field(min_length=1)
    slab_slices: int = Field(default=16, ge=1, le=512)


class SegmentEntry(Strict):
    number: int = Field(ge=1, le=255)
    key: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    label: str = Field(min_length=1, max_length=64)
    category: CodeEntry
    type: CodeEntry
    type_modifier: CodeEntry | None = None
    anatomic_region: CodeEntry | None = None
    rgb: tuple[int, int, int] = (255, 0, 0)

    def definition(self) -> SegmentDefinition:
        return SegmentDefinition(
            number=self.number,
            label=self.label,
            category=self.category.code(),
            type=self.type.code(),
            type_modifier=self.type_modifier.code() if self.type_modifier else None,
            anatomic_region=self.anatomic_region.code() if self.anatomic_region else None,
            rgb=self.rgb,
        )


class MeasurementEntry(Strict):
    """One measurement, made for each segment that was found."""

    key: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    compute: MeasureSpec
    name: CodeEntry
    unit: CodeEntry
    derivation: CodeEntry | None = None


class CriticalEntry(Strict):
    """When a measurement or finding is critical in its authors' view.

    A rule takes that up with ``critical = {"*" = true}``, else nothing comes of it.
    ``min`` and ``max``: inclusive, of the value or a finding's probability. ``value``: a finding's
    code or meaning, ``*`` for one that is positive.
    """

    min: float | None = None
    max: float | None = None
    value: str = Field(default="", max_length=64)

    @model_validator(mode="after")
    def _says_when(self) -> CriticalEntry:
        if (self.min is not None or self.max is not None) == bool(self.value):
            raise ValueError("give min, max or both, or a value")
        return self

    def condition(self, key: str) -> Condition:
        return Condition(key, self.min, self.max, self.value)


def check_proposals(
    critical: Mapping[str, CriticalEntry], measurements: Collection[str], findings: Collection[str]
) -> None:
    """Raises ValueError for a key that nothing has, and for the value of what is a number."""
    for key, entry in critical.items():
        if key not in findings and (key not in measurements or entry.value):
            raise ValueError(f"critical.{key} must be a measurement with min or max, or a finding")


class Outputs(Strict):
    segments: tuple[SegmentEntry, ...] = Field(min_length=1)
    measurements: tuple[MeasurementEntry, ...]
    critical: dict[str, CriticalEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Outputs:
        if [s.number for s in self.segments] != list(range(1, len(self.segments) + 1)):
            raise ValueError("segment numbers must run from 1 without holes")
        for names in (
            [s.key for s in self.segments],
            [s.label for s in self.segments],
            [m.key for m in self.measurements],
        ):
            if len(set(names)) != len(names):
                raise ValueError("keys and labels must differ from each other")
        check_proposals(self.critical, [m.key for m in self.measurements], ())
        return self


class GoldenCase(Strict):
    """An input with the output that a sound engine gives for it.

    ``input``: .npy, int16 (slices, rows, columns), in the units of the input contract.
    ``labels``: .npy, uint8 of the same shape. ``affine``: (slice, row, column, 1) to LPS mm,
    row by row. ``measurements``: expected values by ``segment key.measurement key``.
    """

    name: str
    input: FileName
    labels: FileName
    affine: tuple[tuple[float, float, float, float], ...] = Field(min_length=4, max_length=4)
    measurements: dict[str, float]
    max_disagreement: float = Field(default=1e-3, ge=0, le=1e-2)
    min_dice: float = Field(default=0.999, ge=0.99, le=1)
    relative_tolerance: float = Field(default=1e-3, ge=0, le=1e-2)


class Manifest(Strict):
    schema_version: Literal[1]
    identity: Identity
    licence: str = Field(min_length=1)
    intended_use: str = Field(min_length=1)
    purpose: Purpose = "clinical"
    input: InputContract
    preprocess: tuple[PreStep, ...]
    engine: EngineSpec
    postprocess: tuple[PostStep, ...] = Field(min_length=1)
    outputs: Outputs
    golden: tuple[GoldenCase, ...] = Field(min_length=1)
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _files_are_listed(self) -> Manifest:
        named = [self.engine.model, *(f for case in self.golden for f in (case.input, case.labels))]
        for name in named:
            if name not in self.files:
                raise ValueError(f"{name} is used but not listed under files")
        return self


def parse_manifest(data: bytes) -> Manifest | StagedManifest:
    """Typed manifest of either schema from the bytes of ``manifest.json``; raises BundleError."""
    from dicomnode.infer.stages.manifest import StagedManifest

    operation, hint = "read manifest.json", "Correct the manifest or fetch the bundle again"
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(operation, f"larger than {MAX_MANIFEST_BYTES} bytes", hint)
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
        staged = isinstance(content, dict) and content.get("schema_version") == 2
        return StagedManifest.model_validate(content) if staged else Manifest.model_validate(content)
    except ValidationError as cause:
        details = "; ".join(
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}" for error in cause.errors()[:5]
        )
        raise BundleError(operation, details, hint) from cause
    except (ValueError, RecursionError) as cause:
        raise BundleError(operation, f"not valid JSON ({cause})", hint) from cause


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result
