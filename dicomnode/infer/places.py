"""The places that can take a job: this box's engine, and KServe endpoints, each with its own verified models."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from dicomnode import logs
from dicomnode.errors import EngineError, NodeError, PeerAway
from dicomnode.index.database import Database
from dicomnode.index.states import backoff_seconds
from dicomnode.infer.choice import EngineChoice, limits_of
from dicomnode.infer.engine import Engine, Ok, Session
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.kserve import KServe
from dicomnode.infer.local_load import LoadOfOthers
from dicomnode.infer.placement import LOCALITY, Candidate, resource_fit
from dicomnode.infer.serving import ServingModels
from dicomnode.settings import Settings

LOCAL = "local"
REST_SECONDS = 15.0
LONGEST_REST = 300.0
"""An endpoint that failed is left alone for so long, twice as long each time that it fails again.

To ask it takes a time-out of the job that asks, or of the next one.
"""

LOCAL_WORKING_BYTES = 1 << 30
"""Free memory that this box should have for a slab and the network's activations: below it, it fits less."""

ACCELERATED = ("tensorrt", "onnxruntime-gpu")


class _Serves:
    """What every place does with the models that it keeps."""

    _serving: ServingModels

    def hold(self, model: ReadyModel) -> None:
        """As ``ServingModels.hold``."""
        self._serving.hold(model)

    def let_go(self, model: ReadyModel) -> None:
        self._serving.let_go(model)

    def keep(self, references: Sequence[str]) -> None:
        """As ``ServingModels.keep``."""
        self._serving.keep(references)

    def settled(self, model: ReadyModel) -> bool:
        """As ``ServingModels.settled``."""
        return self._serving.settled(model)


class Local(_Serves):
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

    def did(self, reference: str) -> None:
        """As :meth:`failed`."""

    def prepare(self, references: Sequence[str]) -> None:
        self._serving.prepare(references)

    def report(self) -> dict[str, Any]:
        return self._serving.report()


class Remote(_Serves):
    """A KServe endpoint with the models that have passed their golden cases through it."""

    def __init__(self, engine: KServe, serving: ServingModels, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.name = engine.endpoint.name
        self._serving = serving
        self._clock = clock
        self._rest_until = float("-inf")
        self._refused: dict[str, tuple[float, EngineError]] = {}
        self._failures: Counter[str] = Counter()
        """In a row, by the model that it refused; of the endpoint as a whole under the empty name."""
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
        self._doubt(self.engine.endpoint.verify_seconds)
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

    def _doubt(self, seconds: float) -> None:
        """After this long the golden cases run again: another may have changed the server's model meanwhile."""
        if self._clock() - self._verified_at > seconds:
            self._serving.forget()
            self._verified_at = self._clock()

    def did(self, reference: str) -> None:
        """It has done a job: what was is forgotten."""
        for name in (reference, ""):
            del self._failures[name]

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
        failing = reference if isinstance(error, EngineError) else ""
        self._failures[failing] += 1
        until = self._clock() + backoff_seconds(self._failures[failing], REST_SECONDS, LONGEST_REST)
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
        self._doubt(self.engine.endpoint.verify_seconds / 2)  # now, between jobs, rather than in the path of one
        self._serving.prepare(())  # closes what is retired
        for reference in references:
            try:
                self.get(reference)
            except NodeError:
                continue  # it is told by the report, and logged once

    def keep(self, references: Sequence[str]) -> None:
        """As ``ServingModels.keep``."""
        super().keep(references)
        for reference in [r for r in self._refused if r not in references]:
            del self._refused[reference]

    def report(self) -> dict[str, Any]:
        return {**self._serving.report(), "fault": self._fault}


Place = Local | Remote


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
