"""Same input, other engine: masks and measurements against onnxruntime on the CPU as the node sets it up."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.subjects import Subject, cores
from benchmarks.tools import ROOT, Bench, say
from dicomnode.infer.engine import Array, Limits, Rejected, Session
from dicomnode.infer.ort import CPU_PROVIDER, OnnxRuntimeCpu
from dicomnode.infer.ort_gpu import OnnxRuntimeGpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.trt import TensorRt
from dicomnode.records import Analysis, Measurement

MIN_DICE = 0.999
MAX_DIFFERENCE = 0.001


@dataclass(frozen=True, slots=True)
class Agreement:
    """``dice``: of the worst segment. ``difference``: the largest relative one of a measurement."""

    dice: float
    difference: float

    @property
    def good(self) -> bool:
        return self.dice >= MIN_DICE and self.difference <= MAX_DIFFERENCE


def compare(found: Analysis, wanted: Analysis) -> Agreement:
    """Segments by label, measurements by segment and key; what one lacks counts as total disagreement."""
    names = {s.label for s in found.segments}
    if names != {s.label for s in wanted.segments}:
        return Agreement(0.0, 1.0)
    dice = min((_dice(_mask(found, name), _mask(wanted, name)) for name in names), default=1.0)
    ours, theirs = _values(found), _values(wanted)
    if ours.keys() != theirs.keys():
        return Agreement(dice, 1.0)
    return Agreement(dice, max((_relative(ours[k], theirs[k]) for k in ours), default=0.0))


def _mask(analysis: Analysis, label: str) -> npt.NDArray[np.bool_]:
    assert analysis.labels is not None
    number = next(s.number for s in analysis.segments if s.label == label)
    return np.asarray(analysis.labels == number)


def _dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def _values(analysis: Analysis) -> dict[tuple[str, str], float]:
    labels = {s.number: s.label for s in analysis.segments}
    return {(labels[m.segment] if m.segment else "", m.key): m.value for m in _measurements(analysis)}


def _measurements(analysis: Analysis) -> tuple[Measurement, ...]:
    return analysis.measurements


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1.0)


class Plain:
    """onnxruntime with settings of its own."""

    def __init__(self, onnx: bytes, *, optimised: bool, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(onnx, options, providers=[CPU_PROVIDER])
        self._names = [output.name for output in self._session.get_outputs()]

    @property
    def engine(self) -> str:
        return "onnxruntime-cpu"

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))

    def close(self) -> None:
        del self._session


@contextmanager
def through_kserve(subject: Subject) -> Iterator[Session]:
    """The network behind the KServe v2 double of the tests, over HTTP on loopback."""
    from dicomnode.endpoint_settings import Endpoint
    from dicomnode.infer.kserve import KServe

    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    double: Any = import_module("tests.infer.kserve_double")
    identity = subject.bundle.manifest.identity
    server = double.HttpDouble({(identity.name, identity.version): double.Model(subject.onnx())}).start()
    engine = KServe(Endpoint(name="double", url=server.url, timeout_seconds=300))
    try:
        session = engine.for_model(identity.name, identity.version).load(subject.onnx())
        yield session
        session.close()
    finally:
        engine.close()
        server.stop()


@contextmanager
def _plain(subject: Subject, *, optimised: bool, threads: int) -> Iterator[Session]:
    session = Plain(subject.onnx(), optimised=optimised, threads=threads)
    yield session
    session.close()


def _on_gpu(bench: Bench, subject: Subject) -> Iterator[tuple[str, Session]]:
    limits = Limits(max_batch=8)
    gpu = OnnxRuntimeGpu(limits)
    if isinstance(answer := gpu.probe(), Rejected):
        bench.skip(f"agreement with {gpu.name}: {answer.text}")
    else:
        yield gpu.name, gpu.load(subject.onnx())
    rt = TensorRt(bench.work, limits)
    if isinstance(answer := rt.probe(), Rejected):
        bench.skip(f"agreement with {rt.name}: {answer.text}")
        return
    for half in (False, True):
        if half and not subject.has_half:
            continue
        onnx, precision = subject.onnx(half=half), "fp16" if half else "fp32"
        rt.build(onnx, precision)  # type: ignore[arg-type]
        yield f"{rt.name} {precision}", rt.load(onnx, precision=precision)  # type: ignore[arg-type]


def measure(bench: Bench, subjects: list[Subject]) -> Section:
    section = Section()
    rows: list[Row] = []
    for subject in subjects:
        say.print(f"agreement of engines: {subject.name} …")
        reference = OnnxRuntimeCpu().load(subject.onnx(), threads=cores())
        wanted = run_bundle(subject.bundle, reference, subject.volume)
        reference.close()
        for name, found in _others(bench, subject):
            agreement = compare(found, wanted)
            rows.append(
                {
                    "model": subject.name,
                    "other engine": name,
                    "worst Dice": f"{agreement.dice:.6f}",
                    "largest difference of a measurement": f"{agreement.difference:.5%}",
                }
            )
            section.goals.append(
                Goal(
                    f"same input, other engine ({subject.name}, {name})",
                    f"Dice >= {MIN_DICE}, {MAX_DIFFERENCE:.1%}",
                    f"{agreement.dice:.6f}, {agreement.difference:.5%}",
                    agreement.good,
                )
            )
    note = f"Against onnxruntime-cpu with {cores()} threads and all optimisations, as the node runs it."
    section.tables.append(Figures("Same input, other engine", rows, note))
    return section


def _others(bench: Bench, subject: Subject) -> Iterator[tuple[str, Analysis]]:
    with _plain(subject, optimised=False, threads=1) as session:
        yield "onnxruntime, no optimisation, 1 thread", run_bundle(subject.bundle, session, subject.volume)
    try:
        with through_kserve(subject) as session:
            yield "KServe v2 double over HTTP", run_bundle(subject.bundle, session, subject.volume)
    except ImportError as error:
        bench.skip(f"agreement through KServe: {error}")
    for name, session in _on_gpu(bench, subject):
        yield name, run_bundle(subject.bundle, session, subject.volume)
        session.close()
