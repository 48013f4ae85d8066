"""C-STORE as SCU, straight from the file (PS3.7 9.1.1).

The data set of a Part 10 file is sent as it lies there: not decoded, not copied into one
piece, several PDUs with one system call. One operation is outstanding at a time; while the
peer works on it, the next file is opened and its first block read.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Generator
from pathlib import Path

from pynetdicom.dsutils import split_dataset

from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.command import encode_store_request
from dicomnode.dimse.lane import PDV_OVERHEAD, message_parts, pdata_header
from dicomnode.dimse.wire import Silence

BLOCK_BYTES = 1024 * 1024
"""Read from the file and handed to the socket at once."""

LARGEST_PDU = 1024 * 1024
"""Where the peer states no maximum (0), or a larger one."""

CANCEL_LOOK_SECONDS = 0.2
_PREAMBLE = 128

Blocks = Generator[tuple[memoryview, bool], None, None]
"""Pieces of a data set, and whether each is the last."""


class NotPart10(ValueError):
    """The file has no meta information of group 0002 with its length."""


def data_set_offset(head: bytes) -> int:
    """Where the data set begins in a Part 10 file (PS3.10 7.1), from its first 144 bytes."""
    if head[_PREAMBLE : _PREAMBLE + 4] != b"DICM" or head[132:140] != b"\x02\x00\x00\x00UL\x04\x00" or len(head) < 144:
        raise NotPart10("it does not begin with Part 10 meta information")
    return 144 + int(struct.unpack_from("<I", head, 140)[0])


class Opened:
    """A Part 10 file with its first block read, at most BLOCK_BYTES; what failed is raised by ``begin``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._blocks = _blocks(path)
        self._first: tuple[memoryview, bool] | None = None
        self._error: OSError | NotPart10 | None = None
        try:
            self._first = next(self._blocks)
        except (OSError, NotPart10) as error:
            self._error = error

    def begin(self) -> tuple[tuple[memoryview, bool], Blocks]:
        """The first block and those after it. Raises OSError or NotPart10."""
        if self._error is not None or self._first is None:
            raise self._error or OSError("it was closed")
        return self._first, self._blocks

    def close(self) -> None:
        self._blocks.close()
        self._first = None


class NextFile:
    """The one file that is read while the peer works on the one before. Not thread-safe."""

    def __init__(self) -> None:
        self._ready: Opened | None = None

    def prepare(self, path: Path) -> None:
        """Open and read now; nothing is raised before its turn."""
        self.close()
        self._ready = Opened(path)

    def take(self, path: Path) -> Opened:
        """What was prepared, or the file opened now."""
        ready, self._ready = self._ready, None
        if ready is not None and ready.path == path:
            return ready
        if ready is not None:
            ready.close()
        return Opened(path)

    def close(self) -> None:
        if self._ready is not None:
            self._ready.close()
            self._ready = None


def send_store(
    assoc: NodeAssociation,
    context_id: int,
    *,
    message_id: int,
    sop_class_uid: str,
    sop_instance_uid: str,
    data: Path | Opened | bytes,
    seconds: float,
    originator: tuple[str, int] | None = None,
    given_up: Callable[[], bool] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> int | None:
    """C-STORE one object on an accepted context; the status, or None without an answer in time.

    ``data`` is a Part 10 file, one opened (it is closed here), or an encoded data set. ``seconds``
    runs from the last byte handed to the socket; ``meanwhile`` is called then, once. Without an
    answer the association is aborted: an answer that came late would be taken for the next
    object's. Raises OSError or NotPart10 when the file cannot be read, before anything was sent.
    """
    request = encode_store_request(
        message_id=message_id, sop_class_uid=sop_class_uid, sop_instance_uid=sop_instance_uid, originator=originator
    )
    announced = assoc.dimse.maximum_pdu_size or LARGEST_PDU
    head = b"".join(message_parts(context_id, request, b"", announced))
    fragment = max(min(announced, LARGEST_PDU) - PDV_OVERHEAD, 1) & ~1 or 1
    assoc.lane.replies.clear()
    opened = Opened(data) if isinstance(data, Path) else data
    try:
        first, rest = ((memoryview(opened), True), None) if isinstance(opened, bytes) else opened.begin()
        _send(assoc, context_id, head, first, rest, fragment)
    except _FileFailed as error:
        assoc.abort(block=False)
        raise OSError(f"the file could not be read to its end ({error})") from None
    except _PeerGone:
        assoc.dul.lost()
        return None
    finally:
        if isinstance(opened, Opened):
            opened.close()
    deadline = time.monotonic() + seconds
    if meanwhile is not None:
        meanwhile()
    return _answer(assoc, message_id, deadline, given_up or (lambda: False))


class _FileFailed(Exception):
    """The file ended or failed after a part of it was sent."""


class _PeerGone(Exception):
    """The connection ended while the object was sent."""


def _blocks(data: Path) -> Blocks:
    """Pieces of the data set, and whether each is the last."""
    fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        offset = _offset(fd, data)
        if offset > size:
            raise NotPart10("its meta information is longer than the file")
        while True:
            block = os.pread(fd, BLOCK_BYTES, offset)
            offset += len(block)
            if not block and offset < size:
                raise OSError("it became shorter")
            yield memoryview(block), offset >= size
            if offset >= size:
                return
    finally:
        os.close(fd)


def _offset(fd: int, path: Path) -> int:
    try:
        return data_set_offset(os.pread(fd, 144, 0))
    except NotPart10:  # files without the length of their meta information exist
        try:
            return int(split_dataset(path)[1])
        except Exception as error:  # noqa: BLE001 whatever pydicom raises for what is no DICOM file
            raise NotPart10(f"it is no Part 10 file ({type(error).__name__})") from None


def _send(
    assoc: NodeAssociation,
    context_id: int,
    head: bytes,
    first: tuple[memoryview, bool],
    rest: Blocks | None,
    fragment: int,
) -> None:
    block, last = first
    parts: list[bytes | memoryview] = [head]
    while True:
        for begin in range(0, max(len(block), 1), fragment):
            piece = block[begin : begin + fragment]
            final = last and begin + fragment >= len(block)
            parts += (pdata_header(context_id, len(piece), command=False, last=final), piece)
        try:
            assoc.wire.send(parts)
        except OSError:
            raise _PeerGone from None
        if last or rest is None:
            return
        parts = []
        try:
            block, last = next(rest)
        except OSError as error:
            raise _FileFailed(type(error).__name__) from None


def _answer(assoc: NodeAssociation, message_id: int, deadline: float, given_up: Callable[[], bool]) -> int | None:
    """The status of the reply to ``message_id``; messages of other kinds stay queued."""
    replies = assoc.lane.replies
    while not replies and assoc.usable() and not given_up():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        try:
            assoc.dul.pump(remaining)
        except Silence:
            break
    if replies and replies[0].message_id == message_id:
        return replies.pop(0).status
    if assoc.usable():
        assoc.abort(block=False)
    return None
