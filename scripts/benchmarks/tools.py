"""What every measurement uses: the run's settings, child processes, waiting, sampling."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
LOOPBACK = "127.0.0.1"
NO_DELAY = {"TCP_NODELAY": "1"}
"""DCMTK's programs, and Orthanc with them, switch Nagle's algorithm off when this is set."""

MEGABYTE = 1_000_000
COMMAND_SECONDS = 900.0
say = Console(stderr=True, highlight=False)


class BenchError(Exception):
    """A measurement that did not come about; the text says why."""


class Skipped(BenchError):
    """What it needs is not here."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: where its files go, how much is measured, how often."""

    work: Path
    quick: bool
    repeat: int
    skipped: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def amount(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def folder(self, name: str) -> Path:
        """A path that nothing has used; it is not made."""
        return self.work / f"{name}-{next(self._numbers)}"

    def skip(self, text: str) -> None:
        if text not in self.skipped:
            self.skipped.append(text)
            say.print(f"left out: {text}")


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of one cell in seconds. ``best`` is the figure: other load on the machine only adds to it."""

    seconds: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.seconds.append(value)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def less(self, start_up: float) -> float:
        """The best without the client's start-up; never below a millisecond."""
        return max(self.best - start_up, 0.001)

    def as_json(self) -> dict[str, Any]:
        return {
            "best_s": round(self.best, 4),
            "median_s": round(self.median, 4),
            "spread_s": round(max(self.seconds) - self.best, 4),
            "samples_s": [round(s, 4) for s in self.seconds],
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections and that nobody else can take."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        yield int(sock.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((LOOPBACK, port)) == 0


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"gave up waiting for {what}")
        time.sleep(0.01)


def program(name: str) -> str:
    """Debian's before any other: pynetdicom puts a storescu of its own into the environment's bin."""
    path = shutil.which(name, path="/usr/bin:/usr/local/bin:/usr/sbin:/usr/local/sbin") or shutil.which(name)
    if path is None:
        package = "orthanc" if name == "Orthanc" else "dcmtk"
        raise Skipped(f"{name} is not installed (apt-get install {package})")
    return path


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Of this process, without a TCP_NODELAY that was set by accident."""
    base = {k: v for k, v in os.environ.items() if k not in NO_DELAY}
    paths = [str(ROOT), str(ROOT / "scripts"), base.get("PYTHONPATH", "")]
    return {**base, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


@contextmanager
def running(argv: Sequence[str], more: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, ended with all its children."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(argv),
            env=environment(more),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def timed(argv: Sequence[str], more: Mapping[str, str], *, fails: bool = False) -> float:
    """Wall-clock seconds of a command. Raises BenchError unless it succeeds (``fails``: unless it fails)."""
    begin = time.perf_counter()
    done = subprocess.run(
        list(argv),
        env=environment(more),
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=COMMAND_SECONDS,
    )
    seconds = time.perf_counter() - begin
    if (done.returncode != 0) is not fails:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        raise BenchError(f"{Path(argv[0]).name} ended with {done.returncode}: {' / '.join(text[-3:])}")
    return seconds


def together(jobs: Sequence[Callable[[], float]]) -> tuple[float, list[float]]:
    """Run all at once; wall-clock seconds in all, and what each returned."""
    found: list[float] = [0.0] * len(jobs)
    faults: list[BaseException] = []

    def run(number: int) -> None:
        try:
            found[number] = jobs[number]()
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise BenchError(f"{len(faults)} of {len(jobs)} failed: {faults[0]}")
    return time.perf_counter() - begin, found


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """User and system time so far, of ended children too where their parent waited for them."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def settle() -> None:
    """Have nobody's dirty pages written during the next measurement."""
    os.sync()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
