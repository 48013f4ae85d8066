"""Inference engines behind one interface, and the choice between them (GPU.md, "Engine contract").

Engines run an ONNX model that is handed over as bytes, on named arrays. ``auto`` tries
tensorrt, onnxruntime-gpu, onnxruntime-cpu in that order; an engine that was asked for by
name and cannot serve is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy.typing as npt

from dicomnode.errors import EngineError

Array = npt.NDArray[Any]

RejectionCode = Literal[
    "NO_DRIVER",
    "CC_UNSUPPORTED",
    "LIB_MISSING",
    "VERSION_SKEW",
    "BUILD_FAILED",
    "PROBE_CRASHED",
    "PROVIDER_MISSING",
    "GOLDEN_MISMATCH",
    "OOM",
    "DEVICE_LOST",
    "BUILDING",
    "ENDPOINT_AWAY",
    "ENDPOINT_REFUSED",
    "MODEL_MISMATCH",
]


@dataclass(frozen=True, slots=True)
class Ok:
    """The engine can serve on this box."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The engine cannot serve here: a stable ``code`` and a sentence for the operator."""

    engine: str
    code: RejectionCode
    text: str


def is_full(answer: Ok | Rejected) -> bool:
    """Whether the engine cannot serve only because the GPU's memory is taken for the moment."""
    return isinstance(answer, Rejected) and answer.code == "OOM"


class Session(Protocol):
    """One loaded model. Not shared between threads."""

    @property
    def engine(self) -> str:
        """Engine name and version, e.g. ``onnxruntime-cpu 1.32.0``; goes into provenance."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """All outputs of the model by name.

        Arrays are C-contiguous numpy arrays of the dtype and rank that the model declares;
        outputs belong to the caller. Raises EngineError when the engine fails.
        """
        ...

    def close(self) -> None:
        """Release the device memory; the session must not be used afterwards."""
        ...


class Loads(Protocol):
    """What opens a network: an engine, or one at a certain precision."""

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        """A session for the model; ``threads`` 0 means the engine's default. Raises EngineError."""
        ...


class Engine(Protocol):
    """A way to run ONNX models on this box."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def probe(self) -> Ok | Rejected:
        """Whether the engine can serve here; cheap, never raises, never crashes the process."""
        ...

    def load(self, onnx: bytes, *, threads: int = 0) -> Session:
        """A session for the model; ``threads`` 0 means the engine's default. Raises EngineError."""
        ...


@runtime_checkable
class ByName(Protocol):
    """An engine that is told which model to run by the bundle's name and version."""

    def for_model(self, name: str, version: str) -> Engine: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine may take: rows of a batch, and share (0..1] of the GPU's memory."""

    max_batch: int = 16
    gpu_memory_share: float = 0.8

    def gpu_bytes(self, total: int) -> int:
        """The share of ``total`` bytes."""
        return int(total * self.gpu_memory_share)


def default_engines(data_dir: Path | None = None, limits: Limits | None = None) -> tuple[Engine, ...]:
    """The engines in the order in which ``auto`` tries them.

    Built engines are kept under ``data_dir``; without one under the user's cache folder.
    """
    from dicomnode.infer.ort import OnnxRuntimeCpu
    from dicomnode.infer.ort_gpu import OnnxRuntimeGpu
    from dicomnode.infer.trt import TensorRt

    if data_dir is None:
        data_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dicomnode"
    return (TensorRt(data_dir, limits), OnnxRuntimeGpu(limits), OnnxRuntimeCpu())


def choose_engine(setting: str, engines: Sequence[Engine] | None = None) -> tuple[Engine, tuple[Rejected, ...]]:
    """The engine for ``[inference] engine`` and the rejections met on the way.

    ``setting`` is ``auto`` or the name of an engine. Raises EngineError with the rejection's
    code when the named one, or with ``auto`` every one, cannot serve.
    """
    known = default_engines() if engines is None else tuple(engines)
    if setting != "auto":
        wanted = [engine for engine in known if engine.name == setting]
        if not wanted:
            names = ", ".join(engine.name for engine in known)
            raise EngineError("choose engine", "LIB_MISSING", "no such engine", f"Use auto or one of: {names}")
        answer = wanted[0].probe()
        if isinstance(answer, Rejected):
            raise EngineError(
                "choose engine", answer.code, answer.text, "Set inference.engine to auto or to another engine"
            )
        return wanted[0], ()
    rejections: list[Rejected] = []
    for engine in known:
        answer = engine.probe()
        if isinstance(answer, Ok):
            return engine, tuple(rejections)
        rejections.append(answer)
    reasons = "; ".join(f"{r.engine} {r.code} ({r.text})" for r in rejections)
    raise EngineError("choose engine", rejections[-1].code if rejections else "LIB_MISSING", reasons)
