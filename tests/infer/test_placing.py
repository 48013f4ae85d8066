"""Jobs on their way through this box and endpoints: choice, fail-over, waiting; what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from dicomnode.durable import ObjectStore
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import EngineError, PeerAway
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.kserve import KServe
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.places import LONGEST_REST, REST_SECONDS, Local, Remote, serving_at
from dicomnode.infer.placing import PlacedModels, verify_at_endpoints
from dicomnode.infer.serving import ServingModels
from dicomnode.infer.worker import Worker
from dicomnode.settings import Settings
from tests.index.rows import job
from tests.infer.infer_case import MODEL, ROOT
from tests.infer.kserve_double import HttpDouble, Model
from tests.peers import free_port

ONNX = (MODEL / "model.onnx").read_bytes()
KEY = ("ct-lung", "1.0.0")


class Idle:
    """Stands for ``LoadOfOthers``: this test decides how busy the box is."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def sample(self) -> float:
        return self.value


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """Two endpoints and, where wanted, this box's engine, over a node's settings."""

    def __init__(self, folder: Path, *, local: bool, **inference: Any) -> None:
        self.db = Database(folder / "data")
        self.doubles = [HttpDouble({KEY: Model(ONNX)}).start() for _ in range(2)]
        endpoints = [
            {"name": f"gpu{n}", "url": d.url, "timeout_seconds": 20, "cost": n / 10} for n, d in enumerate(self.doubles)
        ]
        self.settings = Settings(
            node={"data_dir": folder / "data"},
            inference={
                "engine": "auto" if local else "kserve",
                "models_dir": ROOT / "models",
                "endpoints": endpoints,
                **inference,
            },
        )
        self.clock = Clock()
        self.box = Idle()
        self.engines = [KServe(e) for e in self.settings.inference.places]
        self.loads = [Idle() for _ in self.engines]
        for engine, load in zip(self.engines, self.loads, strict=True):  # latency on a busy test machine says nothing
            engine.load_of = lambda name, load=load: load.sample()  # type: ignore[method-assign]
        places: list[Any] = [Local(self.serving(OnnxRuntimeCpu()), 0.0, self.box)] if local else []  # type: ignore[arg-type]
        places += [Remote(e, serving_at(e, self.settings, self.db), self.clock) for e in self.engines]
        self.models = PlacedModels(self.settings, self.db, places)
        self.decisions: list[Any] = []

    def serving(self, engine: Any) -> ServingModels:
        return ServingModels(
            self.db,
            engine,
            models_dir=self.settings.inference.models_dir,
            data_dir=self.settings.node.data_dir,
            threads=1,
        )

    def for_job(self) -> Any:
        return self.models.for_job("ct-lung", self.decisions.append)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for double in self.doubles:
            double.stop()
        self.db.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, local=False)
    yield world
    world.close()


@pytest.fixture
def mixed(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, local=True)
    yield world
    world.close()


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from dicomnode.demo.phantom import EXAMPLE_TIME, thorax, to_datasets

    folder = tmp_path_factory.mktemp("series")
    phantom = thorax(slices=32, rows=176, columns=176, pixel_spacing=2.0, slice_spacing=10.0)
    paths = []
    for number, ds in enumerate(
        to_datasets(phantom, study_uid="2.25.1", series_uid="2.25.2", patient_id="1", clock=EXAMPLE_TIME)
    ):
        paths.append(folder / f"{number}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def answers(status: int) -> Any:
    return lambda request, good: web.Response(status=status)


def test_the_best_place_takes_the_job_and_the_decision_is_kept(mixed: World) -> None:
    mixed.models.prepare(["ct-lung"])
    assert mixed.for_job().identity.version == "1.0.0"
    kept = mixed.decisions[-1]
    assert kept["chosen"] == "gpu0" and [c["name"] for c in kept["candidates"]] == ["gpu0", "gpu1", "local"]
    assert kept["candidates"][0]["score"] == pytest.approx(0.88, abs=0.01)
    report = mixed.models.report()
    assert report["ready"]["ct-lung"]["version"] == "1.0.0" and report["failed"] == {}  # type: ignore[index]
    assert set(report["places"]) == {"local", "gpu0", "gpu1"}  # type: ignore[arg-type]


def test_a_place_that_dies_in_the_middle_is_followed_by_the_next(pool: World, series: list[Path]) -> None:
    """The whole analysis is the next one's: a result is never of two engines."""
    model = pool.for_job()
    pool.doubles[0].script = [None, answers(503)]
    before = len(pool.doubles[1].headers)
    analysis = model.analyse(series, decoder=InlineDecoder())
    assert analysis.engine == "kserve gpu1 (double 1.0)" and len(analysis.segments) == 2
    assert len(pool.doubles[1].headers) - before >= 2, "both slabs, and not only the second"
    kept = pool.decisions[-1]
    assert kept["chosen"] == "gpu1" and kept["tried"][0]["name"] == "gpu0" and "503" in kept["tried"][0]["cause"]
    here = OnnxRuntimeCpu()
    from dicomnode.infer.golden import open_model

    np.testing.assert_array_equal(open_model(MODEL, here).analyse(series).labels, analysis.labels)


def test_all_away_waits_and_what_came_back_serves_again(pool: World, series: list[Path]) -> None:
    model = pool.for_job()
    for double in pool.doubles:
        double.script = [answers(503)]
    with pytest.raises(PeerAway, match=r"gpu0.*gpu1") as caught:
        model.analyse(series, decoder=InlineDecoder())
    assert caught.value.retryable and pool.decisions[-1]["chosen"] is None
    asked = [len(d.requests) for d in pool.doubles]
    with pytest.raises(PeerAway, match="tried again soon"):
        pool.for_job()
    assert [len(d.requests) for d in pool.doubles] == asked, "they rest"
    pool.clock.now += REST_SECONDS + 1
    runs = len(pool.doubles[0].headers)
    assert pool.for_job().analyse(series, decoder=InlineDecoder()).engine.startswith("kserve gpu0")
    assert len(pool.doubles[0].headers) - runs > 4, "the golden cases came first"


def test_one_that_stays_away_is_asked_less_and_less_until_it_has_done_a_job(mixed: World, series: list[Path]) -> None:
    """Each question costs a job the time-out of an endpoint that hangs, although another place is ready."""
    mixed.for_job()
    first, other = mixed.doubles
    first.script = [answers(503)] * 99
    place = mixed.models.place("gpu0")
    place.failed("ct-lung", PeerAway("run model", "time-out"))
    rests = []
    for _ in range(7):
        began, since = place._rest_until, mixed.clock.now
        while place._rest_until == began:
            mixed.clock.now += 1.0
            mixed.for_job()
        rests.append(mixed.clock.now - since)
    assert rests[:5] == [15.0, 30.0, 60.0, 120.0, 240.0] and rests[5:] == [300.0, 300.0]
    assert mixed.decisions[-1]["chosen"] in ("local", "gpu1") and len(other.requests) > 1
    mixed.loads[1].value, mixed.box.value = 0.95, 0.95
    first.script.clear()
    mixed.clock.now += LONGEST_REST
    assert mixed.for_job().analyse(series, decoder=InlineDecoder()).engine.startswith("kserve gpu0")
    place.failed("ct-lung", PeerAway("run model", "time-out"))
    assert place._rest_until - mixed.clock.now == REST_SECONDS


def test_golden_cases_that_are_due_run_between_jobs(mixed: World) -> None:
    def asked() -> int:
        return sum(len(d.headers) for d in mixed.doubles)

    mixed.for_job()
    before = asked()
    for _ in range(4):
        mixed.clock.now += 1900.0  # more than half of verify_seconds
        mixed.models.prepare(["ct-lung"])
        between = asked()
        assert between > before
        mixed.for_job()
        before = asked()
        assert before == between, "no golden case in the path of a study"
    mixed.clock.now += 3700.0  # never idle: then it has to be
    mixed.for_job()
    assert asked() > before


def test_an_answer_that_is_wrong_is_an_error_of_this_series(pool: World, series: list[Path]) -> None:
    """Tried at each place, then it counts as an attempt: one series must not be tried for ever."""
    model = pool.for_job()
    for double in pool.doubles:
        double.script = [answers(500)]
    with pytest.raises(EngineError, match="HTTP 500"):
        model.analyse(series, decoder=InlineDecoder())
    assert [t["name"] for t in pool.decisions[-1]["tried"]] == ["gpu0", "gpu1"]


def test_one_that_is_too_busy_is_skipped(mixed: World) -> None:
    mixed.for_job()
    for load in mixed.loads:
        load.value = 0.91
    mixed.for_job()
    assert mixed.decisions[-1]["chosen"] == "local"
    mixed.box.value = 0.95
    with pytest.raises(PeerAway, match="load 95% is above 90%"):
        mixed.for_job()
    assert mixed.decisions[-1]["chosen"] is None


def test_the_golden_cases_run_again_after_a_while(pool: World) -> None:
    pool.for_job()
    runs = len(pool.doubles[0].headers)
    pool.for_job()
    assert len(pool.doubles[0].headers) == runs
    pool.doubles[0].models[KEY].change = lambda outputs: {"air": 1 - outputs["air"]}  # somebody replaced the model
    pool.clock.now += 3601
    pool.for_job()
    assert pool.decisions[-1]["chosen"] == "gpu1" and len(pool.doubles[0].headers) > runs
    assert "GOLDEN_MISMATCH" in next(c["skipped"] for c in pool.decisions[-1]["candidates"] if c["name"] == "gpu0")


def test_a_model_that_one_endpoint_lacks_does_not_put_it_to_rest_for_others(pool: World) -> None:
    del pool.doubles[0].models[KEY]
    pool.for_job()
    assert pool.decisions[-1]["chosen"] == "gpu1"
    assert pool.models.report()["places"]["gpu0"]["fault"] == ""  # type: ignore[index]


def test_a_bundle_is_verified_when_one_endpoint_passes_it(pool: World) -> None:
    del pool.doubles[0].models[KEY]
    verify_at_endpoints(pool.settings.inference.endpoints, MODEL)
    del pool.doubles[1].models[KEY]
    with pytest.raises(EngineError, match="model"):
        verify_at_endpoints(pool.settings.inference.endpoints, MODEL)


def test_a_job_without_a_place_waits_without_limit_and_shows_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.infer.worker.intact", lambda source: True)
    settings = Settings(
        node={"data_dir": tmp_path / "data"},
        inference={
            "engine": "kserve",
            "models_dir": ROOT / "models",
            "max_attempts": 2,
            "endpoints": [Endpoint(name="gpu1", url=f"http://127.0.0.1:{free_port()}")],
        },
    )
    db = Database(tmp_path / "data")
    job_id = job(db)
    with db.transaction():
        db.execute("UPDATE jobs SET model = 'ct-lung' WHERE id = ?", (job_id,))
    ObjectStore(tmp_path / "data").prepare()
    engine = KServe(settings.inference.places[0])
    serving = serving_at(engine, settings, db)
    models = PlacedModels(settings, db, [Remote(engine, serving)])
    worker = Worker(settings, db, models, lambda *_: (), owner="w", decoder=InlineDecoder(), on_results=lambda: None)
    for _ in range(3):
        assert worker.run_once()
        with db.transaction():
            db.execute("UPDATE jobs SET next_at = 0")
    shown = Jobs(db).show(job_id)
    assert shown is not None
    assert (shown["state"], shown["attempts"], shown["waits"]) == ("pending", 0, 3), "not parked, and no attempts"
    assert "gpu1" in shown["last_error"]
    assert shown["placement"]["chosen"] is None
    assert "cannot be reached" in shown["placement"]["candidates"][0]["skipped"]
    assert [e["subject"] for e in Events(db).listing(kind="job-waits")] == [f"job {job_id}"], "told once"
    assert Jobs(db).lease("w", 60) is not None
    worker.start()  # the process was killed: one crash, after however many waits, does not park it
    assert Jobs(db).show(job_id)["state"] == "pending"
    engine.close()
    db.close()


class Failing:
    """Stands for a ``ReadyModel`` of this box whose engine fails with ``code``, or works where it is empty."""

    def __init__(self, name: str, code: str = "") -> None:
        self.name, self.code = name, code
        self.session = type("Session", (), {"engine": f"{name} 1"})()
        self.report = type("Report", (), {"engine": f"{name} 1"})()
        self.identity = type("Identity", (), {"name": "ct-lung", "version": "1.0.0"})()
        self.bundle = load_bundle(MODEL)

    def analyse(self, instances: Any, **_: Any) -> str:
        if self.code:
            raise EngineError("run model", self.code, f"{self.name} failed")
        return self.name


class Engines:
    """Stands for ``ServingModels`` with a GPU and a CPU engine."""

    def __init__(self, gpu: str, cpu: str) -> None:
        self.gpu, self.cpu = Failing("tensorrt", gpu), Failing("onnxruntime-cpu", cpu)

    def get(self, reference: str) -> Failing:
        return self.gpu

    def other(self, model: Failing) -> Failing:
        return self.cpu  # also when asked for the one after it, as with three engines


@pytest.mark.parametrize(
    ("gpu", "cpu", "by", "tried"),
    [
        ("", "", "tensorrt", []),
        ("OOM", "", "onnxruntime-cpu", []),
        ("BUILD_FAILED", "BUILD_FAILED", "kserve gpu0 (double 1.0)", ["local"]),
    ],
)
def test_on_this_box_its_other_engine_comes_before_another_place(
    mixed: World, series: list[Path], gpu: str, cpu: str, by: str, tried: list[str]
) -> None:
    local = Local(Engines(gpu, cpu), 0.0, mixed.box)  # type: ignore[arg-type]
    models = PlacedModels(mixed.settings, mixed.db, [local, *mixed.models._places[1:]])
    kept: list[Any] = []
    done: Any = models.for_job("ct-lung", kept.append).analyse(series, decoder=InlineDecoder())
    assert getattr(done, "engine", done) == by
    assert [t["name"] for t in kept[-1].get("tried", [])] == tried


def test_a_lost_device_is_not_passed_over(mixed: World, series: list[Path]) -> None:
    """The process has to end: the worker must hear of it, whatever other places there are."""
    local = Local(Engines("DEVICE_LOST", ""), 0.0, mixed.box)  # type: ignore[arg-type]
    models = PlacedModels(mixed.settings, mixed.db, [local, *mixed.models._places[1:]])
    model = models.for_job("ct-lung", lambda decision: None)
    with pytest.raises(EngineError) as caught:
        model.analyse(series, decoder=InlineDecoder())
    assert caught.value.code == "DEVICE_LOST"
    assert models.other(model) is model and model.session.engine == "onnxruntime-cpu 1"
