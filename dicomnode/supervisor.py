"""Keeps child processes running: starts, restarts with back-off, stops in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dicomnode import logs
from dicomnode.lifeline import SUPERVISED, StopFlag

EXIT_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: starting again cannot help until the operator has acted."""

BACKOFF_FIRST = 0.2
BACKOFF_LONGEST = 5.0
STEADY_SECONDS = 10.0
STOP_SECONDS = 6.0
"""Then SIGKILL: every process may die at any instruction, so a long job or a slow peer is not waited for."""

POLL_SECONDS = 0.05


def how_it_ended(code: int) -> str:
    """For people: by which signal, or with which exit code. SIGKILL is most often the kernel's, for want of memory."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = " (by the kernel, when memory is short: 'journalctl -k' tells)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{why}"


def _child_environment() -> dict[str, str]:
    """Only the parent talks to systemd; the child dies with the parent."""
    kept = {k: v for k, v in os.environ.items() if k not in {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}}
    return {**kept, SUPERVISED: str(os.getpid())}


@dataclass(slots=True)
class Child:
    """One process to keep alive. ``argv`` is complete; ``pass_fds`` are inherited."""

    name: str
    argv: Sequence[str]
    pass_fds: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    due: float = 0.0
    restarts: int = field(default=0)


class Supervisor:
    """``on_restart(name, exit code)`` is told of each death that was not asked for."""

    def __init__(self, children: Sequence[Child], on_restart: Callable[[str, int], None] | None = None) -> None:
        self._children = list(children)
        self._on_restart = on_restart or (lambda name, code: None)
        self._log = logs.get()

    def run(self, stop: StopFlag, while_running: Callable[[], None] | None = None) -> int:
        """Supervise until ``stop``; returns the exit code for the parent.

        ``while_running`` is called at each poll; it must be quick.
        """
        try:
            while not stop.wait(POLL_SECONDS):
                for child in self._children:
                    if not self._tend(child):
                        return EXIT_CONFIGURATION
                if while_running is not None:
                    while_running()
            return 0
        finally:
            self.stop()

    def _tend(self, child: Child) -> bool:
        now = time.monotonic()
        if child.process is None:
            if now >= child.due:
                child.started = now
                try:
                    child.process = subprocess.Popen(
                        child.argv, pass_fds=child.pass_fds, start_new_session=True, env=_child_environment()
                    )
                except OSError as error:  # no memory or process to spare: that passes, and the others work on
                    child.due = now + BACKOFF_LONGEST
                    self._log.error("process cannot be started", name=child.name, error=error.strerror)
            return True
        code = child.process.poll()
        if code is None:
            return True
        self._reap_group(child.process.pid)
        child.process = None
        if code == EXIT_CONFIGURATION and not child.restarts:  # later it did work: a port or lock still to be let go
            return False
        child.failures = 1 if now - child.started > STEADY_SECONDS else child.failures + 1
        child.restarts += 1
        wait = min(BACKOFF_LONGEST, BACKOFF_FIRST * 2.0 ** min(child.failures - 1, 30))
        child.due = now + wait
        self._log.error("process ended, restarting", name=child.name, exit=code, retry_in=wait)
        with contextlib.suppress(Exception):
            self._on_restart(child.name, code)
        return True

    @staticmethod
    def _reap_group(pid: int) -> None:
        """What the dead process left behind in its own session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM to all, wait, SIGKILL what is left."""
        running = [c.process for c in self._children if c.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._log.warning("process did not stop in time, killed", pid=process.pid)
            self._reap_group(process.pid)
