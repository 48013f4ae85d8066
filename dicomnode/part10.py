"""Where the data set of a Part 10 file begins, and in which transfer syntax (PS3.10 7.1). Pure."""

from __future__ import annotations

from dicomnode.header import Wanted, read_begun_header

HEAD_BYTES = 64 * 1024
"""Enough of a file for its header, in all but odd cases."""

_GROUP_LENGTH = b"DICM\x02\x00\x00\x00UL\x04\x00"
_TRANSFER_SYNTAX = b"\x02\x00\x10\x00UI"


def data_set_begin(head: bytes | memoryview) -> tuple[str, int] | None:
    """Transfer Syntax UID and offset of the data set; None where ``head`` does not say so plainly."""
    if bytes(head[128:140]) != _GROUP_LENGTH or len(head) < 144:
        return None
    start = 144 + int.from_bytes(head[140:144], "little")
    meta = bytes(head[144:start])
    place = meta.find(_TRANSFER_SYNTAX)
    if place < 0 or len(meta) < start - 144:
        return None
    length = int.from_bytes(meta[place + 6 : place + 8], "little")
    value = meta[place + 8 : place + 8 + length]
    return value.rstrip(b"\0 ").decode("ascii", "replace"), start


def begun_header(head: bytes | memoryview, wanted: Wanted) -> dict[str, str] | None:
    """Wanted attributes as text from the first bytes of a Part 10 file.

    None where these bytes do not settle it: no plain meta information, a deflated data set, or a
    header that is longer than ``head`` or out of order. The caller then reads the whole file.
    """
    found = data_set_begin(head)
    if found is None:
        return None
    syntax, start = found
    with memoryview(head) as view:
        return read_begun_header(view[start:], syntax, wanted)
