"""On an NVIDIA GPU: TensorRT in half precision, onnxruntime's CUDA provider and eager PyTorch, on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import graphs
from benchmarks.eager import EagerTorch
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.subjects import Subject
from benchmarks.tools import Bench, Samples, say
from dicomnode.infer.cuda import open_cuda
from dicomnode.infer.engine import Array, Limits, Rejected
from dicomnode.infer.ort_gpu import OnnxRuntimeGpu
from dicomnode.infer.trt import TensorRt

RT, ORT, TORCH = "TensorRT fp16", "onnxruntime CUDA fp32", "eager PyTorch fp32"
RUNS = 30
SHAPES = {
    "ct-lung-unet": (8, 3, 144, 144),
    graphs.UNET3D: (1, 1, graphs.PATCH, graphs.PATCH, graphs.PATCH),
    graphs.DENSENET: (8, 3, graphs.SIDE, graphs.SIDE),
}
"""What the worker sends in one call."""


@dataclass(frozen=True, slots=True)
class Aim:
    """A ratio of GPU.md: how much faster ``first`` has to be than ``second``."""

    model: str
    first: str
    second: str
    times: float


AIMS = (
    Aim("ct-lung-unet", RT, ORT, 2.0),
    Aim(graphs.DENSENET, RT, ORT, 2.0),
    Aim(graphs.UNET3D, RT, ORT, 1.5),
    *(Aim(name, ORT, TORCH, 0.9) for name in SHAPES),
)


def goals(medians: Mapping[tuple[str, str], float], gpu: str) -> list[Goal]:
    """A verdict for each aim; without both figures it was not measured. Pure."""
    found = []
    for aim in AIMS:
        first, second = medians.get((aim.model, aim.first)), medians.get((aim.model, aim.second))
        what = f"{aim.model}: {aim.first} against {aim.second} ({gpu})"
        if first is None or second is None:
            found.append(Goal(what, f">= {aim.times}x", "-", None))
        else:
            ratio = second / first
            found.append(Goal(what, f">= {aim.times}x", f"{ratio:.2f}x", ratio >= aim.times))
    return found


def measure(bench: Bench, subjects: list[Subject]) -> Section:
    section = Section()
    medians: dict[tuple[str, str], float] = {}
    rows: list[Row] = []
    gpu = _gpu_name()
    wanted = [s for s in subjects if s.name in SHAPES]
    for subject in wanted if gpu else []:
        for name, run, memory in _ways(bench, subject):
            say.print(f"{subject.name}: {name} …")
            samples = _timed(subject, run)
            medians[subject.name, name] = samples.median
            rows.append(
                {
                    "model": subject.name,
                    "engine": name,
                    "p50, ms": f"{samples.median * 1e3:.2f}",
                    "GPU memory, MB": f"{memory() / 1e6:.0f}",
                }
            )
            section.samples[f"{subject.name}, {name}"] = samples.as_json()
    if not gpu:
        bench.skip("engines of a GPU: there is no NVIDIA driver or no binding of CUDA here")
    section.tables.append(Figures(f"One call on {gpu}, copies included", rows, f"Median of {RUNS} warm calls."))
    section.goals += goals(medians, gpu or "no GPU")
    return section


def _gpu_name() -> str:
    """Empty where there is no GPU that can be used."""
    try:
        cuda = open_cuda()
        device = cuda.device()
    except Exception:  # noqa: BLE001 whatever a binding raises without a driver, there is no GPU then
        return ""
    return f"{device.name}, driver {device.driver}"


def _timed(subject: Subject, run: Callable[[dict[str, Array]], Any]) -> Samples:
    engine = subject.bundle.manifest.engine
    assert engine is not None
    batch = np.random.default_rng(5).uniform(0, 1, SHAPES[subject.name]).astype(np.float32)
    samples = Samples()
    for turn in range(-5, RUNS):
        begin = time.perf_counter()
        run({engine.input: batch})
        if turn >= 0:
            samples.add(time.perf_counter() - begin)
    return samples


Way = tuple[str, Callable[[dict[str, Array]], Any], Callable[[], int]]


def _ways(bench: Bench, subject: Subject) -> Iterator[Way]:
    """Each way that works here, one after another, so that none holds memory while another is timed."""
    cuda = open_cuda()

    def free() -> int:
        with cuda.current():
            return cuda.memory()[0]

    limits = Limits(max_batch=8)
    rt = TensorRt(bench.work, limits)
    if isinstance(answer := rt.probe(), Rejected):
        bench.skip(f"{RT}: {answer.text}")
    else:
        onnx = subject.onnx(half=True)
        before = free()
        rt.build(onnx, "fp16")
        session = rt.load(onnx, precision="fp16")
        yield RT, session.run, lambda: before - free()
        session.close()
    ort = OnnxRuntimeGpu(limits)
    if isinstance(answer := ort.probe(), Rejected):
        bench.skip(f"{ORT}: {answer.text}")
    else:
        before = free()
        session = ort.load(subject.onnx())
        yield ORT, session.run, lambda: before - free()
        session.close()
    try:
        eager = EagerTorch(subject.onnx(), "cuda")
    except (ImportError, RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        bench.skip(f"{TORCH}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'not here'}")
        return
    yield TORCH, eager.run, eager.memory
