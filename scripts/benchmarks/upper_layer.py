"""A light requestor on a blocking socket, so that the client costs next to nothing.

It speaks just enough of PS3.8 9.3 and PS3.7 for C-ECHO and C-FIND in Implicit VR Little
Endian; it is for measuring, and trusts its peer.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from io import BytesIO
from typing import Self

from pydicom.dataset import Dataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset

from benchmarks.tools import LOOPBACK, BenchError

VERIFICATION = "1.2.840.10008.1.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
_APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
_C_ECHO_RQ, _C_FIND_RQ = 0x0030, 0x0020
_NO_DATA_SET = 0x0101
_PENDING = (0xFF00, 0xFF01)
TIMEOUT_SECONDS = 20.0
_RECEIVE_BYTES = 256 * 1024


def _item(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(payload)) + payload


def _pdu(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BBL", kind, 0, len(payload)) + payload


def _element(element: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, element, len(value)) + value


def encoded(ds: Dataset) -> bytes:
    """In Implicit VR Little Endian."""
    stream = DicomIO(BytesIO())
    stream.is_little_endian, stream.is_implicit_VR = True, True
    write_dataset(stream, ds)
    data: bytes = stream.parent.getvalue()
    return data


class Association:
    """Established on construction; raises BenchError when the peer rejects it or goes away."""

    def __init__(self, port: int, called: str, abstract: str, calling: str = "BENCH") -> None:
        self._abstract = abstract
        self._message = 0
        self._buffer, self._at = b"", 0
        try:
            self._sock = socket.create_connection((LOOPBACK, port), timeout=TIMEOUT_SECONDS)
        except OSError as error:
            raise BenchError(f"no association: {error}") from None
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.sendall(self._request(called, calling))
            kind, _ = self._read_pdu()
        except (OSError, BenchError) as error:
            self._sock.close()
            raise BenchError(f"no association: {error}") from None
        if kind != 0x02:
            self._sock.close()
            raise BenchError(f"no association: PDU type {kind:#04x}")

    def _request(self, called: str, calling: str) -> bytes:
        context = bytes((1, 0, 0, 0)) + _item(0x30, self._abstract.encode()) + _item(0x40, IMPLICIT_LITTLE.encode())
        user = _item(0x51, struct.pack(">L", 131072)) + _item(0x52, b"2.25.271828") + _item(0x55, b"BENCH")
        names = called.encode().ljust(16) + calling.encode().ljust(16)
        body = struct.pack(">HH", 1, 0) + names + bytes(32) + _item(0x10, _APPLICATION_CONTEXT)
        return _pdu(0x01, body + _item(0x20, context) + _item(0x50, user))

    def _read(self, count: int) -> bytes:
        """From what one receive brought, as long as it lasts: two calls for each PDU would be what is measured."""
        while len(self._buffer) - self._at < count:
            part = self._sock.recv(_RECEIVE_BYTES)
            if not part:
                raise BenchError("the peer closed the connection")
            self._buffer, self._at = self._buffer[self._at :] + part, 0
        begin = self._at
        self._at += count
        return self._buffer[begin : self._at]

    def _read_pdu(self) -> tuple[int, bytes]:
        kind, _, length = struct.unpack(">BBL", self._read(6))
        return kind, self._read(length)

    def _send(self, command: int, data: bytes | None) -> None:
        self._message += 1
        uid = self._abstract.encode()
        elements = _element(0x0002, uid + b"\0" * (len(uid) % 2)) + _element(0x0100, struct.pack("<H", command))
        elements += _element(0x0110, struct.pack("<H", self._message))
        if data is not None:
            elements += _element(0x0700, b"\0\0")
        elements += _element(0x0800, struct.pack("<H", _NO_DATA_SET if data is None else 0))
        whole = _element(0x0000, struct.pack("<L", len(elements))) + elements
        out = _pdu(0x04, struct.pack(">LBB", len(whole) + 2, 1, 3) + whole)
        if data is not None:
            out += _pdu(0x04, struct.pack(">LBB", len(data) + 2, 1, 2) + data)
        self._sock.sendall(out)

    def _responses(self) -> tuple[int, int]:
        """Status of the last response and the number of pending ones before it."""
        command, pending = b"", 0
        while True:
            kind, payload = self._read_pdu()
            if kind != 0x04:
                raise BenchError(f"PDU type {kind:#04x} instead of a response")
            position = 0
            while position < len(payload):
                length = int.from_bytes(payload[position : position + 4], "big")
                header = payload[position + 5]
                if header & 1:
                    command += payload[position + 6 : position + 4 + length]
                    if header & 2:
                        status, command = _status(command), b""
                        if status not in _PENDING:
                            return status, pending
                        pending += 1
                position += 4 + length

    def echo(self) -> None:
        self._send(_C_ECHO_RQ, None)
        status, _ = self._responses()
        if status:
            raise BenchError(f"C-ECHO was answered with {status:#06x}")

    def find(self, identifier: bytes) -> int:
        """Number of answers to a C-FIND. Raises BenchError unless it ends with success.

        ``identifier`` is :func:`encoded`: pydicom takes 0.1 to 0.2 ms for it.
        """
        self._send(_C_FIND_RQ, identifier)
        status, answers = self._responses()
        if status:
            raise BenchError(f"C-FIND ended with {status:#06x}")
        return answers

    def close(self) -> None:
        """A-RELEASE, without waiting for the answer."""
        try:
            self._sock.sendall(_pdu(0x05, bytes(4)))
        except OSError:
            pass
        finally:
            self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _status(command: bytes) -> int:
    position = 0
    while position < len(command):
        _, element, length = struct.unpack_from("<HHL", command, position)
        if element == 0x0900:
            return int.from_bytes(command[position + 8 : position + 8 + length], "little")
        position += 8 + length
    raise BenchError("a response without status")


def several(count: int, port: int, called: str) -> Sequence[Association]:
    """So many associations for C-ECHO, as long as the peer takes them; at least one."""
    found: list[Association] = []
    try:
        for _ in range(count):
            found.append(Association(port, called, VERIFICATION))
    except BenchError:
        if not found:
            raise
    return found
