"""Manifest schema 2: any orientation and spacing, patches, classification, Python pipelines.

``preprocess`` steps make the network's grid, ``engine`` says how the network sees it,
``activations`` and ``decision`` turn channels into labels on the source grid (the way back
through orientation, resampling, crop and pad is implied), ``postprocess`` works on those.
Instead of all of these ``pipeline`` may name an installed Python package's entry point.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dicomnode.infer.contract import AnyContract, ProjectionContract, Purpose, Strict
from dicomnode.infer.manifest import CodeEntry, CriticalEntry, FileName, Identity, SegmentEntry, Sha256, check_proposals
from dicomnode.infer.stages.classify import ActivationName, Calibration
from dicomnode.infer.stages.decide import Activation, Argmax, Decision, FillHoles, KeepLargest, MaskFrom, Threshold
from dicomnode.infer.stages.extent import CropForeground, CropToBody, Pad
from dicomnode.infer.stages.image_measures import ImageSpec, RotationSpec
from dicomnode.infer.stages.inputs import MoreInput
from dicomnode.infer.stages.intensity import ClipValues, MeanStd, MinMax, Percentiles, ScaleRange, Window, ZScore
from dicomnode.infer.stages.lung_fields import LungFields
from dicomnode.infer.stages.measures import MeasureSpec
from dicomnode.infer.stages.network import Network
from dicomnode.infer.stages.orient import Orient, Straighten
from dicomnode.infer.stages.picture_field import CropToField
from dicomnode.infer.stages.resample import Resample, Resize
from dicomnode.infer.steps import CloseAndFill, InsideBody, NameSides, NoteCoverage, RemoveAirways, RemoveGas, TwoLungs

PreStep = Annotated[
    Orient
    | Straighten
    | Resample
    | Resize
    | ClipValues
    | Window
    | ScaleRange
    | MeanStd
    | ZScore
    | MinMax
    | Percentiles
    | CropToBody
    | CropForeground
    | CropToField
    | Pad,
    Field(discriminator="step"),
]
PostStep = Annotated[
    KeepLargest
    | FillHoles
    | InsideBody
    | RemoveAirways
    | RemoveGas
    | TwoLungs
    | LungFields
    | CloseAndFill
    | NameSides
    | NoteCoverage,
    Field(discriminator="step"),
]
_MASK_STEPS = frozenset({"inside_body", "remove_airways", "remove_gas", "two_lungs", "lung_fields"})
_LABELLING = frozenset({"two_lungs", "lung_fields"})
_NORMALISING = frozenset({"window", "scale_range", "mean_std", "zscore", "min_max", "percentiles"})

Key = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class MeasurementEntry(Strict):
    """One measurement, made for each segment that was found."""

    key: Key
    compute: MeasureSpec
    name: CodeEntry
    unit: CodeEntry
    derivation: CodeEntry | None = None


class ImageMeasurementEntry(Strict):
    """One measurement of each single image as a whole, made where the image has what it takes."""

    key: Key
    compute: ImageSpec
    name: CodeEntry
    unit: CodeEntry
    derivation: CodeEntry | None = None


class FindingEntry(Strict):
    """One answer of a classification: class ``index`` of the score ``output``.

    ``threshold`` null gives the probability without an answer. The codes of the answers are
    those of CID 240 (Present-Absent) unless others are named. A pipeline in Python gives
    probabilities by ``key``; ``output``, ``index`` and ``activation`` do not apply to it.
    """

    key: Key
    name: CodeEntry
    output: str = ""
    index: int = Field(default=0, ge=0, lt=65536)
    activation: ActivationName = "none"
    calibration: Calibration | None = None
    threshold: Share | None = None
    present: CodeEntry = CodeEntry(value="52101004", scheme="SCT", meaning="Present")
    absent: CodeEntry = CodeEntry(value="2667000", scheme="SCT", meaning="Absent")
    text: str = Field(default="", max_length=256)


class ImageFindingEntry(Strict):
    """One answer about each single image, computed from it and its segments; the report tells the reason.

    The codes are those of CID 240 (Present-Absent) unless others are named.
    """

    key: Key
    compute: RotationSpec
    name: CodeEntry
    present: CodeEntry = CodeEntry(value="52101004", scheme="SCT", meaning="Present")
    absent: CodeEntry = CodeEntry(value="2667000", scheme="SCT", meaning="Absent")
    undetermined: CodeEntry = CodeEntry(value="373068000", scheme="SCT", meaning="Undetermined")


class ProbabilityMapEntry(Strict):
    """One probability map: ``channel`` of the dense ``output``, after its activation, on the source grid."""

    key: Key
    name: CodeEntry
    output: str = ""
    channel: int = Field(default=0, ge=0, lt=65536)
    dtype: Literal["float16", "float32"] = "float16"


class Outputs(Strict):
    """What the result holds; at least one segment, finding, map or measurement of an image."""

    segments: tuple[SegmentEntry, ...] = ()
    measurements: tuple[MeasurementEntry, ...] = ()
    image_measurements: tuple[ImageMeasurementEntry, ...] = ()
    image_findings: tuple[ImageFindingEntry, ...] = ()
    findings: tuple[FindingEntry, ...] = ()
    probability_maps: tuple[ProbabilityMapEntry, ...] = ()
    critical: dict[str, CriticalEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Outputs:
        if not (self.segments or self.findings or self.probability_maps or self.image_measurements):
            raise ValueError("name at least one segment, finding, probability map or measurement of an image")
        if [s.number for s in self.segments] != list(range(1, len(self.segments) + 1)):
            raise ValueError("segment numbers must run from 1 without holes")
        if self.measurements and not self.segments:
            raise ValueError("measurements are of segments, and there is none")
        for names in (
            [s.key for s in self.segments],
            [s.label for s in self.segments],
            [*(m.key for m in self.measurements), *(m.key for m in self.image_measurements)],
            [*(f.key for f in self.findings), *(f.key for f in self.image_findings)],
            [p.key for p in self.probability_maps],
        ):
            if len(set(names)) != len(names):
                raise ValueError("keys and labels must differ from each other")
        measured = [*(m.key for m in self.measurements), *(m.key for m in self.image_measurements)]
        answers = [*(f.key for f in self.findings), *(f.key for f in self.image_findings)]
        check_proposals(self.critical, measured, answers)
        return self


class GoldenInput(Strict):
    """A further input of a golden case: .npy, int16 (slices, rows, columns), with its ``affine`` to LPS mm."""

    input: FileName
    affine: tuple[tuple[float, float, float, float], ...] = Field(min_length=4, max_length=4)


class GoldenCase(Strict):
    """An input with the output that a sound engine gives for it.

    ``input``: .npy, int16 (slices, rows, columns). ``labels``: .npy, uint8, where there are
    segments. ``affine``: (slice, row, column, 1) to LPS mm. ``more``: the further inputs by
    name. ``measurements``: by ``segment key.measurement key``, of an image by the key alone. ``white`` and
    ``facts``: of a single image, its grey values run from 0 to ``white``. ``findings``: probability by key;
    within ``probability_tolerance`` and in the same ranking. ``answers``: code value of each of ``image_findings``
    by key. ``probability_maps``: .npy, float16 or
    float32, by key; the share of voxels that differ by more than 0.01 is at most
    ``max_disagreement``. ``statistics``: mean and standard deviation of each channel of a dense
    output as the network gave it, within ``relative_tolerance`` of the spread.
    """

    name: str
    input: FileName
    affine: tuple[tuple[float, float, float, float], ...] = Field(min_length=4, max_length=4)
    more: dict[str, GoldenInput] = Field(default_factory=dict)
    white: float | None = Field(default=None, gt=0)
    facts: dict[str, float] = Field(default_factory=dict)
    labels: FileName | None = None
    measurements: dict[str, float] = Field(default_factory=dict)
    findings: dict[str, Share] = Field(default_factory=dict)
    answers: dict[str, str] = Field(default_factory=dict)
    probability_maps: dict[str, FileName] = Field(default_factory=dict)
    statistics: dict[str, tuple[tuple[float, float], ...]] = Field(default_factory=dict)
    max_disagreement: float = Field(default=1e-3, ge=0, le=1e-2)
    min_dice: float = Field(default=0.999, ge=0.99, le=1)
    relative_tolerance: float = Field(default=1e-3, ge=0, le=1e-2)
    probability_tolerance: float = Field(default=0.01, ge=0, le=0.01)

    @property
    def files(self) -> tuple[str, ...]:
        labels = () if self.labels is None else (self.labels,)
        return (self.input, *labels, *self.probability_maps.values(), *(m.input for m in self.more.values()))


class PythonPipeline(Strict):
    """An algorithm of the house: entry point ``name`` of the group ``dicomnode.pipelines``.

    ``parameters`` are handed to it as they are; they are part of the provenance.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    parameters: dict[str, Any] = Field(default_factory=dict)


class StagedManifest(Strict):
    schema_version: Literal[2]
    identity: Identity
    licence: str = Field(min_length=1)
    intended_use: str = Field(min_length=1)
    purpose: Purpose = "clinical"
    input: AnyContract
    preprocess: tuple[PreStep, ...] = ()
    more_inputs: tuple[MoreInput, ...] = ()
    engine: Network | None = None
    activations: tuple[Activation, ...] = ()
    decision: Decision | None = None
    postprocess: tuple[PostStep, ...] = ()
    pipeline: PythonPipeline | None = None
    outputs: Outputs
    golden: tuple[GoldenCase, ...] = Field(min_length=1)
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _makes_sense(self) -> StagedManifest:
        if self.pipeline is None:
            if self.engine is None:
                raise ValueError("engine: a bundle needs a network, or a pipeline that is installed here")
            problems = [*_order(self), *_decisions(self), *_references(self, self.engine)]
        else:
            problems = _pipeline_alone(self)
        problems += _golden_problems(self)
        problems += _projection_problems(self) if isinstance(self.input, ProjectionContract) else _volume_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def parameters(self) -> dict[str, Any]:
        """All steps with all their values: provenance, and part of the identity of results."""
        keys = {"preprocess", "engine", "activations", "decision", "postprocess", "pipeline"}
        found = {"schema_version": 2, **self.model_dump(mode="json", include=keys)}
        if self.more_inputs:
            found |= self.model_dump(mode="json", include={"more_inputs"})
        if self.engine is not None and not self.engine.inputs:
            del found["engine"]["inputs"]  # results of bundles that know nothing of it keep their identity
        return found


def _order(m: StagedManifest) -> list[str]:
    """Orders of steps that compute something else than meant."""
    names = [step.step for step in m.preprocess]
    problems = []
    for name in ("orient", "straighten"):
        if names.count(name) > 1:
            problems.append(f"preprocess: {name} occurs twice")
    if "straighten" in names:
        before = {"orient", "resample", "resize", "crop_to_body", "crop_foreground", "crop_to_field", "pad"} & set(
            names[: names.index("straighten")]
        )
        if before:
            problems.append(f"preprocess: straighten must come before {', '.join(sorted(before))}")
    seen: set[str] = set()
    for step in m.preprocess:
        body = step.step == "crop_to_body" or (step.step == "zscore" and step.over == "body")
        if body and seen & _NORMALISING:
            problems.append(f"preprocess: {step.step} looks for the body by HU; put it before the normalisation")
        if step.step in ("resample", "resize") and "pad" in seen:
            problems.append(f"preprocess: {step.step} after pad interpolates across the padding; put pad after it")
        seen.add(step.step)
    return problems


def _decisions(m: StagedManifest) -> list[str]:
    problems = []
    if m.outputs.segments and m.decision is None:
        problems.append("decision: segments need one of argmax, threshold, from_output")
    if m.decision is not None and not m.outputs.segments:
        problems.append("outputs.segments: there is a decision but no segment that it makes")
    if m.postprocess and m.decision is None:
        problems.append("postprocess: its steps work on labels; there is no decision")
    mask = isinstance(m.decision, MaskFrom)
    labelled = not mask
    for step in m.postprocess:
        if step.step in _MASK_STEPS and not mask:
            problems.append(f"postprocess: {step.step} works on the mask of a from_output decision")
        if step.step not in _MASK_STEPS and not labelled:
            problems.append(f"postprocess: {step.step} needs labels; put two_lungs or lung_fields before it")
        labelled = labelled or step.step in _LABELLING
    if mask and not labelled:
        problems.append(
            "postprocess: no step makes labels of the mask; add two_lungs or lung_fields, or decide by threshold"
        )
    if isinstance(m.decision, Threshold) and m.decision.labels is not None and 0 in m.decision.labels:
        problems.append("decision: threshold gives each channel a segment number of 1 or more")
    return problems + _outside(m)


def _outside(m: StagedManifest) -> list[str]:
    """Outside a crop every channel is 0 on the source grid: that must not make a segment."""
    if not any(step.step in ("crop_to_body", "crop_foreground", "crop_to_field") for step in m.preprocess):
        return []
    if isinstance(m.decision, MaskFrom) and m.decision.threshold <= 0:
        return ["decision: from_output needs a threshold above 0, which is what the outside of a crop has"]
    if isinstance(m.decision, Argmax) and m.decision.on == "source" and m.decision.labels and m.decision.labels[0]:
        return [
            "decision: argmax takes the outside of a crop for channel 0; give that the label 0, or decide on network"
        ]
    return []


def _references(m: StagedManifest, network: Network) -> list[str]:
    problems = []
    for place, names, known in (
        ("activations", [a.output for a in m.activations], network.outputs),
        ("decision", [m.decision.output] if m.decision else [], network.outputs),
        ("outputs.probability_maps", [p.output for p in m.outputs.probability_maps], network.outputs),
        ("outputs.findings", [f.output for f in m.outputs.findings], network.scores),
        ("golden.statistics", [n for case in m.golden for n in case.statistics], network.outputs),
    ):
        kind = "scores" if known is network.scores else "outputs"
        problems += [
            f"{place}: {name or 'no output'} is not among engine.{kind} ({', '.join(known) or 'none'})"
            for name in names
            if name not in known
        ]
    twice = [a.output for a in m.activations]
    problems += [f"activations: {name} gets two" for name in sorted(set(twice)) if twice.count(name) > 1]
    if network.model not in m.files:
        problems.append(f"{network.model} is used but not listed under files")
    return problems


def _pipeline_alone(m: StagedManifest) -> list[str]:
    used = [
        name
        for name, there in (
            ("preprocess", bool(m.preprocess)),
            ("activations", bool(m.activations)),
            ("decision", m.decision is not None),
            ("postprocess", bool(m.postprocess)),
        )
        if there
    ]
    problems = [f"{name}: a pipeline does its own steps; leave it out" for name in used]
    problems += [
        f"outputs.findings: {f.key}: a pipeline gives calibrated probabilities; leave calibration out"
        for f in m.outputs.findings
        if f.calibration is not None
    ]
    if m.engine is not None and m.engine.model not in m.files:
        problems.append(f"{m.engine.model} is used but not listed under files")
    return problems


def _golden_problems(m: StagedManifest) -> list[str]:
    problems = []
    names = [i.name for i in m.more_inputs]
    if len(set(names)) != len(names):
        problems.append("more_inputs: names must differ")
    if names and m.engine is None:
        problems.append("more_inputs: a pipeline without a network takes one series")
    channels = [i for i in m.more_inputs if i.apply == "channel"]
    if m.engine is not None and m.engine.inputs and len(m.engine.inputs) != 1 + len(channels):
        problems.append("engine.inputs: one for the first series and one for each channel of more_inputs")
    findings = {f.key for f in m.outputs.findings}
    maps = {p.key for p in m.outputs.probability_maps}
    answers = {f.key for f in m.outputs.image_findings}
    for case in m.golden:
        if case.answers.keys() != answers:
            problems.append(f"golden {case.name}: answers must have a code for each of {sorted(answers)}")
        problems += [f"{f} is used but not listed under files" for f in case.files if f not in m.files]
        if case.more.keys() != {i.name for i in m.more_inputs}:
            problems.append(f"golden {case.name}: more must have an input for each of more_inputs")
        if bool(m.outputs.segments) != (case.labels is not None):
            problems.append(f"golden {case.name}: labels are needed exactly where there are segments")
        if case.findings.keys() != findings:
            problems.append(f"golden {case.name}: findings must have a probability for each of {sorted(findings)}")
        if case.probability_maps.keys() != maps:
            problems.append(f"golden {case.name}: probability_maps must have a file for each of {sorted(maps)}")
    return problems


def _volume_problems(m: StagedManifest) -> list[str]:
    problems = [
        f"outputs.measurements: {entry.key}: areas are of single images; input.kind must be projection"
        for entry in m.outputs.measurements
        if entry.compute.kind == "area_mm2"
    ]
    if m.outputs.image_measurements or m.outputs.image_findings:
        problems.append(
            "outputs.image_measurements, image_findings: they are of single images; input.kind must be projection"
        )
    for step in {s.step for s in (*m.preprocess, *m.postprocess)} & {"crop_to_field", "lung_fields"}:
        problems.append(f"{step}: it is for single images; input.kind must be projection")
    if any(case.white is not None or case.facts for case in m.golden):
        problems.append("golden: white and facts are of single images")
    return problems


def _projection_problems(m: StagedManifest) -> list[str]:
    """What makes no sense for images without Hounsfield units, depth or, mostly, a size of their pixels."""
    assert isinstance(m.input, ProjectionContract)
    steps = {step.step for step in (*m.preprocess, *m.postprocess)}
    hounsfield = steps & {"straighten", "crop_to_body", "inside_body", "remove_airways", "remove_gas", "two_lungs",
                          "note_coverage"}  # fmt: skip
    problems = [f"{name}: it needs a CT volume, the input is single images" for name in sorted(hounsfield)]
    names = [step.step for step in m.preprocess]
    if "crop_to_field" in names[1:]:
        problems.append("preprocess: crop_to_field looks at the image as it is; put it first")
    if m.more_inputs:
        problems.append("more_inputs: single images lie in no common space with another series")
    if m.outputs.probability_maps:
        problems.append(
            "outputs.probability_maps: DICOM has none of single images (a parametric map wants a frame of reference "
            "and positions); make segments or findings of them"
        )
    for entry in m.outputs.measurements:
        if entry.compute.kind == "volume_ml":
            problems.append(f"outputs.measurements: {entry.key}: a single image has no volumes")
        if entry.compute.kind in ("area_mm2", "diameter_in_plane_mm", "feret_mm") and not m.input.needs_spacing:
            problems.append(f"outputs.measurements: {entry.key}: mm need input.needs_spacing")
    segments = {s.number for s in m.outputs.segments}
    of_images: list[ImageMeasurementEntry | ImageFindingEntry] = [*m.outputs.image_measurements]
    for image in (*of_images, *m.outputs.image_findings):
        spec = image.compute.model_dump()
        named = {*spec.get("segments", ()), *(spec[side] for side in ("right", "left") if side in spec)}
        if named - segments or (image.compute.kind == "margin_percent" and not segments):
            problems.append(f"outputs: {image.key}: it is of a segment that there is not")
    if any(case.white is None for case in m.golden):
        problems.append("golden: a single image needs white, the upper end of its grey values")
    return problems
