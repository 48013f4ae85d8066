"""Which engine serves which model, what is built beside serving, and what a job does when its engine fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dicomnode import metrics
from dicomnode.durable import ObjectStore
from dicomnode.errors import EngineError
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events
from dicomnode.infer import choice as choice_module
from dicomnode.infer import verification
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.choice import AGAIN_SECONDS, MAX_BUILDS, EngineChoice, NotBuilt, candidates, engine_text
from dicomnode.infer.cuda import CudaError
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.engine import Engine, Limits
from dicomnode.infer.golden import gate
from dicomnode.infer.isolated import inline
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.serving import ServingModels
from dicomnode.infer.trt import TensorRt
from dicomnode.infer.trt_build import Toolkit, probe
from dicomnode.infer.upgrades import MAX_BROKEN
from dicomnode.infer.worker import Worker
from dicomnode.settings import Settings
from tests.index.rows import job
from tests.infer.fake_cuda import FakeCuda
from tests.infer.fake_trt import FakeTrt
from tests.infer.infer_case import copy_bundle, edit_manifest, replace_file
from tests.infer.test_engines_contract import ONNX, fake_ort_gpu, fake_tensorrt
from tests.peers import wait_for

LIMITS = Limits(max_batch=8)
FP16 = ONNX + b"\x32\x04fp16"
"""The model with a doc_string: other bytes, same network."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """ct-lung with one golden case and an FP16 file."""
    path = copy_bundle(tmp_path / "models")
    edit_manifest(path, lambda m: m.update(golden=m["golden"][:1]))
    replace_file(path, "fp16mixed.onnx", FP16)
    return path


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "data")
    yield made
    made.close()


def spoil(fp16: bool = True, fp32: bool = False) -> Callable[[bytes, dict], dict]:
    """Black masks, as they are reported of FP16 engines of nnU-Nets (GPU.md)."""

    def outputs(onnx: bytes, values: dict) -> dict:
        wrong = fp16 if onnx == FP16 else fp32
        return {n: np.zeros_like(v) if wrong else v for n, v in values.items()}

    return outputs


def box(tmp_path: Path) -> tuple[tuple[Engine, ...], FakeTrt, FakeCuda]:
    """A box with all three engines."""
    tensorrt, trt = fake_tensorrt(tmp_path / "data")
    cuda = FakeCuda()
    return (tensorrt, fake_ort_gpu(cuda), OnnxRuntimeCpu()), trt, cuda


def fallbacks(engine: str, code: str) -> float:
    labels = {"engine": engine, "code": code}
    return metrics.REGISTRY.get_sample_value("dicomnode_inference_fallbacks_total", labels) or 0.0


def test_order_of_candidates(tmp_path: Path) -> None:
    engines, _, _ = box(tmp_path)
    assert [c.text for c in candidates(engines, ["model.onnx"])] == [
        "tensorrt fp32",
        "onnxruntime-gpu fp32",
        "onnxruntime-cpu fp32",
    ]
    assert [c.text for c in candidates(engines, ["model.onnx", "fp16mixed.onnx"])][:2] == [
        "tensorrt fp16",
        "tensorrt fp32",
    ]


def test_nothing_is_built_in_the_path_of_a_study(tmp_path: Path, bundle: Path) -> None:
    engines, trt, _ = box(tmp_path)
    opened = EngineChoice("auto", engines, limits=LIMITS).open(bundle)
    assert engine_text(opened.model) == "onnxruntime-gpu fp32" and opened.better
    assert not trt.builds


def test_half_precision_serves_where_it_is_right(tmp_path: Path, bundle: Path) -> None:
    engines, trt, _ = box(tmp_path)
    opened = EngineChoice("auto", engines, limits=LIMITS).open(bundle, build=True)
    assert opened.model.session.engine == "tensorrt 10.4.0 fp16" and not opened.better
    assert opened.model.report.passed and len(trt.builds) == 1


def test_fp16_out_of_tolerance_then_fp32_then_the_next_engine(tmp_path: Path, bundle: Path) -> None:
    engines, trt, _ = box(tmp_path)
    before = fallbacks("tensorrt", "GOLDEN_MISMATCH")
    trt.faults.outputs = spoil(fp16=True)
    choice = EngineChoice("auto", engines, limits=LIMITS)
    assert engine_text(choice.open(bundle, build=True).model) == "tensorrt fp32"
    assert fallbacks("tensorrt", "GOLDEN_MISMATCH") == before + 1
    trt.faults.outputs = spoil(fp16=True, fp32=True)
    choice = EngineChoice("auto", engines, limits=LIMITS)
    opened = choice.open(bundle, build=True)
    assert engine_text(opened.model) == "onnxruntime-gpu fp32"
    digest = opened.model.bundle.digest
    assert [(r.engine, r.code) for r in choice.refusals(digest)] == [
        ("tensorrt fp16", "GOLDEN_MISMATCH"),
        ("tensorrt fp32", "GOLDEN_MISMATCH"),
    ]
    builds = len(trt.builds)
    choice.open(bundle, build=True)  # what failed is remembered
    assert len(trt.builds) == builds


@pytest.mark.parametrize(("words", "code"), [("no implementation for node", "BUILD_FAILED"), ("out of memory", "OOM")])
def test_what_cannot_be_built_falls_to_the_next_for_this_model_only(
    tmp_path: Path, bundle: Path, words: str, code: str
) -> None:
    engines, trt, _ = box(tmp_path)
    trt.faults.build = words
    choice = EngineChoice("auto", engines, limits=LIMITS)
    opened = choice.open(bundle, build=True)
    assert engine_text(opened.model) == "onnxruntime-gpu fp32"
    assert [r.code for r in choice.refusals(opened.model.bundle.digest)] == [code, code]
    trt.faults.build = None
    other = copy_bundle(tmp_path / "other")
    edit_manifest(other, lambda m: m.update(golden=m["golden"][:1]))
    assert engine_text(choice.open(other, build=True).model) == "tensorrt fp32"


def test_a_named_engine_never_falls_back(tmp_path: Path, bundle: Path) -> None:
    engines, trt, _ = box(tmp_path)
    choice = EngineChoice("tensorrt", engines, limits=LIMITS)
    with pytest.raises(NotBuilt) as caught:
        choice.open(bundle)
    assert caught.value.code == "BUILDING"
    trt.faults.outputs = spoil(fp16=True, fp32=True)
    with pytest.raises(EngineError) as caught:
        choice.open(bundle, build=True)
    assert caught.value.code == "GOLDEN_MISMATCH"
    trt.faults.outputs = spoil(fp16=True)
    model = EngineChoice("tensorrt", engines, limits=LIMITS).open(bundle, build=True).model
    assert engine_text(model) == "tensorrt fp32" and not choice.has_other(model)


def test_rejections_at_start_are_counted_and_kept(tmp_path: Path, bundle: Path) -> None:
    before = fallbacks("tensorrt", "LIB_MISSING")
    engines = (type(fake_tensorrt(tmp_path)[0])(tmp_path), OnnxRuntimeCpu())
    choice = EngineChoice("auto", engines, limits=LIMITS)
    assert [(r.engine, r.code) for r in choice.rejected] == [("tensorrt", "LIB_MISSING")]
    assert fallbacks("tensorrt", "LIB_MISSING") == before + 1
    with pytest.raises(EngineError):
        EngineChoice("tensorrt", engines, limits=LIMITS)


def test_a_lost_gpu_leaves_the_cpu(tmp_path: Path, bundle: Path) -> None:
    engines, trt, _ = box(tmp_path)
    engines[0].build(ONNX, "fp32")
    trt.cuda.fail["launch"] = trt.cuda.fail["synchronise"] = CudaError("synchronise stream", 700, "illegal address")
    opened = EngineChoice("auto", engines, limits=LIMITS).open(bundle)
    assert engine_text(opened.model) == "onnxruntime-cpu fp32"  # the context is one for both GPU engines


def test_a_full_gpu_is_no_fault_of_the_bundle(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden case does not fit: another engine serves, and by name the error says what to do, and passes."""
    engines, trt, _ = box(tmp_path)
    for precision, onnx in (("fp32", ONNX), ("fp16", FP16)):
        engines[0].build(onnx, precision)
    trt.cuda.fail["allocate"] = CudaError("allocate device memory", 2, "out of memory")
    choice = EngineChoice("auto", engines, limits=LIMITS)
    opened = choice.open(bundle)
    assert engine_text(opened.model) == "onnxruntime-gpu fp32"
    assert {r.code for r in choice.refusals(opened.model.bundle.digest)} == {"OOM"}
    with pytest.raises(EngineError) as caught:
        EngineChoice("tensorrt", engines, limits=LIMITS).open(bundle)
    assert caught.value.code == "OOM"
    monkeypatch.setattr("dicomnode.infer.engine.default_engines", lambda *_: engines)
    task = {"path": str(bundle), "engine": "tensorrt", "data_dir": str(tmp_path), "build": False, "threads": 1}
    told = verification._verify({**task, "max_batch": 8, "gpu_memory_share": 0.8, "memory_mb": 64})
    assert (told["kind"], told["code"]) == ("engine", "OOM"), "a pulled bundle is tried again, not rejected"


def test_a_golden_case_of_either_schema_says_that_the_device_failed(bundle: Path) -> None:
    class Full:
        engine, precision = "tensorrt 10", "fp32"

        def run(self, inputs: object) -> dict:
            raise EngineError("run model", "OOM", "CUDA error 2")

        def close(self) -> None:
            """Nothing to release."""

    unet = Path(__file__).resolve().parents[2] / "models" / "ct-lung-unet" / "1.0.0"
    for path in (bundle, unet):
        with pytest.raises(EngineError, match="free GPU memory") as caught:
            gate(load_bundle(path), Full())
        assert caught.value.code == "OOM"


def serving(db: Database, tmp_path: Path, choice: EngineChoice, on_better: Callable[[], None]) -> ServingModels:
    folders = {"models_dir": tmp_path / "models", "data_dir": tmp_path / "data"}
    return ServingModels(db, choice, threads=1, on_better=on_better, **folders)


def test_the_next_engine_serves_while_one_is_built_then_they_swap(db: Database, tmp_path: Path, bundle: Path) -> None:
    engines, _, cuda = box(tmp_path)
    go, better = threading.Event(), threading.Event()
    build = engines[0].build

    def slowly(onnx: bytes, precision: str, report=None) -> None:
        report("half way", 0.5)
        assert go.wait(20)
        build(onnx, precision, report)

    engines[0].build = slowly
    models = serving(db, tmp_path, EngineChoice("auto", engines, limits=LIMITS), better.set)
    model = models.get("ct-lung")
    assert engine_text(model) == "onnxruntime-gpu fp32"
    assert models.get("ct-lung") is model
    report = models.report()
    assert set(report["building"]) == {"ct-lung@1.0.0"}
    assert report["ready"]["ct-lung"]["engine"].startswith("onnxruntime-gpu")
    go.set()
    assert better.wait(20)
    swapped = models.get("ct-lung")
    assert swapped.session.engine == "tensorrt 10.4.0 fp16" and swapped.report.passed
    assert models.report()["building"] == {} and models.get("ct-lung") is swapped
    models.prepare([])  # between jobs
    assert not cuda.hosts  # the one before gave back what it held
    labels = {"model": "ct-lung", "version": "1.0.0", "engine": "tensorrt", "precision": "fp16"}
    assert metrics.REGISTRY.get_sample_value("dicomnode_inference_engine_info", labels) == 1
    labels |= {"engine": "onnxruntime-gpu", "precision": "fp32"}
    assert metrics.REGISTRY.get_sample_value("dicomnode_inference_engine_info", labels) is None


def test_a_build_that_fails_leaves_the_next_engine_and_says_why(db: Database, tmp_path: Path, bundle: Path) -> None:
    engines, trt, _ = box(tmp_path)
    trt.faults.outputs = spoil(fp16=True, fp32=True)
    choice = EngineChoice("auto", engines, limits=LIMITS)
    done = threading.Event()
    upgrade = choice.upgrade

    def told(path: Path, than: str, report) -> object:
        try:
            return upgrade(path, than, report)
        finally:
            done.set()

    choice.upgrade = told
    models = serving(db, tmp_path, choice, lambda: None)
    model = models.get("ct-lung")
    assert done.wait(20)
    assert models.get("ct-lung") is model and engine_text(model) == "onnxruntime-gpu fp32"
    assert [r.partition(":")[0] for r in models.report()["ready"]["ct-lung"]["rejected"]] == [
        "tensorrt fp16 GOLDEN_MISMATCH",
        "tensorrt fp32 GOLDEN_MISMATCH",
    ]


def test_a_named_engine_is_built_and_serves_then(db: Database, tmp_path: Path, bundle: Path) -> None:
    engines, _, _ = box(tmp_path)
    better = threading.Event()
    models = serving(db, tmp_path, EngineChoice("tensorrt", engines, limits=LIMITS), better.set)
    models.prepare(["ct-lung"])
    assert "BUILDING" in models.report()["failed"]["ct-lung"]
    assert Events(db).listing()[0]["severity"] == "info"
    assert better.wait(20)
    assert engine_text(models.get("ct-lung")) == "tensorrt fp16"
    assert models.report()["failed"] == {}


def test_a_named_engine_whose_build_fails_is_built_three_times_and_then_says_so(
    db: Database, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else may serve; a build that fails or never ends must not fill the GPU for ever without a word."""
    moment = [1000.0]
    monkeypatch.setattr(choice_module.time, "monotonic", lambda: moment[0])
    engines, trt, _ = box(tmp_path)
    trt.faults.build = "Could not find any implementation for node conv1"
    begun = []
    build = engines[0].build
    engines[0].build = lambda onnx, precision, report=None: (begun.append(precision), build(onnx, precision, report))
    choice = EngineChoice("tensorrt", engines, limits=LIMITS)

    def round_(expected: str) -> EngineError:
        with pytest.raises(EngineError) as caught:
            choice.open(bundle)
        assert caught.value.code == expected
        return caught.value

    for count in range(1, MAX_BUILDS + 1):
        round_("BUILDING")
        assert choice.upgrade(bundle, "", lambda *_: None) is None
        assert begun == ["fp16", "fp32"] * count
        told = round_("BUILD_FAILED")
        assert "Could not find any implementation" in told.cause and "tensorrt fp32" in told.cause
        assert choice.upgrade(bundle, "", lambda *_: None) is None and len(begun) == 2 * count, "not at once"
        moment[0] += AGAIN_SECONDS
    assert "not again before the worker is restarted" in round_("BUILD_FAILED").hint
    moment[0] += 1e6
    round_("BUILD_FAILED")
    assert len(begun) == 2 * MAX_BUILDS
    models = serving(db, tmp_path, choice, lambda: None)
    for _ in range(2):
        models.prepare(["ct-lung"])
        moment[0] += 100
    [event] = Events(db).listing()
    assert event["severity"] == "error" and "inference.engine = 'auto'" in event["text"]


def damage(tmp_path: Path) -> None:
    for plan in (tmp_path / "data" / "engines").glob("*.plan"):
        plan.write_bytes(plan.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("setting", ["auto", "tensorrt"])
def test_a_damaged_plan_is_built_again_beside_serving(db: Database, tmp_path: Path, bundle: Path, setting: str) -> None:
    """A disk that lost a block: the next engine serves at once, nothing is built in the path of a study."""
    engines, trt, _ = box(tmp_path)
    for precision, onnx in (("fp32", ONNX), ("fp16", FP16)):
        engines[0].build(onnx, precision)
    damage(tmp_path)
    go, better, build, threads = threading.Event(), threading.Event(), engines[0].build, []

    def slowly(onnx: bytes, precision: str, report=None) -> None:
        threads.append(threading.current_thread())
        assert go.wait(20)
        build(onnx, precision, report)

    engines[0].build = slowly
    models = serving(db, tmp_path, EngineChoice(setting, engines, limits=LIMITS), better.set)
    if setting == "auto":
        served = models.get("ct-lung")
        assert engine_text(served) == "onnxruntime-gpu fp32" and not models.settled(served)
    else:
        with pytest.raises(NotBuilt):
            models.get("ct-lung")
    go.set()
    assert better.wait(20)
    assert threading.main_thread() not in threads and len(trt.builds) == 3
    served = models.get("ct-lung")
    assert engine_text(served) == "tensorrt fp16" and models.settled(served)


def test_memory_that_was_short_for_a_while_is_asked_for_again(
    db: Database, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model serves on the next engine meanwhile; it needs no restart to come back."""
    engines, trt, _ = box(tmp_path)
    for precision, onnx in (("fp32", ONNX), ("fp16", FP16)):
        engines[0].build(onnx, precision)
    trt.cuda.fail["allocate"] = CudaError("allocate device memory", 2, "out of memory")
    moment, better = [1000.0], threading.Event()
    monkeypatch.setattr(choice_module.time, "monotonic", lambda: moment[0])
    models = serving(db, tmp_path, EngineChoice("auto", engines, limits=LIMITS), better.set)
    served = models.get("ct-lung")
    assert engine_text(served) == "onnxruntime-gpu fp32" and not models.settled(served)
    assert models.get("ct-lung") is served and models.report()["building"] == {}
    del trt.cuda.fail["allocate"]
    moment[0] += AGAIN_SECONDS
    models.get("ct-lung")
    assert better.wait(20)
    assert engine_text(models.get("ct-lung")) == "tensorrt fp16"


def test_a_gpu_that_is_full_when_the_worker_starts_is_looked_at_again(
    db: Database, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the probe finds memory: the CPU serves, and no restart is needed when it is back."""
    trt, full = FakeTrt(), [True]

    def open_tools() -> Toolkit:
        if full[0]:
            raise EngineError("open GPU", "OOM", "cuCtxCreate failed: out of memory")
        return Toolkit(trt, trt.cuda)

    moment, better = [1000.0], threading.Event()
    monkeypatch.setattr(choice_module.time, "monotonic", lambda: moment[0])
    tensorrt = TensorRt(tmp_path / "data", LIMITS, open_tools=open_tools, run_child=inline, missing=lambda: None)
    choice = EngineChoice("auto", (tensorrt, OnnxRuntimeCpu()), limits=LIMITS)
    assert [(r.engine, r.code) for r in choice.rejected] == [("tensorrt", "OOM")]
    models = serving(db, tmp_path, choice, better.set)
    served = models.get("ct-lung")
    assert engine_text(served) == "onnxruntime-cpu fp32" and not models.settled(served)
    moment[0] += AGAIN_SECONDS
    models.get("ct-lung")
    wait_for(lambda: not models.report()["building"], 20, "it was looked at, and is full still")
    assert not better.is_set() and choice.engines[0].name == "onnxruntime-cpu"
    full[0] = False
    moment[0] += AGAIN_SECONDS
    models.get("ct-lung")
    assert better.wait(20)
    served = models.get("ct-lung")
    assert engine_text(served) == "tensorrt fp16" and models.settled(served) and choice.rejected == ()


def test_a_builder_without_memory_is_a_full_gpu_and_no_wrong_version() -> None:
    class Full(FakeTrt):
        def Builder(self, logger: object) -> None:
            raise CudaError("create builder", 2, "out of memory")

    trt = Full()
    with pytest.raises(EngineError) as caught:
        probe(lambda *_: None, lambda: Toolkit(trt, trt.cuda))
    assert caught.value.code == "OOM"


def test_an_upgrade_that_breaks_is_not_begun_for_ever(
    db: Database, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, _, _ = box(tmp_path)
    choice, began = EngineChoice("auto", engines, limits=LIMITS), []

    def broken(*_: object) -> None:
        began.append(1)
        raise RuntimeError("a bug")

    choice.upgrade = broken
    models = serving(db, tmp_path, choice, lambda: None)

    def idle() -> bool:
        models.get("ct-lung")
        return models._upgrades._broken[bundle] == MAX_BROKEN and not models.report()["building"]

    wait_for(idle, 20, "it was given up")
    models.get("ct-lung")
    assert models.report()["building"] == {} and len(began) == MAX_BROKEN


def test_what_was_built_for_nobody_is_closed(db: Database, tmp_path: Path, bundle: Path) -> None:
    """An engine that came too late, and a spare one, of a model that no rule wants any more."""
    engines, _, cuda = box(tmp_path)
    better = threading.Event()
    models = serving(db, tmp_path, EngineChoice("auto", engines, limits=LIMITS), better.set)
    spare = models.other(models.get("ct-lung"))
    assert spare is not None and better.wait(20)
    models.keep(["ct-lung"])
    assert models._upgrades._done, "it is to be taken"
    hu = {"hu": np.zeros((1, 1, 8, 8), np.float32)}
    assert spare.session.run(hu)
    models.keep([])
    models.prepare([])
    assert not models._upgrades._done and not cuda.hosts
    with pytest.raises(EngineError, match="closed"):
        spare.session.run(hu)


class FailingModel:
    """A ReadyModel whose engine fails with ``code``."""

    def __init__(self, code: str, name: str = "tensorrt") -> None:
        self.code, self.ran = code, 0
        self.session = type("S", (), {"engine": f"{name} 1"})()
        self.identity = type("I", (), {"name": "ct-lung", "version": "1.0.0"})()

    def analyse(self, sources: object, **options: object) -> None:
        self.ran += 1
        raise EngineError("run model", self.code, "CUDA error 700")


class Models:
    def __init__(self, first: FailingModel, second: FailingModel | None) -> None:
        self.first, self.second = first, second

    def for_job(self, reference: str, record: object) -> FailingModel:
        return self.first

    def other(self, model: FailingModel) -> FailingModel | None:
        return self.second

    def settled(self, model: FailingModel) -> bool:
        return True

    def hold(self, model: FailingModel) -> None:
        """Nothing takes its place here."""

    def let_go(self, model: FailingModel) -> None:
        """As :meth:`hold`."""


def run_job(db: Database, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    monkeypatch.setattr("dicomnode.infer.worker.intact", lambda source: True)
    job_id, ended = job(db), []
    store = ObjectStore(tmp_path / "data")
    store.prepare()
    settings = Settings(node={"data_dir": tmp_path / "data"})
    worker = Worker(
        settings,
        db,
        models,
        lambda *_: (),
        owner="w",
        decoder=InlineDecoder(),
        on_results=lambda: None,
        on_lost=lambda: ended.append(Jobs(db).show(job_id)["state"]),
    )
    assert worker.run_once()
    return job_id, ended


def test_a_sticky_error_hands_the_lease_back_and_ends_the_process(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = FailingModel("RUN_FAILED", "onnxruntime-cpu")
    job_id, ended = run_job(db, tmp_path, Models(FailingModel("DEVICE_LOST"), spare), monkeypatch)
    assert ended == ["pending"]  # in this order: given back, then ended
    shown = Jobs(db).show(job_id)
    assert shown["attempts"] == 1 and "DEVICE_LOST" in shown["last_error"] and shown["lease_owner"] is None
    assert spare.ran == 0
    assert Events(db).listing(kind="device-lost")


def test_after_a_sticky_error_the_next_engine_does_the_job(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, spare = FailingModel("DEVICE_LOST"), FailingModel("RUN_FAILED", "onnxruntime-cpu")
    job_id, _ = run_job(db, tmp_path, Models(first, spare), monkeypatch)
    db.execute("UPDATE jobs SET next_at = 0 WHERE id = ?", (job_id,))
    worker = Worker(
        Settings(node={"data_dir": tmp_path / "data"}),
        db,
        Models(first, spare),
        lambda *_: (),
        owner="w",
        decoder=InlineDecoder(),
        on_results=lambda: None,
    )
    assert worker.run_once()
    assert first.ran == 1 and spare.ran >= 1


@pytest.mark.parametrize("code", ["OOM", "SHAPE", "RUN_FAILED"])
def test_another_engine_is_tried_before_later(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    spare = FailingModel("OOM", "onnxruntime-cpu")
    before = fallbacks("tensorrt", code)
    job_id, ended = run_job(db, tmp_path, Models(FailingModel(code), spare), monkeypatch)
    assert spare.ran == 1 and not ended and fallbacks("tensorrt", code) == before + 1
    assert Jobs(db).show(job_id)["state"] == "pending"


def test_other_engine_of_a_served_model(db: Database, tmp_path: Path, bundle: Path) -> None:
    engines, _, _ = box(tmp_path)
    models = serving(db, tmp_path, EngineChoice("auto", engines, limits=LIMITS), lambda: None)
    model = models.get("ct-lung")
    other = models.other(model)
    assert engine_text(model) == "onnxruntime-gpu fp32"
    assert other is not None and engine_text(other) == "onnxruntime-cpu fp32"
    assert models.other(model) is other and models.other(other) is None
