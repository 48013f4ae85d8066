"""What the node said and heard, from the bytes that it handed to the kernel (PS3.8 9.3, PS3.7 6.3)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from scripts.crashing.shim import Event

C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001
P_DATA_TF = 0x04
OURS = 1
"""Flag of an event: the connection was made to us, not by us."""


@dataclass(frozen=True, slots=True)
class Said:
    """A C-STORE command at the moment of event ``number``; ``status`` is -1 in a request."""

    number: int
    field: int
    uid: str
    status: int


@dataclass(slots=True)
class _Stream:
    """One direction of one connection, put together again."""

    buffer: bytearray = field(default_factory=bytearray)
    command: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        while len(self.buffer) >= 6:
            kind, length = struct.unpack_from(">BxL", self.buffer)
            if len(self.buffer) < 6 + length:
                return
            payload = bytes(self.buffer[6 : 6 + length])
            del self.buffer[: 6 + length]
            if kind == P_DATA_TF:
                yield from self._fragments(payload)

    def _fragments(self, payload: bytes) -> Iterator[bytes]:
        position = 0
        while position + 6 <= len(payload):
            length = int.from_bytes(payload[position : position + 4], "big")
            control = payload[position + 5]
            if control & 1:
                self.command += payload[position + 6 : position + 4 + length]
                if control & 2:
                    yield bytes(self.command)
                    self.command.clear()
            position += 4 + length


def _said(number: int, command: bytes) -> Said | None:
    found: dict[int, bytes] = {}
    position = 0
    while position + 8 <= len(command):
        _, element, length = struct.unpack_from("<HHL", command, position)
        found[element] = command[position + 8 : position + 8 + length]
        position += 8 + length
    kind = int.from_bytes(found.get(0x0100, b""), "little")
    if kind not in (C_STORE_RQ, C_STORE_RSP):
        return None
    status = int.from_bytes(found[0x0900], "little") if kind == C_STORE_RSP else -1
    return Said(number, kind, found.get(0x1000, b"").rstrip(b"\0").decode("ascii", "replace"), status)


def answers(events: Iterable[Event]) -> list[Said]:
    """C-STORE responses that we sent, each at the moment in which its last byte was handed over."""
    return _whole(events, "N", OURS)


def heard(events: Iterable[Event]) -> list[Said]:
    """C-STORE responses that a peer gave us."""
    return _whole(events, "G", 0)


def _whole(events: Iterable[Event], kind: str, flags: int) -> list[Said]:
    streams: dict[int, _Stream] = {}
    said: list[Said] = []
    for event in events:
        if event.kind == kind and event.flags == flags:
            stream = streams.setdefault(event.ino, _Stream())
            said += [s for c in stream.feed(event.data) if (s := _said(event.number, c)) and s.field == C_STORE_RSP]
    return said


def requests(events: Iterable[Event]) -> list[Said]:
    """C-STORE requests that we sent to a peer, each at the moment in which its command left.

    Only the beginning of what was sent is in the trace; a command begins a call.
    """
    said = []
    for event in events:
        if event.kind == "N" and event.flags == 0 and event.data[:1] == bytes((P_DATA_TF,)):
            for command in _Stream()._fragments(event.data[6:]):
                found = _said(event.number, command)
                if found is not None and found.field == C_STORE_RQ:
                    said.append(found)
    return said
