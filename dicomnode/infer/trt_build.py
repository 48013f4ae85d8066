"""TensorRT: what is here, and building a plan. Runs in a child process (isolated.py).

Only API that TensorRT 8.6 to 11 have in common is used, or asked for by name before use:
8.6 knows no strongly typed networks and takes the explicit-batch flag; from 10 on networks
are strongly typed, so that the precision is what the ONNX file says; 11 has removed the
flags of precision.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dicomnode.errors import EngineError
from dicomnode.infer import cuda as cuda_calls
from dicomnode.infer.cuda import Cuda, CudaError, Device
from dicomnode.infer.faults import Fault, classify
from dicomnode.infer.isolated import Report
from dicomnode.infer.plans import InputRange, PlanKey, PlanStore

Precision = Literal["fp32", "fp16"]
SLOTS = 2
"""Profiles of a plan: with dynamic shapes each context that runs beside another needs one of its own."""

_DRIVER_TOO_OLD = frozenset({34, 35, 36, 802, 803, 804})
"""CUresult and cudaError values of a driver or its library that do not fit together."""


@dataclass(frozen=True, slots=True)
class Toolkit:
    """The TensorRT module and a device, open in this process."""

    trt: Any
    cuda: Cuda


OpenToolkit = Callable[[], Toolkit]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a probe found: full TensorRT version, CUDA binding, device."""

    tensorrt: str
    binding: str
    device: Device


def open_toolkit() -> Toolkit:
    """TensorRT and CUDA of this box. Raises EngineError: NO_DRIVER, VERSION_SKEW or LIB_MISSING."""
    status = cuda_calls.initialise()
    if status:
        code = "VERSION_SKEW" if status in _DRIVER_TOO_OLD else "NO_DRIVER"
        raise EngineError("open GPU", code, f"cuInit answers {status}", "See 'nvidia-smi' and the driver's version")
    try:
        import tensorrt

        return Toolkit(tensorrt, cuda_calls.open_cuda())
    except ImportError as cause:
        raise EngineError(
            "open GPU", "LIB_MISSING", f"cannot be imported: {cause}", "scripts/setup --extra t4"
        ) from cause
    except CudaError as cause:
        raise EngineError("open GPU", _full_or(cause, "NO_DRIVER"), str(cause), "See 'nvidia-smi'") from cause


def _full_or(cause: Exception, code: str) -> str:
    """OOM where the words of a library mean that, else ``code``."""
    return "OOM" if classify(str(cause), getattr(cause, "code", 0)) is Fault.oom else code


def least_capability(tensorrt: str) -> tuple[int, int]:
    """Oldest compute capability that this TensorRT serves: Volta went with 10.5 (GPU.md, "Support"). Pure."""
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in (*tensorrt.split("."), "0")[:2])
    return (7, 5) if (major, minor) >= (10, 5) else (7, 0)


def probe(report: Report, open_tools: OpenToolkit) -> Facts:
    """For a child: whether a builder can be made here. Raises EngineError with the reason."""
    report("looking at the GPU", 0.0)
    tools = open_tools()
    facts = Facts(str(tools.trt.__version__), tools.cuda.name, tools.cuda.device())
    least = least_capability(facts.tensorrt)
    if facts.device.capability < least:
        have, need = (".".join(map(str, c)) for c in (facts.device.capability, least))
        raise EngineError(
            "open GPU",
            "CC_UNSUPPORTED",
            f"{facts.device.name} has compute capability {have}, TensorRT {facts.tensorrt} needs {need}",
            "scripts/setup --extra v100 has the last TensorRT for older cards",
        )
    try:
        with tools.cuda.current():
            builder = tools.trt.Builder(make_logger(tools.trt))
    except (TypeError, RuntimeError, CudaError) as cause:
        code = _full_or(cause, "VERSION_SKEW")
        raise EngineError("open GPU", code, f"TensorRT {facts.tensorrt} makes no builder: {cause}") from cause
    if builder is None:
        raise EngineError("open GPU", "VERSION_SKEW", f"TensorRT {facts.tensorrt} makes no builder")
    return facts


def make_logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's last errors in ``words``; called from any thread."""

    class Log(trt.ILogger):  # type: ignore[misc] # the module is found at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lock = threading.Lock()
            self.kept: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                with self.lock:
                    self.kept.append(text.strip()[:300])

        def words(self) -> str:
            with self.lock:
                return "; ".join(self.kept) or "TensorRT gave no reason"

    return Log()


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """What to build; ``workspace`` is scratch memory for the fastest kernels, bytes."""

    key: PlanKey
    onnx: bytes
    precision: Precision
    workspace: int

    @property
    def timing_name(self) -> str:
        key = self.key
        return f"{key.tensorrt}|{key.gpu}|{key.capability}|{key.multiprocessors}|{key.driver}"


def build_and_store(report: Report, open_tools: OpenToolkit, data_dir: Path, order: BuildOrder) -> int:
    """For a child: build, prove that the plan can be used, store it; the plan's size in bytes.

    Raises EngineError: BUILD_FAILED or OOM.
    """
    report("loading TensorRT", 0.0)
    tools = open_tools()
    store = PlanStore(data_dir)
    try:
        with tools.cuda.current():
            plan, timings = build_plan(tools.trt, order, store.timings(order.timing_name), report)
            report("first use", 0.97)
            log = make_logger(tools.trt)
            engine = tools.trt.Runtime(log).deserialize_cuda_engine(plan)
            if engine is None or engine.create_execution_context() is None:
                raise EngineError("build engine", "BUILD_FAILED", f"the new plan cannot be used: {log.words()}")
    except CudaError as cause:
        raise EngineError("build engine", _full_or(cause, "BUILD_FAILED"), str(cause)) from cause
    store.store(order.key, plan)
    if timings:
        store.store_timings(order.timing_name, timings)
    report("built", 1.0)
    return len(plan)


def build_plan(trt: Any, order: BuildOrder, timings: bytes, report: Report) -> tuple[bytes, bytes]:
    """Plan and new timing cache. Raises EngineError BUILD_FAILED, or OOM when the builder lacked memory."""
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    report("reading the model", 0.01)
    if not parser.parse(order.onnx):
        words = "; ".join(str(parser.get_error(i).desc()) for i in range(min(3, parser.num_errors)))
        raise EngineError("build engine", "BUILD_FAILED", f"TensorRT cannot read the model: {words or log.words()}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace)
    _set_precision(trt, config, order.precision)
    for _ in range(SLOTS):
        _add_profile(builder, config, order.key.profiles)
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another build or damaged: measured afresh
        config.set_timing_cache(cache, False)
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, report)
    report("building", 0.05)
    made = builder.build_serialized_network(network, config)
    if made is None:
        words = log.words()
        code = "OOM" if classify(words) is Fault.oom else "BUILD_FAILED"
        raise EngineError("build engine", code, words, "Another engine serves this model")
    known = config.get_timing_cache()
    return bytes(made), bytes(known.serialize()) if known is not None else b""


def _network_flags(trt: Any) -> int:
    flag = trt.NetworkDefinitionCreationFlag
    if hasattr(flag, "STRONGLY_TYPED"):
        return 1 << int(flag.STRONGLY_TYPED)
    return 1 << int(flag.EXPLICIT_BATCH)


def recipe(tensorrt: str, precision: Precision) -> tuple[str, tuple[str, ...]]:
    """Precision recipe and flags as they stand in a plan's key. Pure."""
    typed = int(tensorrt.partition(".")[0] or 0) >= 9
    return f"{precision} as in the file", ("strongly-typed" if typed else "weakly-typed", "no-tf32", f"slots-{SLOTS}")


def _set_precision(trt: Any, config: Any, precision: Precision) -> None:
    """FP32 stays FP32 (TF32 is off: its 10 bits of mantissa do not hold the golden tolerance)."""
    flags = trt.BuilderFlag
    if hasattr(flags, "TF32"):
        config.clear_flag(flags.TF32)
    if precision == "fp16" and not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        config.set_flag(flags.FP16)  # a weakly typed network: half precision is allowed ...
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)  # ... where the file has it


def _add_profile(builder: Any, config: Any, ranges: tuple[InputRange, ...]) -> None:
    profile = builder.create_optimization_profile()
    for entry in ranges:
        # The bindings answer None or a bool, by version; a range that does not fit shows below.
        profile.set_shape(entry.name, entry.least, entry.usual, entry.most)
    if cast("int", config.add_optimization_profile(profile)) < 0:
        raise EngineError("build engine", "BUILD_FAILED", "TensorRT refuses the range of shapes")


def _monitor(trt: Any, report: Report) -> Any:
    """Progress of the outermost phase, mapped to 0.05..0.95; called from threads of the builder."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the module is found at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                if not parent_phase:
                    self.steps[phase_name] = max(1, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                steps = self.steps.get(phase_name)
                if steps:
                    report(phase_name, 0.05 + 0.9 * min(1.0, (step + 1) / steps))
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.steps.pop(phase_name, None)

    return Monitor()
