"""CUDA through PyCUDA. Importing this module needs PyCUDA; making the object needs a driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pycuda
from pycuda import driver

from dicomnode.infer.cuda import Bytes, CudaError, Device, driver_text
from dicomnode.infer.cuda_graphs import Graphs


class PyCuda(Graphs):
    """See :class:`dicomnode.infer.cuda.Cuda`. No ``autoinit``: it makes a context of its own.

    PyCUDA's objects free what they hold when they are collected, in whichever thread that
    happens; so they are kept here until they are released by name.
    """

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__()
        self._held: dict[int, Any] = {}
        self._try("initialise CUDA", driver.init)
        self._device = self._try("open device", driver.Device, ordinal)
        self._context = self._try("retain primary context", self._device.retain_primary_context)

    @property
    def name(self) -> str:
        return f"pycuda {pycuda.VERSION_TEXT}"

    def device(self) -> Device:
        d = self._device
        major, minor = d.compute_capability()
        return Device(
            name=str(d.name()),
            capability=(int(major), int(minor)),
            multiprocessors=int(d.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)),
            memory=int(d.total_memory()),
            driver=driver_text(int(driver.get_driver_version())),
        )

    @contextmanager
    def current(self) -> Iterator[None]:
        self._try("push context", self._context.push)
        try:
            yield
        finally:
            driver.Context.pop()

    def memory(self) -> tuple[int, int]:
        free, total = self._try("look at device memory", driver.mem_get_info)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        held = self._try("allocate device memory", driver.mem_alloc, max(1, size))
        self._held[int(held)] = held
        return int(held)

    def release(self, address: int) -> None:
        self._try("free device memory", self._held.pop(address).free)

    def pinned(self, size: int) -> Bytes:
        array: Bytes = self._try("allocate pinned memory", driver.pagelocked_empty, max(1, size), np.uint8)
        return array

    def release_pinned(self, array: Bytes) -> None:
        self._try("free pinned memory", array.base.free)  # type: ignore[union-attr]

    def stream(self) -> int:
        held = self._try("make stream", driver.Stream)
        self._held[int(held.handle)] = held
        return int(held.handle)

    def release_stream(self, stream: int) -> None:
        self._held.pop(stream, None)

    def event(self) -> int:
        held = self._try("make event", driver.Event)
        self._held[int(held.handle)] = held
        return int(held.handle)

    def release_event(self, event: int) -> None:
        self._held.pop(event, None)

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        self._try("copy to device", driver.memcpy_htod_async, address, source, self._held[stream])

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        self._try("copy from device", driver.memcpy_dtoh_async, target, address, self._held[stream])

    def record(self, event: int, stream: int) -> None:
        self._try("record event", self._held[event].record, self._held[stream])

    def wait(self, stream: int, event: int) -> None:
        self._try("wait for event", self._held[stream].wait_for_event, self._held[event])

    def synchronise(self, stream: int) -> None:
        self._try("synchronise stream", self._held[stream].synchronize)

    def elapsed(self, start: int, end: int) -> float:
        return float(self._try("time events", self._held[end].time_since, self._held[start])) / 1000.0

    @staticmethod
    def _try(operation: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except driver.Error as cause:  # PyCUDA gives the driver's words, not its number
            raise CudaError(operation, 0, str(cause)) from cause
