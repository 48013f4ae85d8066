"""A data folder with series and two versions of the shipped model, and workers on it. Also run as a program.

``python -m tests.infer.life_case``: reads data folders with a phase from stdin, forks a child for
each that does jobs in it and kills itself with SIGKILL in that phase. One process for all, since
the imports take longer than the work.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dicomnode import durable, logs
from dicomnode.app_results import encoder
from dicomnode.durable import ObjectStore
from dicomnode.header import Wanted, read_header
from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Request
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.infer.choice import EngineChoice
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.job_files import data_set_of
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.serving import ServingModels
from dicomnode.infer.worker import Worker
from dicomnode.records import Analysis, Measurement, SourceInstance
from dicomnode.settings import Settings
from tests.e2e.harness import Series, make_series
from tests.infer.infer_case import MODEL

PHASES = (
    "lease", "pick", "decoding", "batch", "inference", "identity", "encoding", "files", "commit", "committed"
)  # fmt: skip
"""In the order of a job. Decoding and batch are of an analysis that is done for real: see :func:`boxes`."""


def settings_of(folder: Path, **sections: Any) -> Settings:
    return Settings(
        node={"data_dir": folder / "data", "reserve_mb": 1},
        inference={"engine": "onnxruntime-cpu", "models_dir": folder / "models", "threads": 1},
        **sections,
    )


def add_version(folder: Path, version: str, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """The shipped model under another version and with one golden case; ``change`` edits its manifest."""
    target = folder / "models" / "ct-lung" / version
    shutil.copytree(MODEL, target)
    path = target / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["version"] = version
    del manifest["golden"][1:]
    for name in manifest["files"].keys() - {"model.onnx", "MODEL_CARD.md", *golden_files(manifest)}:
        del manifest["files"][name]
        (target / name).unlink()
    if change:
        change(manifest)
    path.write_text(json.dumps(manifest))
    return target


def golden_files(manifest: dict[str, Any]) -> set[str]:
    return {case[key] for case in manifest["golden"] for key in ("input", "labels")}


def boxes(self: ReadyModel, instances: Sequence[SourceInstance], **_: Any) -> Analysis:
    """Stands for an analysis: a box for each segment. What these tests are about comes after it."""
    manifest = self.bundle.manifest
    labels = np.zeros((len(instances), 176, 176), np.uint8)
    segments = [s.definition() for s in manifest.outputs.segments]
    for segment in segments:
        labels[4:20, 10 * segment.number : 10 * segment.number + 8, 20:60] = segment.number
    entry = manifest.outputs.measurements[0]
    return Analysis(
        labels=labels,
        source_uids=tuple(i.sop_instance_uid for i in instances),
        segments=tuple(segments),
        measurements=tuple(
            Measurement(entry.key, entry.name.code(), 100.0 * s.number, entry.unit.code(), s.number) for s in segments
        ),
        engine=self.session.engine,
        precision="fp32",
        seconds={"inference": 0.5},
    )


def add_series(
    db: Database,
    series: Series | None = None,
    destinations: tuple[str, ...] = ("pacs",),
    requests: Sequence[Request] = (),
) -> int:
    """Store a series as the receiver does and make its job, or those of ``requests``; returns the first job's id."""
    series = series or make_series("life")
    store, new = ObjectStore(db.data_dir), []
    for ds in series.datasets:
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        part10 = buffer.getvalue()
        syntax = str(ds.file_meta.TransferSyntaxUID)
        name = store.new_name(series.series_uid)
        store.stage(name, [part10], sync=False)
        data_set = data_set_of(part10)
        new.append(
            NewInstance(
                attributes=read_header(data_set, syntax, Wanted(HEADER_KEYS)),
                transfer_syntax_uid=syntax,
                file=name,
                size=len(part10),
                sha256=durable.sha256_object(store.path(name)),
                dataset_sha256=durable.sha256(data_set),
            )
        )
    Catalogue(db).commit(new)
    row = db.row("SELECT id, generation FROM series WHERE SeriesInstanceUID = ?", (series.series_uid,))
    assert row is not None
    request = Request("ct-lung", ("rule",), destinations, "routine")
    return Jobs(db).select(row["id"], row["generation"], "because", requests or [request])[0]


def worker_on(settings: Settings, db: Database, engine: EngineChoice | None = None) -> Worker:
    models = ServingModels(
        db,
        engine or OnnxRuntimeCpu(),
        models_dir=settings.inference.models_dir,
        data_dir=settings.node.data_dir,
        threads=1,
    )
    ObjectStore(settings.node.data_dir).prepare()
    worker = Worker(
        settings, db, models, encoder(settings, db=db), owner="worker", decoder=InlineDecoder(), on_results=lambda: None
    )
    worker.start()
    return worker


def die_in(phase: str, worker: Worker) -> None:
    """Have this process kill itself at the end of a phase, ``commit``: at the last instruction before it."""

    def killing(before: Any = None, after: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if before is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            result = after(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    jobs = worker._jobs
    if phase == "lease":
        jobs.lease = killing(after=jobs.lease)  # type: ignore[method-assign]
    elif phase == "pick":
        worker._router.pick = killing(after=worker._router.pick)  # type: ignore[method-assign]
    elif phase == "decoding":
        worker._decoder.frames = killing(before=True)  # type: ignore[method-assign]
    elif phase == "batch":  # the network has answered once, for this job
        pick = worker._router.pick

        def picked(*arguments: Any) -> Any:
            model = pick(*arguments)
            model.session._session._fill = killing(after=model.session._session._fill)
            return model

        worker._router.pick = picked  # type: ignore[method-assign]
    elif phase == "encoding":  # the segmentation is made, its report is not
        from dicomnode.encode import results

        results.encode_sr = killing(before=True)  # type: ignore[assignment]
    elif phase == "inference":
        worker._identity = killing(before=True)  # type: ignore[method-assign]
    elif phase == "identity":
        jobs.fix_identity = killing(after=jobs.fix_identity)  # type: ignore[method-assign]
    elif phase == "files":
        jobs.finish = killing(before=True)  # type: ignore[method-assign]
    elif phase == "commit":  # inside the transaction, all rows written
        jobs._leave = killing(before=True)  # type: ignore[method-assign]
    elif phase == "committed":
        jobs.finish = killing(after=jobs.finish)  # type: ignore[method-assign]


def _child(folder: Path, phase: str) -> None:
    if phase not in ("decoding", "batch"):
        ReadyModel.analyse = boxes  # type: ignore[method-assign,assignment]
    settings = settings_of(folder)
    db = Database(settings.node.data_dir)
    worker = worker_on(settings, db)
    die_in(phase, worker)
    worker.run_once()


def main() -> None:
    logs.configure("killed", "warning", "console")
    for line in sys.stdin:
        phase, _, folder = line.strip().partition(" ")
        pid = os.fork()
        if pid == 0:
            try:
                _child(Path(folder), phase)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            os._exit(3)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
