"""onnxruntime on the CPU. The library is imported on first use, in the worker only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from time import perf_counter
from typing import Any

import numpy as np

from dicomnode import metrics
from dicomnode.errors import EngineError
from dicomnode.infer.engine import Array, Ok, Rejected, Session
from dicomnode.infer.filling import Call, streamed
from dicomnode.infer.lanes import in_lanes

CPU_PROVIDER = "CPUExecutionProvider"
DTYPES = {
    **{f"tensor({name})": name for name in ("float16", "double", "uint8", "int8", "uint16", "int16", "int32", "int64")},
    "tensor(float)": "float32",
}
"""Of answers that are written straight where they belong."""
LANES = 2
"""Batches of one stream at a time, each in its own share of the threads: no batch waits for the slowest
thread of each layer, and what is not computed in several threads has the other batch beside it.

The session for them has weights of its own: 2 MB for ct-lung-unet, 0.2 MB for cxr-quality, 220 MB for 75 MB of
convolutions (resident, onnxruntime 1.32). Initializers that both sessions are given (``add_initializer``) save a
quarter of that for convolutions and nothing for matrix products: what is large are the packed forms, and the
container that shares those is not part of onnxruntime's Python API. Without packing each run takes longer.
"""


class OnnxRuntimeCpu:
    """Engine ``onnxruntime-cpu``: the reference that the other engines are measured against."""

    name = "onnxruntime-cpu"

    @property
    def version(self) -> str:
        try:
            return str(_library().__version__)
        except ImportError:
            return ""

    def probe(self) -> Ok | Rejected:
        try:
            available = _library().get_available_providers()
        except (ImportError, AttributeError) as cause:
            return Rejected(self.name, "LIB_MISSING", f"onnxruntime cannot be imported: {cause}")
        if CPU_PROVIDER not in available:
            return Rejected(self.name, "PROVIDER_MISSING", f"onnxruntime offers no {CPU_PROVIDER}")
        return Ok()

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        """Loading from bytes leaves external tensors without a folder to be resolved in."""
        try:
            library = _library()
        except ImportError as cause:
            raise EngineError(
                "load model", "LIB_MISSING", "onnxruntime is not installed", "Install dicomnode[cpu]"
            ) from cause
        count = threads or os.cpu_count() or 1
        lanes = LANES if count > 1 else 1
        return _OrtSession(
            _opened(library, onnx, threads),
            f"{self.name} {library.__version__}",
            lanes,
            lambda: _opened(library, onnx, max(1, count // lanes)),
        )


def _opened(library: Any, onnx: bytes, threads: int) -> Any:
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A thread without work would turn in circles for a while, on a core that another batch, the
    # decoder or the receiver has work for.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = library.InferenceSession(onnx, options, providers=[CPU_PROVIDER])
    except Exception as cause:
        raise EngineError("load model", "BUILD_FAILED", _first_line(cause)) from cause
    if session.get_providers() != [CPU_PROVIDER]:
        raise EngineError("load model", "PROVIDER_MISSING", f"runs on {session.get_providers()}")
    return session


class _OrtSession:
    """``another`` opens the same model with its share of the threads, for the batches of a stream."""

    def __init__(self, session: Any, engine: str, lanes: int, another: Callable[[], Any]) -> None:
        self._session = session
        self._engine = engine
        self._lanes = lanes
        self._another = another
        self._of_lanes: Any = None
        self._outputs = [output.name for output in session.get_outputs()]
        self._dtypes = {o.name: np.dtype(DTYPES[o.type]) for o in session.get_outputs() if o.type in DTYPES}

    @property
    def engine(self) -> str:
        return self._engine

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._run(self._session, inputs)

    def _run(self, session: Any, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if session is None:
            raise EngineError("run model", "BUILD_FAILED", "the session is closed")
        begin = perf_counter()
        try:
            values = session.run(self._outputs, dict(inputs))
        except Exception as cause:
            raise _failed(cause) from cause
        metrics.inference("onnxruntime-cpu", "fp32", "compute", perf_counter() - begin)
        return {name: np.asarray(value) for name, value in zip(self._outputs, values, strict=True)}

    def stream(self, batches: Iterable[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
        """See :func:`dicomnode.infer.batching.stream`; a single batch has all threads to itself."""
        source = iter(batches)
        head = list(islice(source, 2 if self._lanes > 1 else 0))
        if len(head) < 2:
            return map(self.run, chain(head, source))
        if self._of_lanes is None and self._session is not None:
            self._of_lanes = self._another()
        return in_lanes(partial(self._run, self._of_lanes), chain(head, source), self._lanes)

    def fill(self, todo: Sequence[Call]) -> Iterator[None]:
        """See :func:`dicomnode.infer.filling.fill`: each lane prepares its slab and checks its answer as well."""
        if not todo or not all(self._dtypes.get(name) for name in todo[0].answers.names):
            yield from streamed(self, todo)
            return
        lanes = self._lanes if len(todo) > 1 else 1
        if lanes > 1 and self._of_lanes is None and self._session is not None:
            self._of_lanes = self._another()
        session = self._of_lanes if lanes > 1 else self._session
        yield from in_lanes(partial(self._fill, session), todo, lanes)

    def _fill(self, session: Any, call: Call) -> None:
        if session is None:
            raise EngineError("run model", "BUILD_FAILED", "the session is closed")
        inputs = call.make()
        places = {name: call.place(name, self._dtypes[name]) for name in call.answers.names}
        begin = perf_counter()
        try:
            bound = session.io_binding()
            for name, array in inputs.items():
                bound.bind_cpu_input(name, array)
            for name, place in places.items():
                bound.bind_output(name, "cpu", 0, place.dtype.type, place.shape, place.ctypes.data)
            session.run_with_iobinding(bound)
        except Exception as cause:
            raise _failed(cause) from cause
        metrics.inference("onnxruntime-cpu", "fp32", "compute", perf_counter() - begin)
        call.read(inputs)
        for name, place in places.items():
            call.check(name, place)

    def close(self) -> None:
        self._session = self._of_lanes = None


def _failed(cause: Exception) -> EngineError:
    return EngineError("run model", "OOM" if "alloc" in str(cause).lower() else "BUILD_FAILED", _first_line(cause))


def _library() -> Any:
    import onnxruntime

    return onnxruntime


def _first_line(cause: BaseException) -> str:
    return (str(cause).splitlines() or [type(cause).__name__])[0][:300]
