"""The intake journal: what makes an object durable with one write to a place that exists already.

A new file costs commits of the file system's own journal (file, name, index): 2 to 6 ms, and
they wait for everyone else's. Overwriting blocks that were written before costs none. So each
object is first written here, whole, and may then be acknowledged; its file and its row are made
when there is time (:mod:`dicomnode.receive.apply`), and their barriers come for many objects
together (:mod:`dicomnode.receive.retire`). After a power cut what the journal holds beyond the
last barrier is stored again (:mod:`dicomnode.receive.recovery`).

One journal belongs to one receiver process. It is a ring of records, each aligned to 4096
bytes: the data set, filled up to a whole block, then a block with the journal's own random mark,
a running number, lengths, the checksum of data set and fields, and the fields. That
block comes last, so that a long data set can be written while it is still coming in. Numbers say
in which order objects were complete; places are taken wherever the ring is free.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from dicomnode import durable
from dicomnode.durable import SyncFailed
from dicomnode.errors import StorageError

BLOCK = 4096
TAIL_BYTES = BLOCK
"""The last block of a record."""

_TAIL = struct.Struct("<8s16sQQI16s")
_MAGIC = b"DNJRNL02"
_FIRST = struct.Struct("<8s16sQ")
"""The journal's own head, at its first block: magic, mark, size."""

_ZERO_BYTES = 1024 * 1024
SUFFIX = ".journal"
LOCK_SECONDS = 0.02
"""Pause between attempts at a journal that another process has."""

_SYNC_FILE_RANGE_WRITE = 2

checksum = xxhash.xxh3_128
"""Finds torn and overwritten records; who could forge one could write the objects themselves."""


def _writeback() -> Callable[[int, int, int], Any]:
    """``sync_file_range(2)``: start writing to the disk, do not wait. A hint: without it the fdatasync does all."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError):
        return lambda fd, begin, length: None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return lambda fd, begin, length: call(fd, begin, length, _SYNC_FILE_RANGE_WRITE)


_start_writing = _writeback()


def padded(size: int) -> int:
    """``size`` filled up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Buffer:
    """Page-aligned memory for the data set of one record and its tail; and a descriptor of the journal.

    The descriptor is the buffer's own: an error of writing back is told once to each descriptor,
    so whoever shared one could take another's failure for its own success.
    """

    def __init__(self, capacity: int, path: Path | None = None) -> None:
        self._memory = mmap.mmap(-1, padded(capacity) + TAIL_BYTES)
        self.view = memoryview(self._memory)
        self.capacity = capacity
        self.size = 0
        self.fd = durable.steps.open(path, os.O_WRONLY | os.O_CLOEXEC) if path is not None else -1

    def add(self, fragment: memoryview) -> bool:
        """Append to the data set; False, and nothing added, when it does not fit."""
        begin = self.size
        end = begin + len(fragment)
        if end > self.capacity:
            return False
        self.view[begin:end] = fragment
        self.size = end
        return True

    @property
    def data_set(self) -> memoryview:
        return self.view[: self.size]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class BufferPool:
    """Buffers to use again: fresh pages cost more than the copy into them. ``path`` is the journal's."""

    def __init__(self, capacity: int, path: Path | None = None, keep: int = 32) -> None:
        self._capacity = capacity
        self._path = path
        self._keep = keep
        self._free: list[Buffer] = []

    def take(self) -> Buffer:
        """Raises StorageError when there is no descriptor to be had."""
        try:
            buffer = self._free.pop()
        except IndexError:
            try:
                return Buffer(self._capacity, self._path)
            except OSError as error:
                raise durable.storage_error("open journal", error) from error
        buffer.size = 0
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        if len(self._free) < self._keep:
            self._free.append(buffer)
        else:
            buffer.close()

    def close(self) -> None:
        while self._free:
            self._free.pop().close()


class Place(NamedTuple):
    """A part of the ring that is taken, in bytes."""

    begin: int
    length: int


class Entry(NamedTuple):
    """A record that holds its place until it is retired; ``number`` runs up from 1."""

    number: int
    place: Place
    size: int
    """Bytes of the data set, from the place's begin on."""


@dataclass(frozen=True, slots=True)
class Found:
    """A record read back: ``fields`` as written, the data set as received."""

    number: int
    fields: bytes
    data_set: bytes


class Journal:
    """The ring of one process; thread-safe. Raises StorageError when another process has it."""

    def __init__(self, path: Path, size: int, *, wait_seconds: float = 0.0) -> None:
        self.path = path
        self._fd, self._mark, self.size = _open(path, padded(size), time.monotonic() + wait_seconds)
        self._lock = threading.Lock()
        self._number = 0
        self._next = BLOCK
        self._begins: list[int] = []
        self._lengths: dict[int, int] = {}
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

    def reserve(self, data_set_bytes: int) -> Place | None:
        """A place in the ring; None when there is no room before older records are retired."""
        length = padded(data_set_bytes) + TAIL_BYTES
        with self._lock:
            begin = self._free_at(length)
            if begin is None:
                return None
            insort(self._begins, begin)
            self._lengths[begin] = length
            self._used += length
            self._next = begin + length
            return Place(begin, length)

    def _free_at(self, length: int) -> int | None:
        """The next begin with so much room; what is held for long is passed over."""
        if self._used + length > self.size - BLOCK:
            return None
        for start in (self._next, BLOCK):
            position = start
            for index in range(bisect_left(self._begins, start), len(self._begins) + 1):
                held = self._begins[index] if index < len(self._begins) else self.size
                if position + length <= held:
                    return position
                if index < len(self._begins):
                    position = held + self._lengths[held]
        return None

    def stream(self, place: Place, buffer: Buffer, begin: int, end: int) -> None:
        """Begin to write these bytes of the data set; ``begin`` and ``end`` are whole blocks."""
        try:
            _write(buffer.fd, buffer.view[begin:end], place.begin + begin)
        except OSError as error:
            raise SyncFailed("write journal", error.strerror or str(error), "Check the disk") from error
        _start_writing(buffer.fd, place.begin + begin, end - begin)

    def finish(self, place: Place, buffer: Buffer, streamed: int, fields: bytes, digest: Any) -> Entry:
        """Write the rest of the record; it is durable after :meth:`sync`.

        ``digest`` is a :data:`checksum` of its own that has seen the data set; ``streamed`` bytes
        were written by :meth:`stream`. Raises SyncFailed: the caller must not acknowledge anything.
        """
        if _TAIL.size + len(fields) > TAIL_BYTES:
            raise StorageError("write journal", "the fields do not fit into a record")
        digest.update(fields)
        with self._lock:
            self._number += 1
            entry = Entry(self._number, place, buffer.size)
            if place.length > padded(buffer.size) + TAIL_BYTES and self._next == place.begin + place.length:
                self._shorten(place, padded(buffer.size) + TAIL_BYTES)
        begin = padded(buffer.size)
        tail = _TAIL.pack(_MAGIC, self._mark, entry.number, buffer.size, len(fields), digest.digest()) + fields
        buffer.view[begin : begin + len(tail)] = tail
        self.stream(place, buffer, streamed, begin + TAIL_BYTES)
        return entry

    def _shorten(self, place: Place, length: int) -> None:
        """The last place taken was larger than its record became."""
        self._used -= self._lengths[place.begin] - length
        self._lengths[place.begin] = length
        self._next = place.begin + length

    def sync(self, buffer: Buffer) -> None:
        """What was written through this buffer is durable. Raises SyncFailed."""
        try:
            durable.steps.fdatasync(buffer.fd)
        except OSError as error:
            raise SyncFailed("write journal", error.strerror or str(error), "Check the disk") from error

    def void(self, entry: Entry, buffer: Buffer) -> None:
        """The object is refused after all: no power cut shall bring it back."""
        with contextlib.suppress(OSError):
            _write(buffer.fd, memoryview(bytes(TAIL_BYTES)), entry.place.begin + padded(entry.size))

    def read(self, entry: Entry, memory: memoryview) -> memoryview:
        """The data set of a record that is held, read into ``memory``. Raises StorageError."""
        view, have = memory[: entry.size], 0
        try:
            while have < entry.size:
                count = os.preadv(self._fd, [view[have:]], entry.place.begin + have)
                have += count
                if not count:
                    raise StorageError("read journal", "it became shorter", "Nobody else may write to it")
        except OSError as error:
            raise StorageError("read journal", error.strerror or str(error), "Check the disk") from error
        return view

    def release(self, place: Place) -> None:
        """What is there is not needed any more: its place may be used again."""
        with self._lock:
            length = self._lengths.pop(place.begin, None)
            if length is not None:
                del self._begins[bisect_left(self._begins, place.begin)]
                self._used -= length

    def records(self, after: int) -> Iterator[Found]:
        """Whole records with a number above ``after``, in the order of their numbers.

        What is torn or was overwritten is left out: it was never acknowledged, or is retired.
        """
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ring:
            places = []
            sign = _MAGIC + self._mark
            for begin in range(BLOCK, self.size, BLOCK):
                if ring[begin : begin + len(sign)] == sign:
                    places.append((int(_TAIL.unpack_from(ring, begin)[2]), begin))
            for number, begin in sorted(places):
                found = _record(ring, begin) if number > after else None
                if found is not None:
                    yield found


def _write(fd: int, view: memoryview, at: int) -> None:
    written = 0
    while written < len(view):
        written += durable.steps.pwrite(fd, view[written:], at + written)


def _record(ring: mmap.mmap, tail: int) -> Found | None:
    _, _, number, size, text_size, digest = _TAIL.unpack_from(ring, tail)
    begin = tail - padded(size)
    if text_size > TAIL_BYTES - _TAIL.size or begin < BLOCK:
        return None
    text = ring[tail + _TAIL.size : tail + _TAIL.size + text_size]
    data = ring[begin : begin + size]
    check = checksum(data)
    check.update(text)
    return Found(number, text, data) if check.digest() == digest else None


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
