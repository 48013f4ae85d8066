"""The gate before serving: a bundle's golden cases on the engine that will serve it.

Tolerances are GPU.md's: at most 1e-3 of the voxels differ, Dice 0.999 for each segment,
measurements within 1e-3; NaN, Inf and constant outputs are refused whatever was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dicomnode.errors import BundleError, EngineError
from dicomnode.infer.begun import BegunSeries, begin_series
from dicomnode.infer.bundle import Bundle, load_bundle
from dicomnode.infer.decode import Decoder
from dicomnode.infer.engine import ByName, Engine, Loads, Session
from dicomnode.infer.faults import Fault, golden_code
from dicomnode.infer.independence import rows_independent
from dicomnode.infer.manifest import GoldenCase, Manifest
from dicomnode.infer.pipeline import NO_SERIES, Progress, analyse_series, infer, run_bundle
from dicomnode.infer.stages.golden import load_array, measurement_problems, run_case
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.run import open_session
from dicomnode.infer.volume import ReadSlice, Volume, spacing_of
from dicomnode.records import Analysis, ModelIdentity, SourceInstance

_HINTS = {
    Fault.oom.value: "Nothing is wrong with the model: free GPU memory, or raise inference.gpu_memory_share",
    Fault.lost.value: "Nothing is wrong with the model: see 'nvidia-smi' and the kernel's log for Xid",
}


@dataclass(frozen=True, slots=True)
class CaseResult:
    """Outcome of one golden case. ``problems`` is empty when it passed.

    ``disagreement``: share of voxels with another label. ``dice``: the worst segment's.
    ``code``: why it failed; that of the engine's error (OOM, DEVICE_LOST) where it raised one.
    """

    name: str
    problems: tuple[str, ...]
    disagreement: float
    dice: float
    code: str = "GOLDEN_MISMATCH"


@dataclass(frozen=True, slots=True)
class GoldenReport:
    """All golden cases of one bundle on one engine."""

    engine: str
    cases: tuple[CaseResult, ...]

    @property
    def passed(self) -> bool:
        return bool(self.cases) and all(not case.problems for case in self.cases)

    @property
    def code(self) -> str:
        """Of the first case that failed."""
        return next((case.code for case in self.cases if case.problems), "GOLDEN_MISMATCH")


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A bundle with a session that has passed its golden cases. Made by ``open_model`` only."""

    bundle: Bundle
    session: Session
    report: GoldenReport
    shares: bool = False
    """Whether series of several studies may share its batches: shown by ``independence``."""

    @property
    def most_rows(self) -> int:
        """Rows of a batch that several studies may share, at present; 1 where they may not."""
        return int(getattr(self.session, "batch", 1)) if self.shares else 1

    @property
    def identity(self) -> ModelIdentity:
        return self.bundle.identity

    def analyse(
        self,
        instances: Sequence[SourceInstance | Path],
        *,
        decoder: Decoder | None = None,
        progress: Progress | None = None,
        ahead: Mapping[str, ReadSlice] | None = None,
        more: Mapping[str, Sequence[SourceInstance] | SegMask] = NO_SERIES,
    ) -> Analysis:
        """See ``pipeline.analyse_series``."""
        return analyse_series(
            self.bundle, self.session, instances, decoder=decoder, progress=progress, ahead=ahead, more=more
        )

    def begin(
        self,
        instances: Sequence[SourceInstance | Path],
        *,
        decoder: Decoder | None = None,
        progress: Progress | None = None,
        ahead: Mapping[str, ReadSlice] | None = None,
        more: Mapping[str, Sequence[SourceInstance] | SegMask] = NO_SERIES,
    ) -> BegunSeries:
        """The first half of :meth:`analyse`, where it ``shares``; see ``begun.begin_series``."""
        return begin_series(self.bundle, instances, decoder=decoder, progress=progress, ahead=ahead, more=more)

    def close(self) -> None:
        self.session.close()


def open_model(path: Path, engine: Engine, *, threads: int = 0) -> ReadyModel:
    """Load, verify and make ready: the only way to a model that may serve.

    Raises BundleError for the bundle and EngineError (GOLDEN_MISMATCH) when the engine does
    not reproduce the golden cases.
    """
    bundle = load_bundle(path)
    return gate(bundle, session_for(bundle, engine, threads))


def gate(bundle: Bundle, session: Session) -> ReadyModel:
    """``session`` with ``bundle``'s model, once it has passed the golden cases.

    Raises EngineError (GOLDEN_MISMATCH), and whatever else the session raises; it is closed then.
    """
    try:
        report = check_golden(bundle, session)
        shares = report.passed and rows_independent(bundle, session)
    except BaseException:
        session.close()
        raise
    if not report.passed:
        session.close()
        identity = bundle.manifest.identity
        problems = "; ".join(f"{c.name}: {', '.join(c.problems)}" for c in report.cases if c.problems)
        raise EngineError(
            f"verify {identity.name} {identity.version} on {report.engine}",
            report.code,
            problems,
            _HINTS.get(report.code, "Do not use this model with this engine; choose another engine or another version"),
        )
    return ReadyModel(bundle, session, report, shares)


def session_for(
    bundle: Bundle, engine: Engine | Loads, threads: int, read: Callable[[str], bytes] | None = None
) -> Session:
    """The session of the bundle's network, ``read`` by the names of its files; a stand-in where it has none.

    Not yet shown to compute the right thing. Raises EngineError, and PeerAway for an endpoint.
    """
    if isinstance(engine, ByName):
        engine = engine.for_model(bundle.manifest.identity.name, bundle.manifest.identity.version)
    if isinstance(bundle.manifest, StagedManifest):
        return open_session(bundle.manifest, engine, read or bundle.read, threads)
    return engine.load((read or bundle.read)(bundle.manifest.engine.model), threads=threads)


def model_file(bundle: Bundle) -> str | None:
    """Name of the network's file; None for a Python pipeline that has none."""
    engine = bundle.manifest.engine
    return None if engine is None else engine.model


def check_golden(bundle: Bundle, session: Session) -> GoldenReport:
    """Run every golden case of ``bundle`` on ``session``."""
    manifest = bundle.manifest
    if isinstance(manifest, StagedManifest):
        outcomes = [(case.name, run_case(manifest, bundle.read, session, case)) for case in manifest.golden]
        return GoldenReport(
            session.engine, tuple(CaseResult(n, o.problems, o.disagreement, o.dice, o.code) for n, o in outcomes)
        )
    return GoldenReport(session.engine, tuple(_run(bundle, manifest, session, case) for case in manifest.golden))


def golden_volume(bundle: Bundle, case: GoldenCase) -> Volume:
    """The input of a golden case; spacing follows from the columns of its affine."""
    values = load_array(bundle.read, case.input, ("<i2",))
    affine = np.array(case.affine, np.float64)
    return Volume(values, affine, spacing_of(affine), tuple(f"2.25.{i + 1}" for i in range(values.shape[0])))


def _run(bundle: Bundle, manifest: Manifest, session: Session, case: GoldenCase) -> CaseResult:
    volume = golden_volume(bundle, case)
    expected = load_array(bundle.read, case.labels, ("|u1",))
    if expected.shape != volume.values.shape:
        raise BundleError("verify bundle", f"{case.labels} and {case.input} differ in shape")
    try:
        for name, output in infer(manifest, session, volume).items():
            if output.min() == output.max():
                return CaseResult(case.name, (f"output {name} is constant",), 1.0, 0.0)
        analysis = run_bundle(bundle, session, volume)
    except EngineError as cause:
        return CaseResult(case.name, (cause.cause,), 1.0, 0.0, golden_code(cause.code))
    assert analysis.labels is not None
    labels = analysis.labels
    disagreement = float(np.mean(labels != expected))
    numbers = [s.number for s in manifest.outputs.segments]
    dice = min((_dice(labels == n, expected == n) for n in numbers), default=1.0)
    found = analysis.numbers_found()
    keys = {s.number: s.key for s in manifest.outputs.segments if s.number in found}
    got = {f"{keys[m.segment]}.{m.key}": m.value for m in analysis.measurements if m.segment in keys}
    problems: list[str] = []
    if disagreement > case.max_disagreement:
        problems.append(f"{disagreement:.2%} of the voxels have another label")
    if dice < case.min_dice:
        problems.append(f"Dice {dice:.4f}")
    problems += measurement_problems(case, got)
    return CaseResult(case.name, tuple(problems), disagreement, dice)


def _dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total
