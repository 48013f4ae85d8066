"""onnxruntime on an NVIDIA GPU: CUDA provider, IO binding, pinned host buffers.

onnxruntime without a working CUDA still lists its GPU providers and silently computes on the
CPU (GPU.md, "Hazards at start"): only what a session says of itself counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from importlib import metadata
from time import perf_counter
from typing import Any

import numpy as np

from dicomnode import metrics
from dicomnode.errors import EngineError
from dicomnode.infer.cuda import Bytes, Cuda, CudaError, driver_library, initialise, open_cuda
from dicomnode.infer.engine import Array, Limits, Ok, Rejected, Session, is_full
from dicomnode.infer.faults import classify
from dicomnode.infer.isolated import ChildCrashed, Isolated, Report, isolated

CUDA_PROVIDER = "CUDAExecutionProvider"
PROBE_SECONDS = 120.0
TINY = bytes.fromhex(
    "08083a330a0c0a0178120179220452656c751201745a0f0a0178120a0a08080112040a02"
    "0801620f0a0179120a0a08080112040a02080142040a00100d"
)
"""One Relu on a vector of one: what tells whether a session computes on the GPU."""

NUMPY_TYPES: Mapping[str, str] = {
    "tensor(float)": "f4",
    "tensor(float16)": "f2",
    "tensor(double)": "f8",
    "tensor(uint8)": "u1",
    "tensor(int8)": "i1",
    "tensor(uint16)": "u2",
    "tensor(int16)": "i2",
    "tensor(int32)": "i4",
    "tensor(int64)": "i8",
    "tensor(bool)": "?",
}

Library = Callable[[], Any]


def gpu_library() -> Any:
    """The onnxruntime module with CUDA's libraries loaded ahead of it, where they came as wheels."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    return onnxruntime


def missing_here() -> Rejected | None:
    """What is visibly missing, without loading anything of NVIDIA's."""
    here = {name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)}
    if "onnxruntime-gpu" not in here:
        return Rejected("onnxruntime-gpu", "LIB_MISSING", "onnxruntime-gpu is not installed (scripts/setup --extra t4)")
    if len(here) == 2:
        return Rejected("onnxruntime-gpu", "VERSION_SKEW", "onnxruntime lies beside onnxruntime-gpu and hides it")
    if driver_library() is None:
        return Rejected("onnxruntime-gpu", "NO_DRIVER", "there is no NVIDIA driver here (libcuda.so.1)")
    return None


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def try_provider(report: Report, library: Library, check_driver: bool) -> int:
    """For a child: a session of one node really is on the GPU. GPU memory in bytes, 0 when unknown.

    Raises EngineError NO_DRIVER, LIB_MISSING or PROVIDER_MISSING.
    """
    report("looking at the GPU", 0.0)
    if check_driver and (status := initialise()):
        raise EngineError("open GPU", "NO_DRIVER", f"cuInit answers {status}", "See 'nvidia-smi'")
    try:
        ort = library()
    except (ImportError, OSError) as cause:
        raise EngineError("open GPU", "LIB_MISSING", f"onnxruntime cannot be imported: {cause}") from cause
    _open_session(ort, TINY, {}, 1)
    with contextlib.suppress(ImportError, CudaError):
        return open_cuda().device().memory
    return 0


def _open_session(ort: Any, onnx: bytes, options: Mapping[str, str], threads: int) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise EngineError("load model", "PROVIDER_MISSING", f"onnxruntime offers no {CUDA_PROVIDER}")
    try:
        session = ort.InferenceSession(onnx, settings, providers=[(CUDA_PROVIDER, dict(options))])
    except Exception as cause:
        text = _first_line(cause)
        fault = classify(text).value
        raise EngineError("load model", "BUILD_FAILED" if fault == "RUN_FAILED" else fault, text) from cause
    if not session.get_providers() or session.get_providers()[0] != CUDA_PROVIDER:
        raise EngineError(
            "load model",
            "PROVIDER_MISSING",
            f"onnxruntime fell back to {', '.join(session.get_providers())}: CUDA or cuDNN does not fit",
            "See 'dicomnode doctor'; the extras t4 and v100 pin versions that fit together",
        )
    return session


class OnnxRuntimeGpu:
    """See :class:`dicomnode.infer.engine.Engine`. ``library``, ``cuda``... are seams for tests."""

    name = "onnxruntime-gpu"

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        library: Library = gpu_library,
        cuda: Callable[[], Cuda] = open_cuda,
        run_child: Isolated = isolated,
        missing: Callable[[], Rejected | None] = missing_here,
    ) -> None:
        self._limits = limits or Limits()
        self._library, self._open_cuda = library, cuda
        self._run_child, self._missing = run_child, missing
        self._answer: Ok | Rejected | None = None
        self._memory = 0

    @property
    def version(self) -> str:
        try:
            return metadata.version("onnxruntime-gpu")
        except metadata.PackageNotFoundError:
            return ""

    def probe(self) -> Ok | Rejected:
        """Once per process: what is installed, then a session of one node in a child. Again where the GPU was full."""
        if self._answer is None or is_full(self._answer):
            self._answer = self._missing() or self._probe()
        return self._answer

    def _probe(self) -> Ok | Rejected:
        from dicomnode.infer.trt import rejection_code

        real = self._library is gpu_library
        try:
            self._memory = self._run_child(try_provider, self._library, real, seconds=PROBE_SECONDS)
        except ChildCrashed as crash:
            return Rejected(self.name, "PROBE_CRASHED", f"the process that looked at the GPU failed: {crash}")
        except EngineError as error:
            return Rejected(self.name, rejection_code(error.code), error.cause)
        return Ok()

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        """FP32 without TF32; never more GPU memory than the node's share. Raises EngineError."""
        answer = self.probe()
        if isinstance(answer, Rejected):
            raise EngineError("load model", answer.code, answer.text)
        ort = self._library()
        try:
            cuda: Cuda | None = self._open_cuda()
        except (ImportError, CudaError):
            cuda = None  # IO binding works without; the copies are from pageable memory then
        options = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        memory = cuda.device().memory if cuda else self._memory
        if memory:
            options["gpu_mem_limit"] = str(self._limits.gpu_bytes(memory))
        session = _open_session(ort, onnx, options, threads)
        return OrtGpuSession(ort, session, cuda, f"{self.name} {ort.__version__}")


class OrtGpuSession:
    """Inputs and outputs on the device; host memory is pinned where a CUDA binding is installed.

    Buffers are kept by name and reused; ``run`` returns after the copies are done, so that the
    next call may write into them.
    """

    name, precision = "onnxruntime-gpu", "fp32"

    def __init__(self, ort: Any, session: Any, cuda: Cuda | None, engine: str) -> None:
        self._ort, self._session, self._cuda, self._engine = ort, session, cuda, engine
        self._types = {i.name: np.dtype(NUMPY_TYPES[i.type]) for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self._values: dict[str, Any] = {}
        self._pinned: dict[str, Bytes] = {}
        self._stream = 0
        if cuda is not None:
            with cuda.current():
                self._stream = cuda.stream()

    @property
    def engine(self) -> str:
        return self._engine

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._session is None:
            raise EngineError("run model", "RUN_FAILED", "the session is closed")
        if inputs.keys() != self._types.keys():
            raise EngineError("run model", "RUN_FAILED", f"the model's inputs are {', '.join(self._types)}")
        try:
            with self._cuda.current() if self._cuda else contextlib.nullcontext():
                return self._run(inputs)
        except EngineError:
            raise
        except CudaError as cause:
            raise EngineError("run model", classify(str(cause), cause.code).value, str(cause)) from cause
        except Exception as cause:
            text = _first_line(cause)
            raise EngineError("run model", classify(str(cause)).value, text) from cause

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        binding = self._session.io_binding()
        begin = perf_counter()
        for name, array in inputs.items():
            if array.dtype != self._types[name]:
                raise EngineError("run model", "RUN_FAILED", f"input {name} is {array.dtype}, not {self._types[name]}")
            binding.bind_ortvalue_input(name, self._upload(name, array))
        for name in self._outputs:
            binding.bind_output(name, "cuda", 0)
        if self._cuda:
            self._cuda.synchronise(self._stream)
        copied = perf_counter()
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        computed = perf_counter()
        found = {n: self._download(n, v) for n, v in zip(self._outputs, binding.get_outputs(), strict=True)}
        taken: dict[metrics.InferenceStage, float] = {
            "h2d": copied - begin,
            "compute": computed - copied,
            "d2h": perf_counter() - computed,
        }
        for stage, seconds in taken.items():
            metrics.inference(self.name, self.precision, stage, seconds)
        if self._cuda:
            metrics.gpu_memory(*self._cuda.memory())
        return found

    def _upload(self, name: str, array: Array) -> Any:
        value = self._values.get(name)
        if value is None or tuple(value.shape()) != array.shape:
            value = self._ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, "cuda", 0)
            self._values[name] = value
        if self._cuda is None:
            value.update_inplace(np.ascontiguousarray(array))
            return value
        host = self._host(name, array.nbytes)
        np.copyto(host.view(array.dtype).reshape(array.shape), array)
        self._cuda.copy_in(value.data_ptr(), host, self._stream)
        return value

    def _download(self, name: str, value: Any) -> Array:
        if self._cuda is None or value.device_name() != "cuda":
            return np.array(value.numpy())
        dtype = np.dtype(NUMPY_TYPES[value.data_type()])
        shape = tuple(value.shape())
        host = self._host(name, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        self._cuda.copy_out(host, value.data_ptr(), self._stream)
        self._cuda.synchronise(self._stream)
        return host.view(dtype).reshape(shape).copy()

    def _host(self, name: str, size: int) -> Bytes:
        assert self._cuda is not None
        known = self._pinned.get(name)
        if known is None or known.nbytes < size:
            if known is not None:
                self._cuda.release_pinned(self._pinned.pop(name))
            known = self._pinned[name] = self._cuda.pinned(size)
        return known[:size]

    def close(self) -> None:
        self._session = None
        self._values.clear()
        if self._cuda is None:
            return
        with contextlib.suppress(CudaError), self._cuda.current():
            for array in self._pinned.values():
                self._cuda.release_pinned(array)
            self._pinned.clear()
            if self._stream:
                self._cuda.release_stream(self._stream)
                self._stream = 0


def _first_line(cause: BaseException) -> str:
    return (str(cause).splitlines() or [type(cause).__name__])[0][:300]
