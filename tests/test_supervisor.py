"""Restart with back-off, end on a wrong configuration, no child left behind."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dicomnode import supervisor
from dicomnode.supervisor import BACKOFF_FIRST, BACKOFF_LONGEST, EXIT_CONFIGURATION, Child, Supervisor, how_it_ended


class Stop:
    """A StopFlag without signal handlers."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def wait(self, seconds: float) -> bool:
        return self.event.wait(seconds)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_crashed_child_is_started_again(tmp_path: Path) -> None:
    stop, told = Stop(), []
    log = tmp_path / "starts"
    child = Child("c", python(f"open({str(log)!r}, 'a').write('x')\nimport os\nos._exit(3)"))

    def restarted(name: str, code: int) -> None:
        told.append((name, code))
        if len(told) == 3:
            stop.event.set()

    assert Supervisor([child], restarted).run(stop) == 0  # type: ignore[arg-type]
    assert told == [("c", 3)] * 3 and log.read_text() == "xxx"


def test_wrong_configuration_ends_all(tmp_path: Path) -> None:
    other = Child("other", python("import signal\nsignal.pause()"))
    wrong = Child("wrong", python(f"import os\nos._exit({EXIT_CONFIGURATION})"))
    assert Supervisor([other, wrong]).run(Stop()) == EXIT_CONFIGURATION  # type: ignore[arg-type]
    assert other.process is not None and other.process.poll() is not None


def test_stop_ends_children_that_ignore_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    read, write = os.pipe()
    code = (
        "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.fork()\n"
        "os.write({}, b'u')\nwhile True: signal.pause()"
    )
    child = Child("c", python(code.format(write)), (write,))
    stop = Stop()
    thread = threading.Thread(target=Supervisor([child]).run, args=(stop,))
    thread.start()
    assert os.read(read, 1) + os.read(read, 1) == b"uu"
    os.close(write)
    stop.event.set()
    thread.join(30)
    assert os.read(read, 1) == b"", "neither the child nor its child is left"
    os.close(read)


def test_back_off_is_capped_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now))
    dead: Any = SimpleNamespace(poll=lambda: 1, pid=2**22 + 1)
    monkeypatch.setattr(Supervisor, "_reap_group", staticmethod(lambda pid: None))
    child = Child("c", ["x"])
    supervised = Supervisor([child])
    waits = []
    for _ in range(3000):  # a crash loop over a week-end
        child.process, child.started = dead, now
        assert supervised._tend(child)
        waits.append(child.due - now)
    assert waits[0] == pytest.approx(BACKOFF_FIRST) and waits[-1] == pytest.approx(BACKOFF_LONGEST)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(waits))
    child.process, child.started = dead, now - 3600  # it ran for an hour: begins anew
    supervised._tend(child)
    assert child.due - now == pytest.approx(BACKOFF_FIRST)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (74, "ended with exit code 74"),
        (-11, "was ended by SIGSEGV"),
        (-9, "was ended by SIGKILL (by the kernel, when memory is short: 'journalctl -k' tells)"),
        (-99, "was ended by signal 99"),
    ],
)
def test_how_a_process_ended_is_said_for_people(code: int, said: str) -> None:
    assert how_it_ended(code) == said
