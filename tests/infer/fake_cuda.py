"""A CUDA device in numpy. Work is done when its stream is synchronised, not before, as late as the real one may.

It asserts what real hardware would answer with wrong voxels: a host buffer that changes while a
copy is under way, memory that is freed or used by another stream while work on it is pending, a
call from a thread whose context is not current, use of the default stream.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from dicomnode.infer.cuda import CudaError, Device

T4 = Device("Tesla T4", (7, 5), 40, 16 << 30, "550.54 CUDA 12.4")


@dataclass
class Work:
    """One piece of work on a stream; ``addresses`` are those that it reads or writes."""

    run: Callable[[], None]
    addresses: frozenset[int] = frozenset()
    check: Callable[[], None] = lambda: None


@dataclass
class FakeCuda:
    found: Device = T4
    name: str = "fake-cuda 1"
    fail: dict[str, CudaError] = field(default_factory=dict)
    """Method -> what it raises from now on."""

    def __post_init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.hosts: dict[int, np.ndarray] = {}
        self.pending: dict[int, list[Work]] = {}
        self.captured: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, float | None] = {}
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._next, self._clock = 0x1000, 0.0
        self._freed: list[tuple[int, int]] = []
        self._thread = threading.local()

    def _enter(self, call: str) -> None:
        assert getattr(self._thread, "depth", 0) > 0, f"{call}: no context is current in this thread"
        self.calls[call] += 1
        if call in self.fail:
            raise self.fail[call]

    def _handle(self) -> int:
        self._next += 0x1000
        return self._next

    @property
    def balanced(self) -> bool:
        """Every context that this thread pushed was popped."""
        return getattr(self._thread, "depth", 0) == 0

    def device(self) -> Device:
        return self.found

    @contextmanager
    def current(self) -> Iterator[None]:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._thread.depth -= 1

    def memory(self) -> tuple[int, int]:
        self._enter("memory")
        return self.found.memory - sum(b.nbytes for b in self.blocks.values()), self.found.memory

    def allocate(self, size: int) -> int:
        self._enter("allocate")
        if size > self.memory()[0]:
            raise CudaError("allocate device memory", 2, "out of memory")
        fits = [entry for entry in self._freed if entry[1] >= size]  # as the driver does: the same address comes again
        if fits:
            self._freed.remove(fits[-1])
        address = fits[-1][0] if fits else self._handle() << 20
        self.blocks[address] = np.full(size, 0xCD, np.uint8)
        return address

    def release(self, address: int) -> None:
        self._enter("release")
        assert not self._in_flight(address), "device memory is freed while work on it is pending"
        self._freed.append((address, self.blocks.pop(address).nbytes))

    def _in_flight(self, address: int, but: int = 0) -> bool:
        return any(address in work.addresses for s, todo in self.pending.items() if s != but for work in todo)

    def pinned(self, size: int) -> np.ndarray:
        self._enter("pinned")
        array = np.zeros(max(1, size), np.uint8)
        self.hosts[array.ctypes.data] = array
        return array

    def release_pinned(self, array: np.ndarray) -> None:
        self._enter("release_pinned")
        del self.hosts[array.ctypes.data]

    def stream(self) -> int:
        self._enter("stream")
        stream = self._handle()
        self.pending[stream] = []
        return stream

    def release_stream(self, stream: int) -> None:
        self._enter("release_stream")
        assert not self.pending.pop(stream), "a stream is destroyed with work pending"

    def event(self) -> int:
        self._enter("event")
        event = self._handle()
        self.events[event] = None
        return event

    def release_event(self, event: int) -> None:
        self._enter("release_event")
        del self.events[event]

    def enqueue(self, stream: int, work: Work) -> None:
        assert stream in self.pending, "work on the default stream, or on one that is gone"
        for address in work.addresses:
            assert address in self.blocks, "work on memory that is not allocated"
            assert not self._in_flight(address, stream), "an address is used again before synchronisation"
        (self.captured[stream] if stream in self.captured else self.pending[stream]).append(work)

    def _pinned_view(self, array: np.ndarray) -> bool:
        first = array.ctypes.data
        return any(start <= first and first + array.nbytes <= start + h.nbytes for start, h in self.hosts.items())

    def copy_in(self, address: int, source: np.ndarray, stream: int) -> None:
        self._enter("copy_in")
        assert self._pinned_view(source), "asynchronous copy from memory that is not pinned"
        assert source.nbytes <= self.blocks[address].nbytes
        before = source.tobytes()

        def run() -> None:
            assert source.tobytes() == before, "a host buffer changed before its copy was done"
            self.blocks[address][: source.nbytes] = source

        self.enqueue(stream, Work(run, frozenset([address])))

    def copy_out(self, target: np.ndarray, address: int, stream: int) -> None:
        self._enter("copy_out")
        assert self._pinned_view(target), "asynchronous copy to memory that is not pinned"
        target[:] = 0xEE  # who reads before synchronising reads this

        def run() -> None:
            target[:] = self.blocks[address][: target.nbytes]

        self.enqueue(stream, Work(run, frozenset([address])))

    def record(self, event: int, stream: int) -> None:
        self._enter("record")
        self.events[event] = None

        def run() -> None:
            self._clock += 1e-3
            self.events[event] = self._clock

        self.enqueue(stream, Work(run))

    def wait(self, stream: int, event: int) -> None:
        self._enter("wait")

    def synchronise(self, stream: int) -> None:
        self._enter("synchronise")
        assert stream not in self.captured, "a stream is synchronised while it is captured"
        todo, self.pending[stream] = self.pending[stream], []
        for work in todo:
            work.run()

    def elapsed(self, start: int, end: int) -> float:
        self._enter("elapsed")
        first, last = self.events[start], self.events[end]
        assert first is not None and last is not None, "events are timed that have not happened"
        return last - first

    def begin_capture(self, stream: int) -> None:
        self._enter("begin_capture")
        assert stream not in self.captured
        self.captured[stream] = []

    def end_capture(self, stream: int) -> int:
        work = self.captured.pop(stream)
        self._enter("end_capture")
        graph = self._handle()
        self.graphs[graph] = work
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._enter("launch")
        for work in self.graphs[graph]:
            work.check()
            self.enqueue(stream, work)

    def release_graph(self, graph: int) -> None:
        self._enter("release_graph")
        del self.graphs[graph]
