"""TensorRT without a GPU: the API that versions 8.6, 10 and 11 have, over onnxruntime on the CPU and FakeCuda.

A plan is the model with a header of version, GPU and profiles; another version or GPU refuses it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from dicomnode.infer.trt_build import Toolkit
from tests.infer.fake_cuda import FakeCuda, Work

MAGIC = b"FAKE-PLAN\n"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def __init__(self) -> None:
        self.made = True


class IProgressMonitor:
    def __init__(self) -> None:
        self.made = True


@dataclass
class Faults:
    """What goes wrong, by name of the call."""

    parse: bool = False
    build: str | None = None
    deserialize: bool = False
    context: bool = False
    profile: bool = False
    shape: bool = False
    address: bool = False
    execute: bool = False
    execute_in_capture: bool = False
    outputs: Callable[[bytes, dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda onnx, outputs: outputs


@dataclass
class FakeTrt:
    """The module ``tensorrt``. ``contexts``: live contexts by profile, ``built``: builds done."""

    __version__: str = "10.4.0"
    cuda: FakeCuda = field(default_factory=FakeCuda)
    faults: Faults = field(default_factory=Faults)
    device_memory: int = 1 << 20

    def __post_init__(self) -> None:
        major = int(self.__version__.split(".")[0])
        self.builds: list[dict[str, Any]] = []
        self.executed: list[tuple[int, tuple[int, ...]]] = []
        self.ILogger = ILogger
        self.TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE=0)
        flags = {"STRONGLY_TYPED": 1} if major >= 10 else {}
        flags |= {"EXPLICIT_BATCH": 0} if major < 11 else {}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
        self.BuilderFlag = SimpleNamespace(
            TF32=7, **({"FP16": 0, "OBEY_PRECISION_CONSTRAINTS": 12} if major < 11 else {})
        )
        if major >= 10:
            self.IProgressMonitor = IProgressMonitor

    @staticmethod
    def nptype(dtype: type) -> type:
        return dtype

    def Builder(self, logger: ILogger) -> _Builder:
        assert logger.made
        return _Builder(self, logger)

    def OnnxParser(self, network: _Network, logger: ILogger) -> _Parser:
        return _Parser(self, network)

    def Runtime(self, logger: ILogger) -> _Runtime:
        return _Runtime(self, logger)


class _Network:
    onnx = b""

    def __init__(self, flags: int) -> None:
        self.flags = flags


class _Parser:
    def __init__(self, trt: FakeTrt, network: _Network) -> None:
        self._trt, self._network = trt, network
        self.num_errors = 0

    def parse(self, onnx: bytes) -> bool:
        if self._trt.faults.parse:
            self.num_errors = 1
            return False
        self._network.onnx = onnx
        return True

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: "no importer for operator Strange")


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, least: tuple, usual: tuple, most: tuple) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        self.shapes[name] = [list(least), list(usual), list(most)]


class _Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data or b"timings"


class _Config:
    def __init__(self, trt: FakeTrt) -> None:
        self._trt = trt
        self.profiles: list[_Profile] = []
        self.flags = {trt.BuilderFlag.TF32}
        self.workspace = 0
        self._cache: _Cache | None = None
        if hasattr(trt, "IProgressMonitor"):
            self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        self.workspace = size

    def clear_flag(self, flag: int) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: int) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: _Profile) -> int:
        if self._trt.faults.profile:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> _Cache:
        return _Cache(data)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        if cache.data and cache.data != b"timings":
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self._cache


class _Builder:
    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> _Network:
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        trt = self._trt
        if trt.faults.build is not None:
            self._logger.log(ILogger.ERROR, trt.faults.build)
            return None
        cache = config.get_timing_cache()
        trt.builds.append({
            "flags": network.flags, "config": sorted(config.flags), "workspace": config.workspace,
            "timings": cache.data if cache else None,
        })  # fmt: skip
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactics", "Building Engine", 9)
            for step in range(2):
                assert monitor.step_complete("Building Engine", step)
            monitor.phase_finish("Building Engine")
        head = {
            "version": trt.__version__, "gpu": trt.cuda.found.name, "profiles": [p.shapes for p in config.profiles]
        }  # fmt: skip
        return MAGIC + json.dumps(head).encode() + b"\n" + network.onnx


class _Runtime:
    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if not plan.startswith(MAGIC) or self._trt.faults.deserialize:
            self._logger.log(ILogger.ERROR, "Serialization assertion failed: magic tag does not match")
            return None
        head, _, onnx = plan[len(MAGIC) :].partition(b"\n")
        facts = json.loads(head)
        if (facts["version"], facts["gpu"]) != (self._trt.__version__, self._trt.cuda.found.name):
            self._logger.log(ILogger.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        return _Engine(self._trt, self._logger, facts["profiles"], onnx)


class _Engine:
    def __init__(self, trt: FakeTrt, logger: Any, profiles: list[dict[str, list]], onnx: bytes) -> None:
        self.trt, self.logger, self.profiles, self.onnx = trt, logger, profiles, onnx
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.device_memory_size = trt.device_memory
        self.used_profiles: set[int] = set()

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> int:
        return 0 if name in self.inputs else 1

    def get_tensor_dtype(self, name: str) -> type:
        return _TYPES[(self.inputs.get(name) or self.outputs[name]).type]

    def create_execution_context(self) -> _Context | None:
        return None if self.trt.faults.context else _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._trt = engine, engine.trt
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if index >= len(self._engine.profiles):
            return False
        assert index not in self._engine.used_profiles, "two contexts share one optimization profile"
        self._engine.used_profiles.add(index)
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._trt.faults.shape:
            return False
        least, _, most = self._engine.profiles[self._profile][name]
        assert all(low <= d <= high for low, d, high in zip(least, shape, most, strict=True)), "outside the profile"
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        feeds = {n: np.zeros(s, self._engine.get_tensor_dtype(n)) for n, s in self._shapes.items()}
        return tuple(self._engine.session.run([name], feeds)[0].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self._trt.cuda.blocks
        self._addresses[name] = address
        return not self._trt.faults.address

    def execute_async_v3(self, stream: int) -> bool:
        trt, cuda, engine = self._trt, self._trt.cuda, self._engine
        if trt.faults.execute or (trt.faults.execute_in_capture and stream in cuda.captured):
            engine.logger.log(ILogger.ERROR, "enqueueV3: Error Code 1: Cuda Runtime (operation not permitted)")
            return False
        assert stream, "the default stream"
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        assert set(addresses) == set(engine.names), "not every tensor has an address"

        def run() -> None:
            feeds = {}
            for name in engine.inputs:
                dtype = np.dtype(engine.get_tensor_dtype(name))
                size = int(np.prod(shapes[name])) * dtype.itemsize
                feeds[name] = cuda.blocks[addresses[name]][:size].view(dtype).reshape(shapes[name])
            values = dict(zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True))
            values = trt.faults.outputs(engine.onnx, values)
            for name, value in values.items():
                data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                cuda.blocks[addresses[name]][: data.size] = data
            trt.executed.append((stream, next(iter(shapes.values()))))

        def check() -> None:
            assert (shapes, addresses) == (self._shapes, self._addresses), "a graph of another shape is replayed"

        cuda.enqueue(stream, Work(run, frozenset(addresses.values()), check))
        return True


def open_fake() -> Toolkit:
    """A T4 with TensorRT 10.4, for children."""
    trt = FakeTrt()
    return Toolkit(trt, trt.cuda)


def open_segfault() -> Toolkit:
    """As TensorRT 8.6 and 11.4 without a driver."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError
