"""Starting and ending the programs of the demo: on loopback, on free ports, never left behind."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dicomnode.errors import NodeError, OperatorError

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
STOP_SECONDS = 25.0


class Program:
    """A child process in a session of its own, so that Ctrl-C reaches the demo first.

    Its output goes to ``log``. Where util-linux has it, the kernel ends the child when the
    demo dies without having stopped it.
    """

    def __init__(self, name: str, argv: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        guard = shutil.which("setpriv")
        prefix = [guard, "--pdeathsig", "TERM"] if guard else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*prefix, *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def check(self) -> None:
        """Raises OperatorError with the end of the log when the program has ended."""
        if not self.running:
            raise OperatorError(
                f"run {self.name}",
                f"it ended with exit code {self._process.returncode}: {self.last_words()}",
                f"Its whole output is in {self.log}",
            )

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-2:])[-400:] or "it said nothing"

    def ask_to_stop(self) -> None:
        if self.running:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, wait, SIGKILL."""
        self.ask_to_stop()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port(preferred: int = 0) -> int:
    """``preferred`` when nobody listens there, else a port that the system says is free."""
    for wanted in (preferred, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((LOOPBACK, wanted))
            return int(sock.getsockname()[1])
    raise OperatorError("find a port", "the system gives no port on 127.0.0.1", "Check the loopback interface")


def accepts(port: int) -> bool:
    """Whether somebody accepts connections on a loopback port."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def wait_until(true: Callable[[], bool], seconds: float, operation: str, program: Program | None = None) -> None:
    """Poll ``true``. Raises when ``program`` ends meanwhile or the deadline passes."""
    deadline = time.monotonic() + seconds
    while not true():
        if program is not None:
            program.check()
        if time.monotonic() > deadline:
            words = f": {program.last_words()}" if program else ""
            hint = f"See {program.log}" if program else ""
            raise NodeError(operation, f"not there after {seconds:.0f} s{words}", hint)
        time.sleep(POLL_SECONDS)
