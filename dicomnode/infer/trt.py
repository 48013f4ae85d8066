"""Engine ``tensorrt``: plans built on this box from the bundle's ONNX, cached, run on two slots.

Whatever may crash runs in a child process first: the probe, the build, and the first use of a
new plan. A plan from the cache has been used once under the very same key (GPU, driver,
TensorRT), so this process opens it directly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dicomnode import logs, metrics
from dicomnode.errors import EngineError
from dicomnode.infer.cuda import driver_library
from dicomnode.infer.engine import Limits, Ok, Rejected, RejectionCode, Session, is_full
from dicomnode.infer.isolated import ChildCrashed, Isolated, Report, isolated
from dicomnode.infer.onnxshape import onnx_inputs, profile_ranges
from dicomnode.infer.plans import MAX_TRIES, PlanKey, PlanStore
from dicomnode.infer.trt_build import (
    BuildOrder,
    Facts,
    OpenToolkit,
    Precision,
    Toolkit,
    build_and_store,
    open_toolkit,
    probe,
    recipe,
)
from dicomnode.infer.trt_run import MemoryBudget, TrtSession

PROBE_SECONDS = 120.0
BUILD_SECONDS = 4 * 3600.0
"""A build of a large 3-D network takes many minutes; one that takes longer than this hangs."""

WORKSPACE_SHARE = 0.5
"""Of the node's share of GPU memory, as scratch for kernels while building."""


def missing_here() -> Rejected | None:
    """What is visibly missing, without loading anything of NVIDIA's."""
    if importlib.util.find_spec("tensorrt") is None:
        return Rejected("tensorrt", "LIB_MISSING", "TensorRT is not installed (scripts/setup --extra t4 or v100)")
    if all(importlib.util.find_spec(name) is None for name in ("pycuda", "cuda")):
        return Rejected("tensorrt", "LIB_MISSING", "neither PyCUDA nor cuda-bindings is installed")
    if driver_library() is None:
        return Rejected("tensorrt", "NO_DRIVER", "there is no NVIDIA driver here (libcuda.so.1)")
    return None


class TensorRt:
    """See :class:`dicomnode.infer.engine.Engine`; ``built`` and ``build`` let a build happen beside serving.

    ``open_tools``, ``run_child`` and ``missing`` are seams for tests; the first travels to the
    child by name.
    """

    name = "tensorrt"

    def __init__(
        self,
        data_dir: Path,
        limits: Limits | None = None,
        *,
        open_tools: OpenToolkit = open_toolkit,
        run_child: Isolated = isolated,
        missing: Callable[[], Rejected | None] = missing_here,
    ) -> None:
        self._data_dir = data_dir
        self._store = PlanStore(data_dir)
        self._limits = limits or Limits()
        self._open_tools, self._run_child, self._missing = open_tools, run_child, missing
        self._answer: Ok | Rejected | None = None
        self._facts: Facts | None = None
        self._tools: Toolkit | None = None
        self._budget: MemoryBudget | None = None
        self._building = threading.Lock()

    @property
    def version(self) -> str:
        return self._facts.tensorrt if self._facts else ""

    @property
    def device(self) -> str:
        """Name of the GPU, empty before a successful probe."""
        return self._facts.device.name if self._facts else ""

    def probe(self) -> Ok | Rejected:
        """Once per process: what is installed, then CUDA and a builder in a child. Again where the GPU was full."""
        if self._answer is None or is_full(self._answer):
            self._answer = self._missing() or self._probe()
        return self._answer

    def _probe(self) -> Ok | Rejected:
        try:
            self._facts = self._run_child(probe, self._open_tools, seconds=PROBE_SECONDS)
        except ChildCrashed as crash:
            return Rejected(self.name, "PROBE_CRASHED", f"the process that looked at the GPU failed: {crash}")
        except EngineError as error:
            return Rejected(self.name, rejection_code(error.code), error.cause)
        self._budget = MemoryBudget(self._limits.gpu_bytes(self._facts.device.memory))
        return Ok()

    def built(self, onnx: bytes, precision: Precision) -> bool:
        """Whether a plan for the model lies in the cache."""
        return self._store.has(self._key(onnx, precision))

    def build(self, onnx: bytes, precision: Precision, report: Report | None = None) -> None:
        """Build in a child and store; takes minutes. Raises EngineError BUILD_FAILED or OOM."""
        key = self._key(onnx, precision)
        workspace = int(self._limits.gpu_bytes(self._known().device.memory) * WORKSPACE_SHARE)
        order = BuildOrder(key, onnx, precision, workspace)
        with self._building:  # one at a time: they measure the speed of kernels
            begin = time.monotonic()
            if self._store.begin(key) >= MAX_TRIES:
                raise EngineError(
                    "build engine",
                    "BUILD_FAILED",
                    f"{MAX_TRIES} builds of it never came to an end: memory?",
                    f"Remove {self._store.folder.name}/*.tries in data_dir to have it tried again",
                )
            try:
                size = self._run_child(
                    build_and_store, self._open_tools, self._data_dir, order, seconds=BUILD_SECONDS, report=report
                )
            except ChildCrashed as crash:
                text = f"the process that built it failed: {crash}"
                raise EngineError("build engine", "BUILD_FAILED", text) from crash
            finally:
                self._store.ended(key)
            seconds = round(time.monotonic() - begin, 1)
            logs.get().info("engine built", engine=self.name, precision=precision, seconds=seconds, size=size)

    def load(self, onnx: bytes, *, threads: int = 0, precision: Precision = "fp32", build: bool = True) -> Session:
        """From the cache. What is not there, is damaged or is refused is built first, if ``build`` says so.

        Raises EngineError: NOT_BUILT where it would have to be built.
        """
        del threads
        session = self._cached(onnx, precision)
        if session is None and build:
            self.build(onnx, precision)
            session = self._cached(onnx, precision)
            if session is None:
                raise EngineError("load model", "BUILD_FAILED", "the plan that was just built cannot be used")
        if session is None:
            raise EngineError("load model", "NOT_BUILT", "no plan that can be used lies in the cache")
        return session

    def _cached(self, onnx: bytes, precision: Precision) -> Session | None:
        """A session on the plan in the cache; None when there is none, or none that is good: it is removed."""
        plan = self._store.load(self._key(onnx, precision))
        if plan is None:
            return None
        try:
            return self._open(plan, onnx, precision)
        except EngineError as error:
            if error.code != "PLAN_REFUSED":
                raise
            metrics.plan_cache("rejected")
            self._store.discard(self._key(onnx, precision))
            logs.get().warning("cached plan refused, it has to be built again", engine=self.name, cause=error.cause)
            return None

    def _open(self, plan: bytes, onnx: bytes, precision: Precision) -> Session:
        facts = self._known()
        if self._tools is None:
            self._tools = self._open_tools()
        assert self._budget is not None  # known since the probe
        return TrtSession(
            self._tools,
            plan,
            version=facts.tensorrt,
            precision=precision,
            ranges=self._key(onnx, precision).profiles,
            budget=self._budget,
        )

    def _known(self) -> Facts:
        answer = self.probe()
        if isinstance(answer, Rejected):
            raise EngineError("use tensorrt", answer.code, answer.text)
        assert self._facts is not None
        return self._facts

    def _key(self, onnx: bytes, precision: Precision) -> PlanKey:
        facts = self._known()
        device = facts.device
        how, flags = recipe(facts.tensorrt, precision)
        return PlanKey(
            onnx=hashlib.sha256(onnx).hexdigest(),
            tensorrt=facts.tensorrt,
            gpu=device.name,
            capability=device.capability,
            multiprocessors=device.multiprocessors,
            driver=device.driver,
            recipe=how,
            profiles=profile_ranges(onnx_inputs(onnx), self._limits.max_batch),
            flags=flags,
        )


def rejection_code(code: str) -> RejectionCode:
    """``code`` as one that a rejection may carry."""
    known: dict[str, RejectionCode] = {
        "NO_DRIVER": "NO_DRIVER",
        "CC_UNSUPPORTED": "CC_UNSUPPORTED",
        "LIB_MISSING": "LIB_MISSING",
        "VERSION_SKEW": "VERSION_SKEW",
        "PROBE_CRASHED": "PROBE_CRASHED",
        "PROVIDER_MISSING": "PROVIDER_MISSING",
        "GOLDEN_MISMATCH": "GOLDEN_MISMATCH",
        "OOM": "OOM",
        "ENDPOINT_AWAY": "ENDPOINT_AWAY",
        "ENDPOINT_REFUSED": "ENDPOINT_REFUSED",
        "MODEL_MISMATCH": "MODEL_MISMATCH",
        "DEVICE_LOST": "DEVICE_LOST",
        "BUILDING": "BUILDING",
    }
    return known.get(code, "BUILD_FAILED")
