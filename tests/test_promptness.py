"""Short turns: the kernel has them, for one thread, and not for its children."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dicomnode import promptness
from dicomnode.promptness import _ATTRIBUTES, _SCHED_SETATTR, ANSWER_NANOSECONDS, ask_for_short_turns, giving_way

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def slice_now(thread: int = 0) -> int:
    """Nanoseconds, as sched_getattr(2) tells; 0 where the kernel's own serves."""
    found = ctypes.create_string_buffer(_ATTRIBUTES.size)
    number = _SCHED_GETATTR[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, thread, found, _ATTRIBUTES.size, 0) == 0
    return int(_ATTRIBUTES.unpack(found.raw)[5])


def kernel_has_them() -> bool:
    release = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    return release >= (6, 12) and _SCHED_SETATTR is not None


@pytest.mark.skipif(not kernel_has_them(), reason="needs Linux 6.12")
def test_one_thread_gets_them_and_nobody_that_it_starts() -> None:
    seen: dict[str, int] = {}
    mine = slice_now()  # another test may have run the sidecar in this thread
    nice = os.getpriority(os.PRIO_PROCESS, 0)

    def prompt() -> None:
        seen["before"] = slice_now()
        assert ask_for_short_turns()
        seen["asked"] = slice_now()
        other = threading.Thread(target=lambda: seen.update(thread=slice_now()))
        other.start()
        other.join()
        code = "from tests.test_promptness import slice_now; print(slice_now())"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        seen["child"] = int(subprocess.check_output([sys.executable, "-c", code], env=environment))

    for target in (ask_for_short_turns, prompt):  # the first one is for this thread alone, too
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert seen.pop("asked") == ANSWER_NANOSECONDS
    assert set(seen.values()) == {seen["before"]} and seen["before"] != ANSWER_NANOSECONDS
    assert slice_now() == mine and os.getpriority(os.PRIO_PROCESS, 0) == nice


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE, os.SCHED_FIFO])
def test_an_operators_policy_stays(policy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: policy)
    before = slice_now()
    assert not ask_for_short_turns() and slice_now() == before


def test_a_machine_of_another_kind_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promptness, "_SCHED_SETATTR", None)
    assert not ask_for_short_turns()


def test_who_gives_way_does_so_with_all_it_starts_and_for_a_while() -> None:
    seen: dict[str, int] = {}

    def work() -> None:
        with giving_way():
            seen["work"] = os.sched_getscheduler(0)
            other = threading.Thread(target=lambda: seen.update(thread=os.sched_getscheduler(0)))
            other.start()
            other.join()
        seen["after"] = os.sched_getscheduler(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {"work": os.SCHED_BATCH, "thread": os.SCHED_BATCH, "after": os.SCHED_OTHER}


def test_an_operators_policy_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_FIFO)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("it was changed"))
    with giving_way():
        pass
