#!/usr/bin/env python3
"""Coverage-guided fuzzing of the header reader with Atheris. A tool for developers, not part of the suite.

    python3 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris pydicom
    PYTHONPATH=. /tmp/fuzz/bin/python tests/fuzz/fuzz_header.py [CORPUS_FOLDER] [libFuzzer options]

The first byte chooses the transfer syntax, the rest is the data set. A folder that is empty or
missing gets small generated data sets of every shape. It fails on any exception but
MalformedDataSet, on a value that is no text, on items that are no JSON, and where bytes in
memory and in a view give different answers. Useful options: ``-max_total_time=900``
``-max_len=4096`` ``-timeout=5`` ``-rss_limit_mb=1024``.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from itertools import product
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dicomnode"]):
    from dicomnode.errors import MalformedDataSet
    from dicomnode.header import Wanted, read_header
    from dicomnode.index.keys import HEADER_KEYS

SYNTAXES = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.4.70",
)
WANTED = Wanted(HEADER_KEYS)
SEQUENCES = {key.partition(".")[0] for key in HEADER_KEYS if "." in key}


def test_one_input(data: bytes) -> None:
    if not data:
        return
    syntax, data_set = SYNTAXES[data[0] % len(SYNTAXES)], data[1:]
    found = attempt(data_set, syntax)
    again = attempt(memoryview(bytearray(b"before" + data_set))[6:], syntax)
    if found != again:
        raise AssertionError("a view gives another answer")
    for keyword, text in (found or {}).items():
        if not isinstance(text, str) or not text:
            raise AssertionError(f"{keyword} has no text")
        if keyword in SEQUENCES and not all(json.loads(text)):
            raise AssertionError(f"{keyword} has an empty item")


def attempt(data_set: bytes | memoryview, syntax: str) -> dict[str, str] | None:
    try:
        return read_header(data_set, syntax, WANTED)
    except MalformedDataSet:
        return None


# Seeds


def element(tag: int, vr: str, value: bytes, kind: int, *, undefined: bool = False) -> bytes:
    """One element in the encoding of ``SYNTAXES[kind]``."""
    order = ">" if kind == 2 else "<"
    length = 0xFFFFFFFF if undefined else len(value)
    if kind == 0:
        return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, length) + value
    if vr in ("OB", "OW", "SQ", "UN", "UT"):
        return struct.pack(f"{order}HH2sHI", tag >> 16, tag & 0xFFFF, vr.encode(), 0, length) + value
    return struct.pack(f"{order}HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), length) + value


def sequence(tag: int, items: list[bytes], kind: int, *, delimited: bool) -> bytes:
    order = ">" if kind == 2 else "<"
    length = 0xFFFFFFFF
    ends = [struct.pack(f"{order}HHI", 0xFFFE, number, 0) for number in (0xE00D, 0xE0DD)]
    content = b"".join(
        struct.pack(f"{order}HHI", 0xFFFE, 0xE000, length if delimited else len(item))
        + item
        + (ends[0] if delimited else b"")
        for item in items
    )
    return element(tag, "SQ", content + (ends[1] if delimited else b""), kind, undefined=delimited)


def seeds() -> list[bytes]:
    found = []
    for kind, charset, delimited in product(
        range(5), (b"ISO_IR 192", b"ISO_IR 100", b"\\ISO 2022 IR 87 "), (False, True)
    ):
        encoding = min(kind, 2) if kind < 3 else 1
        request = element(0x00401001, "SH", b"RP1 ", encoding) + element(0x00400007, "LO", b"\xc3\xa4b ", encoding)
        data = element(0x00080005, "CS", charset, encoding)
        data += element(0x00080008, "CS", b"ORIGINAL\\PRIMARY\\AXIAL ", encoding)
        data += sequence(0x00081140, [element(0x00081155, "UI", b"1.2.3\0", encoding)], encoding, delimited=delimited)
        data += element(0x00100010, "PN", b"A\x1b$B;3ED\x1b(B^B=\xe5\xb1 ", encoding)
        data += element(0x00280010, "US", b"\0\2", encoding) + element(0x00400245, "TM", b"101530", encoding)
        data += sequence(0x00400275, [request, b"", request], encoding, delimited=delimited)
        data += element(0x7FE00010, "OW", bytes(4), encoding)
        if kind == 3:
            squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            data = squeezer.compress(data) + squeezer.flush()
        found.append(bytes([kind]) + data)
    return found


def main() -> None:
    folder = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            for number, data in enumerate(seeds()):
                (folder / f"seed-{number:02}").write_bytes(data)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
