"""How a job gets through the places (:mod:`dicomnode.infer.places`) that can take it.

A job goes to the best place by ``placement``; when that one fails in the
middle, the analysis starts again at the next best: a result is of one engine. When none is left the job waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicomnode import logs, metrics
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import BundleError, EngineError, NodeError, PeerAway
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.operation import Models
from dicomnode.infer.choice import NotBuilt
from dicomnode.infer.decode import Decoder
from dicomnode.infer.engine import Session
from dicomnode.infer.faults import Fault, fault_of
from dicomnode.infer.golden import ReadyModel, model_file, open_model
from dicomnode.infer.kserve import KServe
from dicomnode.infer.pipeline import NO_SERIES, Progress
from dicomnode.infer.placement import Candidate, Decision, Weights, decide
from dicomnode.infer.places import Local, Place, Remote, serving_at
from dicomnode.infer.serving import ServingModels, bundle_folders, resolve
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.infer.volume import ReadSlice
from dicomnode.records import Analysis, ModelIdentity, SourceInstance
from dicomnode.settings import Settings

Record = Callable[[Mapping[str, Any]], None]


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

    def settled(self, model: ReadyModel | PlacedModel) -> bool:
        """As ``ServingModels.settled``, at the place that was chosen."""
        return not isinstance(model, PlacedModel) or model.settled

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
    def ready(self) -> ReadyModel:
        """The model at the place that was chosen last."""
        return self._ready

    @property
    def session(self) -> Session:
        """Of the place that was chosen last."""
        return self._ready.session

    def did(self) -> None:
        """The place has done a job that was not :meth:`analyse` d here."""
        self._place.did(self._reference)

    def leave(self, error: PeerAway | EngineError) -> None:
        """The place has failed this job: it rests, and the job goes to the next best. Raises as the first choice."""
        self._place.failed(self._reference, error)
        self._tried[self._place.name] = error
        self._place, self._ready = self._choose()
        self._hold_this()

    @property
    def settled(self) -> bool:
        return self._place.settled(self._ready)

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
                found = self._ready.analyse(instances, decoder=decoder, progress=progress, ahead=ahead, more=more)
            except (PeerAway, EngineError) as error:
                if isinstance(error, EngineError):
                    if isinstance(self._place, Local) and fault_of(error.code) is Fault.lost:
                        raise
                    if self._has_next_engine():
                        continue
                self.leave(error)
            else:
                self._place.did(self._reference)
                return found

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
        return next((e for e in errors.values() if isinstance(e, NotBuilt)), None) or next(iter(errors.values()))
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
