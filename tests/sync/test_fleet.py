"""Heartbeat and desired state against the reference endpoint: applied whole, or refused with a reason."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from typer.testing import CliRunner

from dicomnode.app_shell import LogLevel
from dicomnode.cli import app
from dicomnode.cloud.storage import Storage
from dicomnode.desired import read_desired
from dicomnode.errors import BundleError, NodeError, PeerRefused, SettingsError
from dicomnode.gpu_facts import gpu_facts
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates, ServingRules
from dicomnode.index.life import Change, Life
from dicomnode.index.operation import Models, Processes
from dicomnode.model_desk import ModelDesk
from dicomnode.settings import Settings
from dicomnode.sidecar import run_sidecar
from dicomnode.sidecar_fleet import describe, judge, serving_digests
from dicomnode.sync.desired import AGAIN_SECONDS, DesiredState
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.fleet_calls import clock_skew
from dicomnode.sync.heartbeat import Heartbeat
from dicomnode.sync.repository import ModelRepository
from tests.cloud.endpoint import endpoint
from tests.infer.life_case import add_version
from tests.sync.cloud_fake import served
from tests.sync.index_case import CANARY, CANARY_ID, FakeClock, add_results
from tests.sync.test_sidecar import until

ALL = ("models", "rules", "log_level")
RULE = {"name": "theirs", "match": {"Modality": "MR"}, "models": ["ct-lung"], "send_to": ["pacs"]}
NODE = "DICOMNODE"


def settings_of(folder: Path, url: str = "http://127.0.0.1:9", **more: Any) -> Settings:
    sections = {
        "node": {"data_dir": folder / "data", "reserve_mb": 1},
        "http": {"port": 0},
        "inference": {"engine": "onnxruntime-cpu", "models_dir": folder / "models", "threads": 1},
        "peers": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104, "allow": ["echo"]}],
        "rules": [{"name": "ours", "match": {"Modality": "CT"}, "models": ["ct-lung"]}],
        "cloud": {"stow_url": f"{url}/studies", "records_url": f"{url}/v1"},
        "fleet": {"accept": ALL},
    }
    return Settings(**{**sections, **more})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for version in ("1.0.0", "1.1.0"):
        add_version(folder, version)
    for name in ("ct-one", "ct-two"):
        for version in ("1.0.0", "2.0.0"):
            target = add_version(folder / "made", version, lambda m, n=name: m["identity"].update(name=n))
            (folder / "models" / name).mkdir(exist_ok=True)
            target.rename(folder / "models" / name / version)
    return folder


@dataclass
class Case:
    db: Database
    clock: FakeClock
    settings: Settings
    storage: Storage
    desk: ModelDesk
    desired: DesiredState
    broken: set[str] = field(default_factory=set)

    @property
    def states(self) -> DesiredStates:
        return DesiredStates(self.db)

    def report(self) -> dict[str, Any]:
        node = self.storage.node(NODE)
        return dict(node["report"]) if node and node["report"] else {}


def run(folder: Path, models: Path, main: Callable[[Case], Awaitable[None]], pulls: Any = (), **more: Any) -> None:
    async def whole() -> None:
        (folder / "models").symlink_to(models / "models")
        async with endpoint(folder / "cloud") as (url, storage):
            cloud = {"stow_url": f"{url}/studies", "records_url": f"{url}/v1", "models": pulls}
            settings, clock, broken = settings_of(folder, url, cloud=cloud, **more), FakeClock(), set[str]()
            db = Database(folder / "data", clock=clock)

            def verify(path: Path) -> None:
                if f"{path.parent.name}@{path.name}" in broken:
                    raise BundleError("verify model", "its golden case failed")

            desk = ModelDesk(settings, db, verify)
            vouched = ModelRepository(settings, db).vouched
            desired = DesiredState(settings, db, Endpoints(settings, db), desk, judge, vouched)
            try:
                await main(Case(db, clock, settings, storage, desk, desired, broken))
            finally:
                db.close()

    asyncio.run(whole())


def test_everything_of_a_generation_is_applied_and_reported(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        rules, level = ServingRules(case.settings, case.db), LogLevel(case.settings, case.db)
        assert [r.name for r in rules()] == ["ours"]
        state = {"models": {"ct-lung": "1.0.0"}, "rules": [RULE], "log_level": "debug"}
        case.storage.desire(NODE, state)
        await case.desired.run_once()
        assert case.report() == {"generation": 1, "applied": True}
        assert Models(case.db).active() == {"ct-lung": "1.0.0"}
        assert Life(case.db).history("ct-lung")[0]["who"] == "cloud"
        assert [r.name for r in rules()] == ["theirs"]
        level.follow()
        assert level._now == "debug"
        case.storage.report(NODE, {"told": "again?"})
        await case.desired.run_once()
        assert case.report() == {"told": "again?"}, "the same generation is decided and reported once"
        case.storage.desire(NODE, {})
        await case.desired.run_once()
        assert [r.name for r in rules()] == ["ours"], "what is left out is as the operator has it"
        level.follow()
        assert level._now == "info"
        assert Models(case.db).active() == {"ct-lung": "1.0.0"}, "no model is taken away"

    run(tmp_path, models, main)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"log_leve": "debug"}, "log_leve"),
        ({"log_level": "loud"}, "log_level"),
        ({"models": {"ct-lung": 1}}, "models"),
        ({"models": {"ct-lung": "../../x"}}, "models"),
        ({"models": {"ct-lung": "9.9.9"}}, "9.9.9"),
        ({"models": {"ct-one": "2.0.0"}}, "golden case failed"),
        ({"rules": [RULE | {"send_to": ["elsewhere"]}]}, "elsewhere"),
        ({"rules": [RULE, RULE]}, "same name"),
        ({"rules": [RULE | {"match": {"Modalty": "CT"}}]}, "Modalty"),
        ({"rules": [RULE | {"match": {"PatientComments": "CT"}}]}, "do not read PatientComments"),
        ({"rules": [RULE | {"models": ["no-such"]}]}, "no-such"),
        ({"rules": [RULE | {"cloud_identity": "kept"}]}, "cloud_identity"),
        ({"rules": [RULE | {"unknown": 1}]}, "unknown"),
    ],
)
def test_what_is_wrong_is_refused_whole_and_the_last_good_state_serves(
    tmp_path: Path, models: Path, state: dict[str, Any], reason: str
) -> None:
    async def main(case: Case) -> None:
        good = {"models": {"ct-two": "2.0.0"}, "rules": [RULE], "log_level": "debug"}
        case.storage.desire(NODE, good)
        await case.desired.run_once()
        case.broken.add("ct-one@2.0.0")
        case.storage.desire(NODE, {"models": {"ct-two": "1.0.0"}, "log_level": "error"} | state)
        await case.desired.run_once()
        report = case.report()
        assert report["generation"] == 2 and report["applied"] is False and reason in report["reason"]
        serving = case.states.serving()
        assert serving is not None and serving["state"] == good
        assert Models(case.db).active() == {"ct-two": "2.0.0"}
        assert [r.name for r in ServingRules(case.settings, case.db)()] == ["theirs"]
        assert case.states.log_level() == "debug"
        assert [e["kind"] for e in case.db.rows("SELECT kind FROM events")].count("desired-state-refused") == 1

    run(tmp_path, models, main)


@pytest.mark.parametrize("part", ALL)
def test_nothing_is_set_that_the_operator_does_not_let(tmp_path: Path, models: Path, part: str) -> None:
    state = {"models": {"ct-lung": "1.0.0"}, "rules": [RULE], "log_level": "debug"}

    async def main(case: Case) -> None:
        case.storage.desire(NODE, state)
        await case.desired.run_once()
        assert f"does not let the cloud set {part}" in case.report()["reason"]
        assert case.states.serving() is None and Models(case.db).active() == {}

    run(tmp_path, models, main, fleet={"accept": [p for p in ALL if p != part]})


def test_by_default_the_cloud_may_set_nothing() -> None:
    assert Settings().fleet.accept == ()


def test_rules_of_before_stop_when_the_operator_stops_them(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        case.storage.desire(NODE, {"rules": [RULE], "log_level": "debug"})
        await case.desired.run_once()
        strict = case.settings.model_copy(update={"fleet": Settings().fleet})
        assert [r.name for r in ServingRules(strict, case.db)()] == ["ours"]
        level = LogLevel(strict, case.db)
        level.follow()
        assert level._now == "info"

    run(tmp_path, models, main)


def test_a_version_that_was_rolled_back_or_waits_for_approval_is_refused(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        case.desk.change("activate", "ct-lung", "1.0.0", who="op")
        case.desk.change("activate", "ct-lung", "1.1.0", who="op")
        Life(case.db).roll_back("ct-lung", "1.1.0", "1.0.0", Change("node", "slow", automatic=True))
        case.storage.desire(NODE, {"models": {"ct-lung": "1.1.0"}})
        await case.desired.run_once()
        assert "rolled back" in case.report()["reason"]
        case.desk.change("stage", "ct-one", "2.0.0", who="op")
        case.storage.desire(NODE, {"models": {"ct-one": "2.0.0"}})
        await case.desired.run_once()
        assert "approval" in case.report()["reason"]
        case.desk.approve("ct-one", "2.0.0", who="op")
        await case.desired.run_once()
        assert case.report()["applied"] is False, "it is not looked at again at once"
        case.clock.now += AGAIN_SECONDS
        await case.desired.run_once()
        assert case.report() == {"generation": 2, "applied": True}
        assert Models(case.db).active()["ct-one"] == "2.0.0"

    entry = {"name": "ct-one", "approve": True, "url": "https://x.example/a.tgz", "sha256": "0" * 64}
    run(tmp_path, models, main, pulls=[entry | {"version": "2.0.0"}])


def test_a_cloud_that_was_set_back_undoes_nothing(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        for level in ("debug", "warning", "error"):
            case.storage.desire(NODE, {"log_level": level})
        await case.desired.run_once()
        with case.storage._transaction() as db:
            db.execute("UPDATE nodes SET generation = 2, desired = ?", (json.dumps({"log_level": "debug"}),))
        with pytest.raises(PeerRefused, match="older than 3"):
            await case.desired.run_once()
        assert case.report()["applied"] is False and "older" in case.report()["reason"]
        assert case.states.log_level() == "error"
        with case.storage._transaction() as db:
            db.execute("UPDATE nodes SET generation = 3, desired = ?", (json.dumps({"log_level": "info"}),))
        case.desired._etag = ""
        with pytest.raises(PeerRefused, match="another content"):
            await case.desired.run_once()
        assert case.states.log_level() == "error"
        case.states.clear()
        assert case.states.serving() is None
        await case.desired.run_once()
        assert case.states.log_level() == "info", "after 'desired clear' any generation may come"

    run(tmp_path, models, main)


KILLED = """
import os, signal, sys
from pathlib import Path
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates
from dicomnode.index.life import Life
from dicomnode.model_desk import ModelDesk
from tests.sync.test_fleet import settings_of

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_at(count, real):
    calls = []
    def call(*arguments, **named):
        calls.append(1)
        if len(calls) == count:
            die()
        return real(*arguments, **named)
    return call

def child(folder, step):
    db = Database(folder / "data")
    desk = ModelDesk(settings_of(folder), db, lambda _: None)
    if step == "told":
        ModelDesk._told = die
    elif step != "row":
        Life.activate = dies_at(int(step), Life.activate)

    def also():
        DesiredStates(db).decide(2, "d", {"log_level": "error"}, "applied")
        if step == "row":
            die()

    desk.activate_all({"ct-one": "2.0.0", "ct-two": "2.0.0"}, who="cloud", why="", also=also)

for step in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        child(Path(sys.argv[1]) / step, step)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, step
"""


def test_a_kill_between_the_steps_leaves_the_old_or_the_new_state(tmp_path: Path, models: Path) -> None:
    steps = ("row", "1", "2", "told")
    old, new = ({"ct-one": v, "ct-two": v} for v in ("1.0.0", "2.0.0"))
    for step in steps:
        folder = tmp_path / step
        folder.mkdir()
        (folder / "models").symlink_to(models / "models")
        db = Database(folder / "data")
        desk = ModelDesk(settings_of(folder), db, lambda _: None)
        desk.activate_all(old, who="op", why="", also=partial(DesiredStates(db).decide, 1, "d", {}, "applied"))
        db.close()
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *steps], check=False, capture_output=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr.decode()
    for step in steps:
        db = Database(tmp_path / step / "data")
        serving = DesiredStates(db).serving()
        assert serving is not None
        found = Models(db).active(), serving["generation"], DesiredStates(db).log_level()
        assert found == ((new, 2, "error") if step == "told" else (old, 1, None)), step
        db.close()


def test_a_dead_cloud_leaves_everything_as_it_is(tmp_path: Path, models: Path) -> None:
    (tmp_path / "models").symlink_to(models / "models")
    settings = settings_of(tmp_path)
    db = Database(tmp_path / "data")
    DesiredStates(db).decide(7, "d", {"rules": [RULE]}, "applied")
    desk = ModelDesk(settings, db, lambda _: None)
    vouched = ModelRepository(settings, db).vouched
    desired = DesiredState(settings, db, Endpoints(settings, db), desk, judge, vouched)
    with pytest.raises(NodeError, match="cannot be reached"):
        asyncio.run(desired.run_once())
    assert [r.name for r in ServingRules(settings, db)()] == ["theirs"]
    db.close()


def test_the_heartbeat_tells_what_the_node_is_and_no_patient(tmp_path: Path, models: Path) -> None:
    async def main(case: Case) -> None:
        add_results(case.db, tmp_path / "data", 2)
        case.storage.desire(NODE, {})
        beat = Heartbeat(
            case.settings, case.db, Endpoints(case.settings, case.db), lambda: describe(case.settings, case.db)
        )
        assert await beat.beat() and await beat.beat()
        node = case.storage.node(NODE)
        assert node is not None
        told = node["heartbeat"]
        assert told["version"] and told["libraries"]["pydicom"] and told["queues"]["sync_items"]["pending"] == 2
        assert told["disk"]["free_mb"] > 0 and told["gpu"] == {"devices": [], "driver": ""}
        assert abs(told["clock_skew_seconds"]) < 3, "two clocks of one machine"
        uids = [r["StudyInstanceUID"] for r in case.db.rows("SELECT StudyInstanceUID FROM studies")]
        text = json.dumps(told)
        assert not any(secret in text for secret in (CANARY, CANARY_ID, "127.0.0.1", str(tmp_path), *uids))
        assert beat.report()["desired_generation"] == 1

    run(tmp_path, models, main)


def test_digests_are_those_of_live_workers() -> None:
    ready = {"m": {"name": "m", "version": "1.0.0", "engine": "cpu", "digest": "ab", "rejected": []}}
    rows = [
        {"name": "worker", "alive": True, "detail": {"models": {"ready": ready | {"m@1.0.0": ready["m"]}}}},
        {"name": "worker-2", "alive": False, "detail": {"models": {"ready": {"x": {"name": "x"}}}}},
        {"name": "courier", "alive": True, "detail": {}},
    ]
    assert serving_digests(rows) == [{"name": "m", "version": "1.0.0", "engine": "cpu", "digest": "ab"}]


def test_gpus_are_told_by_the_driver(tmp_path: Path) -> None:
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t Tesla T4\nIRQ: 1\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Tue\nGCC version: 12\n")
    assert gpu_facts(tmp_path) == {"devices": ["Tesla T4"], "driver": "NVIDIA UNIX x86_64 Kernel Module  550.54  Tue"}
    assert gpu_facts(tmp_path / "none") == {"devices": [], "driver": ""}


def test_a_clock_that_is_wrong_is_told(tmp_path: Path) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response({"generation": 0}, headers={"Date": "Thu, 01 Jan 2026 00:00:00 GMT"})

    async def main() -> None:
        async with served(handle, "/v1/heartbeat") as url:
            settings = settings_of(tmp_path, url.removesuffix("/v1/heartbeat"))
            db = Database(tmp_path / "data")
            beat = Heartbeat(settings, db, Endpoints(settings, db), dict)
            await beat.beat()
            await beat.beat()
            skew = beat.report()["clock_skew_seconds"]
            behind = (datetime.now(UTC) - datetime(2026, 1, 1, tzinfo=UTC)).total_seconds()
            assert skew == pytest.approx(behind, abs=5)
            assert [e["severity"] for e in db.rows("SELECT * FROM events WHERE kind = 'clock'")] == ["warning"]
            db.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("date", "skew"),
    [
        ("Thu, 01 Jan 2026 00:00:10 GMT", -9.5),
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0.5),
        ("nonsense", None),
        (None, None),
    ],
)
def test_the_skew_of_a_date_header(date: str | None, skew: float | None) -> None:
    assert clock_skew(date, datetime(2026, 1, 1, tzinfo=UTC), 2.0) == skew


def test_a_state_that_is_no_state_is_told_with_its_keys() -> None:
    with pytest.raises(SettingsError, match=r"models.*; .*log_level"):
        read_desired({"models": [], "log_level": "loud"})


def test_the_whole_sidecar_does_it_and_shows_it(tmp_path: Path, models: Path) -> None:
    async def main() -> None:
        (tmp_path / "models").symlink_to(models / "models")
        db = Database(tmp_path / "data")
        async with endpoint(tmp_path / "cloud") as (url, storage):
            settings = settings_of(tmp_path, url)
            storage.desire(NODE, {"models": {"ct-lung": "1.0.0"}, "log_level": "info"})
            stop = asyncio.Event()
            task = asyncio.create_task(run_sidecar(settings, db, verify=lambda _: None, stop=stop))

            def told() -> bool:
                node = storage.node(NODE)
                return task.done() or bool(node and node["report"] and node["heartbeat"])

            await until(told)
            node = storage.node(NODE)
            assert node is not None and node["report"] == {"generation": 1, "applied": True}
            row = db.row("SELECT detail FROM processes WHERE name = 'sidecar'")
            assert row is not None
            base = f"http://127.0.0.1:{json.loads(row['detail'])['port']}"
            async with ClientSession() as client:
                async with client.get(f"{base}/api/v1/desired") as answer:
                    found = await answer.json()
                assert found["states"][0]["status"] == "applied" and found["states"][0]["serves"] is True
                for language, words in (("en", "Desired state, generation 1"), ("zh", "期望状态，代次 1")):
                    async with client.get(f"{base}/?lang={language}") as answer:
                        assert words in await answer.text()
                async with client.get(f"{base}/api/v1/status") as answer:
                    status = await answer.json()
                async with client.get(f"{base}/metrics") as answer:
                    text = await answer.text()
                assert "dicomnode_clock_skew_seconds" in text
                assert 'dicomnode_desired_generation{which="serving"} 1.0' in text
                assert "dicomnode_desired_refused 0.0" in text
            assert status["fleet"]["serving"]["generation"] == 1
            stop.set()
            await task
        db.close()

    asyncio.run(main())


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Callable[..., str]]:
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n[fleet]\naccept = ["log_level"]\n')
    db = Database(tmp_path / "data")
    DesiredStates(db).decide(3, "d", {"log_level": "debug"}, "applied")
    DesiredStates(db).decide(4, "d", {"rules": []}, "refused", "this node does not let the cloud set rules")
    good = {"every_seconds": 60.0, "runs": 1, "last_time": "2026-01-01T00:00:00Z", "seconds": 0.1, "error": ""}
    tasks = {"alerts": good, "fleet-desired": good | {"error": "it cannot be reached"}}
    fleet = {"beat_time": "2026-01-01T00:00:00Z", "clock_skew_seconds": -1.5}
    Processes(db).beat("sidecar", "ready", {"scheduled": tasks, "fleet": fleet})
    db.close()

    def command(*arguments: str, verb: str = "desired") -> str:
        ended = CliRunner().invoke(app, [*filter(None, [verb]), *arguments, "--config", str(config)])
        assert ended.exit_code == 0, ended.output
        return ended.output

    yield command


def test_the_command_shows_what_serves_and_why_not(shown: Callable[..., str]) -> None:
    text = shown("show")
    assert "the cloud may set: log_level" in text and "refused" in text
    found = json.loads(shown("show", "--json"))
    assert "does not let the cloud set rules" in found["states"][0]["reason"]
    assert [(s["generation"], s["status"], s["serves"]) for s in found["states"]] == [
        (4, "refused", False),
        (3, "applied", True),
    ]
    told = shown("status", verb="")
    assert "desired state: generation 4 refused, serving 3" in told
    assert "periodic work: 2 tasks, 1 failed last time" in told and "fleet-desired: it cannot be reached" in told
    assert "this clock is -1.5 s against the cloud's" in told
    assert json.loads(shown("clear", "--json")) == {"forgotten": 2}
    assert json.loads(shown("show", "--json"))["states"] == []
