"""The places that can take a job, this box's engine and KServe endpoints, and how a job gets through them.

Each place keeps its own verified models. A job goes to the best place by ``placement``; when that one fails in the
middle, the analysis starts again at the next best: a result is of one engine. When none is left the job waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from dicomnode import logs, metrics
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import BundleError, EngineError, NodeError, PeerAway
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.operation import Models
from dicomnode.infer.choice import EngineChoice, limits_of
from dicomnode.infer.decode import Decoder
from dicomnode.infer.engine import Engine, Ok, Session
from dicomnode.infer.faults import Fault, fault_of
from dicomnode.infer.golden import ReadyModel, model_file, open_model
from dicomnode.infer.kserve import KServe
from dicomnode.infer.local_load import LoadOfOthers
from dicomnode.infer.pipeline import NO_SERIES, Progress
from dicomnode.infer.placement import LOCALITY, Candidate, Decision, Weights, decide, resource_fit
from dicomnode.infer.serving import ServingModels, bundle_folders, resolve
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.infer.volume import ReadSlice
from dicomnode.records import Analysis, ModelIdentity, SourceInstance
from dicomnode.settings import Settings

LOCAL = "local"
REST_SECONDS = 15.0
"""An endpoint that failed is left alone for so long."""

LOCAL_WORKING_BYTES = 1 << 30
"""Free memory that this box should have for a slab and the network's activations: below it, it fits less."""

ACCELERATED = ("tensorrt", "onnxruntime-gpu")

Record = Callable[[Mapping[str, Any]], None]


class Local:
    """This box's engine."""

    name = LOCAL

    def __init__(self, serving: ServingModels, cost: float, others: LoadOfOthers | None = None) -> None:
        self._serving = serving
        self._cost = cost
        self._others = others or LoadOfOthers()

    def get(self, reference: str) -> ReadyModel:
        return self._serving.get(reference)

    def other(self, model: ReadyModel) -> ReadyModel | None:
        """The model on this box's next engine. Raises EngineError as ``ServingModels.other``."""
        return self._serving.other(model)

    def candidate(self, model: ReadyModel) -> Candidate:
        free = int(psutil.virtual_memory().available)
        fit = resource_fit(
            accelerated=model.report.engine.startswith(ACCELERATED),
            needed_bytes=LOCAL_WORKING_BYTES,
            free_bytes=free,
        )
        return Candidate(self.name, LOCALITY["host"], fit, self._others.sample(), self._cost)

    def failed(self, reference: str, error: PeerAway | EngineError) -> None:
        """This box's engine has its own ways back: see ``serving``."""

    def prepare(self, references: Sequence[str]) -> None:
        self._serving.prepare(references)

    def hold(self, model: ReadyModel) -> None:
        """As ``ServingModels.hold``."""
        self._serving.hold(model)

    def let_go(self, model: ReadyModel) -> None:
        self._serving.let_go(model)

    def keep(self, references: Sequence[str]) -> None:
        """As ``ServingModels.keep``."""
        self._serving.keep(references)

    def report(self) -> dict[str, Any]:
        return self._serving.report()


class Remote:
    """A KServe endpoint with the models that have passed their golden cases through it."""

    def __init__(self, engine: KServe, serving: ServingModels, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.name = engine.endpoint.name
        self._serving = serving
        self._clock = clock
        self._rest_until = float("-inf")
        self._refused: dict[str, tuple[float, EngineError]] = {}
        self._verified_at = float("-inf")
        self._fault = ""
        self._log = logs.get()

    def get(self, reference: str) -> ReadyModel:
        """Raises what keeps the endpoint from serving, for REST_SECONDS after a failure without asking it."""
        now = self._clock()
        if now < self._rest_until:
            raise PeerAway("ask inference endpoint", f"{self._fault}; tried again soon")
        until, refusal = self._refused.get(reference, (now, None))
        if refusal is not None and now < until:
            raise refusal
        if now - self._verified_at > self.engine.endpoint.verify_seconds:
            self._serving.forget()  # another may have changed the server's model meanwhile
            self._verified_at = now
        try:
            ready = self._serving.get(reference)
        except (PeerAway, EngineError) as error:
            self.failed(reference, error)
            raise
        if self._fault:
            self._log.info("inference endpoint is back", endpoint=self.name)
            self._fault = ""
        self._refused.pop(reference, None)
        return ready

    def other(self, model: ReadyModel) -> None:
        """An endpoint has one engine."""

    def candidate(self, model: ReadyModel) -> Candidate:
        endpoint = self.engine.endpoint
        there, _ = endpoint.remote(model.identity.name, model.identity.version)
        return Candidate(
            self.name,
            LOCALITY[endpoint.network],
            resource_fit(accelerated=endpoint.accelerator == "gpu"),
            self.engine.load_of(there),
            endpoint.cost,
        )

    def failed(self, reference: str, error: PeerAway | EngineError) -> None:
        """Let it rest, and run the golden cases again before it serves the next time.

        One that is away rests as a whole; one that answered wrongly, with this model only.
        """
        until = self._clock() + REST_SECONDS
        if isinstance(error, EngineError):
            self._refused[reference] = (until, error)
            self._log.warning("inference endpoint refused", endpoint=self.name, model=reference, cause=error.cause)
            self._serving.forget(reference)
            return
        if self._fault != error.cause:
            self._log.warning("inference endpoint failed", endpoint=self.name, cause=error.cause)
        self._fault = error.cause
        self._rest_until = until
        self._serving.forget()

    def prepare(self, references: Sequence[str]) -> None:
        self._serving.prepare(())  # closes what is retired
        for reference in references:
            try:
                self.get(reference)
            except NodeError:
                continue  # it is told by the report, and logged once

    def hold(self, model: ReadyModel) -> None:
        """As ``ServingModels.hold``."""
        self._serving.hold(model)

    def let_go(self, model: ReadyModel) -> None:
        self._serving.let_go(model)

    def keep(self, references: Sequence[str]) -> None:
        """As ``ServingModels.keep``."""
        self._serving.keep(references)
        for reference in [r for r in self._refused if r not in references]:
            del self._refused[reference]

    def report(self) -> dict[str, Any]:
        return {**self._serving.report(), "fault": self._fault}


Place = Local | Remote


class PlacedModels:
    """Takes the part of ``ServingModels`` where there are endpoints."""

    def __init__(self, settings: Settings, db: Database, places: Sequence[Place]) -> None:
        inference = settings.inference
        self._settings = settings
        self._models = Models(db)
        self._life = Life(db)
        self._places = tuple(places)
        self._weights = Weights(
            inference.placement_locality, inference.placement_fit, inference.placement_load, inference.placement_cost
        )
        self._max_load = inference.placement_max_load
        self._log = logs.get()

    def for_job(self, reference: str, record: Record) -> PlacedModel:
        """A model at the best place; ``record`` gets the decision. Raises PeerAway when there is none.

        Raises the error of the place that came nearest when none of them can serve the model
        for a reason that does not pass by itself.
        """
        return PlacedModel(self, reference, record)

    def get(self, reference: str) -> ReadyModel:
        """The model at the first place that serves it, without a decision: for what it is, not for work."""
        first: NodeError | None = None
        for place in self._places:
            try:
                return place.get(reference)
            except NodeError as error:
                first = first or error
        assert first is not None
        raise first

    def other(self, model: ReadyModel | PlacedModel) -> PlacedModel | None:
        """``model`` on the next engine of this box, where it was to run here; None when there is none.

        Raises EngineError when the next engine cannot serve it.
        """
        return model if isinstance(model, PlacedModel) and model.next_engine() else None

    def prepare(self, references: Sequence[str]) -> None:
        """Verify all of these at every place now; what fails is reported."""
        for place in self._places:
            place.prepare(references)

    def hold(self, model: ReadyModel | PlacedModel) -> None:
        """A job begins with it: what it runs on stays open until :meth:`let_go`, at each place that it comes to."""
        if isinstance(model, PlacedModel):
            model.hold()

    def let_go(self, model: ReadyModel | PlacedModel) -> None:
        if isinstance(model, PlacedModel):
            model.let_go()

    def keep(self, references: Sequence[str]) -> None:
        """Give back, at every place, what none of these needs any more."""
        for place in self._places:
            place.keep(references)

    def report(self) -> dict[str, object]:
        """As ``ServingModels.report``: a model is ready when one place serves it; ``places`` has each place's own."""
        places = {place.name: place.report() for place in self._places}
        ready: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for name, found in places.items():
            for reference, model in found["ready"].items():
                ready.setdefault(reference, model)
            for reference, error in found["failed"].items():
                failed[reference] = "; ".join(filter(None, (failed.get(reference), f"{name}: {error}")))
        return {
            "ready": ready,
            "failed": {r: e for r, e in failed.items() if r not in ready},
            "places": {
                name: {"fault": found.get("fault", ""), "models": sorted(found["ready"]), "failed": found["failed"]}
                for name, found in places.items()
            },
        }

    def choose(
        self, reference: str, tried: Mapping[str, NodeError], version: str = ""
    ) -> tuple[Decision, dict[str, ReadyModel], dict[str, NodeError]]:
        """The decision among the places that are not in ``tried``, their models, and the errors of the others.

        ``version``: of the model that the job has begun with; no other one takes its place.
        """
        ready: dict[str, ReadyModel] = {}
        errors: dict[str, NodeError] = dict(tried)
        for place in self._places:
            if place.name not in tried:
                try:
                    ready[place.name] = place.get(reference)
                except NodeError as error:
                    errors[place.name] = error
        version = version or self._version(reference, ready)
        candidates: list[Candidate] = []
        here = False
        for place in self._places:
            model = ready.get(place.name)
            if model is None:
                candidates.append(_absent(place.name, errors[place.name].cause))
            elif model.identity.version != version:
                candidates.append(_absent(place.name, f"serves version {model.identity.version}, not {version}"))
            elif here:
                candidates.append(_absent(place.name, "the model has no network to run elsewhere"))
            else:
                here = model_file(model.bundle) is None  # a Python pipeline: its work is done in this process
                candidates.append(place.candidate(model))
        return decide(candidates, self._weights, self._max_load), ready, errors

    def place(self, name: str) -> Place:
        return next(p for p in self._places if p.name == name)

    def _version(self, reference: str, ready: Mapping[str, ReadyModel]) -> str:
        """The version that should serve where one place can; else that of the first place with any."""
        if not ready:
            return ""
        inference = self._settings.inference
        folders = bundle_folders(inference.models_dir, self._settings.node.data_dir)
        try:
            wanted = resolve(folders, reference, self._models.active(), self._life.held_back()).version
        except BundleError:
            wanted = ""
        versions = [m.identity.version for m in ready.values()]
        return wanted if wanted in versions else versions[0]


class PlacedModel:
    """A model at a place. Takes the part of ``ReadyModel`` for one job."""

    def __init__(self, models: PlacedModels, reference: str, record: Record) -> None:
        self._models = models
        self._reference = reference
        self._record = record
        self._tried: dict[str, NodeError] = {}
        self._moved = False
        self._version = ""
        self._holds = False
        self._held: list[tuple[Place, ReadyModel]] = []
        self._place, self._ready = self._choose()
        self._version = self._ready.identity.version

    @property
    def identity(self) -> ModelIdentity:
        return self._ready.identity

    @property
    def session(self) -> Session:
        """Of the place that was chosen last."""
        return self._ready.session

    def next_engine(self) -> bool:
        """Go on with this box's next engine, if it is this box's turn and there is one. Raises EngineError."""
        other = None if self._moved else self._place.other(self._ready)
        if other is None:
            return False
        self._moved = True  # one other engine here, as for a job that has no other place
        self._ready = other
        self._hold_this()
        return True

    def hold(self) -> None:
        """Whatever takes its place there meanwhile, what this job runs on stays open until :meth:`let_go`."""
        self._holds = True
        self._hold_this()

    def let_go(self) -> None:
        self._holds = False
        while self._held:
            place, ready = self._held.pop()
            place.let_go(ready)

    def _hold_this(self) -> None:
        if self._holds:
            self._place.hold(self._ready)
            self._held.append((self._place, self._ready))

    def analyse(
        self,
        instances: Sequence[SourceInstance | Path],
        *,
        decoder: Decoder | None = None,
        progress: Progress | None = None,
        ahead: Mapping[str, ReadSlice] | None = None,
        more: Mapping[str, Sequence[SourceInstance] | SegMask] = NO_SERIES,
    ) -> Analysis:
        """As ``ReadyModel.analyse``; a place that fails is followed by the next best, from the beginning.

        On this box its other engines come first. A lost device ends the process (``faults``): raised as it is.
        """
        while True:
            try:
                return self._ready.analyse(instances, decoder=decoder, progress=progress, ahead=ahead, more=more)
            except (PeerAway, EngineError) as error:
                if isinstance(error, EngineError):
                    if isinstance(self._place, Local) and fault_of(error.code) is Fault.lost:
                        raise
                    if self._has_next_engine():
                        continue
                self._place.failed(self._reference, error)
                self._tried[self._place.name] = error
                self._place, self._ready = self._choose()
                self._hold_this()

    def _has_next_engine(self) -> bool:
        try:
            return self.next_engine()
        except EngineError:
            return False  # then another place

    def _choose(self) -> tuple[Place, ReadyModel]:
        decision, ready, errors = self._models.choose(self._reference, self._tried, self._version)
        told = [{"name": name, "cause": error.cause} for name, error in self._tried.items()]
        self._record({**decision.as_dict(), **({"tried": told} if told else {})})
        metrics.placed(decision.chosen or "none")
        if not decision.chosen:
            raise _no_place(decision, ready, self._tried, errors)
        return self._models.place(decision.chosen), ready[decision.chosen]


Servable = ReadyModel | PlacedModel
"""What a job is done with."""


def _no_place(
    decision: Decision, ready: Mapping[str, ReadyModel], tried: Mapping[str, NodeError], errors: Mapping[str, NodeError]
) -> NodeError:
    """What the job ends with when no place takes it.

    An answer to this very series that cannot be used counts as an attempt, so that one series
    cannot be tried for ever. What passes (away, too busy) is waited for without limit.
    """
    for error in tried.values():
        if isinstance(error, EngineError):
            return error
    if not ready and errors and not any(isinstance(e, PeerAway) for e in errors.values()):
        return next(iter(errors.values()))
    return PeerAway("place job", f"no place can take it: {decision.refusal}", "It waits and is tried again")


def _absent(name: str, cause: str) -> Candidate:
    return Candidate(name, 0.0, 0.0, 1.0, 1.0, unavailable=cause)


def placed_models(settings: Settings, db: Database, local: ServingModels | None) -> PlacedModels:
    """The places of the configuration: ``local`` where it is given, then the endpoints."""
    inference = settings.inference
    places: list[Place] = [Local(local, inference.local_cost)] if local is not None else []
    for endpoint in inference.places:
        engine = KServe(endpoint)
        places.append(Remote(engine, serving_at(engine, settings, db)))
    return PlacedModels(settings, db, places)


def serving_at(engine: KServe, settings: Settings, db: Database) -> ServingModels:
    """The models of an endpoint, which may be away when this is called."""
    inference = settings.inference
    return ServingModels(
        db,
        EngineChoice(engine.name, [_Unprobed(engine)], threads=inference.threads, limits=limits_of(settings)),
        models_dir=inference.models_dir,
        data_dir=settings.node.data_dir,
        threads=inference.threads,
    )


class _Unprobed:
    """An endpoint that is away now may be back for the next job: it is asked when a model is loaded."""

    def __init__(self, engine: KServe) -> None:
        self._engine = engine
        self.name = engine.name

    @property
    def version(self) -> str:
        return self._engine.version

    def probe(self) -> Ok:
        return Ok()

    def for_model(self, name: str, version: str) -> Engine:
        return self._engine.for_model(name, version)

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        return self._engine.load(onnx, threads=threads)


def verify_at_endpoints(endpoints: Sequence[Endpoint], path: Path) -> str:
    """Digests and golden cases of a bundle through the endpoints; returns the first that passes, one is enough.

    Raises BundleError, and the first endpoint's error (EngineError, PeerAway, or OperatorError for
    its files) when none passes.
    """
    first: NodeError | None = None
    for endpoint in endpoints:
        engine = KServe(endpoint)
        try:
            ready = open_model(path, engine)
            ready.close()
        except BundleError:
            raise
        except NodeError as error:
            first = first or error
        else:
            return ready.report.engine
        finally:
            engine.close()
    raise first or EngineError(
        "verify bundle", "ENDPOINT_REFUSED", "no endpoint is configured", "See inference.endpoints"
    )
