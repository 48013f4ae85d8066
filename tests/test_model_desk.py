"""The life of a model from outside: command line and HTTP API on one data folder, with real bundles."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from typer.testing import CliRunner

from dicomnode.admin.application import make_app
from dicomnode.admin.status import waiting_versions
from dicomnode.cli import app
from dicomnode.cli_fleet import repository_line
from dicomnode.errors import BundleError, OperatorError
from dicomnode.index.database import Database
from dicomnode.index.life import Change, Life
from dicomnode.index.operation import Models
from dicomnode.index.runs import Runs
from dicomnode.index.trust import Trust, Trusted
from dicomnode.model_desk import ModelDesk
from dicomnode.settings import Repository, Settings
from tests.index.rows import job
from tests.infer.life_case import add_version, settings_of

CHANGE = {"X-Dicomnode": "1"}
NAME = "ct-lung"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        add_version(tmp_path, version)
    return tmp_path


@pytest.fixture
def settings(folder: Path) -> Settings:
    peers = [{"name": "ct1", "ae_title": "CT1", "allow": ["store"]}]
    return settings_of(folder, peers=peers)


@pytest.fixture
def db(folder: Path) -> Iterator[Database]:
    made = Database(folder / "data")
    yield made
    made.close()


def refuse(path: Path) -> None:
    raise BundleError("verify", "it is damaged")


def states(db: Database) -> dict[str, str]:
    return {r["version"]: r["state"] for r in Life(db).versions(NAME)}


def desk(settings: Settings, db: Database, verify: Any = lambda _: None) -> ModelDesk:
    return ModelDesk(settings, db, verify)


def test_staging_makes_what_serves_by_default_the_way_back(settings: Settings, db: Database) -> None:
    """1.1.0 serves for being newest but for the one that is staged."""
    on = desk(settings, db)
    assert {r["version"]: r["state"] for r in on.listing()} == {
        "1.0.0": "unlisted",
        "1.1.0": "unlisted",
        "1.2.0": "default",
    }
    on.change("stage", NAME, "1.2.0", who="me")
    assert states(db) == {"1.1.0": "active", "1.2.0": "staged"}
    on.change("activate", NAME, "1.2.0", who="me")
    assert on.roll_back(NAME, who="me") == {"name": NAME, "version": "1.1.0", "rolled_back": "1.2.0"}
    assert states(db) == {"1.1.0": "active", "1.2.0": "retired"}


def test_a_roll_back_by_hand_never_returns_to_what_was_rolled_back(settings: Settings, db: Database) -> None:
    on = desk(settings, db)
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        on.change("activate", NAME, version, who="me")
    Life(db).roll_back(NAME, "1.2.0", "1.1.0", Change("node", "errors", automatic=True))
    assert on.roll_back(NAME, who="me")["version"] == "1.0.0"
    with pytest.raises(OperatorError, match="but for those that were rolled back") as caught:
        on.roll_back(NAME, who="me")
    assert "models activate" in caught.value.hint
    assert states(db) == {"1.0.0": "active", "1.1.0": "retired", "1.2.0": "retired"}
    on.change("activate", NAME, "1.2.0", who="me")  # an operator may try again, by its name
    assert on.roll_back(NAME, who="me")["version"] == "1.0.0"


@pytest.mark.parametrize("action", ["stage", "shadow", "canary", "retire"])
def test_the_only_version_that_serves_stays(folder: Path, db: Database, action: Any) -> None:
    """It serves for being the newest. Without rules nothing is served, and it may go."""
    rules = [{"name": "r", "match": {"Modality": "CT"}, "models": [NAME]}]
    ruled, verified = settings_of(folder, rules=rules), []
    for version in ("1.0.0", "1.1.0"):
        Life(db).stage(NAME, version, who="me")
    with pytest.raises(OperatorError, match="the only version") as caught:
        desk(ruled, db).change(action, NAME, "1.2.0", who="me", percent=10)
    assert "Activate another version first" in caught.value.hint
    Life(db).activate(NAME, "1.0.0", who="me")  # another serves: this one is free
    desk(ruled, db).change(action, NAME, "1.2.0", who="me", percent=10)
    assert states(db)["1.0.0"] == "active"
    db.execute("DELETE FROM models")
    db.execute("DELETE FROM model_versions")
    on = desk(ruled, db, lambda path: verified.append(path.name))
    on.change(action, NAME, "1.2.0", who="me", percent=10)
    assert states(db)["1.1.0"] == "active" and "1.1.0" in verified, "the next release was verified and serves"


def test_nothing_that_fails_verification_gets_anywhere(settings: Settings, db: Database) -> None:
    Models(db).activate(NAME, "1.0.0")
    on = desk(settings, db, refuse)
    for action in ("stage", "shadow", "canary", "activate"):
        with pytest.raises(BundleError, match="damaged"):
            on.change(action, NAME, "1.1.0", who="me", percent=10)
    assert states(db) == {"1.0.0": "active"}
    with pytest.raises(OperatorError, match=r"no 'mr9'"):
        desk(settings, db).change("canary", NAME, "1.1.0", who="me", peers=["mr9"])
    with pytest.raises(OperatorError, match="no earlier version"):
        on.roll_back("other", who="me")


def test_the_version_before_is_never_deleted(settings: Settings, db: Database) -> None:
    on, pulled = desk(settings, db), settings.node.data_dir / "models" / NAME
    for version in ("2.0.0", "3.0.0", "4.0.0"):
        add_version(settings.node.data_dir, version)
        on.change("activate", NAME, version, who="me")
    with pytest.raises(OperatorError, match="the version before"):
        on.delete(NAME, "3.0.0")
    for version in ("4.0.0", "9.9.9"):
        with pytest.raises(OperatorError, match="not retired"):
            on.delete(NAME, version)
    on.delete(NAME, "2.0.0")
    assert sorted(p.name for p in pulled.iterdir()) == ["3.0.0", "4.0.0"]
    on.change("stage", NAME, "1.0.0", who="me")
    on.change("retire", NAME, "1.0.0", who="me")
    with pytest.raises(OperatorError, match="not among the pulled"):
        on.delete(NAME, "1.0.0")


def test_one_command_each(settings: Settings, db: Database, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = folder / "node.toml"
    config.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\n[inference]\nengine = "onnxruntime-cpu"\n'
        f'models_dir = "{settings.inference.models_dir}"\n'
        '[[peers]]\nname = "ct1"\nae_title = "CT1"\nallow = ["store"]\n'
    )
    verified: list[str] = []
    monkeypatch.setattr("dicomnode.app.verify_model", lambda _, path: verified.append(path.name))

    def run(*verb: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["models", *verb, "--config", str(config), "--json"])
        assert done.exit_code == code, (done.output, done.exception)
        return json.loads(done.stdout) if not code else done.exception

    run("activate", f"{NAME}@1.0.0", "--why", "start")
    assert run("stage", f"{NAME}@1.1.0")["state"] == "staged"
    assert run("approve", f"{NAME}@1.1.0", "--why", "looked at")["state"] == "staged"
    assert run("approve", f"{NAME}@1.0.0", code=1).cause == "it is active"
    assert run("shadow", f"{NAME}@1.1.0")["state"] == "shadow"
    assert run("canary", f"{NAME}@1.1.0", "--percent", "10", "--peer", "ct1")["state"] == "canary"
    assert run("rollback", NAME)["rolled_back"] == "1.1.0"
    assert run("activate", f"{NAME}@1.2.0", "--why", "better")["state"] == "active"
    assert run("rollback", NAME, "--why", "worse") == {"name": NAME, "version": "1.0.0", "rolled_back": "1.2.0"}
    assert run("retire", f"{NAME}@1.0.0", code=1).cause == "'retire' is not possible in state 'active'"
    assert "no version given" in str(run("activate", NAME, code=1))
    assert verified == ["1.0.0", "1.1.0", "1.1.0", "1.1.0", "1.2.0", "1.0.0"]
    listed = {r["version"]: (r["state"], r["serves"]) for r in run("list")}
    assert listed == {"1.0.0": ("active", "yes"), "1.1.0": ("retired", ""), "1.2.0": ("retired", "")}
    history = run("history", NAME)
    assert [h["event"] for h in history[:3]] == ["activate", "roll_back", "activate"]
    assert history[1]["why"] == "worse" and history[1]["who"].startswith("cli")
    comparison = Runs(db).compare_begin(job(db), NAME, "1.1.0", "1.0.0", "shadow")
    fields = {"state": "done", "least_dice": 0.9, "same_findings": 1, "dice": {"Lung": 0.9}}
    Runs(db).compare_end(comparison, fields)
    assert run("compare", f"{NAME}@1.1.0")[0]["dice"] == {"Lung": 0.9}
    done = CliRunner().invoke(app, ["models", "compare", NAME, "--config", str(config)])
    assert "100% of 1 comparisons agree" in done.output


def test_one_call_each(settings: Settings, db: Database) -> None:
    async def main() -> None:
        made = make_app(db, settings, desk=desk(settings, db))
        async with TestServer(made, host="127.0.0.1") as server, ClientSession(server.make_url("/")) as client:

            async def post(path: str, body: Any = None, headers: Any = CHANGE) -> tuple[int, Any]:
                async with client.post(f"/api/v1/models/{NAME}/{path}", json=body, headers=headers) as answer:
                    return answer.status, await answer.json()

            assert (await post("1.0.0/activate", headers={}))[0] == 403
            assert states(db) == {}
            assert (await post("1.0.0/activate", {"why": "start"}))[1]["state"] == "active"
            assert (await post("1.1.0/canary", {"percent": 25, "peers": ["CT1"]}))[1]["state"] == "canary"
            assert (await post("1.1.0/shadow"))[1]["state"] == "shadow"
            assert (await post("1.1.0/approve", headers={}))[0] == 403
            assert (await post("1.1.0/approve", {"percent": 9}))[0] == 400
            assert (await post("1.1.0/approve", {"why": "looked at"}))[1]["state"] == "shadow"
            assert [(await post(f"{v}/approve"))[0] for v in ("7.7.7", "1.0.0")] == [400, 409]
            assert (await post("1.1.0/activate"))[1]["state"] == "active"
            assert (await post("rollback", {"why": "worse"}))[1]["version"] == "1.0.0"
            assert Models(db).active() == {NAME: "1.0.0"}
            for path, body, status in (
                ("1.0.0/retire", None, 409),
                ("7.7.7/stage", None, 404),
                ("1.1.0/canary", {"percent": 101}, 400),
                ("1.1.0/canary", {"percent": True}, 400),
                ("1.1.0/canary", {"percent": "9"}, 400),
                ("1.1.0/canary", {"peers": "ct1"}, 400),
                ("1.1.0/stage", {"percent": 9}, 400),
                ("1.1.0/stage", {"surprise": 9}, 400),
                ("1.1.0/stage", [], 400),
                ("1.1.0/explode", None, 404),
            ):
                assert (await post(path, body))[0] == status, path
            async with client.get(f"/api/v1/models/{NAME}/history?limit=2") as answer:
                history = (await answer.json())["history"]
            assert [(h["version"], h["event"], h["who"]) for h in history] == [
                ("1.0.0", "activate", "api:127.0.0.1"),
                ("1.1.0", "roll_back", "api:127.0.0.1"),
            ]
            async with client.get("/api/v1/models") as answer:
                rows = (await answer.json())["models"]
            assert [(r["version"], r["state"], r["here"]) for r in rows] == [
                ("1.0.0", "active", True),
                ("1.1.0", "retired", True),
                ("1.2.0", "retired", True),  # it served for being the newest
            ]
            assert "path" not in rows[0]
            async with client.get(f"/api/v1/models/{NAME}/comparisons") as answer:
                assert await answer.json() == {"comparisons": []}

    asyncio.run(main())


def test_the_page_and_the_metrics_tell_why_a_model_does_not_come(settings: Settings, db: Database) -> None:
    life = Life(db)
    life.activate(NAME, "1.0.0", who="sync")
    life.stage(NAME, "1.1.0", who="sync")
    life.wait_for(NAME, "1.1.0", "approval", "an operator has to approve it")
    repository = Repository(metadata_url="https://m.example/metadata", root_file=Path("root.json"))
    chosen = settings.model_copy(update={"cloud": settings.cloud.model_copy(update={"repository": repository})})
    trust = Trust(db, repository.metadata_url)
    trust.good(Trusted({"root": 1}, datetime.now(UTC) + timedelta(days=9), []))
    assert trust.bad("refused", "timestamp <b>was</b> signed by 0/1 keys")

    async def main() -> tuple[str, str, str, Any]:
        made = make_app(db, chosen, desk=desk(chosen, db))
        async with TestServer(made, host="127.0.0.1") as server, ClientSession(server.make_url("/")) as client:
            found = []
            for path in ("?lang=en", "?lang=zh", "metrics", "api/v1/status"):
                async with client.get(f"/{path}") as answer:
                    found.append(await answer.text())
            return found[0], found[1], found[2], json.loads(found[3])["models"]

    english, chinese, text, told = asyncio.run(main())
    for page, words in (
        (english, ("Signed repository", "approval by an operator")),
        (chinese, ("签名模型仓库", "管理员批准")),
    ):
        assert all(word in page for word in words)
        assert f'data-retry="/api/v1/models/{NAME}/1.1.0/approve"' in page
        assert "timestamp &lt;b&gt;was" in page and "<b>was" not in page
    assert 'dicomnode_model_repository_info{state="refused"} 1.0' in text
    assert f'model_waiting_info{{model="{NAME}",reason="approval",state="staged",version="1.1.0"}} 1.0' in text
    assert re.search(r"^dicomnode_model_repository_expiry_timestamp_seconds \d", text, re.M)
    assert (told["repository"]["state"], told["repository"]["versions"]) == ("refused", {"root": 1})
    assert [(w["version"], w["waits_for"]) for w in told["waiting"]] == [("1.1.0", "an operator has to approve it")]
    line = repository_line(told["repository"])
    assert line.startswith("refused, what was signed last is valid until 20") and line.endswith("0/1 keys")
    assert repository_line(
        {"state": "expired", "expires_time": "2026-01-01T00:00:00", "reason": "timestamp.json is"}
    ) == ("expired: timestamp.json is")
    life.activate(NAME, "1.1.0", who="me")
    assert waiting_versions(db) == [], "it serves, whatever the policy waited for"
    [active] = [v for v in desk(chosen, db).listing() if v["version"] == "1.1.0"]
    assert (active["state"], active["waits_for"]) == ("active", None)


def test_the_page_and_the_metrics_tell_how_versions_do(settings: Settings, db: Database) -> None:
    runs, life = Runs(db), Life(db)
    life.activate(NAME, "1.0.0", who="<b>me</b>", why="start")
    life.canary(NAME, "1.1.0", percent=10, who="me")
    for number in range(60):
        job_id = job(db)
        run = runs.begin(job_id, 1, NAME, "1.0.0", "active", 10)
        runs.end(run, "done", seconds=2.0, outputs={"Lung.volume_ml": 100.0 if number < 40 else 200.0})
    runs.end(runs.begin(job_id, 1, NAME, "1.1.0", "canary", 10), "error")
    comparison = runs.compare_begin(job_id, NAME, "1.1.0", "1.0.0", "canary")
    runs.compare_end(comparison, {"state": "done", "least_dice": 0.5, "greatest_difference": 0.3, "same_findings": 1})
    life.roll_back(NAME, "1.1.0", None, Change("node", "errors: many", automatic=True))
    chosen = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"drift_reference": 40})})

    async def main() -> tuple[str, str]:
        made = make_app(db, chosen, desk=desk(chosen, db))
        async with TestServer(made, host="127.0.0.1") as server, ClientSession(server.make_url("/")) as client:
            async with client.get("/?lang=zh") as answer:
                page = await answer.text()
            async with client.get("/metrics") as answer:
                return page, await answer.text()

    page, text = asyncio.run(main())
    assert "模型版本" in page and "灰度" in page and "&lt;b&gt;me&lt;/b&gt;" in page and "<b>me</b>" not in page
    assert f'data-retry="/api/v1/models/{NAME}/rollback"' in page
    labels = f'model="{NAME}",'
    for line in (
        f'dicomnode_model_state_info{{{labels}state="active",version="1.0.0"}} 1.0',
        f'dicomnode_model_run_seconds{{{labels}quantile="0.5",version="1.0.0"}} 2.0',
        f'dicomnode_model_runs{{{labels}outcome="error",version="1.1.0"}} 1.0',
        f'dicomnode_model_agreement_ratio{{{labels}version="1.1.0"}} 0.0',
        f'dicomnode_model_least_dice_mean{{{labels}version="1.1.0"}} 0.5',
        f'dicomnode_model_drift_mean_ratio{{measurement="Lung.volume_ml",{labels}version="1.0.0"}} 2.0',
    ):
        assert line in text, line
    assert 'dicomnode_model_rolled_back_timestamp_seconds{model="ct-lung",version="1.1.0"}' in text
    psi = next(line for line in text.splitlines() if line.startswith("dicomnode_model_drift_psi{"))
    assert float(psi.split()[-1]) > 0.25
