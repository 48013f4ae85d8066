"""The pinned requirement files, and what scripts/setup and scripts/demo do without a network."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "scripts" / "requirements"
HASHED = [ROOT / "requirements.txt", *(LISTS / f"{name}.txt" for name in ("build", "cpu", "dev", "s3"))]
GPU = [LISTS / "t4.txt", LISTS / "v100.txt"]
DEVELOPERS_ONLY = {"pytest", "ruff", "mypy", "hypothesis", "onnx", "build", "simpleitk", "pip-tools"}
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}


def pins(path: Path) -> dict[str, str]:
    """Package -> version; every line that is no comment, hash or continuation has to be a pin."""
    found = {}
    for line in path.read_text().splitlines():
        text = line.strip()
        if not text or text.startswith(("#", "--hash=sha256:")):
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9._-]*)(?:\[[a-z,]+\])?==([0-9][^\s;\\]*)(?: ; .*?)?(?: \\)?", text)
        assert match, f"{path.name}: not a pin: {text}"
        found[match[1]] = match[2]
    return found


@pytest.mark.parametrize("path", HASHED, ids=lambda p: p.name)
def test_every_package_has_hashes(path: Path) -> None:
    blocks = re.split(r"\n(?=[a-z0-9])", "\n" + path.read_text())[1:]
    assert len(blocks) == len(pins(path)) > 0
    assert [b.split("==")[0] for b in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", b)] == []


@pytest.mark.parametrize("path", [*HASHED, *GPU], ids=lambda p: p.name)
def test_no_registry_and_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?:|file:/|--(extra-)?index-url|--find-links|--trusted-host|(?<![\w.])/\w+/", text)


def test_versions_agree_in_all_files() -> None:
    for extra in ("cpu", "dev", "t4", "v100"):
        together = [pins(p) for p in (HASHED[0], LISTS / "build.txt", LISTS / f"{extra}.txt")]
        for name in {n for found in together for n in found}:
            assert len({found[name] for found in together if name in found}) == 1, name


def test_cpu_and_gpu_runtimes_never_meet() -> None:
    present = {p.stem: RUNTIMES & set(pins(p)) for p in [*HASHED, *GPU]}
    assert present == {
        "requirements": set(),
        "build": set(),
        "dev": set(),
        "s3": set(),
        "cpu": {"onnxruntime"},
        "t4": {"onnxruntime-gpu"},
        "v100": {"onnxruntime-gpu"},
    }
    assert not [
        n for n in {**pins(HASHED[0]), **pins(LISTS / "cpu.txt")} if n.startswith(("nvidia", "tensorrt", "cuda"))
    ]


def test_the_runtime_has_no_developer_tools() -> None:
    assert DEVELOPERS_ONLY & set(pins(HASHED[0])) == set()


def test_files_cover_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = {
        HASHED[0]: project["project"]["dependencies"],
        LISTS / "build.txt": project["build-system"]["requires"],
        **{LISTS / f"{name}.txt": extras[name] for name in ("cpu", "dev", "kserve", "s3", "t4", "v100")},
    }
    for path, lines in wanted.items():
        names = {re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-") for line in lines}  # type: ignore[index]
        assert names - set(pins(path)) == set(), path.name


@pytest.mark.parametrize("name", ["setup", "demo", "requirements/compile"])
def test_scripts_parse_and_run_as_programs(name: str) -> None:
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=False).stderr == b""


class FakeVenv:
    """A virtual environment whose interpreter notes how it is called and installs nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "venv"
        self.calls = folder / "calls"
        (self.folder / "bin").mkdir(parents=True)
        (self.folder / "pyvenv.cfg").touch()
        self.present = folder / "present"
        self.present.touch()
        python = self.folder / "bin" / "python"
        python.write_text(
            f'#!/bin/sh\ncase "$1 $2" in\n"-c "*metadata*) cat {self.present} ;;\n'
            f'"-c "*) exit 0 ;;\n*) echo "$@" >> {self.calls} ;;\nesac\n'
        )
        python.chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "scripts" / "setup", *arguments],
            env={**os.environ, "DICOMNODE_VENV": str(self.folder), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def commands(self) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def venv(tmp_path: Path) -> FakeVenv:
    return FakeVenv(tmp_path)


def test_second_setup_does_nothing(venv: FakeVenv) -> None:
    first = venv.setup()
    assert first.returncode == 0, first.stderr
    commands = venv.commands()
    assert len(commands) == 2  # the packages, then the project itself
    assert "--require-hashes" in commands[0]
    assert "--no-build-isolation --no-deps --editable ." in commands[1]
    second = venv.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert venv.commands() == []


def test_developer_packages_come_once_and_stay(venv: FakeVenv) -> None:
    assert venv.setup().returncode == 0
    venv.commands()
    assert venv.setup("--dev").returncode == 0
    (command,) = venv.commands()
    assert "scripts/requirements/dev.txt" in command
    assert "--require-hashes" in command
    assert venv.setup("--dev").returncode == venv.setup().returncode == 0
    assert venv.commands() == []


def test_another_extra_is_refused(venv: FakeVenv) -> None:
    assert venv.setup("--extra", "cpu").returncode == 0
    venv.commands()
    refused = venv.setup("--extra", "t4")
    assert refused.returncode == 1
    assert "rm -r" in refused.stderr
    assert "--extra t4" in refused.stderr
    assert venv.commands() == []


def test_a_foreign_runtime_is_refused(venv: FakeVenv) -> None:
    venv.present.write_text("onnxruntime-gpu\n")
    refused = venv.setup()
    assert refused.returncode == 1
    assert "onnxruntime-gpu" in refused.stderr
    assert venv.commands() == []


def test_wrong_words_are_explained(venv: FakeVenv, tmp_path: Path) -> None:
    assert "no extra 'cuda'" in venv.setup("--extra", "cuda").stderr
    assert "unknown option" in venv.setup("--gpu").stderr
    assert "--extra needs a value" in venv.setup("--extra").stderr
    assert venv.setup("--help").stdout.startswith("Make .venv")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    missing = venv.setup(DICOMNODE_VENV=str(tmp_path / "new"), PYTHON=str(old))
    assert missing.returncode == 1
    assert "not Python 3.11 or newer" in missing.stderr
    assert not (tmp_path / "new").exists()


def test_without_python_it_says_which_package(venv: FakeVenv, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "readlink", "dirname", "cat", "sha256sum", "cut", "flock", "env"):
        (tools / tool).symlink_to(subprocess.check_output(["sh", "-c", f"command -v {tool}"], text=True).strip())
    missing = venv.setup(DICOMNODE_VENV=str(tmp_path / "new"), PATH=str(tools), PYTHON="")
    assert missing.returncode == 1
    assert "apt-get install python3 python3-venv" in missing.stderr


def test_a_failed_install_shows_the_cause_and_is_tried_again(venv: FakeVenv) -> None:
    python = venv.folder / "bin" / "python"
    good = python.read_text()
    python.write_text(good.replace("*) echo", '*) echo "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"; exit 1; echo'))
    failed = venv.setup()
    assert failed.returncode == 1
    assert "DO NOT MATCH THE HASHES" in failed.stderr
    python.write_text(good)
    assert venv.setup().returncode == 0
    assert len(venv.commands()) == 2


def test_gpu_is_asked_only_for_auto(venv: FakeVenv, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Tesla V100-SXM2-16GB, 7.0'\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "--extra" not in venv.setup(PATH=path).stderr
    assert any("cpu.txt" in line for line in venv.commands())
    (venv.folder / ".dicomnode" / "extra").unlink()
    chosen = venv.setup("--extra", "auto", PATH=path)
    assert "using --extra v100" in chosen.stderr
    assert any("v100.txt" in line for line in venv.commands())
