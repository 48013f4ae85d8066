"""Work in a child: result, progress, errors, crashes, time."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dicomnode.errors import EngineError
from dicomnode.infer.isolated import ChildCrashed, Report, isolated


def task(report: Report, what: str) -> str:
    if what == "engine error":
        raise EngineError("build engine", "OOM", "too little", "Buy more")
    if what == "error":
        raise ValueError("first line\nsecond line")
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    if what == "hang":
        report("hangs", 0.5)
        time.sleep(600)
    report("half", 0.5)
    return what.upper()


def test_result_progress_and_errors() -> None:
    seen: list[tuple[str, float]] = []
    assert isolated(task, "fine", seconds=60, report=lambda what, share: seen.append((what, share))) == "FINE"
    assert seen == [("half", 0.5)]
    with pytest.raises(EngineError) as caught:
        isolated(task, "engine error", seconds=60)
    assert (caught.value.code, caught.value.cause, caught.value.hint) == ("OOM", "OOM: too little", "Buy more")
    with pytest.raises(ChildCrashed, match=r"ValueError: first line$"):
        isolated(task, "error", seconds=60)


@pytest.mark.parametrize(("what", "words"), [("segfault", "SIGSEGV"), ("exit", "exit code 3")])
def test_a_crash_is_an_error_here(what: str, words: str) -> None:
    with pytest.raises(ChildCrashed, match=words):
        isolated(task, what, seconds=60)


def test_what_hangs_is_ended() -> None:
    begun = time.monotonic()
    with pytest.raises(ChildCrashed, match="within 2 s"):
        isolated(task, "hang", seconds=2)
    assert time.monotonic() - begun < 30
