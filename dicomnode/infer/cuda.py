"""CUDA behind one small interface, so that PyCUDA or cuda-bindings can serve (GPU.md).

Addresses, streams, events and graphs are plain integers: the handles of the driver API.
All work is asynchronous on streams of our own; the default stream is never used. The
primary context of the device is shared with onnxruntime and TensorRT and has to be current
in the calling thread (:meth:`Cuda.current`): the driver keeps a stack of them per thread.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
LIBRARY = "libcuda.so.1"


class CudaError(Exception):
    """A call of the driver failed: ``code`` is the CUresult, 0 where the binding only gives text."""

    def __init__(self, operation: str, code: int, text: str) -> None:
        self.operation, self.code, self.text = operation, code, text
        super().__init__(f"{operation}: CUDA error {code} {text}" if code else f"{operation}: {text}")


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. ``memory`` in bytes; ``driver`` is the kernel driver with the CUDA version that it serves."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    driver: str


class Cuda(Protocol):
    """Calls on one device. Every method raises CudaError; ``current`` must surround all but ``device``."""

    @property
    def name(self) -> str:
        """Binding and version, e.g. ``pycuda 2026.1``."""
        ...

    def device(self) -> Device: ...

    def current(self) -> AbstractContextManager[None]:
        """The primary context, current in this thread within the block; may be nested."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, bytes."""
        ...

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes; its address."""
        ...

    def release(self, address: int) -> None: ...

    def pinned(self, size: int) -> Bytes:
        """Page-locked host memory: only from and to such a copy overlaps with computing."""
        ...

    def release_pinned(self, array: Bytes) -> None: ...

    def stream(self) -> int: ...

    def release_stream(self, stream: int) -> None: ...

    def event(self) -> int: ...

    def release_event(self, event: int) -> None: ...

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        """Host to device, asynchronous; ``source`` must not change before the stream has come past it."""
        ...

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        """Device to host, asynchronous; ``target`` is valid once the stream has come past it."""
        ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None:
        """What follows on ``stream`` starts after ``event``."""
        ...

    def synchronise(self, stream: int) -> None:
        """Return when all work of the stream is done; errors of that work show here."""
        ...

    def elapsed(self, start: int, end: int) -> float:
        """Seconds between two recorded events that have happened."""
        ...

    def begin_capture(self, stream: int) -> None:
        """What this thread puts on ``stream`` from here is recorded, not run."""
        ...

    def end_capture(self, stream: int) -> int:
        """The recorded work as an executable graph."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def release_graph(self, graph: int) -> None: ...


def driver_library() -> Any | None:
    """The driver's library, or None where no driver is installed. Initialises nothing."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def initialise() -> int:
    """cuInit through ctypes: its CUresult, or -1 without a driver.

    Before anything else of NVIDIA's is loaded: TensorRT 8.6 and 11.4 end in a segmentation
    fault where this fails (GPU.md, "Hazards at start").
    """
    library = driver_library()
    return int(library.cuInit(0)) if library is not None else -1


def driver_text(cuda_version: int) -> str:
    """``550.54.14 CUDA 12.4`` from the kernel's module and the number that the driver gives (12040)."""
    try:
        kernel = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        kernel = "unknown"
    return f"{kernel} CUDA {cuda_version // 1000}.{cuda_version % 1000 // 10}"


def open_cuda(ordinal: int = 0) -> Cuda:
    """The first binding that is installed: PyCUDA, then cuda-bindings. Raises ImportError when none is."""
    try:
        from dicomnode.infer.cuda_pycuda import PyCuda

        return PyCuda(ordinal)
    except ImportError:
        from dicomnode.infer.cuda_bindings import CudaBindings

        return CudaBindings(ordinal)
