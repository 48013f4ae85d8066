"""The socket guard: what a peer may send, how much of it, and how long it may take.

pynetdicom reads a PDU of any announced length without a deadline; RELIABILITY.md has what
that costs. The guard sits where bytes enter: it checks each PDU's type and length before
reading it, gives the whole PDU one absolute deadline, counts the bytes of one object, and
re-arms TCP_QUICKACK so that a sender with Nagle's algorithm on does not wait 40 ms for each
object (PERFORMANCE.md).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pynetdicom.transport import AssociationSocket

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

A_ABORT_INVALID_PDU = bytes((0x07, 0, 0, 0, 0, 4, 0, 0, 2, 6))
"""A-ABORT, source 2 (service provider), reason 6 (invalid PDU parameter value), PS3.8 9.3.8."""

_CHUNK = 256 * 1024
_HEADER = struct.Struct(">BxL")


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_pdu`` bytes of a P-DATA PDU, ``max_object`` bytes of one message, deadlines in seconds."""

    max_pdu: int
    max_object: int
    pdu_seconds: float
    request_seconds: float
    max_connections: int
    max_connections_per_address: int


class GuardedSocket(AssociationSocket):  # type: ignore[misc]  # pynetdicom ships no types
    """AssociationSocket that refuses what the limits forbid."""

    def __init__(self, assoc: Any, client_socket: socket.socket, limits: Limits) -> None:
        self.limits = limits
        self.message_bytes = 0
        self.violation = ""
        self._deadline: float | None = None
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client_socket.settimeout(limits.pdu_seconds)
        super().__init__(assoc, client_socket=client_socket)

    def message_done(self) -> None:
        """A complete message was handled: its bytes no longer count."""
        self.message_bytes = 0

    def recv(self, nr_bytes: int) -> bytearray:
        """Read ``nr_bytes``; 6 starts a new PDU and its deadline (see DULServiceProvider).

        Raises OSError when the peer breaks a limit; pynetdicom then closes the connection.
        """
        sock = self.socket
        if sock is None:
            raise OSError("connection closed")
        header = nr_bytes == 6 and self._deadline is None
        if header:
            seconds = self.limits.pdu_seconds if self.assoc.is_established else self.limits.request_seconds
            self._deadline = time.monotonic() + seconds
        data = self._read(sock, nr_bytes)
        if not header or len(data) < 6:
            self._deadline = None
            return data
        kind, length = _HEADER.unpack(data)
        limit = self.limits.max_pdu if kind == P_DATA_TF else CONTROL_PDU_LIMITS.get(kind, 0)
        if length > limit:
            self._refuse(f"PDU type 0x{kind:02X} of {length} bytes, {limit} are allowed")
        self.message_bytes += length
        if self.message_bytes > self.limits.max_object:
            self._refuse(f"an object of more than {self.limits.max_object} bytes")
        if length == 0:
            self._deadline = None
        return data

    def _read(self, sock: socket.socket, count: int) -> bytearray:
        buffer = bytearray(count)
        view = memoryview(buffer)
        received = 0
        while received < count:
            remaining = (self._deadline or 0.0) - time.monotonic()
            if remaining <= 0:
                self._refuse("a PDU was not complete within its deadline")
            sock.settimeout(remaining)
            try:
                size = sock.recv_into(view[received : received + _CHUNK])
            except TimeoutError:
                self._refuse("a PDU was not complete within its deadline")
            if size == 0:
                view.release()
                del buffer[received:]
                return buffer
            received += size
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        sock.settimeout(self.limits.pdu_seconds)
        return buffer

    def _refuse(self, cause: str) -> None:
        self.violation = cause
        self._deadline = None
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.settimeout(1.0)
                self.socket.sendall(A_ABORT_INVALID_PDU)
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        raise OSError(cause)


class ConnectionCounter:
    """Connections in total and by address; a cap on one address leaves room for the others."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._by_address: Counter[str] = Counter()

    def admit(self, address: str) -> bool:
        with self._lock:
            if (
                self._by_address.total() >= self._limits.max_connections
                or self._by_address[address] >= self._limits.max_connections_per_address
            ):
                return False
            self._by_address[address] += 1
            return True

    def leave(self, address: str) -> None:
        with self._lock:
            self._by_address[address] -= 1
            if self._by_address[address] <= 0:
                del self._by_address[address]

    def total(self) -> int:
        with self._lock:
            return self._by_address.total()
