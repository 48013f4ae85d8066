"""The intake journal: what makes an object durable with one write to a place that exists already.

A new file costs commits of the file system's own journal (file, name, index): 2 to 6 ms, and
they wait for everyone else's. Overwriting blocks that were written before costs none: 0.5 ms
for 512 KB. So each object is first written here, whole, and may then be acknowledged; its file
and its row are made at once too, visible to all, but their barriers come later and for many
objects together (:mod:`dicomnode.receive.retire`). After a power cut what the journal holds
beyond the last barrier is stored again (:mod:`dicomnode.receive.recovery`).

One journal belongs to one receiver process. It is a ring of records, each aligned to 4096
bytes: a head with the journal's own random mark, a running number, lengths and the SHA-256 of
data set and fields; the fields as JSON; the data set.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode import durable
from dicomnode.durable import SyncFailed
from dicomnode.errors import StorageError

BLOCK = 4096
HEAD_BYTES = BLOCK
"""Room for head and fields; the data set begins at the next block."""

_HEAD = struct.Struct("<8s16sQQI32s")
_MAGIC = b"DNJRNL01"
_FIRST = struct.Struct("<8s16sQ")
"""The journal's own head, at its first block: magic, mark, size."""

_ZERO_BYTES = 1024 * 1024
SUFFIX = ".journal"
LOCK_SECONDS = 0.02
"""Pause between attempts at a journal that another process has."""


class Buffer:
    """Page-aligned memory for one record: ``HEAD_BYTES`` for its head, then the data set."""

    def __init__(self, capacity: int) -> None:
        self._memory = mmap.mmap(-1, HEAD_BYTES + -(-capacity // BLOCK) * BLOCK)
        self.view = memoryview(self._memory)
        self.capacity = capacity
        self.size = 0

    def add(self, fragment: memoryview) -> bool:
        """Append to the data set; False, and nothing added, when it does not fit."""
        end = self.size + len(fragment)
        if end > self.capacity:
            return False
        self.view[HEAD_BYTES + self.size : HEAD_BYTES + end] = fragment
        self.size = end
        return True

    @property
    def data_set(self) -> memoryview:
        return self.view[HEAD_BYTES : HEAD_BYTES + self.size]


class BufferPool:
    """Buffers to use again: fresh pages cost more than the copy into them."""

    def __init__(self, capacity: int, keep: int = 32) -> None:
        self._capacity = capacity
        self._keep = keep
        self._free: list[Buffer] = []

    def take(self) -> Buffer:
        try:
            buffer = self._free.pop()
        except IndexError:
            return Buffer(self._capacity)
        buffer.size = 0
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        if len(self._free) < self._keep:
            self._free.append(buffer)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that holds its place until it is retired; ``number`` runs up from 1."""

    number: int
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class Found:
    """A record read back: ``fields`` as written, the data set as received."""

    number: int
    fields: Mapping[str, str]
    data_set: bytes


class Journal:
    """The ring of one process; thread-safe. Raises StorageError when another process has it."""

    def __init__(self, path: Path, size: int, *, wait_seconds: float = 0.0) -> None:
        self.path = path
        self._fd, self._mark, self.size = _open(path, -(-size // BLOCK) * BLOCK, time.monotonic() + wait_seconds)
        self._lock = threading.Lock()
        self._number = 0
        self._next = BLOCK
        self._held: dict[int, Entry] = {}  # in the order of their numbers, and so of their places
        self._used = 0

    @property
    def mark(self) -> str:
        """What tells this journal from one that was made anew under the same name."""
        return self._mark.hex()

    @property
    def next_number(self) -> int:
        return self._number + 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def begin_after(self, number: int) -> None:
        """Number records from here on; call before the first, with the highest one there is."""
        self._number = number

    def used(self) -> float:
        """Part of the ring that is held, 0 to 1."""
        return self._used / (self.size - BLOCK)

    def reserve(self, data_set_bytes: int) -> Entry | None:
        """A place in the ring; None when there is no room before older records are retired."""
        length = HEAD_BYTES + -(-data_set_bytes // BLOCK) * BLOCK
        with self._lock:
            begin = self._place(length)
            if begin is None:
                return None
            self._number += 1
            entry = Entry(self._number, begin, length)
            self._held[entry.number] = entry
            self._used += length
            self._next = begin + length
            return entry

    def _place(self, length: int) -> int | None:
        oldest = next(iter(self._held.values()), None)
        if oldest is None or self._next > oldest.begin:  # free: from next to the end, from the start to the oldest
            if self._next + length <= self.size:
                return self._next
            return BLOCK if BLOCK + length <= (oldest.begin if oldest else self.size) else None
        return self._next if self._next + length <= oldest.begin else None

    def write(self, entry: Entry, buffer: Buffer, fields: Mapping[str, str], digest: Any) -> None:
        """Make the record durable; ``digest`` is a hash object of its own that has seen the data set.

        Raises SyncFailed: the caller must not acknowledge anything.
        """
        text = json.dumps(dict(fields)).encode()
        if _HEAD.size + len(text) > HEAD_BYTES:
            raise StorageError("write journal", "the fields do not fit into a record")
        digest.update(text)
        head = _HEAD.pack(_MAGIC, self._mark, entry.number, buffer.size, len(text), digest.digest())
        buffer.view[: len(head)] = head
        buffer.view[len(head) : len(head) + len(text)] = text
        try:
            written = 0
            while written < entry.length:
                written += durable.steps.pwrite(self._fd, buffer.view[written : entry.length], entry.begin + written)
            durable.steps.fdatasync(self._fd)
        except OSError as error:
            raise SyncFailed("write journal", error.strerror or str(error), "Check the disk") from error

    def release(self, entry: Entry) -> None:
        """The record is not needed any more: its place may be used again."""
        with self._lock:
            if self._held.pop(entry.number, None) is not None:
                self._used -= entry.length

    def records(self, after: int) -> Iterator[Found]:
        """Whole records with a number above ``after``, in the order of their numbers.

        What is torn or was overwritten is left out: it was never acknowledged, or is retired.
        """
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ring:
            places = []
            sign = _MAGIC + self._mark
            for begin in range(BLOCK, self.size, BLOCK):
                if ring[begin : begin + len(sign)] == sign:
                    places.append((int(_HEAD.unpack_from(ring, begin)[2]), begin))
            for number, begin in sorted(places):
                found = _record(ring, begin) if number > after else None
                if found is not None:
                    yield found


def _record(ring: mmap.mmap, begin: int) -> Found | None:
    _, _, number, size, text_size, digest = _HEAD.unpack_from(ring, begin)
    if text_size > HEAD_BYTES - _HEAD.size or begin + HEAD_BYTES + size > len(ring):
        return None
    text = ring[begin + _HEAD.size : begin + _HEAD.size + text_size]
    data = ring[begin + HEAD_BYTES : begin + HEAD_BYTES + size]
    check = hashlib.sha256(data)
    check.update(text)
    return Found(number, json.loads(text), data) if check.digest() == digest else None


def _open(path: Path, size: int, deadline: float) -> tuple[int, bytes, int]:
    """Descriptor (locked), mark and size of a journal, made and filled with zeros if need be."""
    durable.make_directory(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = durable.steps.open(path, flags, 0o600)
        try:
            _lock(fd, deadline)
            first = os.pread(fd, _FIRST.size, 0)
            known = _FIRST.unpack(first) if len(first) == _FIRST.size else (b"", b"", 0)
            if known[0] != _MAGIC or known[2] != os.fstat(fd).st_size:
                known = (_MAGIC, os.urandom(16), size)
                _fill(fd, size)
                durable.steps.pwrite(fd, _FIRST.pack(*known), 0)
                durable.steps.fsync(fd)
            durable.sync_directory(path.parent)  # each time: who made it may not have lived to do it
            with contextlib.suppress(OSError):  # not every file system has it; the page cache then does
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except BaseException:
            os.close(fd)
            raise
    except BlockingIOError:
        raise StorageError(
            "open journal", "another process has it", "Only one receiver of a name may run", retryable=True
        ) from None
    except OSError as error:
        raise durable.storage_error("open journal", error) from error
    return fd, known[1], known[2]


def _lock(fd: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(LOCK_SECONDS)
        else:
            return


def _fill(fd: int, size: int) -> None:
    """Write zeros over all of it: blocks that were only reserved would cost a metadata commit each."""
    os.ftruncate(fd, size)
    zeros = memoryview(bytes(_ZERO_BYTES))
    for begin in range(0, size, _ZERO_BYTES):
        durable.steps.pwrite(fd, zeros[: min(_ZERO_BYTES, size - begin)], begin)
