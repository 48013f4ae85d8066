"""Wrong settings of the cloud as a person makes them: what check-config and doctor say, and what to do about it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dicomnode.cli import app
from dicomnode.cloud_check import cloud_findings, told
from dicomnode.doctor_cloud import examine_cloud, judge_records, judge_status
from dicomnode.findings import Finding, Level
from dicomnode.settings import Settings
from dicomnode.settings_words import plain
from tests.cloud.endpoint import endpoint
from tests.cloud.test_sites import ADMIN, TOKENS, A, B
from tests.sync.index_case import make_settings

FAR = {"stow_url": "https://cloud.example/studies", "records_url": "https://cloud.example/v1"}


def faults(found: Any) -> list[Finding]:
    return [f for f in found if f.level is Level.fault]


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"cloud": {"stow_url": "http://cloud.example/studies"}}, "cloud.stow_url is http://"),
        ({"cloud": {**FAR, "records_url": "http://10.0.0.8/v1"}}, "cloud.records_url is http://"),
        ({"metrics": {"remote_write_url": "http://10.0.0.8/w"}}, "metrics.remote_write_url is http://"),
        ({"cloud": {**FAR, "token_file": "/nothing/token"}}, "cloud.token_file: /nothing/token: No such file"),
        ({"metrics": {"remote_write_url": "https://p.example/w", "token_file": "/nothing/t"}}, "metrics.token_file"),
        ({"cloud": {**FAR, "pseudonym_key_file": "/nothing/key"}}, "pseudonym key"),
    ],
)
def test_what_cannot_work_is_a_fault_that_says_what_to_do(tmp_path: Path, sections: Any, word: str) -> None:
    [fault] = faults(cloud_findings(make_settings(tmp_path, **sections)))
    assert word in fault.text and len(fault.hint) > 15


@pytest.mark.parametrize(
    ("sections", "level", "word"),
    [
        ({"fleet": {"accept": ["models"]}}, Level.warn, "no cloud.records_url"),
        ({"cloud": FAR, "sync": {"apply_corrections": True}}, Level.note, "no name, ID or birth date"),
        ({"cloud": FAR, "sync": {"offline_mode": "always"}}, Level.note, "not sent"),
        (
            {"cloud": {"repository": {"metadata_url": "https://m.example/metadata", "root_file": "/r"}}},
            Level.warn,
            "follows",
        ),
    ],
)
def test_what_has_no_effect_is_told(tmp_path: Path, sections: Any, level: Level, word: str) -> None:
    found = list(cloud_findings(make_settings(tmp_path, **sections)))
    assert [(f.level, word in f.text) for f in found] == [(level, True)]


def test_nothing_is_said_of_what_is_right(tmp_path: Path) -> None:
    local = {"stow_url": "http://127.0.0.1:8090/studies", "records_url": "http://localhost:8090/v1"}
    for cloud in ({}, FAR, local):
        assert list(cloud_findings(make_settings(tmp_path, cloud=cloud))) == []


def test_the_summary_says_what_leaves_and_what_may_come_in(tmp_path: Path) -> None:
    assert list(told(make_settings(tmp_path))) == ["cloud: off, nothing leaves the building"]
    rule = {"name": "chest", "match": {}, "models": ["ct-lung"], "cloud_identity": "kept"}
    lines = list(told(make_settings(tmp_path, cloud=FAR, rules=[rule], fleet={"accept": ["rules"]})))
    assert lines[0] == "cloud: results and records to https://cloud.example; patient identity removed, but for chest"
    assert "may set: rules" in lines[1] and "not used" in lines[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("text", "said", "code"),
    [
        ('[cloud]\nstow_url = "http://cloud.example/studies"\n', "Use https://", 78),
        ('[cloud]\nstow_url = "cloud.example/studies"\n', "must begin with https://", 78),
        ('[cloud]\nstow_uri = "https://cloud.example/studies"\n', "did you mean 'stow_url'?", 78),
        ('[sync]\nresults = "soon"\n', "Input should be 'urgent', 'normal' or 'batch'", 78),
        ('[[cloud.models]]\nname = "ct-lung"\n', "there is no [cloud.repository]", 78),
        ('[[peers]]\nname = "CT 1"\nae_title = "CT1"\n', "should be 1 to 32 of a-z", 78),
        ('[cloud]\nstow_url = "https://cloud.example/studies"\n', "patient identity removed", 0),
    ],
)
def test_check_config_as_a_person_meets_it(tmp_path: Path, text: str, said: str, code: int) -> None:
    path = write(tmp_path / "node.toml", f'[node]\ndata_dir = "{tmp_path}"\n{text}')
    done = CliRunner().invoke(app, ["check-config", "--config", str(path)])
    assert done.exit_code == code or (code and done.exception is not None), done.output
    assert said in done.output or said in str(getattr(done.exception, "cause", done.exception))


@dataclass
class Cloud:
    """The reference endpoint of two sites, in a thread."""

    url: str
    folder: Path

    def found(self, **changes: Any) -> list[Finding]:
        token = changes.pop("token", A)
        cloud = {
            "stow_url": f"{self.url}/studies",
            "records_url": f"{self.url}/v1",
            "token_file": write(self.folder / "token", token),
            **changes,
        }
        settings = make_settings(self.folder, node={"data_dir": self.folder, "ae_title": "CT-A"}, cloud=cloud)
        return list(examine_cloud(settings))


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    found: list[str] = []
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with endpoint(tmp_path_factory.mktemp("cloud"), ADMIN, nodes=TOKENS) as (url, _):
            found.append(url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield Cloud(found[0], tmp_path_factory.mktemp("node"))
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


def test_the_doctor_asks_whether_it_is_the_right_place_and_the_right_token(cloud: Cloud) -> None:
    assert faults(cloud.found()) == []
    assert "knows this node as CT-A" in cloud.found()[-1].text
    for changes, word in (
        ({"token": B}, "as that of another node"),
        ({"token": "x" * 20}, "HTTP 401"),
        ({"stow_url": f"{cloud.url}/wrong"}, "nothing at this path"),
        ({"records_url": f"{cloud.url}/v2"}, "nothing at this path"),
        ({"records_url": f"{cloud.url}/health?x="}, "does not speak"),
    ):
        found = faults(cloud.found(**changes))
        assert found and any(word in f.text for f in found), (word, found)
        assert all(f.hint for f in found) and B not in str(found) and "xxxx" not in str(found)


def test_a_server_that_says_nothing_hides_no_other_check(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.doctor_cloud.request", lambda *_: (0, None))
    warned = [f for f in cloud.found() if f.level is Level.warn]
    assert len(warned) == 2 and all("does not answer" in f.text for f in warned)


def test_judgements() -> None:
    assert list(judge_status("k", 405, "x")) == [] == list(judge_status("k", 200, "x"))
    assert [f.level for f in judge_status("k", 307, "x")] == [Level.fault]
    assert [f.level for f in judge_records("k", 200, {"records": []}, "N")] == [Level.ok]
    assert [f.level for f in judge_records("k", 200, [], "N")] == [Level.fault]


def test_a_pattern_is_told_in_words() -> None:
    for field, value in (("name", "CT 1"), ("version", "one"), ("sha256", "xyz"), ("url", "ftp://x")):
        entry = {"name": "ct-lung", "url": "https://x/y.zip", "sha256": "0" * 64, "version": "1.0.0", field: value}
        with pytest.raises(Exception, match="should match pattern") as caught:
            Settings.model_validate({"cloud": {"models": [entry]}})
        [item] = caught.value.errors()  # type: ignore[attr-defined]
        assert plain(item).startswith("should be ") and "^" not in plain(item)
