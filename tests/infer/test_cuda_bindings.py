"""The two CUDA bindings against stand-ins of their libraries: calls, results, errors, contexts."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dicomnode.infer import cuda
from dicomnode.infer.cuda import CudaError
from dicomnode.infer.cuda_graphs import Graphs


class Status(int):
    name = "CUDA_ERROR_ILLEGAL_ADDRESS"


VALUES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGet": (0,),
    "cuDevicePrimaryCtxRetain": ("context",),
    "cuDeviceGetName": (b"Tesla T4\0\0",),
    "cuDeviceGetAttribute": (7,),
    "cuDeviceTotalMem": (16 << 30,),
    "cuDriverGetVersion": (12040,),
    "cuMemGetInfo": (1, 2),
    "cuMemAlloc": (4096,),
    "cuStreamCreate": (77,),
    "cuEventCreate": (88,),
    "cuEventElapsedTime": (2.5,),
    "cuStreamEndCapture": ("graph",),
    "cuGraphInstantiate": (99,),
}


class FakeDriver(ModuleType):
    """cuda.bindings.driver: every call answers (status, values...)."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.called: list[str] = []
        self.fail = ""
        for kind in ("CUdeviceptr", "CUstream", "CUevent", "CUgraphExec"):
            setattr(self, kind, int)
        names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
        self.CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{n}": n for n in names})
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        self.host = ctypes.create_string_buffer(64)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.called.append(name)
            if name == self.fail:
                return (Status(700),)
            if name == "cuMemHostAlloc":
                return (Status(0), ctypes.addressof(self.host))
            return (Status(0), *VALUES.get(name, ()))

        return call


def _forget() -> None:
    for name in ("cuda_bindings", "cuda_pycuda"):
        sys.modules.pop(f"dicomnode.infer.{name}", None)


@pytest.fixture(autouse=True)
def _fresh_modules() -> Iterator[None]:
    """They keep the library that they were imported with."""
    _forget()
    yield
    _forget()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.driver, bindings.__version__, package.bindings = made, "12.9.4", bindings
    for name, module in {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.driver": made}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    return made


def test_cuda_bindings_are_taken_where_pycuda_is_not(driver: FakeDriver) -> None:
    opened = cuda.open_cuda()
    assert opened.name == "cuda-bindings 12.9.4"
    device = opened.device()
    assert (device.name, device.capability, device.memory) == ("Tesla T4", (7, 7), 16 << 30)
    assert device.driver.endswith("CUDA 12.4")
    with opened.current():
        assert opened.memory() == (1, 2)
        address, stream, event = opened.allocate(10), opened.stream(), opened.event()
        host = opened.pinned(64)
        host[:] = 5
        assert driver.host.raw == b"\5" * 64
        opened.copy_in(address, host, stream)
        opened.copy_out(host, address, stream)
        opened.record(event, stream)
        opened.wait(stream, event)
        opened.synchronise(stream)
        assert opened.elapsed(event, event) == 0.0025
        opened.begin_capture(stream)
        graph = opened.end_capture(stream)
        opened.launch(graph, stream)
        opened.release_graph(graph)
        opened.release(address)
        opened.release_pinned(host)
        opened.release_event(event)
        opened.release_stream(stream)
    assert driver.called.count("cuCtxPushCurrent") == driver.called.count("cuCtxPopCurrent") == 1
    assert "cuGraphDestroy" in driver.called and "cuMemFreeHost" in driver.called


def test_an_error_carries_the_drivers_number(driver: FakeDriver) -> None:
    opened = cuda.open_cuda()
    driver.fail = "cuStreamSynchronize"
    with pytest.raises(CudaError, match="700 CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        opened.synchronise(77)
    assert caught.value.code == 700


class FakePycuda(ModuleType):
    """pycuda.driver, as far as it is used."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.depth, self.freed = 0, 0
        outer = self

        class Context:
            def push(self) -> None:
                outer.depth += 1

            @staticmethod
            def pop() -> None:
                outer.depth -= 1

        class Device:
            def __init__(self, ordinal: int) -> None:
                self.name, self.compute_capability = lambda: "Tesla V100", lambda: (7, 0)
                self.get_attribute, self.total_memory = lambda which: 80, lambda: 32 << 30
                self.retain_primary_context = Context

        class Held:
            handle = 77

            def __int__(self) -> int:
                return 4096

            def free(self) -> None:
                outer.freed += 1

            def synchronize(self) -> None:
                raise outer.Error("cuStreamSynchronize failed: an illegal memory access was encountered")

            def record(self, stream: Any) -> None: ...

            def wait_for_event(self, event: Any) -> None: ...

            def time_since(self, start: Any) -> float:
                return 2.5

        class Event(Held):
            handle = 88

        self.Context, self.Device, self.Stream, self.Event = Context, Device, Held, Event
        self.device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT=1)
        self.init, self.get_driver_version = lambda: None, lambda: 12020
        self.mem_get_info, self.mem_alloc = lambda: (1, 2), lambda size: Held()
        self.pagelocked_empty = np.zeros
        self.memcpy_htod_async = self.memcpy_dtoh_async = lambda *arguments: None


def test_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    package, driver = ModuleType("pycuda"), FakePycuda()
    package.VERSION_TEXT, package.driver = "2026.1", driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    opened = importlib.import_module("dicomnode.infer.cuda").open_cuda()
    assert opened.name == "pycuda 2026.1"
    assert opened.device().capability == (7, 0) and opened.device().driver.endswith("CUDA 12.2")
    with opened.current():
        assert driver.depth == 1
        address, stream, event = opened.allocate(8), opened.stream(), opened.event()
        host = opened.pinned(8)
        opened.copy_in(address, host, stream)
        opened.copy_out(host, address, stream)
        opened.record(event, stream)
        opened.wait(stream, event)
        assert opened.elapsed(event, event) == 0.0025 and opened.memory() == (1, 2)
        with pytest.raises(CudaError, match="illegal memory access"):
            opened.synchronise(stream)
        opened.release(address)
        assert driver.freed == 1
        opened.release_event(event)
        opened.release_stream(stream)
    assert driver.depth == 0


def test_graphs_through_ctypes() -> None:
    called: list[str] = []

    class Library:
        fail = ""

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> int:
                called.append(name)
                if name == "cuGraphInstantiateWithFlags":
                    arguments[0]._obj.value = 0x55
                return 901 if name == self.fail else 0

            return call

    library = Library()
    graphs = Graphs(library)
    graphs.begin_capture(77)
    graph = graphs.end_capture(77)
    graphs.launch(graph, 77)
    graphs.release_graph(graph)
    assert graph == 0x55 and called == [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]
    library.fail = "cuStreamEndCapture"
    with pytest.raises(CudaError) as caught:
        graphs.end_capture(77)
    assert caught.value.code == 901


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    assert cuda.driver_library() is None and cuda.initialise() == -1
    assert cuda.driver_text(12040) in {"unknown CUDA 12.4", cuda.driver_text(12040)}
