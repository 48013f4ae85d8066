"""A TensorRT plan at work: two slots, so that copies of one batch overlap with computing another.

A slot has everything that a batch in flight needs for itself: pinned host buffers, device
buffers, a stream, an execution context with its optimisation profile, and a CUDA graph of
the shape that it ran last. A slot is used again only after its stream was synchronised, so
no buffer changes while the device may still read or write it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode import metrics
from dicomnode.errors import EngineError
from dicomnode.infer.cuda import Bytes, Cuda, CudaError
from dicomnode.infer.engine import Array
from dicomnode.infer.faults import classify
from dicomnode.infer.plans import InputRange, Shape
from dicomnode.infer.trt_build import SLOTS, Precision, Toolkit, make_logger

Arrays = Mapping[str, Array]
STAGES: tuple[tuple[metrics.InferenceStage, int, int], ...] = (("h2d", 0, 1), ("compute", 1, 2), ("d2h", 2, 3))
"""Stages of a batch between the events that a slot records."""


def device_error(operation: str, error: CudaError) -> EngineError:
    """The EngineError of a failed CUDA call, with the code that the table of faults.py knows."""
    return EngineError(operation, classify(str(error), error.code).value, str(error))


@dataclass(slots=True)
class _Buffer:
    """Pinned host memory with its twin on the device; both ``size`` bytes."""

    host: Bytes
    device: int
    size: int


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch between its start and the end of its copy back; ``landed`` holds what came early, ``failed`` why
    nothing will come: its slot may have another stream's batch by then."""

    slot: _Slot
    landed: Arrays | None = None
    failed: Exception | None = None


class MemoryBudget:
    """Device memory that the sessions of one engine may take together, bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        return self._limit - self._taken

    def take(self, size: int) -> None:
        """Raises EngineError OOM when it would be exceeded."""
        with self._lock:
            if self._taken + size > self._limit:
                raise EngineError(
                    "use GPU memory",
                    "OOM",
                    f"{size >> 20} MiB more would exceed the share of this node",
                    "Raise inference.gpu_memory_share, or lower inference.max_batch",
                )
            self._taken += size

    def give(self, size: int) -> None:
        with self._lock:
            self._taken -= size


class TrtSession:
    """One loaded plan. Used by one thread at a time; which one does not matter.

    ``budget`` is shared with other sessions: a second slot is left out, and batches are refused
    with OOM, where it would be exceeded. What the session took of it is given back by ``close``.
    """

    def __init__(
        self,
        tools: Toolkit,
        plan: bytes,
        *,
        version: str,
        precision: Precision,
        ranges: tuple[InputRange, ...],
        budget: MemoryBudget,
    ) -> None:
        self._trt, self._cuda = tools.trt, tools.cuda
        self._log = make_logger(tools.trt)
        self._ranges = {r.name: r for r in ranges}
        self._version, self._precision = version, precision
        self._budget, self._fixed = budget, 0
        self._slots: list[_Slot] = []
        self._flights: list[_Flight] = []
        self._lock = threading.Lock()
        try:
            with self._cuda.current():
                self._open(plan)
                metrics.gpu_memory(*self._cuda.memory())
        except CudaError as cause:
            self.close()
            raise device_error("load model", cause) from cause
        except EngineError:
            self.close()
            raise

    def _open(self, plan: bytes) -> None:
        self._runtime = self._trt.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("load model", "PLAN_REFUSED", f"TensorRT refuses the plan: {self._log.words()}")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self._engine.get_tensor_mode(n) == mode]
        self.outputs = [n for n in names if n not in self.inputs]
        self.dtypes: dict[str, npt.DTypeLike] = {n: self._trt.nptype(self._engine.get_tensor_dtype(n)) for n in names}
        scratch = int(getattr(self._engine, "device_memory_size_v2", 0) or self._engine.device_memory_size)
        self._keep(len(plan) + scratch)  # weights and activations of the first context
        for index in range(SLOTS):
            if index and scratch > self._budget.left:
                break  # one slot serves; only copies do not overlap then
            if index:
                self._keep(scratch)
            self._slots.append(_Slot(self, self._cuda, index))

    def _keep(self, size: int) -> None:
        """Take of the budget until the session is closed."""
        self._budget.take(size)
        self._fixed += size

    @property
    def engine(self) -> str:
        return f"tensorrt {self._version} {self._precision}"

    @property
    def precision(self) -> str:
        return self._precision

    def run(self, inputs: Arrays) -> Arrays:
        (outputs,) = self.stream([inputs])
        return outputs

    def stream(self, batches: Iterable[Arrays]) -> Iterator[Arrays]:
        """Outputs of each batch in order; while one is computed the next is copied in.

        What goes wrong with a batch is raised in its turn, behind the outputs of those before it; none is
        begun after it. Raises EngineError.
        """
        if not self._slots:
            raise EngineError("run model", "RUN_FAILED", "the session is closed")
        mine = deque[_Flight]()
        try:
            for batch in batches:
                ready = self._land(mine.popleft()) if len(mine) == len(self._slots) else None
                mine.append(self._start(batch))
                if ready is not None:
                    yield ready
                if mine[-1].failed is not None:
                    break
            while mine:
                yield self._land(mine.popleft())
        finally:
            for flight in mine:  # the caller gave up
                self._abandon(flight)

    def _start(self, batch: Arrays) -> _Flight:
        """A batch in a free slot. Where another stream has them all, its oldest batch is landed first.

        That happens when a more urgent job is done between two batches of another one: the streams
        are nested then, on the same thread. What goes wrong with either batch stays with its flight:
        the urgent job is not to blame for the other's, nor the other for the urgent one's.
        """
        if len(self._flights) == len(self._slots):
            oldest = self._flights[0]
            with contextlib.suppress(Exception):  # the flight keeps it, and its own stream raises it
                oldest.landed = self._land(oldest)
        taken = [flight.slot for flight in self._flights]
        flight = _Flight(next(slot for slot in self._slots if slot not in taken))
        self._flights.append(flight)
        try:
            self._guard(flight.slot.begin, batch)
        except Exception as error:  # noqa: BLE001 _land raises it
            flight.failed = error
            self._abandon(flight)
        return flight

    def _land(self, flight: _Flight) -> Arrays:
        if flight.failed is not None:
            raise flight.failed
        if flight.landed is not None:
            return flight.landed
        try:
            found: Arrays = self._guard(flight.slot.finish)
        except Exception as error:
            flight.failed = error
            self._abandon(flight)
            raise
        self._flights.remove(flight)
        return found

    def _abandon(self, flight: _Flight) -> None:
        """Free its slot, once the device neither reads nor writes its buffers any more."""
        if flight in self._flights:
            self._flights.remove(flight)
            with contextlib.suppress(CudaError), self._cuda.current():
                self._cuda.synchronise(flight.slot.stream)

    def _guard(self, step: Any, *arguments: Any) -> Any:
        """One step with the device's context current in this thread; never across a yield."""
        with self._lock:
            try:
                with self._cuda.current():
                    return step(*arguments)
            except CudaError as cause:
                raise device_error("run model", cause) from cause

    def range_of(self, name: str) -> InputRange:
        return self._ranges[name]

    def close(self) -> None:
        """Release device memory; a device that is lost has none to release."""
        slots, self._slots = self._slots, []
        fixed, self._fixed = self._fixed, 0
        self._flights.clear()
        self._budget.give(fixed + sum(slot.held for slot in slots))
        with contextlib.suppress(CudaError), self._cuda.current():
            for slot in slots:
                slot.close()
            self._engine = self._runtime = None
            metrics.gpu_memory(*self._cuda.memory())


class _Slot:
    def __init__(self, session: TrtSession, cuda: Cuda, profile: int) -> None:
        self._session, self._cuda = session, cuda
        self._buffers: dict[str, _Buffer] = {}
        self._shapes: dict[str, Shape] = {}
        self._graph = 0
        self._runs = 0  # with the present shapes
        self._capturable = True
        self._begun = 0.0
        self.stream = cuda.stream()
        self._marks = [cuda.event() for _ in range(4)]
        self._context = session._engine.create_execution_context()
        if self._context is None:
            raise EngineError("load model", "OOM", f"no execution context: {session._log.words()}")
        if not self._context.set_optimization_profile_async(profile, self.stream):
            raise EngineError("load model", "BUILD_FAILED", f"the plan has no profile {profile}")
        cuda.synchronise(self.stream)

    def begin(self, inputs: Arrays) -> None:
        """Start a batch: copy in, compute, copy out, all on this slot's stream."""
        session, cuda = self._session, self._cuda
        self._shape(inputs)
        for name in session.inputs:
            host = self._view(name, self._shapes[name])
            np.copyto(host, inputs[name], casting="no")
        self._begun = perf_counter()
        cuda.record(self._marks[0], self.stream)
        for name in session.inputs:
            cuda.copy_in(self._buffers[name].device, self._bytes(name), self.stream)
        cuda.record(self._marks[1], self.stream)
        self._compute()
        cuda.record(self._marks[2], self.stream)
        for name in session.outputs:
            cuda.copy_out(self._bytes(name), self._buffers[name].device, self.stream)
        cuda.record(self._marks[3], self.stream)

    def finish(self) -> Arrays:
        """Wait for the batch; its outputs as arrays of the caller's."""
        session, cuda = self._session, self._cuda
        cuda.synchronise(self.stream)
        waited = perf_counter() - self._begun  # what is left of it, the batch waited for the other slot or for us
        for stage, first, last in STAGES:
            seconds = cuda.elapsed(self._marks[first], self._marks[last])
            metrics.inference("tensorrt", session.precision, stage, seconds)
            waited -= seconds
        metrics.inference("tensorrt", session.precision, "queue", waited)
        return {name: self._view(name, self._shapes[name]).copy() for name in session.outputs}

    def _compute(self) -> None:
        """Launch the graph of this shape; the first run of a shape is direct, the second captures."""
        self._runs += 1
        if not self._graph and self._runs > 1 and self._capturable:
            self._capture()
        if self._graph:
            self._cuda.launch(self._graph, self.stream)
        elif not self._context.execute_async_v3(self.stream):
            words = self._session._log.words()
            raise EngineError("run model", classify(words).value, f"TensorRT did not start: {words}")

    def _capture(self) -> None:
        """Some layers cannot be captured (they synchronise): such a plan runs without a graph."""
        self._cuda.begin_capture(self.stream)
        started = False
        try:
            started = bool(self._context.execute_async_v3(self.stream))
        finally:
            try:
                graph = self._cuda.end_capture(self.stream)
            except CudaError as error:
                if classify(str(error), error.code).value == "DEVICE_LOST":
                    raise
                graph = 0
        if started and graph:
            self._graph = graph
            return
        self._capturable = False
        if graph:
            self._cuda.release_graph(graph)

    def _shape(self, inputs: Arrays) -> None:
        """Adopt the shapes of ``inputs``; what depends on other shapes or addresses is dropped."""
        session = self._session
        missing = [n for n in session.inputs if n not in inputs]
        if missing or len(inputs) != len(session.inputs):
            raise EngineError("run model", "RUN_FAILED", f"the model's inputs are {', '.join(session.inputs)}")
        for name in session.inputs:
            array, wanted = inputs[name], np.dtype(session.dtypes[name])
            if array.dtype != wanted:
                raise EngineError("run model", "RUN_FAILED", f"input {name} is {array.dtype}, the model takes {wanted}")
            if not session.range_of(name).holds(array.shape):
                r = session.range_of(name)
                raise EngineError("run model", "SHAPE", f"{array.shape} is outside {r.least}..{r.most} of input {name}")
        shapes = {name: tuple(inputs[name].shape) for name in session.inputs}
        if all(self._shapes.get(name) == shape for name, shape in shapes.items()):
            return
        self._drop_graph()
        self._shapes, self._runs = {}, 0
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError("run model", "SHAPE", f"TensorRT refuses {shape} for input {name}")
            self._address(name, shape)
        for name in session.outputs:
            shape = tuple(int(d) for d in self._context.get_tensor_shape(name))
            if any(d < 0 for d in shape):
                raise EngineError("run model", "SHAPE", f"the shape of output {name} depends on data")
            shapes[name] = shape
            self._address(name, shape)
        self._shapes = shapes

    def _address(self, name: str, shape: Shape) -> None:
        """Have buffers of the right size behind ``name``; they only grow."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(self._session.dtypes[name]).itemsize
        known = self._buffers.get(name)
        if known is None or known.size < size:
            if known is not None:
                del self._buffers[name]
                self._session._budget.give(known.size)
                self._free(known)
            self._session._budget.take(size)
            try:
                self._buffers[name] = self._buffer(size)
            except CudaError:  # it was not had: the next, smaller batch must find the budget as it was
                self._session._budget.give(size)
                raise
        if not self._context.set_tensor_address(name, self._buffers[name].device):
            raise EngineError("run model", "RUN_FAILED", f"TensorRT refuses the address of {name}")

    def _buffer(self, size: int) -> _Buffer:
        device = self._cuda.allocate(size)
        try:
            return _Buffer(self._cuda.pinned(size), device, size)
        except CudaError:
            self._cuda.release(device)
            raise

    def _bytes(self, name: str) -> Bytes:
        return self._view(name, self._shapes[name]).reshape(-1).view(np.uint8)

    def _view(self, name: str, shape: Shape) -> Array:
        dtype = np.dtype(self._session.dtypes[name])
        count = int(np.prod(shape, dtype=np.int64))
        return self._buffers[name].host[: count * dtype.itemsize].view(dtype).reshape(shape)

    def _drop_graph(self) -> None:
        if self._graph:
            self._cuda.release_graph(self._graph)
            self._graph = 0

    def _free(self, buffer: _Buffer) -> None:
        self._cuda.release(buffer.device)
        self._cuda.release_pinned(buffer.host)

    @property
    def held(self) -> int:
        """Device bytes of its buffers."""
        return sum(buffer.size for buffer in self._buffers.values())

    def close(self) -> None:
        self._cuda.synchronise(self.stream)
        self._drop_graph()
        self._context = None
        for buffer in self._buffers.values():
            self._free(buffer)
        self._buffers.clear()
        for mark in self._marks:
            self._cuda.release_event(mark)
        self._cuda.release_stream(self.stream)
