"""Versions and places together: the router decides the version, the placed models decide where it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from onnx import load_model_from_string, shape_inference

from dicomnode.durable import ObjectStore
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import EngineError, NodeError, PeerAway
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.life import Life
from dicomnode.index.operation import Models
from dicomnode.index.runs import Runs
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.engine import Limits
from dicomnode.infer.golden import ReadyModel, open_model
from dicomnode.infer.kserve import KServe
from dicomnode.infer.kserve_tensors import onnx_signature
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.places import REST_SECONDS, Local, Remote, serving_at
from dicomnode.infer.placing import PlacedModels
from dicomnode.infer.serving import ServingModels
from dicomnode.infer.shadow import _engine
from dicomnode.infer.verification import verify_apart
from dicomnode.infer.worker import Worker
from dicomnode.settings import EngineName, Settings
from tests.infer.infer_case import MODEL, golden_report
from tests.infer.kserve_double import HttpDouble, Model
from tests.infer.life_case import add_series, add_version, boxes
from tests.infer.stages.bundle_case import golden, manifest, measurement, npy, segment, two_channels, write
from tests.infer.stages.test_plugins import bundle as pipeline_bundle
from tests.infer.stages.test_plugins import find_pipeline, install
from tests.peers import free_port

ONNX = (MODEL / "model.onnx").read_bytes()
OLD, NEW = ("ct-lung", "1.0.0"), ("ct-lung", "1.1.0")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Case:
    """A worker whose models, in two versions, run on two endpoints."""

    def __init__(self, folder: Path, active: str = "1.0.0") -> None:
        for version in ("1.0.0", "1.1.0"):
            add_version(folder, version)
        self.folder = folder
        self.doubles = [HttpDouble({OLD: Model(ONNX), NEW: Model(ONNX)}).start() for _ in range(2)]
        self.settings = Settings(
            node={"data_dir": folder / "data", "reserve_mb": 1},
            inference={
                "engine": "kserve",
                "models_dir": folder / "models",
                "threads": 1,
                "placement_max_load": 1.0,
                "endpoints": [{"name": f"gpu{n}", "url": d.url, "cost": n} for n, d in enumerate(self.doubles)],
            },
        )
        self.db = Database(folder / "data")
        ObjectStore(folder / "data").prepare()
        self.clock = Clock()
        self.engines = [KServe(endpoint) for endpoint in self.settings.inference.places]
        for engine in self.engines:  # latency on a busy test machine says nothing
            engine.load_of = lambda name: 0.0  # type: ignore[method-assign]
        places = [Remote(e, serving_at(e, self.settings, self.db), self.clock) for e in self.engines]
        self.models = PlacedModels(self.settings, self.db, places)
        self.worker = Worker(
            self.settings,
            self.db,
            self.models,
            lambda *_: (),
            owner="worker",
            decoder=InlineDecoder(),
            on_results=lambda: None,
        )
        if active:
            Models(self.db).activate("ct-lung", active)

    def runs(self, version: str) -> list[str]:
        return [r.state for r in Runs(self.db).recent("ct-lung", version, 9)]

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for double in self.doubles:
            double.stop()
        self.db.close()


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    made.close()


def away(request: Any, good: Any) -> web.Response:
    return web.Response(status=503)


def test_the_canary_gets_its_study_and_a_place(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    Life(case.db).canary("ct-lung", "1.1.0", percent=100.0, who="me")
    assert case.worker.router.canaries() == ["ct-lung@1.1.0"]
    case.models.prepare(["ct-lung", "ct-lung@1.1.0"])
    job_id = add_series(case.db)
    assert case.worker.run_once()
    shown = Jobs(case.db).show(job_id)
    assert shown is not None
    assert (shown["state"], shown["model_version"], shown["summary"]["role"]) == ("done", "1.1.0", "canary")
    assert shown["placement"]["chosen"] == "gpu0" and shown["summary"]["engine"].startswith("kserve gpu0")
    assert case.runs("1.1.0") == ["done"]

    case.models.keep(["ct-lung"])
    assert set(case.models.report()["ready"]) == {"ct-lung"}  # type: ignore[call-overload]


def test_a_canary_without_a_place_is_neither_waited_for_nor_blamed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint that has it is away, the other one lacks it."""
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    Life(case.db).canary("ct-lung", "1.1.0", percent=100.0, who="me")
    del case.doubles[1].models[NEW]
    case.doubles[0].stop()
    job_id = add_series(case.db)
    assert case.worker.run_once()
    shown = Jobs(case.db).show(job_id)
    assert shown is not None
    assert (shown["state"], shown["model_version"], shown["summary"]["role"]) == ("done", "1.0.0", "active")
    assert shown["placement"]["chosen"] == "gpu1"
    assert case.runs("1.1.0") == [] and case.runs("1.0.0") == ["done"]


def test_one_that_answers_and_lacks_the_canary_is_an_error_of_the_canary(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    Life(case.db).canary("ct-lung", "1.1.0", percent=100.0, who="me")
    for double in case.doubles:
        del double.models[NEW]
    add_series(case.db)
    assert case.worker.run_once()
    assert case.runs("1.1.0") == ["error"] and case.runs("1.0.0") == ["done"]


def test_endpoints_that_go_away_in_the_middle_are_no_failure_of_the_version(case: Case) -> None:
    case.models.prepare(["ct-lung"])
    for double in case.doubles:
        double.script = [away]
    job_id = add_series(case.db)
    assert case.worker.run_once()
    shown = Jobs(case.db).show(job_id)
    assert shown is not None and shown["state"] == "pending"
    assert case.runs("1.0.0") == ["stopped"]
    assert case.worker.router.role(job_id) == ""  # let go
    assert not any(place._serving._held for place in case.models._places)


def test_a_job_is_not_finished_with_another_version_than_it_began_with(case: Case) -> None:
    """gpu1 can serve only the version before: what 1.1.0 began there waits, it does not turn into 1.0.0."""
    Models(case.db).activate("ct-lung", "1.1.0")
    del case.doubles[1].models[NEW]
    case.models.prepare(["ct-lung"])
    decisions: list[Any] = []
    model = case.models.for_job("ct-lung", decisions.append)
    assert model.identity.version == "1.1.0"
    case.doubles[0].script = [away]
    job_id = add_series(case.db)
    sources = case.worker.files.sources({"id": job_id})
    with pytest.raises(PeerAway, match=r"gpu1: serves version 1\.0\.0, not 1\.1\.0"):
        model.analyse(sources, decoder=InlineDecoder())
    assert decisions[0]["chosen"] == "gpu0" and decisions[-1]["chosen"] is None
    assert case.models.for_job("ct-lung", decisions.append).identity.version == "1.0.0", "a new attempt may"


def test_what_a_job_runs_on_stays_open_while_another_version_takes_its_place(case: Case) -> None:
    """As when a more urgent job is done in the middle of it, after a swap: that one lets go, and closes."""
    job_id = add_series(case.db)
    model = case.models.for_job("ct-lung", lambda decision: None)
    case.models.hold(model)
    Models(case.db).activate("ct-lung", "1.1.0")
    urgent = case.models.for_job("ct-lung", lambda decision: None)
    assert (model.identity.version, urgent.identity.version) == ("1.0.0", "1.1.0")
    case.models.hold(urgent)
    case.models.let_go(urgent)
    case.models.keep(["ct-lung"])
    sources = case.worker.files.sources({"id": job_id})
    assert model.analyse(sources, decoder=InlineDecoder()).engine.startswith("kserve gpu0")
    case.models.let_go(model)
    with pytest.raises(EngineError, match="closed"):
        model._ready.session.run({"hu": np.zeros((1, 1, 8, 8), np.float32)})


def test_a_staged_version_is_not_what_places_should_serve(tmp_path: Path) -> None:
    """gpu0 has but the release before; the newest but the staged one is at gpu1, and that is where the job goes."""
    case = Case(tmp_path, active="")
    add_version(tmp_path, "0.9.0")
    case.doubles[0].models = {("ct-lung", "0.9.0"): Model(ONNX)}
    Life(case.db).stage("ct-lung", "1.1.0", who="me")
    try:
        decisions: list[Any] = []
        assert case.models.for_job("ct-lung", decisions.append).identity.version == "1.0.0"
        assert decisions[-1]["chosen"] == "gpu1"
    finally:
        case.close()


def with_shapes(onnx: bytes) -> bytes:
    return bytes(shape_inference.infer_shapes(load_model_from_string(onnx)).SerializeToString(deterministic=True))


def lesion(folder: Path, version: str = "1.0.0") -> tuple[Path, bytes]:
    """A bundle of schema 2 in 3-D: everything above 300 HU."""
    values = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 8)).astype(np.int16)
    labels = (values > 300).astype(np.uint8)
    data = manifest(
        preprocess=[],
        engine={"model": "model.onnx", "input": "x", "outputs": ["y"], "reach": {"kind": "whole"}},
        activations=[],
        postprocess=[],
        outputs={"segments": [segment(1, "lesion")], "measurements": [measurement("volume_ml", kind="volume_ml")]},
        golden=[golden(labels="golden/labels.npy", measurements={"lesion.volume_ml": float(labels.sum()) * 0.016})],
    )
    data["identity"]["version"] = version
    onnx = with_shapes(two_channels(threshold=300))
    files = {"golden/one.npy": npy(values), "golden/labels.npy": npy(labels), "model.onnx": onnx}
    return write(folder, data, files), onnx


def test_a_model_of_schema_2_runs_at_an_endpoint(tmp_path: Path) -> None:
    path, onnx = lesion(tmp_path)
    served = Model(onnx)
    with_double = HttpDouble({("staged", "1.0.0"): served}).start()
    engine = KServe(Endpoint(name="gpu1", url=with_double.url))
    try:
        ready = open_model(path, engine)
        assert ready.report.passed and ready.report.engine == "kserve gpu1 (double 1.0)"
        assert with_double.headers, "its golden case went through the endpoint"
        served.change = lambda outputs: {"y": -outputs["y"]}
        assert not golden_report(ready.bundle, engine).passed
        with pytest.raises(EngineError, match="GOLDEN_MISMATCH"):
            open_model(path, engine)
    finally:
        engine.close()
        with_double.stop()


def test_an_output_without_a_shape_is_refused_in_words() -> None:
    """Nothing would say how much of an answer is too much."""
    with pytest.raises(ValueError, match="y has no shape in the model file"):
        onnx_signature(two_channels())
    assert len(onnx_signature(with_shapes(two_channels())).outputs[0].shape) == 5


def test_a_pipeline_without_a_network_stays_on_this_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    find_pipeline.cache_clear()
    pipeline_bundle(tmp_path / "models")
    settings = Settings(
        node={"data_dir": tmp_path / "data"},
        inference={
            "models_dir": tmp_path / "models",
            "placement_max_load": 1.0,
            "endpoints": [{"name": "gpu1", "url": f"http://127.0.0.1:{free_port()}", "network": "host"}],
        },
    )
    db = Database(tmp_path / "data")
    engine = KServe(settings.inference.places[0])
    here = ServingModels(db, OnnxRuntimeCpu(), models_dir=tmp_path / "models", data_dir=tmp_path / "data", threads=1)
    models = PlacedModels(settings, db, [Local(here, 0.0), Remote(engine, serving_at(engine, settings, db))])
    decisions: list[Any] = []
    models.for_job("staged", decisions.append)
    assert decisions[0]["chosen"] == "local"
    assert "no network" in next(c["skipped"] for c in decisions[0]["candidates"] if c["name"] == "gpu1")
    find_pipeline.cache_clear()
    db.close()


def test_verification_apart_asks_the_endpoints(tmp_path: Path) -> None:
    limit: Any = {"data_dir": tmp_path, "limits": Limits(), "threads": 1, "memory_mb": 2048, "seconds": 60.0}
    double = HttpDouble({OLD: Model(ONNX)}).start()
    dead = Endpoint(name="dead", url=f"http://127.0.0.1:{free_port()}")
    there = Endpoint(name="gpu1", url=double.url, timeout_seconds=30)
    locked = Endpoint(name="gpu2", url=double.url, token_file=tmp_path / "absent")
    try:
        assert verify_apart(MODEL, "kserve", endpoints=[dead, there], **limit) == "kserve gpu1 (double 1.0)"
        with pytest.raises(PeerAway, match="dead"):
            verify_apart(MODEL, "kserve", endpoints=[dead], **limit)
        with pytest.raises(NodeError, match="No such file"):
            verify_apart(MODEL, "kserve", endpoints=[locked], **limit)
        double.models[OLD].change = lambda outputs: {"air": 1 - outputs["air"]}
        with pytest.raises(EngineError) as caught:
            verify_apart(MODEL, "kserve", endpoints=[there], **limit)
        assert caught.value.code == "GOLDEN_MISMATCH"
    finally:
        double.stop()


def test_comparisons_leave_the_endpoints_to_the_clinical_work() -> None:
    assert _engine(EngineName.kserve) == "onnxruntime-cpu"
    assert _engine(EngineName.auto) == "auto"


def test_an_endpoint_that_was_away_gets_its_canary_back(case: Case) -> None:
    reference = "ct-lung@1.1.0"
    double = case.doubles[1]
    del case.doubles[0].models[NEW]
    double.script = [away]
    with pytest.raises(PeerAway):
        case.models.for_job(reference, lambda decision: None)
    case.clock.now += REST_SECONDS + 1
    assert case.models.for_job(reference, lambda decision: None).identity.version == "1.1.0"
