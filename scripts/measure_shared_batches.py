"""Studies of one image that wait in the queue: done one by one, and with shared batches of the network.

Usage: ``python scripts/measure_shared_batches.py [--studies 64] [--repeat 3] [--small] [--json FILE]``. A worker
on the CPU engine takes them from a queue of its own data folder to committed SEG or SR; the network is
DenseNet-121 with random weights (``--small``: two convolutions, so that all but the network shows). Both ways take
turns. What is told: seconds on the clock and of the processors for all studies, and of their networks alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
from benchmarks.graphs import SIDE, densenet  # noqa: E402

from dicomnode import logs  # noqa: E402
from dicomnode.demo.radiograph import radiograph, to_dataset  # noqa: E402
from dicomnode.durable import ObjectStore  # noqa: E402
from dicomnode.identity import derived_uid  # noqa: E402
from dicomnode.index.database import Database  # noqa: E402
from dicomnode.index.jobs import Request  # noqa: E402
from dicomnode.infer.choice import EngineChoice, limits_of  # noqa: E402
from dicomnode.infer.ort import OnnxRuntimeCpu  # noqa: E402
from dicomnode.infer.stages.golden import case_volume  # noqa: E402
from dicomnode.infer.stages.manifest import StagedManifest  # noqa: E402
from dicomnode.infer.stages.run import run_staged  # noqa: E402
from dicomnode.settings import Settings  # noqa: E402

MODEL = "triage"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all studies: seconds on the clock and of the processors, and of the network's stage on the clock."""

    batch_studies: int
    wall: float
    processor: float
    network: float
    shared: float
    """Studies in a batch, on average."""


def bundle(folder: Path, *, small: bool) -> None:
    """The network as a bundle that takes radiographs; its golden answers come from the CPU engine."""
    from tests.infer.radiograph_case import CLASSES
    from tests.infer.stages.bundle_case import CODE, golden, manifest, npy, write

    grey = radiograph(mm=1.0).pixels[np.newaxis].astype("<i2")
    onnx = densenet((2,), 8) if small else densenet()
    data = manifest(
        identity={
            "name": MODEL, "version": "1.0.0", "manufacturer": "dicomnode project",
            "device_uid": derived_uid("model", MODEL), "description": "Random weights, for measuring",
        },
        input={"kind": "projection", "modalities": ["DX"], "sop_classes": list(CLASSES)},
        preprocess=[
            {"step": "resize", "size": [None, SIDE, SIDE]},
            {"step": "scale_range", "low": 0, "high": 4095, "out_low": 0, "out_high": 1},
        ],
        engine={
            "model": "model.onnx", "input": "x", "scores": ["y"],
            "reach": {"kind": "neighbours", "channels": 3, "axis": 0},
        },
        activations=[],
        decision=None,
        postprocess=[],
        outputs={"findings": [{"key": "urgent", "name": CODE, "output": "y", "index": 0, "activation": "softmax"}]},
    )  # fmt: skip
    contents = {"model.onnx": onnx, "golden/one.npy": npy(grey)}
    case = golden(white=4095.0, affine=np.eye(4).tolist(), findings={"urgent": 0.0})
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    draft = StagedManifest.model_validate({**data, "golden": [case], "files": files})
    session = OnnxRuntimeCpu().load(onnx)
    analysis = run_staged(draft, session, case_volume(draft.golden[0], contents.__getitem__))
    session.close()
    case["findings"] = {f.key: f.probability for f in analysis.findings}
    write(folder, {**data, "golden": [case]}, contents)


def series_of(number: int, base: Any) -> Any:
    """The radiograph as another study, its grey values moved by the number."""
    from tests.e2e.harness import Series

    ds = to_dataset(base, "DX")
    grey = np.frombuffer(ds.PixelData, "<u2")
    ds.PixelData = np.minimum(grey + number % 16, 4095).astype("<u2").tobytes()
    ds.PatientID = f"P{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = (
        derived_uid("shared batches", kind, str(number)) for kind in ("study", "series", "image")
    )
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return Series([ds])


def measure(models: Path, studies: int, batch_studies: int, threads: int) -> Figures:
    from tests.infer.life_case import add_series, worker_on

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            node={"data_dir": Path(folder) / "data", "reserve_mb": 1},
            inference={
                "engine": "onnxruntime-cpu", "models_dir": models, "batch_studies": batch_studies, "threads": threads,
            },
        )  # fmt: skip
        ObjectStore(settings.node.data_dir).prepare()
        db = Database(settings.node.data_dir)
        choice = EngineChoice("onnxruntime-cpu", [OnnxRuntimeCpu()], threads=threads, limits=limits_of(settings))
        worker = worker_on(settings, db, choice)
        base = radiograph(mm=1.0)
        for number in range(studies + 1):
            add_series(db, series_of(number, base), requests=[Request(MODEL, ("r",), ("pacs",), "routine")])
            if number == 0:
                worker.run_once()  # the model is loaded and all is warm
        begin, used = time.perf_counter(), time.process_time()
        while worker.run_once():
            pass
        wall, processor = time.perf_counter() - begin, time.process_time() - used
        rows = db.rows("SELECT state, seconds, batch_studies FROM jobs WHERE id > 1")
        assert [r["state"] for r in rows] == ["done"] * studies
        network = sum(json.loads(r["seconds"])["inference"] for r in rows)
        shared = studies / sum(1 / max(1, r["batch_studies"]) for r in rows)
        db.close()
    return Figures(batch_studies, wall, processor, network, shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a network of next to no cost")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0: all cores")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logs.configure("measure", "error", "console")
    found: dict[int, list[Figures]] = {size: [] for size in options.sizes}
    with tempfile.TemporaryDirectory() as models:
        bundle(Path(models), small=options.small)
        for turn in range(options.repeat):
            for size in options.sizes if turn % 2 == 0 else options.sizes[::-1]:
                found[size].append(measure(Path(models), options.studies, size, options.threads))
    print(f"{options.studies} studies of one image, {os.cpu_count()} cores, best of {options.repeat}")
    print("batch_studies  in a batch  clock s  processors s  network s  studies/s")
    for size, runs in found.items():
        wall, processor, network = (min(getattr(r, name) for r in runs) for name in ("wall", "processor", "network"))
        print(
            f"{size:>13}  {runs[0].shared:>10.1f}  {wall:>7.2f}  {processor:>12.2f}  {network:>9.2f}"
            f"  {options.studies / wall:>9.1f}"
        )
    if options.json:
        told = {size: [asdict(r) for r in runs] for size, runs in found.items()}
        options.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
