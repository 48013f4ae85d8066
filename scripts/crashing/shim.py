"""Python's side of shim.c: build it, hand it to processes, read what it wrote, make calls fail."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
_RECORD = struct.Struct("<IB3xIIQqqIII")
_CONTROL = struct.Struct("<8I128s128s")


KILL = 0x7FFF
"""Instead of an errno: SIGKILL to the process just before the call."""


class NoCompiler(RuntimeError):
    """There is no C compiler here: what needs the shim cannot run."""


@dataclass(frozen=True, slots=True)
class Event:
    """One record. ``kind``: O create, W write, T size, R rename, L link, U unlink, M mkdir, X rmdir, S fsync,
    N sent, G received, F a fault, P a shared mapping, K a mark of ours, ! something that is not modelled.

    ``path`` and ``other`` are relative to the watched folder. ``length`` is a size (T) or errno (F).
    """

    number: int
    kind: str
    pid: int
    flags: int
    ino: int
    offset: int
    length: int
    path: str
    other: str
    data: bytes


def build(folder: Path) -> Path:
    """Compile the shim into ``folder``. Raises NoCompiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise NoCompiler("gcc is not installed: power cuts and failing disks are not tried")
    target = folder / "shim.so"
    argv = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(SOURCE), "-ldl"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"the shim does not compile:\n{done.stderr}")
    return target


class Op(IntFlag):
    """Kinds of calls that can be made to fail; the numbers are shim.c's."""

    create = 1
    write = 2
    sync = 4
    rename = 8
    unlink = 16
    mkdir = 32
    truncate = 64


class Faults:
    """The control block: one rule at a time, for all processes that have the shim."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_CONTROL.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _CONTROL.size)

    def arm(
        self,
        ops: Op,
        code: int,
        *,
        nth: int = 1,
        sticky: bool = False,
        match: str = "",
        avoid: str = "",
        shorten: bool = False,
    ) -> None:
        """Fail the ``nth`` call of these kinds whose path has ``match`` and not ``avoid``; if sticky, all later ones.

        ``shorten``: a failing write first writes a part, as it does on a disk that becomes full.
        """
        self.disarm()
        rule = (0, ops, code, sticky, shorten, nth - 1, 0, 0, match.encode(), avoid.encode())
        self._map[:] = _CONTROL.pack(*rule)
        self._map[:4] = struct.pack("<I", 1)  # last: a process that looks in between sees a whole rule

    def disarm(self) -> None:
        self._map[:4] = bytes(4)

    @property
    def seen(self) -> int:
        """How many calls the rule applied to."""
        return int(struct.unpack_from("<I", self._map, 24)[0])

    @property
    def fired(self) -> int:
        return int(struct.unpack_from("<I", self._map, 28)[0])


class Shim:
    """The built shim with a folder to watch; :meth:`environment` is for the processes to watch."""

    def __init__(self, library: Path, root: Path, trace: Path, *, port: int = 0, peer: int = 0) -> None:
        self.root = root
        self.path = trace
        self._variables = {"LD_PRELOAD": str(library), "CRASH_ROOT": str(root.resolve()), "CRASH_TRACE": str(trace)}
        if port:
            self._variables["CRASH_PORT"] = str(port)
        if peer:
            self._variables["CRASH_PEER"] = str(peer)

    def environment(self, faults: Faults | None = None) -> dict[str, str]:
        return {**self._variables, **({"CRASH_FAULTS": str(faults.path)} if faults else {})}

    def mark(self, text: str) -> None:
        """Put a mark of ours between the events."""
        data = text.encode()
        head = _RECORD.pack(_RECORD.size + len(data), ord("K"), os.getpid(), 0, 0, 0, 0, 0, 0, len(data))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, head + data)
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Begin anew; those who write append, so they go on at the beginning."""
        if self.path.exists():
            os.truncate(self.path, 0)

    def events(self) -> list[Event]:
        return read_trace(self.path)


def read_trace(path: Path) -> list[Event]:
    """All events; a record that a kill cut off ends the list."""
    raw = path.read_bytes() if path.exists() else b""
    events: list[Event] = []
    at = 0
    while at + _RECORD.size <= len(raw):
        total, kind, pid, flags, ino, offset, length, first, second, count = _RECORD.unpack_from(raw, at)
        if at + total > len(raw):
            break
        head = at + _RECORD.size
        names = raw[head : head + first].decode(), raw[head + first : head + first + second].decode()
        data = raw[head + first + second : head + first + second + count]
        events.append(Event(len(events), chr(kind), pid, flags, ino, offset, length, *names, data))
        at += total
    return events


def describe(event: Event) -> str:
    """A line for a report; no contents."""
    text = f"{event.number}: {event.kind} {event.path}"
    if event.kind == "R":
        text += f" -> {event.other}"
    if event.kind == "W":
        text += f" at {event.offset}, {len(event.data)} bytes"
    if event.kind == "F":
        text += f" {errno.errorcode.get(event.length, event.length)}"
    return text
