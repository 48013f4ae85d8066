"""One comparison in a process of its own: another version on the series that a job was made for.

Its task comes as JSON on stdin, its answer goes as JSON to stdout. It opens neither the index nor
a socket and writes no file, so its parent may stop or kill it at any instruction: it can hold no
lock, and what it makes can go nowhere but into the parent's row.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicomnode.lifeline import die_with_parent, limit_data

if TYPE_CHECKING:
    from dicomnode.infer.choice import EngineChoice
    from dicomnode.records import Analysis, SourceInstance


@dataclass(frozen=True, slots=True)
class Task:
    """``sources``: [SOPInstanceUID, SOPClassUID, TransferSyntaxUID, path, sha256] of each instance.

    ``segs``: paths of the SEG objects that the job made. ``summary``: of its result, as the job keeps it.
    """

    bundle: str
    engine: str
    data_dir: str
    threads: int
    max_batch: int
    gpu_memory_share: float
    sources: list[list[str]]
    segs: list[str]
    summary: dict[str, Any]
    memory_mb: int

    def as_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def run(task: Task) -> dict[str, Any]:
    """Columns of ``model_comparisons``; ``error`` instead of a comparison where none came about."""
    from dicomnode.errors import EngineError, NodeError
    from dicomnode.infer.choice import GPU_ENGINES, EngineChoice
    from dicomnode.infer.compare import Finding, compare, masks_of_labels, masks_of_segs, planes_of
    from dicomnode.infer.engine import Limits, default_engines
    from dicomnode.infer.routing import outputs_of
    from dicomnode.infer.summary import summary_of
    from dicomnode.records import SourceInstance

    sources = [SourceInstance(uid, cls, syntax, Path(path), sha) for uid, cls, syntax, path, sha in task.sources]
    try:
        limits = Limits(task.max_batch, task.gpu_memory_share)
        engines = default_engines(Path(task.data_dir), limits)
        choice = EngineChoice(task.engine, engines, threads=task.threads, limits=limits)
        gpu = any(engine.name in GPU_ENGINES for engine in choice.engines)
        if not gpu:  # CUDA maps more than it uses
            limit_data(task.memory_mb << 20)
        try:
            analysis, seconds = _analysed(choice, Path(task.bundle), sources)
        except EngineError:  # it is not built, or lacks memory beside the clinical work: the CPU will do
            if not gpu:
                raise
            last = EngineChoice(engines[-1].name, engines[-1:], threads=task.threads, limits=limits)
            analysis, seconds = _analysed(last, Path(task.bundle), sources)
        names = {s.number: s.label for s in analysis.segments}
        masks = masks_of_labels(analysis.labels, names, planes_of(analysis.source_uids, analysis.source_frames))
        kept = masks_of_segs(map(Path, task.segs)) if task.segs or not task.summary.get("segments") else None
        comparison = compare(Finding.of(summary_of(analysis), masks), Finding.of(task.summary, kept))
    except NodeError as error:
        return {"error": f"{error.operation}: {error.cause}"}
    except (ValueError, KeyError, AttributeError, IndexError, OSError, MemoryError) as error:
        return {"error": f"unexpected {type(error).__name__}"}  # its text may quote a header
    return {**comparison.fields(), "seconds": seconds, "outputs": outputs_of(analysis)}


def _analysed(choice: EngineChoice, bundle: Path, sources: list[SourceInstance]) -> tuple[Analysis, float]:
    """The analysis and its seconds, on the first engine that passes the golden cases."""
    from dicomnode.infer.decode import InlineDecoder

    model = choice.open(bundle).model
    begin = time.perf_counter()
    try:
        analysis = model.analyse(sources, decoder=InlineDecoder())
        return analysis, time.perf_counter() - begin
    finally:
        model.close()


def be_last() -> None:
    """Least of all at the processor and the disk, first of all to go when memory runs out."""
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    die_with_parent()
    answer_to = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of the answer
    be_last()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    task = Task(**json.loads(sys.stdin.buffer.read()))
    answer = run(task)
    with os.fdopen(answer_to, "w") as out:
        out.write(json.dumps(answer))


if __name__ == "__main__":
    main()
