"""Engine ``kserve``: models that run on a KServe v2 / Triton server, over HTTP or gRPC.

Nothing but tensors, their names and shapes, and the model's name and version is sent: no
UID, no request id, nothing of the patient's in a header. The tensors themselves are images.

The bundle stays the truth: the server's model must have the inputs and outputs of the
bundle's ONNX file, and serves only after the golden cases of the bundle have passed through
the endpoint (``golden.open_model``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from dicomnode import metrics
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import EngineError, NodeError, PeerAway
from dicomnode.infer import endpoint_load
from dicomnode.infer.engine import Array, Engine, Ok, Rejected, Session
from dicomnode.infer.kserve_http import HttpTransport
from dicomnode.infer.kserve_tensors import (
    Signature,
    checked_outputs,
    input_problem,
    misfit,
    onnx_signature,
    reply_bytes,
)
from dicomnode.infer.kserve_transport import Transport, Unusable, away, mismatch, shown

PROBE_SECONDS = 5.0
METRICS_SECONDS = 1.0
METRICS_BYTES = 4 << 20
METRICS_AGE_SECONDS = 2.0

Clock = Callable[[], float]


def open_transport(endpoint: Endpoint) -> Transport:
    """HTTP or gRPC by the scheme of its url. Raises EngineError (LIB_MISSING) without grpcio."""
    if endpoint.scheme.startswith("grpc"):
        from dicomnode.infer.kserve_grpc import GrpcTransport

        return GrpcTransport(endpoint)
    return HttpTransport(endpoint)


class KServe:
    """One endpoint as an engine. Its sessions share one connection: use it from one thread."""

    name = "kserve"

    def __init__(self, endpoint: Endpoint, *, clock: Clock = time.monotonic) -> None:
        self.endpoint = endpoint
        self._clock = clock
        self._transport: Transport | None = None
        self._scraper: HttpTransport | None = None
        self._scraped: tuple[float, str] = (float("-inf"), "")
        self._server = ""
        self._load = endpoint_load.LatencyLoad()

    @property
    def version(self) -> str:
        """The server's name and version, as it told them at the last probe."""
        return self._server

    def probe(self) -> Ok | Rejected:
        """Whether the server is ready; asks it, within PROBE_SECONDS."""
        try:
            self._server = self.transport.ready(PROBE_SECONDS)
        except EngineError as error:
            text = error.cause.removeprefix(f"{error.code}: ")
            return Rejected(self.name, "LIB_MISSING" if error.code == "LIB_MISSING" else "ENDPOINT_REFUSED", text)
        except NodeError as error:
            return Rejected(self.name, "ENDPOINT_AWAY", error.cause)
        return Ok()

    def for_model(self, name: str, version: str) -> Engine:
        """This engine for one bundle: the server has to be told which model is meant."""
        return _ForModel(self, name, version)

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        """Not possible without the bundle's name: use ``for_model(...).load(...)``."""
        del onnx, threads
        raise EngineError("load model", "BUILD_FAILED", "an endpoint is asked for a model by name, not by its bytes")

    def load_of(self, name: str) -> float:
        """How busy the endpoint is, 0 to 1; ``name`` is the model's on the server. Never raises.

        May ask the metrics address, for METRICS_SECONDS at most.
        """
        found = self._load.value(self._clock())
        if self.endpoint.metrics_url:
            try:
                told = endpoint_load.triton_load(self._metrics(), name)
            except (NodeError, ValueError):
                told = None  # then latency alone tells
            found = max(found, told or 0.0)
        return found

    def _metrics(self) -> str:
        now = self._clock()
        if now - self._scraped[0] > METRICS_AGE_SECONDS:
            if self._scraper is None:
                self._scraper = HttpTransport(self.endpoint)
            text = self._scraper.metrics(self.endpoint.metrics_url, METRICS_BYTES, METRICS_SECONDS)
            self._scraped = (now, text)
        return self._scraped[1]

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            self._transport = open_transport(self.endpoint)
        return self._transport

    def timed(self, key: object, call: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """Run one inference, count it, and learn from its time how busy the endpoint is."""
        begin = self._clock()
        outcome: metrics.EndpointOutcome = "error"
        try:
            outputs = call()
            outcome = "ok"
        except PeerAway:
            outcome = "away"
            raise
        else:
            return outputs
        finally:
            now = self._clock()
            metrics.endpoint(self.endpoint.name, outcome, now - begin)
            if outcome == "ok":
                self._load.record(key, now - begin, now)

    def close(self) -> None:
        for transport in (self._transport, self._scraper):
            if transport is not None:
                transport.close()
        self._transport = self._scraper = None


class _ForModel:
    """See ``KServe.for_model``."""

    def __init__(self, engine: KServe, bundle: str, bundle_version: str) -> None:
        self._engine = engine
        self._bundle = f"{bundle} {bundle_version}"
        self._remote = engine.endpoint.remote(bundle, bundle_version)
        self.name = engine.name

    @property
    def version(self) -> str:
        return self._engine.version

    def probe(self) -> Ok | Rejected:
        return self._engine.probe()

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        """Asks the server for the model and compares it with the bundle's; nothing is uploaded.

        Raises PeerAway when the server is away or still loads the model, EngineError
        (MODEL_MISMATCH) when its model has other inputs or outputs.
        """
        del threads
        operation = f"load {self._bundle}"
        engine, (name, version) = self._engine, self._remote
        where = engine.endpoint.name
        try:
            signature = onnx_signature(onnx)
        except ValueError as error:
            raise EngineError(operation, "BUILD_FAILED", str(error)) from None
        answer = engine.probe()
        if isinstance(answer, Rejected):
            if answer.code == "ENDPOINT_AWAY":
                raise PeerAway(operation, answer.text, "Is it up, and may this node reach it?")
            raise Unusable(operation, answer.code, answer.text)
        there = engine.transport.metadata(name, version, PROBE_SECONDS)
        problem = misfit(signature, there)
        if problem:
            raise mismatch(operation, where, f"its model {name} is another one: {problem}")
        if not engine.transport.model_ready(name, version, PROBE_SECONDS):
            raise away(operation, where, f"has the model {name}, which is not ready yet")
        return _KServeSession(engine, name, version, signature)


class _KServeSession:
    def __init__(self, engine: KServe, name: str, version: str, signature: Signature) -> None:
        self._owner = engine
        self._name, self._version = name, version
        self._signature = signature
        self._open = True
        server = f" ({engine.version})" if engine.version else ""
        self._engine = f"{engine.name} {engine.endpoint.name}{server}"

    @property
    def engine(self) -> str:
        return self._engine

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See ``Session``. Raises PeerAway when the endpoint is away, EngineError for a wrong answer."""
        if not self._open:
            raise EngineError("run model", "BUILD_FAILED", "the session is closed")
        problem = input_problem(self._signature, inputs)
        if problem:
            raise EngineError("run model", "BUILD_FAILED", problem)
        key = (self._name, sum(array.nbytes for array in inputs.values()))
        return self._owner.timed(key, lambda: self._infer(inputs))

    def _infer(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        where = self._owner.endpoint.name
        names = [spec.name for spec in self._signature.outputs]
        limit = reply_bytes(self._signature, inputs)
        reply = self._owner.transport.infer(self._name, self._version, inputs, names, limit=limit)
        if reply.model not in ("", self._name):
            raise mismatch("run model", where, f"it answered for the model {shown(reply.model)}")
        if self._version and reply.version not in ("", self._version):
            raise mismatch("run model", where, f"it answered for version {shown(reply.version)}")
        outputs, problem = checked_outputs(self._signature, inputs, reply.outputs)
        if problem:
            raise mismatch("run model", where, problem)
        return outputs

    def close(self) -> None:
        self._open = False
