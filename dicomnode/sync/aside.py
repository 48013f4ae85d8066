"""De-identification in child processes: parsing must not hold the interpreter that answers the API.

An object may end the process that parses it: a codec's or library's crash, more memory than it may
have, no end. That is told apart from a machine on which no such process can be had now, which passes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dicomnode.deidentify import Departure, deidentify
from dicomnode.errors import MalformedDataSet, NodeError
from dicomnode.lifeline import die_with_parent
from dicomnode.pseudonyms import Pseudonyms

NICE = 5
MOST_CHILDREN = 2
"""So that a class does not wait for another one's large object."""

BEGIN_SECONDS = 120.0
"""Until a child has loaded its libraries, on a busy machine."""

MOST_BYTES, BYTES_FOR_EACH = 256 << 20, 12
"""Memory of a child (RLIMIT_DATA) beyond what it has at its begin: for any object, and for each byte of one."""


def leave(path: Path, key: bytes, plain_slice: bool = False) -> Departure:
    """What leaves in place of the file at ``path``. Raises MalformedDataSet; OSError and MemoryError pass."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MalformedDataSet("de-identify", f"the stored file cannot be read ({error.strerror})") from None
    return deidentify(content, Pseudonyms(key), plain_slice=plain_slice)


Action = Callable[[Path, bytes, bool], Departure]


class ChildEnded(NodeError):
    """The process that de-identifies ended with this object in hand, or ran out of memory or time."""

    retryable = True


def seconds_for(size: int) -> float:
    """How long an object of so many bytes may take; about a thousand times what it does."""
    return 60.0 + size / 200_000


class Aside:
    """Children that are started when they are needed; a dead one is replaced. Used by several threads."""

    def __init__(self, action: Action = leave, seconds: Callable[[int], float] = seconds_for) -> None:
        self._action, self._seconds = action, seconds
        self._idle: list[_Child] = []
        self._busy: list[_Child] = []
        self._closed = False
        self._lock = threading.Lock()
        self._free = threading.Semaphore(MOST_CHILDREN)

    def leave(self, path: Path, key: bytes, plain_slice: bool = False) -> Departure:
        """As :func:`leave`. Raises ChildEnded for what ended two children, or one by its time or memory.

        MemoryError: no child can be had now.
        """
        with self._free:
            ended = ""
            for _ in range(2):
                child = self._child()
                try:
                    answer = child.ask((path, key, plain_slice), self._seconds)
                    if isinstance(answer, ChildEnded):
                        child.stop()  # what failed in it may have left it without memory, or half way: another is begun
                except EOFError:
                    ended = child.stop()
                    continue
                finally:
                    self._done(child)
                if isinstance(answer, BaseException):
                    raise answer
                assert isinstance(answer, Departure)
                return answer
            raise ChildEnded("de-identify", f"the de-identifier ended by {ended}")

    def close(self) -> None:
        """For good; who waits for a child is told that there is none."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for child in self._busy:
                child.kill()
        for child in idle:
            child.stop()

    def _child(self) -> _Child:
        child = None
        with self._lock:
            while self._idle and child is None:
                child = self._idle.pop()
                if not child.alive:
                    child.stop()
                    child = None
        child = child or _Child(self._action)
        with self._lock:
            self._busy.append(child)
            if self._closed:
                child.kill()
                raise MemoryError("the de-identifier is closed")
        return child

    def _done(self, child: _Child) -> None:
        with self._lock:
            self._busy.remove(child)
            if child.alive and not self._closed:
                self._idle.append(child)


class _Child:
    def __init__(self, action: Action) -> None:
        """Raises MemoryError where it does not come up: nothing speaks against an object then."""
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, action), daemon=True, name="de-identify")
        try:
            self._process.start()
        except OSError:
            self._line.close()
            raise
        finally:
            theirs.close()  # so that its end is seen here
        try:
            if self._line.poll(BEGIN_SECONDS) and self._line.recv() == "ready":
                return
        except (EOFError, OSError):
            pass
        raise MemoryError(f"the de-identifier does not come up ({self.stop()})")

    @property
    def alive(self) -> bool:
        return not self._line.closed and self._process.is_alive()

    def kill(self) -> None:
        with contextlib.suppress(ValueError):  # it was stopped already
            self._process.kill()

    def ask(self, what: tuple[Path, bytes, bool], seconds: Callable[[int], float]) -> Any:
        """Its answer, an exception among them. EOFError: it ended. Raises ChildEnded where its time is over."""
        allowed = seconds(_size(what[0]))
        try:
            self._line.send(what)
            if self._line.poll(allowed):
                return self._line.recv()
        except OSError:
            raise EOFError from None
        self.stop()
        raise ChildEnded("de-identify", f"the de-identifier had no end after {allowed:.0f} s")

    def stop(self) -> str:
        """By what it ended, in words."""
        self._line.close()
        self._process.join(1.0)  # one that is idle ends with its line
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        self._process.close()
        if code == -signal.SIGKILL:
            return "signal 9, memory most likely"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(line: Connection, action: Action) -> None:
    """The child ends with the sidecar, gives way to intake, and is silent: libraries' warnings quote values.

    It also ends after an object that it failed with: the next one begins with a clean process and its memory.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    begin = _data_bytes()
    line.send("ready")
    while True:
        try:
            what = line.recv()
        except EOFError:
            return
        most = begin + MOST_BYTES + BYTES_FOR_EACH * _size(what[0])
        try:
            _limit(most)
            line.send(action(*what))
            continue
        except MemoryError:
            failed: NodeError | OSError = _memory(most)
        except OSError as error:
            failed = _memory(most) if error.errno == errno.ENOMEM else error
        except NodeError as error:
            failed = error
        except Exception as error:  # noqa: BLE001 its traceback would be on stderr, with values
            failed = ChildEnded("de-identify", f"the de-identifier failed ({type(error).__name__})")
        line.send(failed)
        if isinstance(failed, ChildEnded):
            return


def _memory(most: int) -> ChildEnded:
    return ChildEnded("de-identify", f"the de-identifier reached its memory limit of {most >> 20} MiB")


def _size(path: Path) -> int:
    """0 for one that is not there: that is told when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _data_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def _limit(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
