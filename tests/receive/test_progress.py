"""What receivers tell each other: what is in the index, and how busy they are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dicomnode.promptness import ANSWER_NANOSECONDS, INTAKE_NANOSECONDS
from dicomnode.receive.acceptor import FEW, Acceptor, Door, listen
from dicomnode.receive.guard import ConnectionCounter
from dicomnode.receive.progress import SUFFIX, Progress, least_open, wait_until_visible
from tests.test_promptness import kernel_has_them, slice_now


@pytest.fixture
def receiver(tmp_path: Path) -> Progress:
    return Progress(tmp_path / f"r1{SUFFIX}", own=True)


def test_nothing_acknowledged_means_nothing_to_wait_for(tmp_path: Path, receiver: Progress) -> None:
    assert wait_until_visible(tmp_path, 0.0)
    assert receiver.wanted == 0
    assert wait_until_visible(tmp_path / "absent", 0.0)


def test_a_query_waits_until_what_is_acknowledged_is_applied(tmp_path: Path, receiver: Progress) -> None:
    receiver.acknowledged = 7
    receiver.applied = 5
    seen: list[bool] = []
    query = threading.Thread(target=lambda: seen.append(wait_until_visible(tmp_path, 60.0)))
    query.start()
    while receiver.wanted != 7:  # the test's time limit ends this if nobody asks
        pass
    assert query.is_alive() and not seen
    receiver.acknowledged = 9  # what comes later is not waited for
    receiver.applied = 7
    query.join(20)
    assert seen == [True]


def test_it_does_not_wait_for_ever(tmp_path: Path, receiver: Progress) -> None:
    receiver.acknowledged = 1
    assert not wait_until_visible(tmp_path, 0.05)


def test_nor_for_a_receiver_that_died(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dicomnode.receive.progress import Progress;"
        "p = Progress(Path(sys.argv[1]), own=True); p.acknowledged = 3; p.open = 0"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / f"dead{SUFFIX}")], check=True, timeout=60)
    assert wait_until_visible(tmp_path, 60.0)
    mine = Progress(tmp_path / f"live{SUFFIX}", own=True)
    mine.open = 4
    assert least_open(tmp_path) == 4


def test_nor_for_one_whose_parent_has_not_noticed_yet(tmp_path: Path, receiver: Progress) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    receiver.acknowledged = 1
    receiver._numbers[3] = child.pid
    assert wait_until_visible(tmp_path, 60.0)
    child.wait()


def test_a_receiver_that_starts_anew_has_stored_all(tmp_path: Path, receiver: Progress) -> None:
    receiver.acknowledged = 7
    seen: list[bool] = []
    query = threading.Thread(target=lambda: seen.append(wait_until_visible(tmp_path, 60.0)))
    query.start()
    while receiver.wanted != 7:
        pass
    Progress(tmp_path / f"r1{SUFFIX}", own=True)
    query.join(20)
    assert seen == [True]
    assert receiver._numbers[3] == os.getpid()


@pytest.mark.skipif(not kernel_has_them(), reason="needs Linux 6.12")
def test_an_association_has_shorter_turns_than_inference_and_longer_ones_than_the_api() -> None:
    listening = listen("127.0.0.1", 0)
    seen: list[int] = []
    served, over = threading.Semaphore(0), threading.Event()

    def serve(*_: object) -> None:
        seen.append(slice_now())
        served.release()
        over.wait(60)

    acceptor = Acceptor([Door(listening)], ConnectionCounter(9, 9), serve, lambda _: None)
    acceptor.start()
    callers = []
    for _ in range(FEW + 1):
        callers.append(socket.create_connection(listening.getsockname()))
        assert served.acquire(timeout=20)
    over.set()
    acceptor.stop()
    for sock in (*callers, listening):
        sock.close()
    assert seen[:FEW] == [INTAKE_NANOSECONDS] * FEW and INTAKE_NANOSECONDS > ANSWER_NANOSECONDS
    assert seen[FEW] != INTAKE_NANOSECONDS, "many would keep each other waiting"


def test_a_busy_receiver_leaves_the_connection_to_another() -> None:
    """The kernel wakes both; only the one that is told that it serves more holds back."""
    listening = listen("127.0.0.1", 0)
    taken: list[str] = []
    both = threading.Semaphore(0)

    def acceptor(name: str, busier: bool) -> Acceptor:
        door = Door(listening.dup())

        def serve(sock: socket.socket, *_: object) -> None:
            taken.append(name)
            both.release()

        return Acceptor([door], ConnectionCounter(99, 99), serve, lambda _: None, busier=lambda running: busier)

    busy, idle = acceptor("busy", True), acceptor("idle", False)
    busy.start()
    callers = [socket.create_connection(listening.getsockname())]
    assert both.acquire(timeout=20)
    assert taken == ["busy"], "nobody else is there: it serves all the same"
    idle.start()
    for _ in range(20):
        callers.append(socket.create_connection(listening.getsockname()))
        assert both.acquire(timeout=20)
    assert taken.count("idle") >= 15
    for one in (busy, idle):
        one.stop()
    for sock in (*callers, listening):
        sock.close()
