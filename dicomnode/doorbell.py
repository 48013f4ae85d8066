"""Wake-ups between processes: a datagram that says "look at the rows again".

Losing one costs latency, never work: every stage also looks by itself at a slow beat.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from pathlib import Path

SLOW_BEAT_SECONDS = 1.0
_RING, _AT_ONCE = b"!", b"!now"


def _address(data_dir: Path, stage: str) -> str:
    path = str(data_dir / "run" / f"{stage}.bell")
    if len(path) < 100:
        return path
    import hashlib

    # sun_path holds 108 bytes: fall back to the abstract namespace for deep data folders.
    return "\0dicomnode-" + hashlib.sha256(path.encode()).hexdigest()[:40]


class Doorbell:
    """The waiting side: one for each stage."""

    def __init__(self, data_dir: Path, stage: str) -> None:
        self._address = _address(data_dir, stage)
        self._at_once = False
        (data_dir / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if not self._address.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                Path(self._address).unlink()
        self._socket.bind(self._address)

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait(self, seconds: float = SLOW_BEAT_SECONDS) -> bool:
        """Wait until rung or the time is over; True when rung."""
        if not select.select([self._socket], [], [], max(0.0, seconds))[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._at_once |= self._socket.recv(16) == _AT_ONCE
        return True

    def at_once(self) -> bool:
        """Whether one of the rings since the last question was an operator's, who does not want to wait."""
        asked, self._at_once = self._at_once, False
        return asked

    def close(self) -> None:
        self._socket.close()


_ringer: socket.socket | None = None
_ringer_lock = threading.Lock()


def ring(data_dir: Path, stage: str, *, at_once: bool = False) -> None:
    """Wake a stage; silently nothing when it is not there or its queue is full.

    ``at_once``: an operator has mended something, back-offs are over.
    """
    global _ringer  # noqa: PLW0603 one unconnected socket per process, datagrams are atomic
    with _ringer_lock:
        if _ringer is None:
            _ringer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    with contextlib.suppress(OSError):
        _ringer.sendto(_AT_ONCE if at_once else _RING, _address(data_dir, stage))
