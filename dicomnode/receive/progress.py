"""What is acknowledged and what of it is in the index, for all processes to see.

An acknowledged object is durable at once, but its file and row are made when there is time. A
query must not miss it, whoever asks and wherever: before it looks, it waits until everything that
was acknowledged by then is in the index (:func:`wait_until_visible`), and tells who makes files
and rows to hurry.

Each receiver has a file of five numbers beside its journal, mapped by whoever is interested;
they also tell how many associations it serves, so that receivers share them evenly.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".progress"
WAIT_SECONDS = 10.0
"""A query goes on after this time, with what is there."""

POLL_SECONDS = 0.001
_ACKNOWLEDGED, _APPLIED, _WANTED, _PID, _OPEN = range(5)
_BYTES = 5 * 8


class Progress:
    """The numbers of one receiver. They count objects since its start; one thread writes each."""

    def __init__(self, path: Path, *, own: bool = False) -> None:
        """``own``: the receiver itself begins. Raises OSError, or ValueError while it is being made."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if own else 0), 0o600)
        try:
            if own:
                os.ftruncate(fd, _BYTES)
            self._map = mmap.mmap(fd, _BYTES)
        finally:
            os.close(fd)
        self._numbers = memoryview(self._map).cast("Q")  # native words, so that no one reads half a number
        if own:
            for place in (_ACKNOWLEDGED, _APPLIED, _WANTED, _OPEN):
                self._numbers[place] = 0
            self._numbers[_PID] = os.getpid()

    @property
    def acknowledged(self) -> int:
        return self._numbers[_ACKNOWLEDGED]

    @acknowledged.setter
    def acknowledged(self, number: int) -> None:
        self._numbers[_ACKNOWLEDGED] = number

    @property
    def applied(self) -> int:
        return self._numbers[_APPLIED]

    @applied.setter
    def applied(self, number: int) -> None:
        self._numbers[_APPLIED] = number

    @property
    def wanted(self) -> int:
        """Up to which number somebody waits."""
        return self._numbers[_WANTED]

    @wanted.setter
    def wanted(self, number: int) -> None:
        self._numbers[_WANTED] = number

    @property
    def open(self) -> int:
        """Connections that it serves now."""
        return self._numbers[_OPEN]

    @open.setter
    def open(self, number: int) -> None:
        self._numbers[_OPEN] = number

    def lives(self) -> bool:
        """Whether the receiver runs."""
        try:
            state = Path(f"/proc/{self._numbers[_PID]}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except FileNotFoundError:
            return False
        except (OSError, IndexError):
            return True
        return state not in (b"Z", b"X")  # dead, and its parent has not looked yet

    def close(self) -> None:
        self._numbers.release()
        self._map.close()


def wait_until_visible(folder: Path, seconds: float = WAIT_SECONDS) -> bool:
    """Return when all that receivers had acknowledged is in the index; False when that takes too long.

    ``folder`` holds the journals. A receiver that does not run is not waited for: it makes good
    what is in its journal when it starts, before it takes anything else.
    """
    deadline = time.monotonic() + seconds
    return all([_wait(progress, deadline) for progress in _receivers(folder)])


def least_open(folder: Path) -> int:
    """How many connections the least busy receiver serves."""
    return min((progress.open for progress in _receivers(folder) if progress.lives()), default=0)


def _receivers(folder: Path) -> Iterator[Progress]:
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            progress = Progress(path)
        except (OSError, ValueError):
            continue  # it begins just now
        try:
            yield progress
        finally:
            progress.close()


def _wait(progress: Progress, deadline: float) -> bool:
    target = progress.acknowledged
    while progress.applied < target <= progress.acknowledged:  # or it was started anew: then all of it is stored
        progress.wanted = target
        if not progress.lives():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
