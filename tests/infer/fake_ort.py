"""onnxruntime-gpu without a GPU: the real CPU session behind the Python API of the CUDA provider."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from tests.infer.fake_cuda import FakeCuda

_NAMES = {np.dtype("f4"): "tensor(float)", np.dtype("u1"): "tensor(uint8)"}


class FakeOrt:
    __version__ = "1.31.1"

    def __init__(
        self, cuda: FakeCuda | None = None, providers: tuple[str, ...] = ("CUDAExecutionProvider",), fail: str = ""
    ) -> None:
        self.cuda, self.providers, self.fail = cuda or FakeCuda(), providers, fail
        self.options: dict[str, str] = {}
        self.SessionOptions = SimpleNamespace
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self._value)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]  # also where CUDA does not work

    def InferenceSession(self, onnx: bytes, settings: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        self.options = providers[0][1]
        return _Session(self, onnx)

    def _value(self, shape: list[int], kind: type, device: str, ordinal: int) -> _Value:
        assert device == "cuda"
        return _Value(self.cuda, tuple(shape), np.dtype(kind))


@dataclass
class _Value:
    cuda: FakeCuda
    dims: tuple[int, ...]
    dtype: np.dtype
    address: int = field(default=0)

    def __post_init__(self) -> None:
        with self.cuda.current():
            self.address = self.cuda.allocate(int(np.prod(self.dims)) * self.dtype.itemsize)

    @property
    def array(self) -> np.ndarray:
        return self.cuda.blocks[self.address].view(self.dtype).reshape(self.dims)

    def shape(self) -> list[int]:
        return list(self.dims)

    def data_type(self) -> str:
        return _NAMES[self.dtype]

    def data_ptr(self) -> int:
        return self.address

    def device_name(self) -> str:
        return "cuda"

    def update_inplace(self, array: np.ndarray) -> None:
        self.array[:] = array

    def numpy(self) -> np.ndarray:
        return self.array.copy()


class _Session:
    def __init__(self, ort: FakeOrt, onnx: bytes) -> None:
        self._ort = ort
        self._session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def get_providers(self) -> list[str]:
        return [*self._ort.providers, "CPUExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding) -> None:
        if self._ort.fail:
            raise RuntimeError(self._ort.fail)
        feeds = {name: value.array for name, value in binding.inputs.items()}
        values = self._session.run(binding.outputs, feeds)
        for value in values:
            made = _Value(self._ort.cuda, value.shape, value.dtype)
            made.array[:] = value
            binding.made.append(made)


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, _Value] = {}
        self.outputs: list[str] = []
        self.made: list[_Value] = []

    def bind_ortvalue_input(self, name: str, value: _Value) -> None:
        self.inputs[name] = value

    def bind_output(self, name: str, device: str, ordinal: int) -> None:
        assert device == "cuda"
        self.outputs.append(name)

    def synchronize_inputs(self) -> None:
        pass

    def synchronize_outputs(self) -> None:
        pass

    def get_outputs(self) -> list[_Value]:
        return self.made


def working() -> FakeOrt:
    return FakeOrt()


def silent_fallback() -> FakeOrt:
    """CUDA's libraries are missing: the session says so, the list of providers does not."""
    return FakeOrt(providers=())


def segfault() -> FakeOrt:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError
