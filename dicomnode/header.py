"""A bounded reader of data set headers: the attributes the index needs, nothing else.

Walks the top level of an encoded data set (PS3.5 7) without recursion and stops at Pixel
Data. Depth, items, element count and lengths are limited, so hostile bytes cost neither
stack nor memory. Text is decoded by Specific Character Set (0008,0005).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping

from pydicom import charset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from dicomnode.errors import MalformedDataSet

MAX_DEPTH = 64
MAX_ITEMS = 100_000
MAX_ELEMENTS = 100_000
MAX_VALUE = 64 * 1024
"""Longest value of a wanted attribute that is kept, bytes; longer ones are cut off."""

MAX_INFLATED = 64 * 1024 * 1024
"""Most bytes of a deflated data set that are inflated to find the header."""

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
DEFLATED = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_TEXT_VRS = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class Wanted:
    """The keywords to collect, resolved to tags once per process."""

    def __init__(self, keywords: Iterable[str]) -> None:
        self.by_tag: dict[int, tuple[str, str]] = {}
        for keyword in keywords:
            tag = tag_for_keyword(keyword)
            if tag is not None:
                self.by_tag[tag] = (keyword, dictionary_VR(tag)[:2])
        self.last = max(self.by_tag, default=0)


def read_header(data: bytes | bytearray | memoryview, transfer_syntax_uid: str, wanted: Wanted) -> dict[str, str]:
    """Keyword -> decoded text, multiple values joined by a backslash; empty ones left out.

    Raises MalformedDataSet when the bytes cannot be walked within the limits.
    """
    if transfer_syntax_uid in DEFLATED:
        data = _inflate(data)
    raw = _walk(memoryview(data).cast("B"), transfer_syntax_uid, wanted)
    return _decode(raw, wanted, ">" if transfer_syntax_uid == EXPLICIT_BIG else "<")


def _inflate(data: bytes | bytearray | memoryview) -> bytes:
    """First bytes of a deflated data set (PS3.5 A.5); the limit makes a bomb harmless."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_INFLATED)
    except zlib.error:
        raise MalformedDataSet("read header", "the deflated data set cannot be inflated") from None


def inflates_within_limit(part10: bytes) -> bool:
    """False for a Part 10 file with a deflated data set of more than ``MAX_INFLATED`` bytes.

    Readers that inflate it whole would take memory by the gigabyte for a file of a megabyte.
    """
    start = 144 + int.from_bytes(part10[140:144], "little")
    if not any(uid.encode() in part10[144:start] for uid in DEFLATED):
        return True
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        return len(inflater.decompress(memoryview(part10)[start:], MAX_INFLATED + 1)) <= MAX_INFLATED
    except zlib.error:
        return True  # the reader says what is wrong with it


def _bad(cause: str) -> MalformedDataSet:
    return MalformedDataSet("read header", cause, "Check the object at its sender; it was not stored")


def _walk(  # noqa: PLR0912, PLR0915 one loop over one grammar; splitting it would hide its state
    data: memoryview, syntax: str, wanted: Wanted
) -> dict[int, bytes]:
    """Raw values of the wanted top-level elements."""
    explicit = syntax != IMPLICIT_LITTLE
    order = ">" if syntax == EXPLICIT_BIG else "<"
    tag_of, u16_of, u32_of = (
        struct.Struct(f"{order}HH").unpack_from,
        struct.Struct(f"{order}H").unpack_from,
        struct.Struct(f"{order}I").unpack_from,
    )
    found: dict[int, bytes] = {}
    end = len(data)
    position = 0
    elements = items = 0
    # Nesting: for each open sequence or item its end offset (None: delimited), whether its
    # content is a list of items, and the nearest end that is known.
    stack: list[tuple[int | None, bool, int]] = []
    while True:
        while stack and stack[-1][0] is not None and position >= stack[-1][0]:
            stack.pop()
        limit = stack[-1][2] if stack else end
        if position + 8 > limit:
            if position == limit and not stack:
                return found
            raise _bad("it ends inside an element" if not stack else "it ends inside a sequence")
        group, element = tag_of(data, position)
        tag = group << 16 | element
        if not stack:
            if group == 0xFFFE:
                raise _bad("it has an item delimiter outside a sequence")
            if tag in _PIXEL_TAGS or (tag > wanted.last and tag >= 0x7FE00000):
                return found
        elements += 1
        if elements > MAX_ELEMENTS * 4:
            raise _bad(f"it has more than {MAX_ELEMENTS * 4} elements before Pixel Data")
        if group == 0xFFFE:
            length = u32_of(data, position + 4)[0]
            position += 8
            if tag == _ITEM:
                items += 1
                if items > MAX_ITEMS:
                    raise _bad(f"it has more than {MAX_ITEMS} sequence items")
                if not stack or not stack[-1][1]:
                    raise _bad("it has an item outside a sequence")
                _push(stack, position, length, limit, is_sequence=False)
            elif tag in (_ITEM_END, _SEQUENCE_END):
                closes_sequence = tag == _SEQUENCE_END
                if not stack or stack[-1][1] != closes_sequence or stack[-1][0] is not None:
                    raise _bad("its sequence delimiters do not match")
                stack.pop()
            else:
                raise _bad("it has an unknown delimiter")
            continue
        if stack and stack[-1][1]:
            raise _bad("it has an element where a sequence item must be")
        vr, length, value = b"", 0, position
        if explicit:
            vr = bytes(data[position + 4 : position + 6])
            if vr in _LONG_VRS:
                if position + 12 > limit:
                    raise _bad("it ends inside an element")
                length, value = u32_of(data, position + 8)[0], position + 12
            elif vr.isalpha() and vr.isupper():
                length, value = u16_of(data, position + 6)[0], position + 8
            else:
                raise _bad("it has a value representation that does not exist")
        else:
            length, value = u32_of(data, position + 4)[0], position + 8
            if length == _UNDEFINED or tag in wanted.by_tag:
                vr = b"SQ" if length == _UNDEFINED else b""
        if length == _UNDEFINED:
            if vr not in (b"SQ", b"UN", b""):
                raise _bad("it has an element of undefined length that is no sequence")
            if vr == b"UN" and explicit:
                # PS3.5 6.2.2: UN of undefined length is an implicit VR sequence.
                position, elements = _skip_implicit(data, value, limit, elements)
                continue
            _push(stack, value, length, limit, is_sequence=True)
            position = value
            continue
        if value + length > limit:
            raise _bad("an element is longer than what is left of it")
        if not stack and tag in wanted.by_tag and tag not in found:
            found[tag] = bytes(data[value : value + min(length, MAX_VALUE)])
        position = value + length


def _push(stack: list[tuple[int | None, bool, int]], start: int, length: int, limit: int, *, is_sequence: bool) -> None:
    if len(stack) >= 2 * MAX_DEPTH:
        raise _bad(f"its sequences are nested deeper than {MAX_DEPTH}")
    if length == _UNDEFINED:
        stack.append((None, is_sequence, limit))
        return
    if start + length > limit:
        raise _bad("an item is longer than what is left of it")
    stack.append((start + length, is_sequence, start + length))


def _skip_implicit(data: memoryview, position: int, limit: int, elements: int) -> tuple[int, int]:
    """End of an undefined-length UN value, which is encoded as implicit VR little endian.

    ``elements`` counts over the whole data set, so that many such values are bounded too.
    """
    depth = 1
    while depth:
        elements += 1
        if elements > MAX_ELEMENTS * 4:
            raise _bad(f"it has more than {MAX_ELEMENTS * 4} elements before Pixel Data")
        if position + 8 > limit:
            raise _bad("it ends inside a sequence")
        group, element = struct.unpack_from("<HH", data, position)
        length = struct.unpack_from("<I", data, position + 4)[0]
        tag = group << 16 | element
        position += 8
        if tag in (_ITEM_END, _SEQUENCE_END):
            depth -= 1
        elif length == _UNDEFINED:
            depth += 1
            if depth > 2 * MAX_DEPTH:
                raise _bad(f"its sequences are nested deeper than {MAX_DEPTH}")
        elif tag != _ITEM:
            if position + length > limit:
                raise _bad("an element is longer than what is left of it")
            position += length
    return position, elements


def _decode(raw: Mapping[int, bytes], wanted: Wanted, order: str) -> dict[str, str]:
    declared = [v.strip(" \0\t\r\n") for v in raw.get(0x00080005, b"").decode("ascii", "replace").split("\\")]
    encodings = charset_encodings(tuple(declared))
    text: dict[str, str] = {}
    for tag, value in raw.items():
        keyword, vr = wanted.by_tag[tag]
        decoded = _value_text(value, vr, encodings, order)
        if decoded:
            text[keyword] = decoded
    return text


def _value_text(value: bytes, vr: str, encodings: tuple[str, ...], order: str) -> str:
    if vr in _NUMBERS:
        size = struct.calcsize(_NUMBERS[vr])
        count = len(value) // size
        return "\\".join(str(n) for n in struct.unpack(f"{order}{count}{_NUMBERS[vr]}", value[: count * size]))
    if vr in _TEXT_VRS:
        delimiters = PN_DELIMS if vr == "PN" else TEXT_VR_DELIMS
        decoded = _decode_text(value, encodings, delimiters)
    else:
        decoded = value.decode("ascii", "replace")
    if vr in ("ST", "LT", "UT"):
        return decoded.rstrip(" \0")
    parts = [part.strip(" \0") for part in decoded.split("\\")]
    if vr == "PN":  # trailing component groups that are empty may be left out (PS3.5 6.2.1)
        parts = [part.rstrip("=") for part in parts]
    return "\\".join(parts)


def _decode_text(value: bytes, encodings: tuple[str, ...], delimiters: set[int]) -> str:
    """Text in the declared character sets; what does not decode becomes U+FFFD.

    Only code extensions (ISO 2022, an escape in the value) need pydicom, which warns about
    undecodable bytes: those are the sender's, and the bytes stay as they came.
    """
    if b"\x1b" not in value:
        return value.decode(encodings[0], "replace")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(charset.decode_bytes(value, encodings, delimiters))


_ENCODINGS: dict[tuple[str, ...], tuple[str, ...]] = {}


def charset_encodings(declared: tuple[str, ...]) -> tuple[str, ...]:
    """Python encodings of a Specific Character Set value; unknown ones read as Latin-1."""
    known = _ENCODINGS.get(declared)
    if known is None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                known = tuple(charset.convert_encodings(list(declared)))
            except (LookupError, ValueError):  # a NUL inside is a ValueError
                known = ("iso8859",)
        if len(_ENCODINGS) < 1000:
            _ENCODINGS[declared] = known
    return known
