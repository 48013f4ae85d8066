"""File meta information around a data set as received (PS3.10 7.1). Pure."""

from __future__ import annotations

import struct

from dicomnode import __version__

IMPLEMENTATION_CLASS_UID = "2.25.312116063226131209174612391098498137961"
IMPLEMENTATION_VERSION_NAME = f"DICOMNODE_{__version__}"[:16]

_PREAMBLE = bytes(128) + b"DICM"
_EXPLICIT_LITTLE_LONG = struct.Struct("<HH2sHI")
_EXPLICIT_LITTLE = struct.Struct("<HH2sH")


def file_meta(*, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae: str) -> bytes:
    """Preamble of zeros, ``DICM`` and group 2, explicit VR little endian.

    The zero preamble keeps executable headers out of the store (RELIABILITY.md, polyglots).
    """
    elements = b"".join(
        (
            _EXPLICIT_LITTLE_LONG.pack(0x0002, 0x0001, b"OB", 0, 2) + b"\x00\x01",
            _uid(0x0002, sop_class_uid),
            _uid(0x0003, sop_instance_uid),
            _uid(0x0010, transfer_syntax_uid),
            _uid(0x0012, IMPLEMENTATION_CLASS_UID),
            _text(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
            _text(0x0016, b"AE", source_ae),
        )
    )
    return _PREAMBLE + _EXPLICIT_LITTLE.pack(0x0002, 0x0000, b"UL", 4) + struct.pack("<I", len(elements)) + elements


def _uid(element: int, value: str) -> bytes:
    data = value.encode("ascii")
    data += b"\0" * (len(data) % 2)
    return _EXPLICIT_LITTLE.pack(0x0002, element, b"UI", len(data)) + data


def _text(element: int, vr: bytes, value: str) -> bytes:
    data = value.encode("ascii", "replace")
    data += b" " * (len(data) % 2)
    return _EXPLICIT_LITTLE.pack(0x0002, element, vr, len(data)) + data
