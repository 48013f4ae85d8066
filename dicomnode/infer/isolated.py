"""A piece of work in a child process of its own: a crash of native code is an error here, not our end.

Probing a GPU, building an engine and the first use of a plan run native code that is known to
end in a segmentation fault (GPU.md, "Hazards at start").
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from dicomnode.errors import EngineError
from dicomnode.lifeline import die_with_parent

T = TypeVar("T")
Report = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0..1."""


class ChildCrashed(Exception):
    """The child ended without an answer; the message names the signal or the exit code."""


class Isolated(Protocol):
    """Runs ``task(report, *arguments)`` and gives its result; see :func:`isolated`."""

    def __call__(self, task: Callable[..., T], *arguments: Any, seconds: float, report: Report | None = None) -> T: ...


def isolated(task: Callable[..., T], *arguments: Any, seconds: float, report: Report | None = None) -> T:
    """``task(report, *arguments)`` in a spawned child; at most ``seconds`` long.

    Task, arguments and result travel by pickle. Raises ChildCrashed when the child dies or takes
    too long, and EngineError when the task raised one; any other exception of the task is a
    crash too. The kernel ends the child with the thread that called this.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, task, arguments), daemon=True)
    child.start()
    theirs.close()
    deadline = time.monotonic() + seconds
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                raise ChildCrashed(f"it did not end within {seconds:.0f} s")
            try:
                kind, *values = ours.recv()
            except EOFError:
                child.join()
                raise ChildCrashed(_ending(child.exitcode)) from None
            if kind == "progress" and report is not None:
                report(*values)
            elif kind == "result":
                result: T = values[0]
                return result
            elif kind == "engine":
                raise EngineError(*values)
            elif kind == "error":
                raise ChildCrashed(values[0])
    finally:
        ours.close()
        child.kill()
        child.join()
        child.close()


def inline(task: Callable[..., T], *arguments: Any, seconds: float, report: Report | None = None) -> T:
    """As :func:`isolated`, in this process: for a process that is itself expendable."""
    del seconds
    return task(report or _silent, *arguments)


def _silent(what: str, share: float) -> None:
    del what, share


def _child(connection: Connection, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    def report(what: str, share: float) -> None:
        with contextlib.suppress(OSError):
            connection.send(("progress", what, share))

    try:
        answer: tuple[Any, ...] = ("result", task(report, *arguments))
    except EngineError as error:
        cause = error.cause.removeprefix(f"{error.code}: ")
        answer = ("engine", error.operation, error.code, cause, error.hint)
    except Exception as error:  # noqa: BLE001 whatever a library does, the parent hears of it
        answer = ("error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
    connection.send(answer)
    connection.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"
