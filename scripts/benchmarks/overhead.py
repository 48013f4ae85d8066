"""The worker's way through a network against a bare onnxruntime loop over the same tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.subjects import Subject, cores
from benchmarks.tools import Bench, Samples, say
from dicomnode.infer.batching import CappedSession
from dicomnode.infer.engine import Array, Session
from dicomnode.infer.manifest import Manifest
from dicomnode.infer.ort import CPU_PROVIDER, OnnxRuntimeCpu
from dicomnode.infer.pipeline import infer
from dicomnode.infer.stages.network import run_network
from dicomnode.infer.stages.run import prepare

LIMIT = 0.05
MAX_BATCH = 16
SHORT_SECONDS, SHORT_TURNS = 2.0, 4
"""Loops shorter than this are measured more often: a disturbance is a larger part of them."""


def overhead(ours: float, bare: float) -> float:
    """Share of the bare loop's time that the worker takes longer."""
    return ours / bare - 1


@dataclass(slots=True)
class Recorder:
    """A session that keeps what it was given."""

    within: Session
    tensors: list[dict[str, Array]] = field(default_factory=list)

    @property
    def engine(self) -> str:
        return self.within.engine

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self.tensors.append({name: array.copy() for name, array in inputs.items()})
        return self.within.run(inputs)

    def close(self) -> None:
        self.within.close()


class Network:
    """What the worker does from a volume that is ready to the network's answers on its grid.

    Schema 1: slabs, clip, cast, network, answers checked and put together. Schema 2: batches
    (neighbours, patches), network, answers checked, blended and put together; the grid is
    made before, since the bare loop has nothing that corresponds to it.
    """

    def __init__(self, subject: Subject) -> None:
        self._manifest = subject.bundle.manifest
        self._volume = subject.volume
        self._values: Any = None
        if not isinstance(self._manifest, Manifest):
            self._values = prepare(self._manifest, subject.volume).values

    def __call__(self, session: Session) -> None:
        capped = CappedSession(session, MAX_BATCH)
        manifest = self._manifest
        if isinstance(manifest, Manifest):
            infer(manifest, capped, self._volume)
        else:
            assert manifest.engine is not None
            run_network(manifest.engine, capped, self._values, lambda *_: None)


def measure(bench: Bench, subjects: list[Subject]) -> Section:
    section = Section()
    rows: list[Row] = []
    for subject in subjects:
        say.print(f"overhead: {subject.name} …")
        (ours, ours_cpu), (bare, bare_cpu), count = _both(bench, subject)
        share = overhead(ours.best, bare.best)
        rows.append(
            {
                "model": subject.name,
                "tensors": count,
                "bare loop, s": f"{bare.best:.3f}",
                "worker, s": f"{ours.best:.3f}",
                "overhead": f"{share:+.1%}",
                "of CPU time": f"{overhead(ours_cpu.best, bare_cpu.best):+.1%}",
            }
        )
        section.samples[subject.name] = {
            "worker": ours.as_json(),
            "bare": bare.as_json(),
            "worker_cpu": ours_cpu.as_json(),
            "bare_cpu": bare_cpu.as_json(),
        }
        section.goals.append(
            Goal(
                f"worker against a bare onnxruntime loop ({subject.name})",
                f"<= {LIMIT:.0%}",
                f"{share:+.1%}",
                share <= LIMIT,
            )
        )
    short = SHORT_TURNS * bench.repeat
    note = (
        f"onnxruntime on the CPU, {cores()} threads each, the same tensors in turn; best of {bench.repeat} "
        f"({short} where it is short). The bare loop is the faster of two: as onnxruntime comes, and with threads "
        "that sleep while they wait, as the worker's do."
    )
    section.tables.append(Figures("The worker's network stage against a bare onnxruntime loop", rows, note))
    return section


Times = tuple[Samples, Samples]
"""On the clock, and of the processors: the second one suffers less from other load on the machine."""


def _both(bench: Bench, subject: Subject) -> tuple[Times, Times, int]:
    """The worker's times, those of the bare loop that was faster, and how many tensors they are for."""
    onnx = subject.onnx()
    session = OnnxRuntimeCpu().load(onnx, threads=cores())
    network = Network(subject)
    recorder = Recorder(session)
    network(recorder)
    bare = [_bare(onnx, recorder.tensors, spin=spin) for spin in (True, False)]
    begin = time.perf_counter()
    bare[0]()
    turns = bench.repeat if bench.quick or time.perf_counter() - begin > SHORT_SECONDS else SHORT_TURNS * bench.repeat
    loops: list[Callable[[], None]] = [partial(network, session), *bare]
    times = [(Samples(), Samples()) for _ in loops]
    for turn in range(turns):
        for index in range(len(loops)):
            which = (turn + index) % len(loops)  # which goes first takes turns
            begin, used = time.perf_counter(), time.process_time()
            loops[which]()
            clock, processor = times[which]
            clock.add(time.perf_counter() - begin)
            processor.add(time.process_time() - used)
    session.close()
    return times[0], min(times[1:], key=lambda t: t[0].best), len(recorder.tensors)


def _bare(onnx: bytes, tensors: list[dict[str, Array]], *, spin: bool) -> Callable[[], None]:
    """A loop over ``tensors``; its threads wait turning (onnxruntime as it comes) or sleeping (as the worker's do)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cores(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    raw = onnxruntime.InferenceSession(onnx, options, providers=[CPU_PROVIDER])

    def loop() -> None:
        for inputs in tensors:
            raw.run(None, inputs)

    return loop
