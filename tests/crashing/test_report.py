"""The command line of ``scripts/crash``: which modes run, what their exit code and JSON say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts.crashing import __main__ as command
from scripts.crashing.report import Report, as_json


def report(mode: str, *wrong: str) -> Report:
    return Report(mode, mode, ("what", "count"), [("a", 1)], {"lost": len(wrong)}, list(wrong), 1.6)


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *argv: str, wrong: str = "") -> tuple[int, list[str]]:
    """The exit code and the modes that ran, each replaced by one that finds ``wrong`` in floods."""
    monkeypatch.setattr(command, "power", lambda *_: report("power"))
    monkeypatch.setattr(command, "faults", lambda *_: report("faults"))
    monkeypatch.setattr(command, "flood", lambda *_: report("flood", *([wrong] if wrong else [])))
    monkeypatch.setattr(command, "kills", lambda *_: report("kills"))
    target = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["crash", *argv, "--json", str(target), "--work", str(tmp_path / "work")])
    code = command.main()
    found = json.loads(target.read_text())
    assert found["date"] and found["machine"] and found["seed"] == 0
    return code, [mode["mode"] for mode in found["modes"]]


def test_one_run_may_combine_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ("--kills", "5", "--power", "--faults", "--flood", "100")
    assert run(monkeypatch, tmp_path, *argv) == (0, ["power", "faults", "flood", "kills"])


def test_without_a_mode_it_kills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path) == (0, ["kills"])


def test_a_broken_promise_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, "--flood", "--kills", wrong="12 threads, 3 before") == (1, ["flood", "kills"])


def test_json_has_counts_table_and_faults() -> None:
    assert as_json(report("kills", "lost")) == {
        "mode": "kills",
        "seconds": 2,
        "lost": 1,
        "table": [{"what": "a", "count": 1}],
        "wrong": ["lost"],
    }
