"""Stream capture and graphs through ctypes, for bindings that lack them (PyCUDA)."""

from __future__ import annotations

import ctypes
from typing import Any

from dicomnode.infer.cuda import CudaError, driver_library

THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do meanwhile does not break the capture."""


class Graphs:
    """The part of :class:`~dicomnode.infer.cuda.Cuda` that is about graphs, on stream handles."""

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else driver_library()

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def release_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def _call(self, function: str, *arguments: Any) -> None:
        if self._library is None:
            raise CudaError(function, 0, "there is no NVIDIA driver")
        code = int(getattr(self._library, function)(*arguments))
        if code:
            raise CudaError(function, code, "")
