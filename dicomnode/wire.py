"""The protobuf wire format (protobuf.dev, "Encoding"), as far as ONNX files, KServe messages and remote-write need it.

Hand-kept because the messages are few and small, and because a protobuf runtime would be
pinned twice: onnxruntime and a Triton client ask for versions that exclude each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MAX_FIELDS = 100_000
"""Fields of one message; a reply beyond that is not one of ours."""

MAX_KEY = 0xFFFF_FFFF
"""A key has 32 bits. Readers of a longer one differ: some cut it, and see another field than the rest do."""

MAX_VALUE = (1 << 64) - 1

Field = tuple[int, int | memoryview]


def fields(view: memoryview, most: int = MAX_FIELDS) -> Iterator[Field]:
    """(field number, varint or bytes) of one message, in order; fixed-width fields yield 0.

    Raises ValueError where the bytes are not a message, or one of more than ``most`` fields.
    """
    at, end, count = 0, len(view), 0
    while at < end:
        count += 1
        if count > most:
            raise ValueError("too many fields")
        key, at = read_varint(view, at)
        number, kind = key >> 3, key & 7
        if number == 0 or key > MAX_KEY:
            raise ValueError("no such field number")
        if kind == 0:
            value, at = read_varint(view, at)
            yield number, value
            continue
        if kind == 2:
            size, at = read_varint(view, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("unknown wire type")
        if size > end - at:
            raise ValueError("cut short")
        yield number, (view[at : at + size] if kind == 2 else 0)
        at += size


def text(value: int | memoryview) -> str:
    """A string field. Raises ValueError when it is not one."""
    return str(message(value), "utf-8")


def message(value: int | memoryview) -> memoryview:
    """A length-delimited field. Raises ValueError when it is not one."""
    if not isinstance(value, memoryview):
        raise ValueError("not length-delimited")  # noqa: TRY004 the bytes are wrong, not the program
    return value


def integers(value: int | memoryview, most: int = MAX_FIELDS) -> list[int]:
    """A repeated int64, packed or one by one; no more than ``most`` are read. Raises ValueError."""
    if not isinstance(value, memoryview):
        return [signed(value)]
    found: list[int] = []
    at = 0
    while at < len(value) and len(found) < most:
        number, at = read_varint(value, at)
        found.append(signed(number))
    return found


def put(number: int, value: bytes | str) -> bytes:
    """A length-delimited field; empty ones are left out, as proto3 does."""
    data = value.encode() if isinstance(value, str) else value
    return head(number, len(data)) + data if data else b""


def head(number: int, size: int) -> bytes:
    """Key and length of a length-delimited field whose ``size`` bytes follow."""
    return varint(number << 3 | 2) + varint(size)


def put_integers(number: int, values: Iterable[int]) -> bytes:
    """A packed repeated int64."""
    return put(number, b"".join(varint(v & (1 << 64) - 1) for v in values))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at`` and where the next byte is. Raises ValueError."""
    result = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ValueError("cut short")
        byte = view[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & MAX_VALUE, at
        shift += 7


def signed(value: int) -> int:
    """An int64 of a varint's 64 bits."""
    return value - (1 << 64) if value >> 63 else value
