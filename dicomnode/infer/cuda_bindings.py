"""CUDA through NVIDIA's cuda-bindings. Importing this module needs them; making the object a driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda import bindings
from cuda.bindings import driver

from dicomnode.infer.cuda import Bytes, CudaError, Device, driver_text

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: no implicit order with the default stream."""


class CudaBindings:
    """See :class:`dicomnode.infer.cuda.Cuda`. Handles are kept as integers and wrapped at each call."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            self._call("initialise CUDA", driver.cuInit, 0)
        except RuntimeError as cause:  # the bindings raise it when they find no libcuda
            raise CudaError("initialise CUDA", 0, str(cause)) from cause
        self._device = self._call("open device", driver.cuDeviceGet, ordinal)
        self._context = self._call("retain primary context", driver.cuDevicePrimaryCtxRetain, self._device)

    @property
    def name(self) -> str:
        return f"cuda-bindings {bindings.__version__}"

    def device(self) -> Device:
        def attribute(which: str) -> int:
            kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{which}")
            return int(self._call("look at device", driver.cuDeviceGetAttribute, kind, self._device))

        name: bytes = self._call("look at device", driver.cuDeviceGetName, 256, self._device)
        return Device(
            name=name.split(b"\0")[0].decode("ascii", "replace"),
            capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
            memory=int(self._call("look at device", driver.cuDeviceTotalMem, self._device)),
            driver=driver_text(int(self._call("look at driver", driver.cuDriverGetVersion))),
        )

    @contextmanager
    def current(self) -> Iterator[None]:
        self._call("push context", driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            driver.cuCtxPopCurrent()

    def memory(self) -> tuple[int, int]:
        free, total = self._call("look at device memory", driver.cuMemGetInfo)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return int(self._call("allocate device memory", driver.cuMemAlloc, max(1, size)))

    def release(self, address: int) -> None:
        self._call("free device memory", driver.cuMemFree, driver.CUdeviceptr(address))

    def pinned(self, size: int) -> Bytes:
        address = int(self._call("allocate pinned memory", driver.cuMemHostAlloc, max(1, size), 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(address))

    def release_pinned(self, array: Bytes) -> None:
        self._call("free pinned memory", driver.cuMemFreeHost, array.ctypes.data)

    def stream(self) -> int:
        return int(self._call("make stream", driver.cuStreamCreate, _NON_BLOCKING))

    def release_stream(self, stream: int) -> None:
        self._call("free stream", driver.cuStreamDestroy, driver.CUstream(stream))

    def event(self) -> int:
        return int(self._call("make event", driver.cuEventCreate, 0))

    def release_event(self, event: int) -> None:
        self._call("free event", driver.cuEventDestroy, driver.CUevent(event))

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        target, size = driver.CUdeviceptr(address), source.nbytes
        self._call(
            "copy to device", driver.cuMemcpyHtoDAsync, target, source.ctypes.data, size, driver.CUstream(stream)
        )

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        source, size = driver.CUdeviceptr(address), target.nbytes
        self._call(
            "copy from device", driver.cuMemcpyDtoHAsync, target.ctypes.data, source, size, driver.CUstream(stream)
        )

    def record(self, event: int, stream: int) -> None:
        self._call("record event", driver.cuEventRecord, driver.CUevent(event), driver.CUstream(stream))

    def wait(self, stream: int, event: int) -> None:
        self._call("wait for event", driver.cuStreamWaitEvent, driver.CUstream(stream), driver.CUevent(event), 0)

    def synchronise(self, stream: int) -> None:
        self._call("synchronise stream", driver.cuStreamSynchronize, driver.CUstream(stream))

    def elapsed(self, start: int, end: int) -> float:
        first, last = driver.CUevent(start), driver.CUevent(end)
        return float(self._call("time events", driver.cuEventElapsedTime, first, last)) / 1000.0

    def begin_capture(self, stream: int) -> None:
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("capture stream", driver.cuStreamBeginCapture, driver.CUstream(stream), mode)

    def end_capture(self, stream: int) -> int:
        graph = self._call("end capture", driver.cuStreamEndCapture, driver.CUstream(stream))
        try:
            return int(self._call("make graph", driver.cuGraphInstantiate, graph, 0))
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("launch graph", driver.cuGraphLaunch, driver.CUgraphExec(graph), driver.CUstream(stream))

    def release_graph(self, graph: int) -> None:
        self._call("free graph", driver.cuGraphExecDestroy, driver.CUgraphExec(graph))

    @staticmethod
    def _call(operation: str, function: Any, *arguments: Any) -> Any:
        """Results without the leading CUresult: one value, a tuple of several, or None."""
        status, *values = function(*arguments)
        if int(status):
            raise CudaError(operation, int(status), status.name)
        return values[0] if len(values) == 1 else tuple(values) or None
