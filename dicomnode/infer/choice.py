"""Which engine serves which model: the first that passes the model's golden cases here.

The choice is made for each model by itself: an engine that serves one may fail the golden
case of another, or lack the memory for it. With ``auto`` the next one serves then, in FP32
before another engine where the half-precision file of the bundle was out of tolerance; an
engine that was asked for by name serves or is an error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from dicomnode import logs, metrics
from dicomnode.errors import EngineError
from dicomnode.infer.batching import CappedSession
from dicomnode.infer.bundle import Bundle, load_bundle
from dicomnode.infer.engine import Engine, Limits, Ok, Rejected, Session, choose_engine, default_engines, is_full
from dicomnode.infer.golden import ReadyModel, gate, model_file, session_for
from dicomnode.infer.isolated import Report
from dicomnode.infer.trt import rejection_code
from dicomnode.infer.trt_build import Precision
from dicomnode.settings import Settings

FP16_FILE = "fp16mixed.onnx"
"""In a bundle: the same network in half precision, norms and softmax in single (GPU.md, "TensorRT API")."""

GPU_ENGINES = frozenset({"tensorrt", "onnxruntime-gpu"})
AGAIN_SECONDS = 600.0
"""An engine that lacked memory for a model is tried again after this long."""

MAX_BUILDS = 3
"""Builds of an engine that was asked for by name: nothing else serves, and what failed may pass (memory, a crash)."""

FOR_EVER = float("inf")


@runtime_checkable
class BuildsEngines(Protocol):
    """An engine that has to build something, for minutes, before it can load a model."""

    def built(self, onnx: bytes, precision: Precision) -> bool: ...

    def build(self, onnx: bytes, precision: Precision, report: Report | None = None) -> None: ...

    def load(self, onnx: bytes, *, threads: int = 0, precision: Precision = "fp32", build: bool = True) -> Session: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a model."""

    engine: Engine
    precision: Precision

    @property
    def text(self) -> str:
        return f"{self.engine.name} {self.precision}"


class HasSession(Protocol):
    @property
    def session(self) -> Session: ...


class NotBuilt(EngineError):
    """Only an engine that has to be built first may serve this model; nothing else stands in for it."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that serves, and whether a better engine could be built for it."""

    model: ReadyModel
    better: bool


@dataclass(slots=True)
class _Refusal:
    """``builds``: how many of it have failed."""

    rejected: Rejected
    until: float = field(default=FOR_EVER)
    builds: int = 0


def limits_of(settings: Settings) -> Limits:
    """``[inference]``: what an engine may take."""
    return Limits(settings.inference.max_batch, settings.inference.gpu_memory_share)


def engines_of(settings: Settings) -> tuple[Engine, ...]:
    """The engines of this box in the order of ``auto``."""
    return default_engines(settings.node.data_dir, limits_of(settings))


def candidates(engines: Iterable[Engine], files: Iterable[str], *, network: bool = True) -> list[Candidate]:
    """In the order in which they are tried: half precision first, where bundle and engine have it. Pure.

    A Python pipeline without a ``network`` needs none of them; the last one stands for it.
    """
    if not network:
        return [Candidate(engine, "fp32") for engine in list(engines)[-1:]]
    names = set(files)
    found: list[Candidate] = []
    for engine in engines:
        if FP16_FILE in names and isinstance(engine, BuildsEngines):
            found.append(Candidate(engine, "fp16"))
        found.append(Candidate(engine, "fp32"))
    return found


def usable_engines(setting: str, engines: Sequence[Engine]) -> tuple[tuple[Engine, ...], tuple[Rejected, ...]]:
    """Engines that can serve here, best first, and why the others cannot.

    Raises EngineError when the one that was asked for by name cannot, or none can.
    """
    if setting != "auto":
        return (choose_engine(setting, engines)[0],), ()
    answers = [(engine, engine.probe()) for engine in engines]
    usable = tuple(engine for engine, answer in answers if isinstance(answer, Ok))
    if not usable:
        choose_engine(setting, engines)  # raises with all the reasons
    return usable, tuple(answer for _, answer in answers if isinstance(answer, Rejected))


class EngineChoice:
    """Opens models on the best engine and remembers what failed. Used by the worker and by one thread beside it."""

    def __init__(
        self,
        setting: str,
        engines: Sequence[Engine],
        *,
        threads: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self.automatic = setting == "auto"
        self._known = tuple(engines)
        self.engines, self.rejected = usable_engines(setting, engines)
        self._full_until = {r.engine: time.monotonic() + AGAIN_SECONDS for r in self.rejected if is_full(r)}
        self._threads = threads
        self._limits = limits or Limits()
        self._refusals: dict[tuple[str, str, str], _Refusal] = {}
        self._lost = False
        for rejection in self.rejected:
            metrics.fallback(rejection.engine, rejection.code)

    @classmethod
    def of(cls, settings: Settings) -> EngineChoice:
        inference = settings.inference
        return cls(inference.engine.value, engines_of(settings), threads=inference.threads, limits=limits_of(settings))

    def open(self, path: Path, *, build: bool = False, below: str = "") -> Opened:
        """The bundle on the first engine that passes; ``below`` names an engine after which to begin.

        Nothing is built unless ``build`` says so: what would have to be is passed over, and NotBuilt
        raised where nothing else serves. Raises BundleError, or EngineError with every reason.
        """
        bundle = load_bundle(path)
        errors: list[EngineError] = []
        skipped: list[Candidate] = []
        for candidate in _candidates(self._after(below), bundle):
            if self._out(bundle, candidate):
                continue
            try:
                model = self._ready(bundle, candidate, None, build=build)
            except EngineError as error:
                errors.append(error)
                continue
            if model is not None:
                return Opened(model, bool(skipped))
            skipped.append(candidate)
        name = f"{bundle.manifest.identity.name} {bundle.manifest.identity.version}"
        if skipped:
            raise NotBuilt(
                f"open {name}", "BUILDING", f"{skipped[0].text} is being built for it", "It serves once built"
            )
        refusals = self.refusals(bundle.digest)
        if len(errors) == 1 and not refusals[1:]:
            raise errors[0]
        reasons = "; ".join(f"{r.engine} {r.code}: {r.text}" for r in refusals)
        code = errors[-1].code if errors else refusals[-1].code if refusals else "LIB_MISSING"
        raise EngineError(f"open {name}", code, reasons or "no engine is left", self._advice(bundle))

    def upgrade(self, path: Path, than: str, report: Report) -> ReadyModel | None:
        """Build and open the best engine for the bundle that comes before ``than``; None when none passes.

        Takes minutes: for a thread beside serving. Raises BundleError.
        """
        self._look_again()
        bundle = load_bundle(path)
        for candidate in _candidates(self.engines, bundle):
            if candidate.text == than:
                return None
            if self._out(bundle, candidate):
                continue
            with contextlib.suppress(EngineError):  # it is among the refusals now
                return self._ready(bundle, candidate, report, build=True)
        return None

    def may_improve(self, model: ReadyModel) -> bool:
        """Whether a way before the one that ``model`` runs on is open: not tried yet, or due to be tried again."""
        if model_file(model.bundle) is not None and any(time.monotonic() >= at for at in self._full_until.values()):
            return True
        return any(not self._out(model.bundle, c) for c in self._before(model))

    def settled(self, model: ReadyModel) -> bool:
        """Whether every way before the one that ``model`` runs on is closed for good."""
        known = [self._refusals.get(_key(model.bundle, c)) for c in self._before(model)]
        return not self._lost and not self._full_until and all(r is not None and r.until == FOR_EVER for r in known)

    def _look_again(self) -> None:
        """At engines that the box has and whose GPU was full when they were looked at last."""
        for engine in self._known:
            if time.monotonic() < self._full_until.get(engine.name, FOR_EVER):
                continue
            answer = engine.probe()
            if is_full(answer):
                self._full_until[engine.name] = time.monotonic() + AGAIN_SECONDS
                continue
            del self._full_until[engine.name]
            others = [r for r in self.rejected if r.engine != engine.name]
            if isinstance(answer, Rejected):
                others.append(answer)
            else:
                self.engines = tuple(e for e in self._known if e in self.engines or e is engine)
            self.rejected = tuple(others)

    def _before(self, model: ReadyModel) -> list[Candidate]:
        """The ways that are tried before the one that ``model`` runs on."""
        ways = _candidates(self.engines, model.bundle)
        texts = [way.text for way in ways]
        here = engine_text(model)
        return ways[: texts.index(here)] if here in texts else []

    def _advice(self, bundle: Bundle) -> str:
        """What the operator can do where nothing serves the bundle."""
        builds = [r for (digest, _, _), r in list(self._refusals.items()) if digest == bundle.digest and r.builds]
        if not builds or self.automatic:
            return "See 'dicomnode doctor'"
        if any(r.until < FOR_EVER for r in builds):
            return f"It is built {MAX_BUILDS} times at most; inference.engine = 'auto' lets another engine serve"
        return (
            f"It was built {MAX_BUILDS} times and is not again before the worker is restarted; "
            "inference.engine = 'auto' lets another engine serve"
        )

    def has_other(self, model: ReadyModel) -> bool:
        """Whether another engine stands in when this one fails for a job."""
        return self.automatic and bool(self._after(engine_name(model)))

    def refusals(self, digest: str) -> list[Rejected]:
        """Why engines do not serve the bundle with this digest."""
        return [r.rejected for (bundle, _, _), r in list(self._refusals.items()) if bundle == digest]

    def _after(self, name: str) -> tuple[Engine, ...]:
        """The engines after the one of this name; all where there is none such."""
        names = [engine.name for engine in self.engines]
        return self.engines[names.index(name) + 1 :] if name in names else self.engines

    def _out(self, bundle: Bundle, candidate: Candidate) -> bool:
        """Whether this way has failed before; a single one that was asked for by name is always tried."""
        if self._lost and candidate.engine.name in GPU_ENGINES:
            return True
        known = self._refusals.get(_key(bundle, candidate))
        if known is None:
            return False
        last = candidate.engine is self.engines[-1] and candidate.precision == "fp32" and not known.builds
        return not last and time.monotonic() < known.until

    def _unbuilt(self, bundle: Bundle, candidate: Candidate) -> bool:
        engine = candidate.engine
        if model_file(bundle) is None:
            return False
        return isinstance(engine, BuildsEngines) and not engine.built(_onnx(bundle, candidate), candidate.precision)

    def _ready(self, bundle: Bundle, candidate: Candidate, report: Report | None, *, build: bool) -> ReadyModel | None:
        """The bundle on this engine; None where it has to be built and may not be: a plan can turn out damaged.

        What fails is refused from now on, and raised as EngineError.
        """
        for _ in range(2):
            if self._unbuilt(bundle, candidate):
                if not build:
                    return None
                self._build(bundle, candidate, report)
            if report:
                report("golden cases", 0.99)
            try:
                model = self._load(bundle, candidate)
            except EngineError as error:
                if error.code == "NOT_BUILT":
                    continue
                raise self._refuse(bundle, candidate, error) from error
            self._refusals.pop(_key(bundle, candidate), None)
            return model
        if not build:
            return None
        broken = EngineError("load model", "BUILD_FAILED", "the engine that was just built cannot be used")
        raise self._refuse(bundle, candidate, broken, built=False)

    def _build(self, bundle: Bundle, candidate: Candidate, report: Report | None) -> None:
        engine = candidate.engine
        assert isinstance(engine, BuildsEngines)
        begin = time.monotonic()
        try:
            engine.build(_onnx(bundle, candidate), candidate.precision, report)
        except EngineError as error:
            metrics.engine_build(engine.name, "failed", time.monotonic() - begin)
            raise self._refuse(bundle, candidate, error, built=False) from error
        metrics.engine_build(engine.name, "built", time.monotonic() - begin)

    def _load(self, bundle: Bundle, candidate: Candidate) -> ReadyModel:
        engine = candidate.engine

        def read(name: str) -> bytes:
            return _onnx(bundle, candidate) if name == model_file(bundle) else bundle.read(name)

        loads = _Precisely(engine, candidate.precision) if isinstance(engine, BuildsEngines) else engine
        session = session_for(bundle, loads, self._threads, read)
        if model_file(bundle) is not None:  # else a stand-in, which a Python pipeline must know as such
            session = CappedSession(session, self._limits.max_batch)
        model = gate(bundle, session)
        metrics.golden(
            model.identity.name,
            engine.name,
            candidate.precision,
            max(case.disagreement for case in model.report.cases),
            min(case.dice for case in model.report.cases),
        )
        return model

    def _refuse(self, bundle: Bundle, candidate: Candidate, error: EngineError, *, built: bool = True) -> EngineError:
        identity = bundle.manifest.identity
        code = rejection_code(error.code)
        text = error.cause.removeprefix(f"{error.code}: ")
        before = self._refusals.get(_key(bundle, candidate))
        builds = (before.builds if before else 0) + (not built)
        again = code == "OOM" or (not built and not self.automatic and builds < MAX_BUILDS)
        until = time.monotonic() + AGAIN_SECONDS if again else FOR_EVER
        self._refusals[_key(bundle, candidate)] = _Refusal(Rejected(candidate.text, code, text), until, builds)
        self._lost |= code == "DEVICE_LOST" and candidate.engine.name in GPU_ENGINES
        metrics.fallback(candidate.engine.name, code)
        logs.get().warning(
            "engine does not serve this model",
            model=identity.name,
            version=identity.version,
            engine=candidate.engine.name,
            precision=candidate.precision,
            code=code,
            cause=text,
        )
        return error


@dataclass(frozen=True, slots=True)
class _Precisely:
    """An engine that builds, at one precision and from what was built before, as what opens a network."""

    engine: BuildsEngines
    precision: Precision

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        return self.engine.load(onnx, threads=threads, precision=self.precision, build=False)


def engine_name(model: HasSession) -> str:
    """Name of the engine that a model runs on, without version."""
    return model.session.engine.split(" ")[0]


def engine_text(model: ReadyModel) -> str:
    """Engine and precision, as :attr:`Candidate.text`."""
    return f"{engine_name(model)} {getattr(model.session, 'precision', 'fp32')}"


def _candidates(engines: Iterable[Engine], bundle: Bundle) -> list[Candidate]:
    return candidates(engines, bundle.manifest.files, network=model_file(bundle) is not None)


def _key(bundle: Bundle, candidate: Candidate) -> tuple[str, str, str]:
    return (bundle.digest, candidate.engine.name, candidate.precision)


def _onnx(bundle: Bundle, candidate: Candidate) -> bytes:
    name = FP16_FILE if candidate.precision == "fp16" else model_file(bundle)
    assert name is not None  # without a network nothing is loaded
    return bundle.read(name)
