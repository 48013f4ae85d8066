"""A small classifier of single images, studies of one image for it, and a worker whose network can be trapped.

``python -m tests.infer.sharing_case``: reads data folders with a phase from stdin, forks a child for each that
does the jobs in it until it kills itself with SIGKILL in that phase; tells the signal, or the jobs' end by 0.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from dicomnode import logs
from dicomnode.errors import EngineError
from dicomnode.identity import derived_uid
from dicomnode.index import sharing
from dicomnode.index.database import Database
from dicomnode.index.jobs import Request
from dicomnode.infer import together
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.stages.golden import case_volume, measured
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.run import run_staged
from dicomnode.infer.worker import Worker
from dicomnode.settings import Settings
from tests.e2e.harness import Series
from tests.infer.life_case import add_series, worker_on
from tests.infer.radiograph_case import CLASSES, image
from tests.infer.stages.bundle_case import CODE, golden, manifest, measurement, npy, onnx_bytes, segment, write

SIDE = 16
POISON = 4095
"""Grey value of all pixels of an image on which a :class:`Trap` closes; others stay below it."""


def network(
    *, seed: int = 3, mixes: bool = False, one_row: bool = False, scores: bool = True, quantised: bool = False
) -> bytes:
    """Two convolutions, a dense answer ``y`` and two scores ``s``. ``mixes``: half the mean of the batch is taken
    off each row; ``one_row``: it takes no batch of more than one; without ``scores`` images of any size;
    ``quantised``: the scores are of 8 bits, whose scale is that of the brightest row of the batch.
    """
    random = np.random.default_rng(seed)
    weights: dict[str, Any] = {
        "a": random.normal(size=(8, 1, 3, 3)).astype(np.float32) / 3,
        "b": random.normal(size=(1, 8, 3, 3)).astype(np.float32) / 8,
        "d": random.normal(size=(SIDE * SIDE, 2)).astype(np.float32) / SIDE,
        "half": np.float32(0.5),
        "shape": np.array([1 if one_row else 0, SIDE * SIDE], np.int64),
    }
    nodes, seen = [], "x"
    if mixes:
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Mul", ["m", "half"], ["k"]),
            helper.make_node("Sub", ["x", "k"], ["c"]),
        ]
        seen = "c"
    nodes += [
        helper.make_node("Conv", [seen, "a"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["y"], pads=[1, 1, 1, 1]),
    ]
    if not scores:
        return onnx_bytes(nodes, ["y"], 4, {name: weights[name] for name in ("a", "b")})
    nodes.append(helper.make_node("Reshape", ["y", "shape"], ["f"]))
    if quantised:
        step = np.float32(np.abs(weights["d"]).max() / 127)
        weights["d"] = np.round(weights["d"] / step).astype(np.int8)
        weights |= {"step": step, "prior": np.array([2, -2], np.float32)}
        nodes += [
            helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["q", "d", "zero"], ["i"]),
            helper.make_node("Cast", ["i"], ["w"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["scale", "step"], ["t"]),
            helper.make_node("Mul", ["w", "t"], ["p"]),
            helper.make_node("Add", ["p", "prior"], ["s"]),
        ]
    else:
        nodes.append(helper.make_node("MatMul", ["f", "d"], ["s"]))
    return onnx_bytes(nodes, ["y", "s"], 4, weights)


def triage(folder: Path, version: str = "1.0.0", *, onnx: bytes | None = None, **changes: Any) -> Path:
    """The bundle with its golden answers computed. Images of any size become ``SIDE`` x ``SIDE``."""
    grey = np.random.default_rng(5).integers(0, POISON, (1, SIDE, SIDE)).astype("<i2")
    data = manifest(
        identity={
            "name": "triage", "version": version, "manufacturer": "tests", "device_uid": "2.25.1",
            "description": "test",
        },
        input={"kind": "projection", "modalities": ["DX"], "sop_classes": list(CLASSES), "min_side": 2},
        preprocess=[
            {"step": "scale_range", "low": 0, "high": 4095, "out_low": 0, "out_high": 1},
            {"step": "resize", "size": [None, SIDE, SIDE], "order": "linear"},
        ],
        engine={
            "model": "model.onnx", "input": "x", "outputs": ["y"], "scores": ["s"],
            "reach": {"kind": "slices", "axis": 0, "batch": 1},
        },
        activations=[{"step": "sigmoid", "output": "y"}],
        decision={"step": "threshold", "output": "y", "threshold": 0.5},
        postprocess=[],
        outputs={
            "segments": [segment(1, "bright")],
            "measurements": [measurement("mean", kind="mean")],
            "findings": [{"key": "urgent", "name": CODE, "output": "s", "index": 1, "activation": "sigmoid"}],
        },
        golden=[],
    ) | changes  # fmt: skip
    contents = {"model.onnx": network() if onnx is None else onnx, "golden/one.npy": npy(grey)}
    if not data["golden"]:
        case = golden(
            labels="golden/labels.npy", white=4095.0, affine=np.eye(4).tolist(), measurements={"bright.mean": 0.0},
            findings={f["key"]: 0.5 for f in data["outputs"].get("findings", [])},
        )  # fmt: skip
        names = ["MODEL_CARD.md", "golden/labels.npy", *contents]
        parsed = StagedManifest.model_validate({**data, "golden": [case], "files": dict.fromkeys(names, "0" * 64)})
        session = OnnxRuntimeCpu().load(contents["model.onnx"], threads=1)
        analysis = run_staged(parsed, session, case_volume(parsed.golden[0], contents.__getitem__))
        session.close()
        assert analysis.labels is not None
        contents["golden/labels.npy"] = npy(analysis.labels)
        case["findings"] = {f.key: f.probability for f in analysis.findings}
        case["measurements"] = measured(parsed, analysis)
        data["golden"] = [case]
    return write(folder, data, contents)


def settings_of(folder: Path, **inference: Any) -> Settings:
    return Settings(
        node={"data_dir": folder / "data", "reserve_mb": 1},
        inference={
            "engine": "onnxruntime-cpu",
            "models_dir": folder / "models",
            "threads": 1,
            "batch_studies": 16,
            **inference,
        },
        rollout={"automatic": False},
    )


def study(number: int, *, images: int = 1, poison: bool = False, **attributes: Any) -> Series:
    """Random grey values, other ones for each number; the images of two numbers are of different size."""
    random = np.random.default_rng(number)
    datasets = []
    for one in range(images):
        shape = (SIDE + number % 5, SIDE + one)
        plane = np.full(shape, POISON) if poison else random.integers(0, POISON, shape)
        ds = image(plane.astype(np.uint16), **{"PatientID": f"P{number}", **attributes})
        ds.StudyInstanceUID = derived_uid("sharing", "study", str(number))
        ds.SeriesInstanceUID = derived_uid("sharing", "series", str(number))
        ds.SOPInstanceUID = derived_uid("sharing", "image", str(number), str(one))
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.InstanceNumber = one + 1
        datasets.append(ds)
    return Series(datasets)


def queue(db: Database, number: int, *, priority: str = "routine", model: str = "triage", **of_study: Any) -> int:
    """A study in the index with its job; the job's id."""
    return add_series(db, study(number, **of_study), requests=[Request(model, ("rule",), ("pacs",), priority)])


class Trap:
    """Stands before a worker's network: keeps how many rows it gets, and can fail on them.

    ``on(inputs)`` is called with each batch and may raise.
    """

    def __init__(self, worker: Worker, on: Callable[[Mapping[str, np.ndarray]], None] | None = None) -> None:
        self.rows: list[int] = []
        self.on = on
        capped = worker._models.get("triage").session  # type: ignore[union-attr]
        self._within = capped._session
        capped._session = self

    engine = "onnxruntime-cpu 1.0"

    def run(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        self.rows.append(len(inputs["x"]))
        if self.on is not None:
            self.on(inputs)
        return self._within.run(inputs)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._within.close()


def poisoned(code: str) -> Callable[[Mapping[str, np.ndarray]], None]:
    """The network fails on a batch with a poisonous image in it."""

    def on(inputs: Mapping[str, np.ndarray]) -> None:
        if any(float(row.min()) >= 1.0 for row in inputs["x"]):
            raise EngineError("run model", code, "a poisonous image")

    return on


def _killing(call: Callable[..., Any], nth: int = 1) -> Callable[..., Any]:
    """``call`` until the ``nth`` time, at whose end the process is killed."""
    count = iter(range(1, nth + 1))

    def done(*arguments: Any, **options: Any) -> Any:
        result = call(*arguments, **options)
        if next(count, nth) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return done


PHASES = ("leased", "third prepared", "batch", "third encoded", "third committed")


def die_in(phase: str, worker: Worker) -> None:
    if phase == "leased":
        sharing.lease_beside = _killing(sharing.lease_beside)
    elif phase == "third prepared":
        together.Together._begun = _killing(together.Together._begun, 3)  # type: ignore[method-assign]
    elif phase == "batch":
        together.run_together = _killing(together.run_together)
    elif phase == "third encoded":
        worker._encode = _killing(worker._encode, 3)
    elif phase == "third committed":
        worker._jobs.finish = _killing(worker._jobs.finish, 3)  # type: ignore[method-assign]
    elif phase == "poison":  # whatever touches the poisonous image kills the process
        Trap(worker, _kills_on_poison)


def _kills_on_poison(inputs: Mapping[str, np.ndarray]) -> None:
    try:
        poisoned("")(inputs)
    except EngineError:
        os.kill(os.getpid(), signal.SIGKILL)


def _child(phase: str, folder: Path) -> None:
    settings = settings_of(folder, max_attempts=3)
    worker = worker_on(settings, Database(settings.node.data_dir))
    die_in(phase, worker)
    while worker.run_once():
        pass


def main() -> None:
    logs.configure("killed", "error", "console")
    for line in sys.stdin:
        phase, _, folder = line.strip().partition(" in ")
        pid = os.fork()
        if pid == 0:
            try:
                _child(phase, Path(folder))
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                os._exit(3)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
