"""Command sets of C-STORE, encoded and decoded without pynetdicom (PS3.7 9.3.1, annex E). Pure.

A command set is group 0000 in implicit VR little endian. Decoding one through pydicom costs
half a millisecond, as much as everything else that is done with a small object.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

C_STORE_RQ = 0x0001
C_STORE_RSP = 0x8001
C_FIND_RSP = 0x8020
C_GET_RSP = 0x8010
C_MOVE_RSP = 0x8021
NO_DATA_SET = 0x0101
PRIORITY_MEDIUM = 0x0000

MAX_COMMAND_BYTES = 64 * 1024
"""A command set has a handful of short elements; a peer may not send more."""

_ELEMENT = struct.Struct("<HHI")
_US = struct.Struct("<H")
_SOP_CLASS, _FIELD, _MESSAGE_ID, _RESPONDED = 0x0002, 0x0100, 0x0110, 0x0120
_PRIORITY, _DATA_SET_TYPE, _STATUS, _COMMENT = 0x0700, 0x0800, 0x0900, 0x0902
_SOP_INSTANCE, _ORIGINATOR, _ORIGINATOR_ID = 0x1000, 0x1030, 0x1031


class BadCommand(ValueError):
    """The bytes are no command set."""


class StoreCommand(NamedTuple):
    """C-STORE-RQ (PS3.7 table 9.3-1)."""

    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    has_data_set: bool


class StoreReply(NamedTuple):
    """C-STORE-RSP (PS3.7 table 9.3-2)."""

    message_id: int
    status: int


def elements(data: bytes | bytearray | memoryview) -> dict[int, bytes]:
    """Element number -> value. Raises BadCommand; anything outside group 0000 is one."""
    found: dict[int, bytes] = {}
    plain, unpack = bytes(data), _ELEMENT.unpack_from
    position, end = 0, len(plain)
    while position < end:
        if position + 8 > end:
            raise BadCommand("it ends inside an element")
        group, element, length = unpack(plain, position)
        position += 8
        stop = position + length
        if group != 0 or stop > end:
            raise BadCommand("an element is not of group 0000, or longer than what follows")
        found[element] = plain[position:stop]
        position = stop
    return found


def number(found: dict[int, bytes], element: int) -> int:
    """A US value; -1 when it is absent or malformed."""
    value = found.get(element, b"")
    return int(_US.unpack(value)[0]) if len(value) == 2 else -1


def command_field(found: dict[int, bytes]) -> int:
    return number(found, _FIELD)


def has_data_set(found: dict[int, bytes]) -> bool:
    return number(found, _DATA_SET_TYPE) not in (NO_DATA_SET, -1)


def store_command(found: dict[int, bytes]) -> StoreCommand:
    """Raises BadCommand without a message ID. UIDs come as they are; the caller checks them."""
    message_id = number(found, _MESSAGE_ID)
    if message_id < 0:
        raise BadCommand("it has no Message ID")
    return StoreCommand(message_id, _uid(found, _SOP_CLASS), _uid(found, _SOP_INSTANCE), has_data_set(found))


def store_reply(found: dict[int, bytes]) -> StoreReply:
    """Raises BadCommand without a status."""
    status = number(found, _STATUS)
    if status < 0:
        raise BadCommand("it has no Status")
    return StoreReply(number(found, _RESPONDED), status)


def _uid(found: dict[int, bytes], element: int) -> str:
    return found.get(element, b"").rstrip(b"\0 ").decode("ascii", "replace")


def encode_store_request(
    *,
    message_id: int,
    sop_class_uid: str,
    sop_instance_uid: str,
    originator: tuple[str, int] | None = None,
    priority: int = PRIORITY_MEDIUM,
) -> bytes:
    """C-STORE-RQ with a data set; ``originator`` is AE title and message ID of a C-MOVE."""
    body = (
        _pack_uid(_SOP_CLASS, sop_class_uid)
        + _pack_us(_FIELD, C_STORE_RQ)
        + _pack_us(_MESSAGE_ID, message_id)
        + _pack_us(_PRIORITY, priority)
        + _pack_us(_DATA_SET_TYPE, 0x0001)
        + _pack_uid(_SOP_INSTANCE, sop_instance_uid)
    )
    if originator is not None:
        body += _pack_text(_ORIGINATOR, originator[0]) + _pack_us(_ORIGINATOR_ID, originator[1])
    return _with_length(body)


def encode_store_reply(
    *, message_id: int, sop_class_uid: str, sop_instance_uid: str, status: int, comment: str = ""
) -> bytes:
    """C-STORE-RSP; ``comment`` goes into Error Comment (LO, 64 characters) of a refusal."""
    body = (
        _pack_uid(_SOP_CLASS, sop_class_uid)
        + _pack_us(_FIELD, C_STORE_RSP)
        + _pack_us(_RESPONDED, message_id)
        + _pack_us(_DATA_SET_TYPE, NO_DATA_SET)
        + _pack_us(_STATUS, status)
    )
    if comment:
        body += _pack_text(_COMMENT, comment[:64])
    return _with_length(body + _pack_uid(_SOP_INSTANCE, sop_instance_uid))


@dataclass(frozen=True, slots=True)
class SubOperations:
    """Numbers of sub-operations in a C-MOVE or C-GET response (PS3.7 tables 9.3-7, 9.3-9)."""

    remaining: int | None
    completed: int
    failed: int
    warning: int


def encode_query_reply(
    *,
    command_field: int,
    message_id: int,
    sop_class_uid: str,
    status: int,
    has_data_set: bool,
    counts: SubOperations | None = None,
) -> bytes:
    """C-FIND-RSP, C-MOVE-RSP or C-GET-RSP."""
    body = (
        _pack_uid(_SOP_CLASS, sop_class_uid)
        + _pack_us(_FIELD, command_field)
        + _pack_us(_RESPONDED, message_id)
        + _pack_us(_DATA_SET_TYPE, 0x0001 if has_data_set else NO_DATA_SET)
        + _pack_us(_STATUS, status)
    )
    if counts is not None:
        if counts.remaining is not None:
            body += _pack_us(0x1020, counts.remaining)
        body += _pack_us(0x1021, counts.completed) + _pack_us(0x1022, counts.failed) + _pack_us(0x1023, counts.warning)
    return _with_length(body)


def _with_length(body: bytes) -> bytes:
    return _ELEMENT.pack(0, 0, 4) + struct.pack("<I", len(body)) + body


def _pack_us(element: int, value: int) -> bytes:
    return _ELEMENT.pack(0, element, 2) + _US.pack(value)


def _pack_uid(element: int, value: str) -> bytes:
    data = value.encode("ascii", "replace")
    data += b"\0" * (len(data) % 2)
    return _ELEMENT.pack(0, element, len(data)) + data


def _pack_text(element: int, value: str) -> bytes:
    data = value.encode("ascii", "replace").replace(b"\\", b"/")
    data += b" " * (len(data) % 2)
    return _ELEMENT.pack(0, element, len(data)) + data
