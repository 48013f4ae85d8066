"""One connection: PDUs in and out, with limits by type and absolute deadlines.

A peer can announce a PDU of any length and take any time over it; RELIABILITY.md has what that
costs. So type and length are checked before the body is read, and a PDU has one deadline from
its first byte to its last. TCP_QUICKACK is re-armed after each read, so that a sender with
Nagle's algorithm on does not wait 40 ms for each object (PERFORMANCE.md).
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

P_DATA_TF = 0x04
CONTROL_PDU_LIMITS = {
    0x01: 128 * 1024,  # A-ASSOCIATE-RQ: 128 contexts with every transfer syntax take about 100 kB
    0x02: 128 * 1024,
    0x03: 4,
    0x05: 4,
    0x06: 4,
    0x07: 4,
}
"""Largest announced length by PDU type, bytes (PS3.8 9.3); P-DATA has the negotiated limit."""

UNRECOGNIZED_PDU = 1
INVALID_PARAMETER = 6
"""Reasons of an A-ABORT by the service provider, PS3.8 table 9-26."""

HEADER_BYTES = 6
_FIRST_BUFFER = 32 * 1024
_HEADER = struct.Struct(">BxL")
_TIMEVAL = struct.Struct("ll")
_MOST_PARTS = 512


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_pdu`` bytes of a P-DATA PDU, ``max_object`` of one object, ``max_message`` of any other
    message; deadlines in seconds: one PDU, a send without progress, silence between PDUs."""

    max_pdu: int
    max_object: int
    pdu_seconds: float
    idle_seconds: float
    max_message: int = 32 * 1024 * 1024


class Violation(OSError):
    """The peer broke a limit; it got an A-ABORT. The text is free of what the peer sent."""


class Silence(OSError):
    """No PDU began within the time that was given."""


def abort_pdu(reason: int) -> bytes:
    """A-ABORT from the service provider (PS3.8 9.3.8)."""
    return bytes((0x07, 0, 0, 0, 0, 4, 0, 0, 2, reason))


class Wire:
    """A connected socket, plain or TLS. Reading belongs to one thread; :meth:`cut` to any."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self.limits = limits
        self.violation = ""
        self.received = 0
        """Bytes read so far."""
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._buffer = bytearray(_FIRST_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._timeout: float | None = -1.0
        self._sending = threading.Lock()
        self._poll = select.poll()
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, ValueError):
            self._poll.register(sock, select.POLLIN)

    def read(self, wait_seconds: float) -> tuple[int, memoryview] | None:
        """Type and whole bytes of the next PDU (valid until the next read); None when the peer closed.

        Raises Silence when none begins within ``wait_seconds``, Violation when it breaks a limit.
        """
        if self._end == self._start:
            self._start = self._end = 0
            if not self._fill(1, time.monotonic() + wait_seconds, begun=False):
                return None
        deadline = time.monotonic() + self.limits.pdu_seconds
        if self._end - self._start < HEADER_BYTES and not self._fill(HEADER_BYTES, deadline):
            return None
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        limit = self.limits.max_pdu if kind == P_DATA_TF else CONTROL_PDU_LIMITS.get(kind)
        if limit is None:
            self.refuse("a PDU of unknown type", UNRECOGNIZED_PDU)
        if length > limit:
            self.refuse(f"PDU type 0x{kind:02X} of {length} bytes, {limit} are allowed")
        length += HEADER_BYTES
        if self._end - self._start < length and not self._fill(length, deadline):
            return None
        begin = self._start
        self._start = begin + length
        return kind, self._view[begin : begin + length]

    def waiting(self, seconds: float = 0.0) -> bool:
        """Whether something can be read, waiting at most ``seconds``."""
        if self._end > self._start or (self._tls and self._sock.pending()):  # type: ignore[attr-defined]
            return True
        try:
            return bool(self._poll.poll(seconds * 1000.0))
        except (OSError, ValueError):
            return True  # reading tells what is wrong

    def arrived(self) -> bool:
        """Whether :meth:`read` would not wait: a whole PDU is here, one that is refused, or the end.

        Takes what the system holds for this socket, and never waits. That something came says
        little: part of a PDU, or a record of TLS without a byte for us (RFC 8446 4.6).
        """
        try:
            while not self._whole():
                if not (self._tls and self._sock.pending()) and not self._poll.poll(0):  # type: ignore[attr-defined]
                    return False
                self._sock.settimeout(0.0)
                self._timeout = -1.0
                size = self._sock.recv_into(self._view[self._end :])
                if size == 0:
                    return True
                self._end += size
                self.received += size
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except (OSError, ValueError):
            return True  # reading tells what is wrong
        return True

    def _whole(self) -> bool:
        """Whether the buffer has a whole PDU, or one that is refused by its head; else there is room for the rest."""
        held = self._end - self._start
        if not held:
            self._start = self._end = 0
        count = HEADER_BYTES
        if held >= HEADER_BYTES:
            kind, length = _HEADER.unpack_from(self._buffer, self._start)
            limit = self.limits.max_pdu if kind == P_DATA_TF else CONTROL_PDU_LIMITS.get(kind, -1)
            if length > limit:
                return True
            count += length
        if held >= count:
            return True
        self._make_room(count)
        return False

    def _fill(self, count: int, deadline: float, *, begun: bool = True) -> bool:
        """Have ``count`` bytes from the start on; False when the peer closed before."""
        self._make_room(count)
        sock, most = self._sock, self.limits.pdu_seconds
        while self._end - self._start < count:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self._too_late(begun=begun)
            self._set_timeout(min(remaining, most))
            try:
                size = sock.recv_into(self._view[self._end :])
            except (TimeoutError, BlockingIOError):
                continue  # a long wait is made of short ones, so that the timeout seldom changes
            if size == 0:
                return False
            self._end += size
            self.received += size
            if not self._tls:
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                except OSError:
                    continue
        return True

    def _too_late(self, *, begun: bool) -> None:
        if begun:
            self.refuse("a PDU was not complete within its deadline")
        raise Silence("the peer is silent")

    def _make_room(self, count: int) -> None:
        if self._start + count <= len(self._buffer):
            return
        if count > len(self._buffer):
            # Two whole PDUs fit, so that one read often brings the next one's beginning.
            grown = bytearray(max(count, 2 * min(self.limits.max_pdu, 131072) + 2 * HEADER_BYTES))
            grown[: self._end - self._start] = self._view[self._start : self._end]
            self._buffer, self._view = grown, memoryview(grown)
        else:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
        self._end -= self._start
        self._start = 0

    def _set_timeout(self, seconds: float) -> None:
        """A recv may overstay its deadline by an eighth; each change costs a system call.

        A plain socket blocks in the kernel, with the kernel's timeout: Python's own would poll before each call.
        """
        known = self._timeout
        if known is None or not seconds * 0.875 <= known <= seconds * 1.125:
            if self._tls:
                self._sock.settimeout(seconds)
            else:
                whole = int(seconds)
                limit = _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 1))
                self._sock.settimeout(None)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._timeout = seconds

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send all bytes. Raises OSError when the connection is gone or stands still."""
        with self._sending:
            self._set_timeout(self.limits.pdu_seconds)
            if self._tls:
                for part in parts:
                    self._sock.sendall(part)
                return
            pending = [memoryview(p) for p in parts if len(p)]
            while pending:
                sent = self._sock.sendmsg(pending[:_MOST_PARTS])
                while pending and sent >= len(pending[0]):
                    sent -= len(pending.pop(0))
                if sent:
                    pending[0] = pending[0][sent:]

    def refuse(self, cause: str, reason: int = INVALID_PARAMETER) -> None:
        """A-ABORT and end the connection; raises Violation."""
        self.violation = cause
        with contextlib.suppress(OSError):
            self._set_timeout(1.0)
            self._sock.sendall(abort_pdu(reason))
        self.cut()
        raise Violation(cause)

    def cut(self) -> None:
        """End the connection at once; a thread that reads sees its end. Safe from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Tell the peer, if nobody is sending, and end the connection. Safe from any thread."""
        if not self._tls and self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    self._sock.send(abort_pdu(0), socket.MSG_DONTWAIT)
            finally:
                self._sending.release()
        self.cut()

    def linger(self, seconds: float) -> None:
        """Let the peer read our last PDU and close: closing at once could drop it (RFC 1122 4.2.2.13)."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            self._timeout = None
            while (remaining := deadline - time.monotonic()) > 0:
                self._sock.settimeout(remaining)
                if not self._sock.recv_into(self._buffer):
                    return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()
