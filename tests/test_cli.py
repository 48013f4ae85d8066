"""The command line: documented as it is, readable errors, and the package as it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from dicomnode import __version__, metrics
from dicomnode.cli import app
from dicomnode.commitment import Reference, Request
from dicomnode.index.database import Database
from dicomnode.index.notices import make_notices
from dicomnode.index.operation import Processes
from dicomnode.index.outbox import Outbox
from dicomnode.index.promises import Promises
from tests.certificates import Authority
from tests.index.rows import finished_job

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def commands(command: Any = None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every verb that can be typed, with its click command."""
    command = command or typer.main.get_command(app)
    inner = getattr(command, "commands", None)
    if inner is None:
        return {path: command}
    return {k: v for name, sub in inner.items() for k, v in commands(sub, (*path, name)).items()}


VERBS = commands()


def code_of(text: str) -> list[str]:
    """Code spans and the lines of code blocks."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()] + spans


def used_commands(text: str) -> list[list[str]]:
    """Argument lists of each ``dicomnode ...`` in code, also behind a path or sudo."""
    found = []
    for piece in code_of(text):
        match = re.match(r"(?:\$ )?(?:sudo (?:-u \S+ )?)?(?:\S*/)?dicomnode ([a-z].*)", piece)
        if match:
            found.append(match[1].split())
    return found


def problem(arguments: list[str]) -> str:
    """What is wrong with a command that a document shows; empty when it exists with its options."""
    verb = next((v for n in (2, 1) if (v := tuple(arguments[:n])) in VERBS), None)
    if verb is None:
        return f"there is no verb '{' '.join(arguments[:2])}'"
    options = {o for p in VERBS[verb].params for o in (*p.opts, *p.secondary_opts)}
    wrong = [a for a in arguments if a.startswith("-") and a.split("=")[0].strip("[]") not in {*options, "--help"}]
    return f"'{' '.join(verb)}' has no {wrong[0]}" if wrong else ""


readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


@readme
def test_documented_commands_exist() -> None:
    used = used_commands(README.read_text(encoding="utf-8"))
    assert len(used) >= len(VERBS)
    assert [p for u in used if (p := problem(u))] == []


@readme
def test_every_verb_is_documented() -> None:
    used = used_commands(README.read_text(encoding="utf-8"))
    named = {tuple(u[:2]) for u in used} | {tuple(u[:1]) for u in used}
    assert set(VERBS) - named == set()


@readme
def test_documented_scripts_exist_and_run() -> None:
    named = {m for piece in code_of(README.read_text(encoding="utf-8")) for m in re.findall(r"scripts/[\w.-]+", piece)}
    assert named
    for script in named:
        path = ROOT / script
        assert path.exists(), script
        assert path.is_dir() or path.suffix == ".py" or os.access(path, os.X_OK), f"{script} is not executable"


def test_the_reader_of_documents_finds_mistakes() -> None:
    text = "`dicomnode fly` and\n```sh\n.venv/bin/dicomnode jobs list --jsn\ndicomnode status --json # fine\n```"
    assert [problem(u) for u in used_commands(text)] == [
        "'jobs list' has no --jsn",
        "",
        "there is no verb 'fly'",
    ]


def test_every_verb_is_described() -> None:
    assert [v for v, command in VERBS.items() if not command.help] == []


def test_verbs_of_the_stable_surface() -> None:
    """ARCHITECTURE.md, "Stable surface": other programs rely on these."""
    stable = (
        "serve, check-config, doctor, status, echo, send, jobs list, jobs show, jobs retry, deliveries list,"
        " deliveries retry, models list, models verify, models activate, models rollback, demo"
    )
    assert {tuple(v.split()) for v in stable.split(", ") for v in [v.strip()]} <= set(VERBS)
    for verb, command in VERBS.items():
        options = {o for p in command.params for o in p.opts}
        assert "--json" in options or verb in {("serve",), ("run",)}
        assert "--config" in options or verb in {("demo",), ("version",), ("cloud",), ("models", "publish")}


def dicomnode(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DICOMNODE")}
    return subprocess.run(
        [sys.executable, "-m", "dicomnode", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**env, **environment},
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(
        f'[node]\ndata_dir = "{tmp_path / "data"}"\n[[peers]]\nname = "pacs"\nae_title = "PACS"\n'
        'host = "127.0.0.1"\nport = 1\n[delivery]\nconnect_seconds = 2\n'
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["status"], 78, "no configuration given"),
        (["check-config", "--config", "/no/such.toml"], 78, "does not exist"),
        (["status", "--config", "{config}"], 78, "data does not exist"),
        (["jobs", "retry", "1", "--config", "{made}"], 78, "there is no job 1"),
        (["jobs", "show", "7", "--config", "{made}"], 78, "there is no job 7"),
        (["deliveries", "retry", "1", "--config", "{made}"], 78, "there is no delivery 1"),
        (["commitments", "retry", "1", "--config", "{made}"], 78, "there is no commitment 1"),
        (["notifications", "retry", "1", "--config", "{made}"], 78, "there is no notification 1"),
        (["echo", "nobody", "--config", "{config}"], 78, "there is no peer 'nobody'"),
        (["echo", "pacs", "--config", "{config}"], 1, "does not answer"),
        (["send", "pacs", "/no/such", "--config", "{config}"], 78, "does not exist"),
        (["run", "kettle", "--config", "{config}"], 78, "there is no process 'kettle'"),
        (["models", "rollback", "ct-lung", "--config", "{made}"], 78, "no earlier version"),
    ],
)
def test_error_is_one_line_with_its_exit_code(
    tmp_path: Path, config: Path, arguments: list[str], code: int, said: str
) -> None:
    if "{made}" in arguments:
        Database(tmp_path / "data").close()
    done = dicomnode(*(a.format(config=config, made=config) for a in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr and done.stderr.startswith("dicomnode: ")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("text", ["[node]\nae_titel = 1", "[node"])
def test_wrong_configuration_is_78_for_every_process(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)
    for arguments in (["serve"], ["run", "worker"], ["check-config"]):
        done = dicomnode(*arguments, DICOMNODE_CONFIG=str(path))
        assert done.returncode == 78 and done.stderr.count("\n") == 1 and str(path) in done.stderr


def test_damaged_index_is_one_line(tmp_path: Path, config: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.sqlite").write_bytes(b"garbage " * 1000)
    done = dicomnode("status", "--config", str(config))
    assert done.returncode != 0 and "damaged" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "verb",
    [
        "check-config",
        "status",
        "events",
        "jobs list",
        "jobs show 1",
        "deliveries list",
        "commitments list",
        "notifications list",
        "models list",
        "version",
    ],
)
def test_json_parses_and_text_is_for_people(tmp_path: Path, config: Path, verb: str) -> None:
    db = Database(tmp_path / "data")
    job_id = finished_job(db)
    study_id = db.rows("SELECT id FROM studies")[0]["id"]
    with db.transaction():
        make_notices(db, job_id=job_id, study_id=study_id, results={1: "1.2"}, notify=("ris",), destinations=("pacs",))
    Promises(db).receive("pacs", Request("1.2.77", (Reference("1.2.1", "1.2.88"),)), "r", 60)
    db.close()
    runner = CliRunner()
    options = [] if verb == "version" else ["--config", str(config)]
    data = runner.invoke(app, [*verb.split(), "--json", *options], catch_exceptions=False)
    assert data.exit_code == 0
    assert json.loads(data.stdout) or verb == "events"
    text = runner.invoke(app, [*verb.split(), *options], catch_exceptions=False)
    assert text.exit_code == 0 and text.stdout.strip()
    with pytest.raises(ValueError, match=r"^(Expecting|Extra data)"):
        json.loads(text.stdout)


def test_retry_of_a_delivery(tmp_path: Path, config: Path) -> None:
    db = Database(tmp_path / "data")
    finished_job(db)
    box = Outbox(db, "deliveries")
    box.lease("pacs", "c", 60, 1)
    box.reject(1, "c", "0xC000")
    result = CliRunner().invoke(app, ["deliveries", "retry", "1", "--config", str(config)], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, "delivery 1 is sent again\n") and box.counts()["pending"] == 2
    db.close()


def test_send_says_what_failed(tmp_path: Path, config: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    done = dicomnode("send", "pacs", str(tmp_path / "x.txt"), "--config", str(config))
    assert done.returncode == 78 and "no DICOM file" in done.stderr


def test_wheel_is_complete_and_its_entry_point_runs(tmp_path: Path) -> None:
    if int(version("setuptools").split(".")[0]) < 80 and os.environ.get("CI") != "true":
        pytest.skip("setuptools 80 is needed to build the wheel, see build-system in pyproject.toml")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dicomnode", source / "dicomnode", ignore=shutil.ignore_patterns("__pycache__"))
    if not (source / "README.md").exists():
        (source / "README.md").write_text("not written yet")
    build = "build --wheel --no-isolation --skip-dependency-check -o {out} {source}"
    install = "pip install --quiet --no-deps --no-index --target {out}/site {wheel}"
    for step in (build, install):
        wheel = next(iter(tmp_path.glob("*.whl")), "")
        done = subprocess.run(
            [sys.executable, "-m", *(a.format(wheel=wheel, out=tmp_path, source=source) for a in step.split())],
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        if "No module named" in done.stderr and "build" in done.stderr:
            pytest.skip("the developer package 'build' is not installed")
        assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    shipped = {p.relative_to(site / "dicomnode") for p in (site / "dicomnode").rglob("*") if p.is_file()}
    present = {p.relative_to(ROOT / "dicomnode") for p in (ROOT / "dicomnode").rglob("*") if p.is_file()}
    missing = {p for p in present - shipped if "__pycache__" not in p.parts}
    assert not missing, "files of the package that the wheel lacks"
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "dicomnode"), "version"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__), done.stderr


def test_a_notification_is_sent_again(tmp_path: Path, config: Path) -> None:
    db = Database(tmp_path / "data")
    job_id = finished_job(db)
    study_id = db.rows("SELECT id FROM studies")[0]["id"]
    with db.transaction():
        make_notices(db, job_id=job_id, study_id=study_id, results={1: "1.2"}, notify=("ris",), destinations=())
        db.execute("UPDATE notifications SET state = 'rejected', last_error = '0x0110'")
    db.close()
    runner, options = CliRunner(), ["--config", str(config)]
    listed = runner.invoke(app, ["notifications", "list", "--state", "rejected", *options], catch_exceptions=False)
    assert "ris" in listed.stdout and "0x0110" in listed.stdout and "this node" in listed.stdout
    again = runner.invoke(app, ["notifications", "retry", "1", "--json", *options], catch_exceptions=False)
    assert json.loads(again.stdout) == {"notification": 1, "state": "waiting"}
    left = runner.invoke(app, ["notifications", "list", "--state", "rejected", *options], catch_exceptions=False)
    assert "no notifications" in left.stdout


def test_status_tells_of_tls(tmp_path: Path, config: Path) -> None:
    authority = Authority(tmp_path / "ca")
    own = authority.issue("node.hospital", days=10.5)
    db = Database(tmp_path / "data")
    metrics.peer_certificate("pacs", time.time() + 86400)
    Processes(db).beat("courier", "ready", {}, metrics.snapshot())
    metrics.TLS_PEER_SECONDS.clear()
    db.close()
    runner, options = CliRunner(), ["--config", str(config)]
    assert "TLS: the certificate of pacs ends" in runner.invoke(app, ["status", *options]).stdout
    with config.open("a") as file:
        file.write(
            f'[tls]\nport = 2762\ncertificate_file = "{own.certificate_file}"\nkey_file = "{own.key_file}"\n'
            f'ca_file = "{authority.ca_file}"\n'
        )
    text = runner.invoke(app, ["status", *options], catch_exceptions=False).stdout
    assert "TLS: port 2762, certificate 'node.hospital' until" in text and "(10 days)" in text
    data = json.loads(runner.invoke(app, ["status", "--json", *options]).stdout)["tls"]
    assert (data["certificate"]["state"], data["certificate"]["sha256"]) == ("expiring", own.sha256)
    assert [(p["peer"], p["state"]) for p in data["peers"]] == [("pacs", "expiring")]
    own.certificate_file.write_text("nothing")
    assert "cannot be understood" in runner.invoke(app, ["status", *options], catch_exceptions=False).stdout
