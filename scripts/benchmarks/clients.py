"""Clients: DCMTK's programs and our own, timed; their start-up is timed apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.data import ObjectSet
from benchmarks.peers import Acceptor
from benchmarks.tools import (
    COMMAND_SECONDS,
    LOOPBACK,
    NO_DELAY,
    BenchError,
    Samples,
    closed_port,
    environment,
    program,
    timed,
)

LOOK_SECONDS = 0.005
Argv = Callable[[int], list[str]]
"""Command line for a port."""


def dcmsend(objects: ObjectSet, called: str) -> Argv:
    front = [program("dcmsend"), "-aet", "BENCH", "-aec", called, LOOPBACK]
    return lambda port: [*front, str(port), "+sd", "+r", str(objects.folder)]


def storescu(objects: ObjectSet, called: str) -> Argv:
    front = [program("storescu"), "-aet", "BENCH", "-aec", called, "+sd", "+r", LOOPBACK]
    return lambda port: [*front, str(port), str(objects.folder)]


def _study(uid: str) -> list[str]:
    return ["-S", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={uid}"]


def movescu(uid: str, called: str, target: str) -> Argv:
    front = [program("movescu"), "-aet", "BENCH", "-aec", called, "-aem", target, *_study(uid), LOOPBACK]
    return lambda port: [*front, str(port)]


def getscu(uid: str, called: str, folder: Path) -> Argv:
    front = [program("getscu"), "-aet", "BENCH", "-aec", called, "-od", str(folder), *_study(uid), LOOPBACK]
    return lambda port: [*front, str(port)]


def start_up(argv: Argv, *, times: int = 5) -> float:
    """The best time of the same command against a port that refuses: start and reading of its input, no network."""
    with closed_port() as port:
        return min(timed(argv(port), NO_DELAY, fails=True) for _ in range(times))


def send(
    objects: ObjectSet, acceptor: Acceptor, argv: Argv, *, no_delay: bool, what: str, held: Samples | None = None
) -> float:
    """Seconds of the client's process. Raises BenchError unless every object arrived.

    ``held`` gets the seconds until the acceptor's own count has all of them: files of those that
    keep none, rows of those with an index.
    """
    objects.renew()
    before = acceptor.count()
    begin = time.perf_counter()
    seconds = timed(argv(acceptor.port), NO_DELAY if no_delay else {})
    while (
        held is not None and acceptor.count() < before + len(objects) and time.perf_counter() - begin < COMMAND_SECONDS
    ):
        time.sleep(LOOK_SECONDS)
    if held is not None:
        held.add(time.perf_counter() - begin)
    acceptor.expect(before + len(objects), what)
    return seconds


def python_sender(role: str, objects: ObjectSet, acceptor: Acceptor, what: str) -> dict[str, float]:
    """``scan_s`` and ``send_s`` of a sender in a process of its own (see python_peers)."""
    objects.renew()
    before = acceptor.count()
    argv = [sys.executable, "-m", "benchmarks.python_peers", role, str(acceptor.port), str(objects.folder)]
    done = subprocess.run(
        argv, env=environment({}), check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    if done.returncode:
        raise BenchError(f"{what}: {done.stderr.strip().splitlines()[-1:]}")
    acceptor.expect(before + len(objects), what)
    found: dict[str, float] = json.loads(done.stdout)
    return found
