"""Parent death, single instance, systemd, stop signals."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from dicomnode.errors import OperatorError
from dicomnode.lifeline import hold_single_instance, loaded, notify


def test_one_instance_of_a_name(tmp_path: Path) -> None:
    fd = hold_single_instance(tmp_path, "worker")
    other = hold_single_instance(tmp_path, "courier")
    with pytest.raises(OperatorError, match="another worker runs"):
        hold_single_instance(tmp_path, "worker")
    os.close(fd)
    os.close(hold_single_instance(tmp_path, "worker"))
    os.close(other)


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "n"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        notify("READY=1")
        assert sock.recv(100) == b"READY=1"
    notify("WATCHDOG=1")  # nobody listens any more


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_flag(number: int) -> None:
    code = (
        "from dicomnode.lifeline import StopFlag\nflag = StopFlag()\nassert not flag.wait(0)\n"
        "print('up', flush=True)\nassert flag.wait(60) and flag.is_set()\nprint('ended', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.readline() == "ended\n"
        assert process.wait(30) == 0


def test_child_whose_parent_died_before_it_could_ask_ends() -> None:
    """kill -9 of a supervisor while its children load their modules: what lived on held the locks of the next."""
    child = (
        "import os, sys\nfrom dicomnode.lifeline import die_with_parent\nsys.stdin.readline()\n"
        "die_with_parent()\nprint('lives on', flush=True)"
    )
    parent = (
        "import os, subprocess, sys\nfrom dicomnode.supervisor import _child_environment\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env=_child_environment())\nos._exit(0)"
    )
    read, write = os.pipe()
    inner, outer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=write, stdin=inner)
    os.close(write)
    os.close(inner)
    assert process.wait(30) == 0
    os.write(outer, b"go\n")
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""
    os.close(outer)


def test_child_dies_with_its_parent() -> None:
    child = (
        "import sys\nfrom dicomnode.lifeline import die_with_parent\ndie_with_parent()\n"
        "print('up', flush=True)\nsys.stdin.read()"
    )
    parent = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nimport signal\nsignal.pause()"
    )
    read, write = os.pipe()
    inner, outer = os.pipe()  # keeps the child's stdin open
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=write, stdin=inner)
    os.close(write)
    os.close(inner)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.readline() == b"up\n"
        process.kill()
        process.wait(30)
        assert pipe.read() == b"", "the child's end of the pipe closed with it"
    os.close(outer)


def test_a_stop_signal_never_meets_a_lock_of_its_own() -> None:
    """A handler runs between two instructions of whoever waits, also while that one holds the event's lock."""
    program = (
        "import os, signal\n"
        "from dicomnode.lifeline import StopFlag\n"
        "for number in range(3000):\n"
        "    flag = StopFlag()\n"
        "    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.00005 + number % 100 * 0.000005)\n"
        "    while not flag.wait(0.000001):\n"
        "        pass\n"
        "    os.close(flag._counter)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_is_loaded_is_not_searched_for_garbage_and_what_comes_later_is() -> None:
    class Ring:
        me: Ring

    loaded()
    try:
        assert gc.get_freeze_count() > 1000
        later = Ring()
        later.me, gone = later, weakref.ref(later)
        del later
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
