"""The gate of GPU.md for bundles of schema 2: labels, measurements, probabilities, maps, statistics."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dicomnode.errors import BundleError, EngineError, UnsuitableSeries
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.engine import Session
from dicomnode.infer.faults import golden_code
from dicomnode.infer.stages.intensity import mean_and_std
from dicomnode.infer.stages.manifest import GoldenCase, GoldenInput, StagedManifest
from dicomnode.infer.stages.network import Answers
from dicomnode.infer.stages.run import run_staged
from dicomnode.infer.volume import Projection, Volume, spacing_of
from dicomnode.records import Analysis

Read = Callable[[str], bytes]
Array = npt.NDArray[Any]
MAX_GOLDEN_VOXELS = 1 << 26
MAP_TOLERANCE = 0.01
"""A voxel of a probability map differs when it is further off than this."""

_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class Outcome:
    """``problems`` is empty when the case passed. ``disagreement``, ``dice``, ``code``: see ``golden.CaseResult``."""

    problems: tuple[str, ...]
    disagreement: float = 0.0
    dice: float = 1.0
    code: str = "GOLDEN_MISMATCH"


def run_case(manifest: StagedManifest, read: Read, session: Session, case: GoldenCase) -> Outcome:
    """Run one golden case; a failing engine is a problem of the case, a broken file a BundleError."""
    problems: list[str] = []
    wanted = {name: load_array(read, name, ("<f2", "<f4")) for name in case.probability_maps.values()}
    expected = None if case.labels is None else load_array(read, case.labels, ("|u1",))
    displayed = isinstance(manifest.input, ProjectionContract) and manifest.input.values == "displayed"
    volume = case_volume(case, read, displayed=displayed)

    def inspect(answers: Answers) -> None:
        problems.extend(answer_problems(case, answers))

    try:
        more = {name: case_volume(one, read) for name, one in case.more.items()}
        analysis = run_staged(manifest, session, volume, inspect=inspect, more=more)
    except (EngineError, UnsuitableSeries) as cause:
        return Outcome((cause.cause,), 1.0, 0.0, golden_code(cause.code))
    disagreement, dice = 0.0, 1.0
    if expected is not None:
        assert analysis.labels is not None
        if expected.shape != volume.values.shape:
            raise BundleError("verify bundle", f"{case.labels} and {case.input} differ in shape")
        disagreement, dice = _compare(analysis.labels, expected, len(manifest.outputs.segments))
        if disagreement > case.max_disagreement:
            problems.append(f"{disagreement:.2%} of the voxels have another label")
        if dice < case.min_dice:
            problems.append(f"Dice {dice:.4f}")
    if expected is not None or manifest.outputs.image_measurements:
        problems += measurement_problems(case, measured(manifest, analysis))
    problems += finding_problems(case, {f.key: f.probability or 0.0 for f in analysis.findings})
    answers = {f.key: f.value.value for f in analysis.findings if f.value is not None}
    problems += [
        f"{key} is answered by {answers.get(key)}, expected {code}"
        for key, code in case.answers.items()
        if answers.get(key) != code
    ]
    for found in analysis.probability_maps:
        reference = wanted[case.probability_maps[found.key]]
        if reference.shape != found.values.shape:
            raise BundleError("verify bundle", f"{case.probability_maps[found.key]} and {case.input} differ in shape")
        off = np.abs(found.values.astype(np.float32) - reference.astype(np.float32)) > MAP_TOLERANCE
        if float(off.mean()) > case.max_disagreement:
            problems.append(f"{off.mean():.2%} of the probability map {found.key} differ")
    return Outcome(tuple(problems), disagreement, dice)


class Expected(Protocol):
    """What a golden case of either schema expects of measurements."""

    @property
    def measurements(self) -> Mapping[str, float]: ...

    @property
    def relative_tolerance(self) -> float: ...


def case_volume(case: GoldenCase | GoldenInput, read: Read, *, displayed: bool = False) -> Volume:
    """The input of a golden case; spacing follows from the columns of its affine.

    Where the model takes a single image as it is ``displayed``, 0 to 1, its values are divided by the case's ``white``.
    """
    values = load_array(read, case.input, ("<i2",))
    affine = np.array(case.affine, np.float64)
    about = None
    if isinstance(case, GoldenCase) and case.white is not None:
        if len(values) != 1:
            raise BundleError(
                "verify bundle", f"{case.input} holds {len(values)} images", "Give each a case of its own"
            )
        values, white = values.astype(np.float32), case.white
        values, white = (values / np.float32(white), 1.0) if displayed else (values, white)
        about = Projection(white, case.facts)
    uids = tuple(f"2.25.{i + 1}" for i in range(values.shape[0]))
    return Volume(values, affine, spacing_of(affine), uids, projection=about)


def answer_problems(case: GoldenCase, answers: Answers) -> list[str]:
    """Constant outputs, and statistics that are off; the network's own answers, before any step."""
    problems = []
    for name, dense in answers.dense.items():
        if dense.min() == dense.max():
            problems.append(f"output {name} is constant")
        wanted = case.statistics.get(name)
        if wanted is None:
            continue
        if len(wanted) != len(dense):
            problems.append(f"output {name} has {len(dense)} channels, expected {len(wanted)}")
            continue
        for channel, (mean, std) in enumerate(wanted):
            got = mean_and_std(dense[channel])
            scale = max(std, 1e-6)
            if not max(abs(got[0] - mean), abs(got[1] - std)) <= case.relative_tolerance * scale:
                problems.append(f"channel {channel} of output {name} is {got[0]:.6g} +- {got[1]:.6g}")
    return problems


def statistics(answers: Answers) -> dict[str, tuple[tuple[float, float], ...]]:
    """Mean and standard deviation of each channel, as ``GoldenCase.statistics`` takes them."""
    return {name: tuple(mean_and_std(channel) for channel in dense) for name, dense in answers.dense.items()}


def finding_problems(case: GoldenCase, got: Mapping[str, float]) -> list[str]:
    """GPU.md: |dp| at most 0.01 and the same ranking."""
    problems = []
    for key, wanted in sorted(case.findings.items()):
        if not abs(got[key] - wanted) <= case.probability_tolerance:
            problems.append(f"{key} is {got[key]:.4f}, expected {wanted:.4f}")
    ordered = sorted(case.findings, key=lambda key: -case.findings[key])
    for i, higher in enumerate(ordered):
        for lower in ordered[i + 1 :]:
            if case.findings[higher] - case.findings[lower] > _TIE and got[higher] < got[lower]:
                problems.append(f"{lower} ranks above {higher}")
    return problems


def measured(manifest: StagedManifest, analysis: Analysis) -> dict[str, float]:
    """Measurements by ``segment key.measurement key``, of the segments that occur; of an image by the key alone."""
    found = analysis.numbers_found()
    keys = {s.number: s.key for s in manifest.outputs.segments if s.number in found}
    whole = {m.key: m.value for m in analysis.measurements if m.segment is None}
    return whole | {f"{keys[m.segment]}.{m.key}": m.value for m in analysis.measurements if m.segment in keys}


def measurement_problems(case: Expected, got: Mapping[str, float]) -> list[str]:
    problems = []
    if got.keys() != case.measurements.keys():
        problems.append("other measurements than expected")
    for key in sorted(got.keys() & case.measurements.keys()):
        wanted = case.measurements[key]
        if not abs(got[key] - wanted) <= case.relative_tolerance * max(abs(wanted), 1.0):
            problems.append(f"{key} is {got[key]:.6g}, expected {wanted:.6g}")
    return problems


def _compare(got: Array, expected: Array, segments: int) -> tuple[float, float]:
    worst = 1.0
    for number in range(1, segments + 1):
        a, b = got == number, expected == number
        total = int(a.sum()) + int(b.sum())
        worst = min(worst, 2.0 * int((a & b).sum()) / total if total else 1.0)
    return float(np.mean(got != expected)), worst


def load_array(read: Read, name: str, kinds: tuple[str, ...]) -> Array:
    """A 3-D .npy array of one of ``kinds``, without pickle, its size checked before reading."""
    data = io.BytesIO(read(name))
    try:
        version = np.lib.format.read_magic(data)
        shape, fortran, found = np.lib.format.read_array_header_1_0(data)
        fits = version == (1, 0) and found.str in kinds and not fortran and len(shape) == 3 and 0 not in shape
        if fits and int(np.prod(shape, dtype=object)) <= MAX_GOLDEN_VOXELS:
            return np.frombuffer(data.read(), found).reshape(shape)
        cause = f"holds {found} {shape}"
    except ValueError as error:
        cause = str(error)
    raise BundleError("verify bundle", f"{name}: {cause}", "Fetch the bundle again")
