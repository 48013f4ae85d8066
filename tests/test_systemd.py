"""The units load without a complaint and are hardened to what the process table says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parent.parent / "systemd"
SERVICES = sorted(p.name for p in UNITS.glob("*.service"))
PROGRAM = "/opt/dicomnode/.venv/bin/dicomnode"
EXPOSURE_MOST = 2.0


def analyze(*arguments: str) -> str:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is not installed, and CI must have it")
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copied(folder: Path, dropins: bool) -> list[str]:
    """The units with a program that exists here; with all example drop-ins where wanted."""
    for source in UNITS.glob("dicomnode*"):
        if source.suffix in {".service", ".target"}:
            text = source.read_text(encoding="utf-8")
            assert source.suffix == ".target" or text.count(PROGRAM) == 1
            text = text.replace(PROGRAM, "/bin/true").replace("Documentation=file:/opt", "Documentation=file:/nowhere")
            (folder / source.name).write_text(text, encoding="utf-8")
        elif source.is_dir() and dropins:
            (folder / source.name).mkdir()
            for example in source.glob("*.example"):
                shutil.copy(example, folder / source.name / example.stem)
    return sorted(str(p) for p in folder.iterdir() if p.is_file())


@pytest.mark.parametrize("dropins", [False, True])
def test_verify_is_clean(tmp_path: Path, dropins: bool) -> None:
    files = copied(tmp_path, dropins)
    assert len(files) == 5
    output = analyze("verify", "--man=no", *files)
    ours = [line for line in output.splitlines() if "dicomnode" in line]
    assert ours == []


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("dropins", [False, True])
def test_exposure(tmp_path: Path, service: str, dropins: bool) -> None:
    copied(tmp_path, False)
    unit = tmp_path / service
    if dropins:  # offline analysis reads one file: append the drop-ins as systemd would
        for example in sorted((UNITS / f"{service}.d").glob("*.example")):
            with unit.open("a", encoding="utf-8") as file:
                file.write("\n" + example.read_text(encoding="utf-8"))
    output = analyze("security", "--offline=true", str(unit))
    found = re.search(r"Overall exposure level for .*: ([\d.]+) ", output)
    assert found, output
    assert float(found[1]) <= EXPOSURE_MOST, output


def keys(service: str) -> dict[str, str]:
    lines = (UNITS / service).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_four_processes_have_a_unit_each() -> None:
    assert [f"dicomnode-{p}.service" for p in ("courier", "receiver", "sidecar", "worker")] == SERVICES
    target = (UNITS / "dicomnode.target").read_text(encoding="utf-8")
    for service in SERVICES:
        unit = keys(service)
        assert service in target
        process = service.removeprefix("dicomnode-").removesuffix(".service")
        assert unit["ExecStart"] == f"{PROGRAM} run {process} --config /etc/dicomnode/dicomnode.toml"
        assert unit["Type"] == "notify"
        assert int(unit["WatchdogSec"]) >= 30
        assert unit["Restart"] == "always"
        assert unit["User"] == "dicomnode"
        assert unit["StateDirectory"] == "dicomnode"
        assert unit["RestartPreventExitStatus"] == "78"
        assert "ProcSubset" not in unit, "node time needs the boot id"


def test_the_worker_has_no_network() -> None:
    unit = keys("dicomnode-worker.service")
    assert unit["PrivateNetwork"] == "yes"
    assert unit["RestrictAddressFamilies"] == "AF_UNIX"
    assert unit["IPAddressDeny"] == "any"


@pytest.mark.parametrize("name", ["sysusers", "tmpfiles"])
def test_snippets_parse(tmp_path: Path, name: str) -> None:
    tool = shutil.which(f"systemd-{name}")
    if tool is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"systemd-{name} is not installed, and CI must have it")
        pytest.skip(f"systemd-{name} is not installed")
    (tmp_path / "etc").mkdir()
    snippet = tmp_path / f"{name}.conf"
    shutil.copy(UNITS / f"dicomnode.{name}.conf", snippet)
    if name == "sysusers":
        done = subprocess.run(
            [tool, f"--root={tmp_path}", "--dry-run", str(snippet)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "dicomnode" in done.stdout + done.stderr
        return
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\ndicomnode:x:999:999::/:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\ndicomnode:x:999:\n")
    done = subprocess.run(
        [tool, f"--root={tmp_path}", "--create", str(snippet)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or os.geteuid() != 0, done.stderr
