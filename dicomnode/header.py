"""A bounded reader of data set headers: the attributes the index needs, nothing else.

Walks the top level of an encoded data set (PS3.5 7) without recursion and stops at Pixel
Data. What has a length is skipped unread. Depth, items, element count and lengths are
limited, so hostile bytes cost neither stack nor memory. Text is decoded by Specific
Character Set (0008,0005).

It runs once for each stored object, so its loops are written for speed: tags and VRs are
compared as the numbers that their bytes make, places are noted first, and only wanted
values are copied.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicomnode.chartext import PLAIN, charset_encodings, is_plain, text_of
from dicomnode.errors import MalformedDataSet

MAX_DEPTH = 64
MAX_ITEMS = 100_000
MAX_ELEMENTS = 400_000
"""Elements of one data set that are looked at."""
MAX_VALUE = 64 * 1024
"""Longest value of a wanted attribute that is kept, bytes; longer ones are cut off."""
MAX_KEPT_ITEMS = 16
"""Items of a wanted sequence that are kept; a series is seldom requested more than twice."""
MAX_ITEM_VALUE = 4 * 1024
"""As MAX_VALUE, for an attribute in an item."""
MAX_CHARSET = 1024
"""As MAX_VALUE, for Specific Character Set: what is made of it is cached."""
MAX_HEAD = 64 * 1024
"""Bytes of a header that are turned to text at once; values behind them are read one by one."""

MAX_INFLATED = 64 * 1024 * 1024
"""Most bytes of a deflated data set that are inflated to find the header."""

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
DEFLATED = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

_TOO_MANY = f"it has more than {MAX_ELEMENTS} elements before Pixel Data"
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()
_SHORT_VRS = b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_PIXEL_DATA, _BEHIND_PIXELS = 0x7FE00010, 0x7FE10000
_CHARSET = 0x00080005
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class _Order:
    """Tags, VRs and lengths as numbers of one byte order; a tag read so is called a word."""

    def __init__(self, name: Literal["little", "big"]) -> None:
        mark = "<" if name == "little" else ">"
        self.name = name
        self.group_shift = 16 if name == "big" else 0
        self.element = struct.Struct(f"{mark}IHH").unpack_from  # word, VR, short length
        self.pair = struct.Struct(f"{mark}II").unpack_from  # word, long length
        self.long = struct.Struct(f"{mark}I").unpack_from
        self.short_vrs = frozenset(int.from_bytes(vr, name) for vr in _SHORT_VRS)
        self.long_vrs = frozenset(int.from_bytes(vr, name) for vr in _LONG_VRS)
        self.sequence, self.unknown = int.from_bytes(b"SQ", name), int.from_bytes(b"UN", name)
        self.delimited = frozenset(int.from_bytes(vr, name) for vr in (b"SQ", b"OB", b"OW"))
        """VRs that may have no length: sequences, and fragments (PS3.5 A.4)."""

    def word(self, tag: int) -> int:
        """The word of a tag, and the tag of a word."""
        return tag if self.name == "big" else (tag & 0xFFFF) << 16 | tag >> 16

    def is_vr(self, vr: int) -> bool:
        """Whether a VR that this reader does not know could be one; it is read with a short length."""
        text = vr.to_bytes(2, self.name)
        return text.isalpha() and text.isupper()


_LITTLE, _BIG = _Order("little"), _Order("big")


class _Slot(NamedTuple):
    """A wanted element. ``plain``: where its bytes are ASCII, only padding has to go; ``parts``: see Wanted."""

    keyword: str
    vr: str
    plain: bool
    charset: bool
    parts: _Slots | None = None


class _Slots:
    """Wanted elements of a data set by their word, in either byte order; the charset is always one."""

    def __init__(self) -> None:
        self.by_word: dict[_Order, dict[int, _Slot]] = {_LITTLE: {}, _BIG: {}}
        self.add(_CHARSET, "", "CS")

    def add(self, tag: int, keyword: str, vr: str, parts: _Slots | None = None) -> None:
        for order, slots in self.by_word.items():
            slots[order.word(tag)] = _Slot(keyword, vr, is_plain(vr), tag == _CHARSET, parts)


_Found = list[tuple[_Slot, int, int]]
"""Wanted elements, each with begin and end of its value."""


class Wanted:
    """The attributes to collect, resolved to tags once per process.

    ``RequestAttributesSequence.AccessionNumber`` is an attribute in the items of a sequence;
    a sequence without such parts is not collected, nor is what does not exist.
    """

    def __init__(self, keywords: Iterable[str]) -> None:
        self.slots = _Slots()
        tags: set[int] = set()
        sequences: dict[str, _Slots] = {}
        for name in sorted(keywords):
            keyword, _, part = name.partition(".")
            tag, part_tag = tag_for_keyword(keyword), tag_for_keyword(part)
            if tag is None or tag in _PIXEL_TAGS:
                continue
            vr = dictionary_VR(tag)[:2]
            if not part and vr != "SQ":
                tags.add(tag)
                self.slots.add(tag, keyword, vr)
            elif part_tag is not None and vr == "SQ":
                tags.add(tag)
                parts = sequences.setdefault(keyword, _Slots())
                parts.add(part_tag, part, dictionary_VR(part_tag)[:2])
                self.slots.add(tag, keyword, vr, parts)
        self.last = max(tags, default=0)


def read_header(data: bytes | bytearray | memoryview, transfer_syntax_uid: str, wanted: Wanted) -> dict[str, str]:
    """Keyword -> decoded text, multiple values joined by a backslash; empty ones left out.

    A wanted sequence is JSON text: a list with an object (keyword -> text) for each item.
    Raises MalformedDataSet when the bytes cannot be walked within the limits.
    """
    if transfer_syntax_uid in DEFLATED:
        data = _inflate(data)
    with memoryview(data).cast("B") as view:
        return _Reader(view, transfer_syntax_uid).read(wanted)


def read_begun_header(data: memoryview, transfer_syntax_uid: str, wanted: Wanted) -> dict[str, str] | None:
    """As :func:`read_header`, of the first bytes of a data set; None when they do not reach to Pixel Data."""
    if transfer_syntax_uid in DEFLATED:
        return None
    reader = _Reader(data, transfer_syntax_uid)
    try:
        found = reader.read(wanted)
    except MalformedDataSet:
        return None  # it may only be cut off
    return found if reader.stop < len(data) else None


class PixelData(NamedTuple):
    """Wanted texts, and where the value of Pixel Data (7FE0,0010) lies in the data set."""

    texts: dict[str, str]
    start: int
    stop: int


def find_pixel_data(data: memoryview, transfer_syntax_uid: str, wanted: Wanted) -> PixelData | None:
    """As :func:`read_header`, with the place of the pixels: fragments reach to the end of the data.

    None where there are none in little endian, or something cannot be walked.
    """
    reader = _Reader(data, transfer_syntax_uid)
    if transfer_syntax_uid in DEFLATED or reader.order is not _LITTLE:
        return None
    try:
        found: _Found = []
        at = reader.walk(found, wanted.slots, 0, len(data), _BEHIND_PIXELS, delimited=False)
        texts = reader._decode(found, str(data[: min(at, MAX_HEAD)], "latin-1"), PLAIN)
    except MalformedDataSet:
        return None
    if at + 12 > len(data) or _LITTLE.word(_LITTLE.pair(data, at)[0]) != _PIXEL_DATA:
        return None
    at += 12 if reader.explicit else 8
    length = _LITTLE.long(data, at - 4)[0]
    stop = len(data) if length == _UNDEFINED else at + length
    return PixelData(texts, at, stop) if stop <= len(data) else None


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


class _Reader:
    """One pass over one data set; counts what it has looked at.

    The walks take ``end`` as the end of all that they may look at and ``last`` as the last
    wanted tag of the top level, -1 inside an item.
    """

    def __init__(self, data: memoryview, syntax: str) -> None:
        self.data = data
        self.explicit = syntax != IMPLICIT_LITTLE
        self.order = _BIG if syntax == EXPLICIT_BIG else _LITTLE
        self.walk = self._explicit if self.explicit else self._implicit
        self.elements = 0
        self.items = 0
        self.stop = 0
        """Where the walk ended."""
        self.kept: dict[str, list[_Found]] = {}
        """Items of wanted sequences, by keyword."""

    def read(self, wanted: Wanted) -> dict[str, str]:
        found: _Found = []
        self.stop = self.walk(found, wanted.slots, 0, len(self.data), wanted.last, delimited=False)
        head = str(self.data[: min(self.stop, MAX_HEAD)], "latin-1")
        encodings = self._encodings(found, PLAIN)
        values = self._decode(found, head, encodings)
        for keyword, items in self.kept.items():
            texts = [self._decode(item, head, self._encodings(item, encodings)) for item in items]
            if any(texts):
                values[keyword] = json.dumps([t for t in texts if t], ensure_ascii=False, separators=(",", ":"))
        return values

    def _explicit(self, found: _Found, slots: _Slots, position: int, end: int, last: int, *, delimited: bool) -> int:
        """Note the places of wanted values in one data set; where it ends.

        That is at ``end``, at Pixel Data, or behind the delimiter when it is the content of an
        item of undefined length (``delimited``).
        """
        data, order = self.data, self.order
        unpack, lookup = order.element, slots.by_word[order].get
        short_vrs, long_vrs, shift = order.short_vrs, order.long_vrs, order.group_shift
        while True:
            for elements in range(self.elements + 1, MAX_ELEMENTS + 1):
                start = position + 8
                if start > end:
                    self.elements = elements
                    return _end(position, end, delimited=delimited)
                word, vr, length = unpack(data, position)
                slot = lookup(word)
                high = slot is None and word >> shift & 0xFFFF >= 0x7FE0
                if high and _closes(order.word(word), last, delimited=delimited):
                    self.elements = elements
                    return start if delimited else position
                if vr in short_vrs:
                    pass
                elif vr in long_vrs:
                    start += 4
                    if start > end:
                        raise _bad("it ends inside an element")
                    length = order.long(data, position + 8)[0]
                    if vr == order.sequence or length == _UNDEFINED:
                        self.elements = elements
                        position = self._sequence(vr, slot, start, length, end)
                        break
                elif not order.is_vr(vr):
                    raise _bad("it has a value representation that does not exist")
                position = start + length
                if position > end:
                    raise _bad("an element is longer than what is left of it")
                if slot is not None:
                    found.append((slot, start, position))
            else:
                raise _bad(_TOO_MANY)

    def _implicit(self, found: _Found, slots: _Slots, position: int, end: int, last: int, *, delimited: bool) -> int:
        """As :meth:`_explicit`, for Implicit VR Little Endian."""
        data, unpack, lookup = self.data, _LITTLE.pair, slots.by_word[_LITTLE].get
        while True:
            for elements in range(self.elements + 1, MAX_ELEMENTS + 1):
                start = position + 8
                if start > end:
                    self.elements = elements
                    return _end(position, end, delimited=delimited)
                word, length = unpack(data, position)
                slot = lookup(word)
                if slot is None and word & 0xFFFF >= 0x7FE0 and _closes(_LITTLE.word(word), last, delimited=delimited):
                    self.elements = elements
                    return start if delimited else position
                if length == _UNDEFINED or (slot is not None and slot.parts is not None):
                    self.elements = elements
                    position = self._sequence(_LITTLE.sequence, slot, start, length, end)
                    break
                position = start + length
                if position > end:
                    raise _bad("an element is longer than what is left of it")
                if slot is not None:
                    found.append((slot, start, position))
            else:
                raise _bad(_TOO_MANY)

    def _sequence(self, vr: int, slot: _Slot | None, start: int, length: int, end: int) -> int:
        """Pass over a sequence, or over fragments; the items of a wanted one are noted."""
        stop = end if length == _UNDEFINED else start + length
        if stop > end:
            raise _bad("an element is longer than what is left of it")
        parts = slot.parts if slot is not None else None
        if slot is not None and parts is not None and vr == self.order.sequence and slot.keyword not in self.kept:
            items: list[_Found] = []
            self.kept[slot.keyword] = items
            if length == _UNDEFINED:
                return self._collect(items, parts, start, end, delimited=True)
            try:
                self._collect(items, parts, start, stop, delimited=False)
            except MalformedDataSet:
                items.clear()  # what has a length is passed over, whatever is in it
        if length != _UNDEFINED:
            return stop
        if vr == self.order.unknown:
            return self._skip_unknown(start, end)
        if vr not in self.order.delimited:
            raise _bad("it has an element of undefined length that is no sequence")
        return self._skip(start, end)

    def _collect(self, items: list[_Found], slots: _Slots, position: int, end: int, *, delimited: bool) -> int:
        """Note the wanted values in each item of one sequence; where it ends."""
        order = self.order
        while delimited or position < end:
            if position + 8 > end:
                raise _bad("it ends inside a sequence")
            word, length = order.pair(self.data, position)
            tag = order.word(word)
            position += 8
            if tag == _SEQUENCE_END and delimited:
                return position
            if tag != _ITEM:
                raise _bad("it has an element where a sequence item must be")
            self._count_item()
            stop = end if length == _UNDEFINED else position + length
            if stop > end:
                raise _bad("an item is longer than what is left of it")
            found: _Found = []
            position = self.walk(found, slots, position, stop, -1, delimited=length == _UNDEFINED)
            if len(items) < MAX_KEPT_ITEMS:
                items.append([(slot, start, min(stop, start + MAX_ITEM_VALUE)) for slot, start, stop in found])
        return position

    def _count_item(self) -> None:
        self.items += 1
        if self.items > MAX_ITEMS:
            raise _bad(f"it has more than {MAX_ITEMS} sequence items")

    def _skip(self, position: int, end: int) -> int:  # noqa: PLR0912 one loop over one grammar; splitting it would hide its state
        """End of a sequence of undefined length.

        What has a length is passed over, so all that is open is delimited: sequences and
        items alternate, and an odd ``depth`` is a sequence.
        """
        data, order = self.data, self.order
        item, closing = order.word(_ITEM), (order.word(_ITEM_END), order.word(_SEQUENCE_END))
        depth = 1
        while depth:
            for elements in range(self.elements + 1, MAX_ELEMENTS + 1):
                if position + 8 > end:
                    raise _bad("it ends inside a sequence")
                word, length = order.pair(data, position)
                vr = order.sequence
                if word == closing[depth & 1]:
                    position += 8
                    depth -= 1
                    if depth:
                        continue
                    self.elements = elements
                    break
                if depth & 1:
                    if word != item:
                        raise _bad("it has an element where a sequence item must be")
                    self._count_item()
                elif order.word(word) >> 16 == 0xFFFE:
                    raise _bad("its sequence delimiters do not match")
                elif self.explicit:
                    word, vr, length = order.element(data, position)
                    if vr in order.long_vrs:
                        position += 4
                        if position + 8 > end:
                            raise _bad("it ends inside an element")
                        length = order.long(data, position + 4)[0]
                    elif not order.is_vr(vr):
                        raise _bad("it has a value representation that does not exist")
                position += 8
                if length != _UNDEFINED:
                    position += length
                    if position > end:
                        raise _bad("an element or item is longer than what is left of it")
                elif vr in order.delimited:
                    depth = _deeper(depth)
                elif vr == order.unknown:
                    self.elements = elements
                    position = self._skip_unknown(position, end)
                    break
                else:
                    raise _bad("it has an element of undefined length that is no sequence")
            else:
                raise _bad(_TOO_MANY)
        return position

    def _skip_unknown(self, position: int, end: int) -> int:
        """End of a UN value of undefined length: an implicit VR sequence, whatever surrounds it (PS3.5 6.2.2)."""
        depth = 1
        for elements in range(self.elements + 1, MAX_ELEMENTS + 1):
            if position + 8 > end:
                raise _bad("it ends inside a sequence")
            word, length = _LITTLE.pair(self.data, position)
            tag = _LITTLE.word(word)
            position += 8
            if tag in (_ITEM_END, _SEQUENCE_END):
                depth -= 1
                if not depth:
                    self.elements = elements
                    return position
            elif length == _UNDEFINED:
                depth = _deeper(depth)
            elif tag != _ITEM:
                position += length
                if position > end:
                    raise _bad("an element is longer than what is left of it")
        raise _bad(_TOO_MANY)

    def _encodings(self, found: _Found, inherited: tuple[str, ...]) -> tuple[str, ...]:
        for slot, start, stop in found:
            if slot.charset:
                return charset_encodings(bytes(self.data[start : min(stop, start + MAX_CHARSET)]))
        return inherited

    def _decode(self, found: _Found, head: str, encodings: tuple[str, ...]) -> dict[str, str]:
        """Texts by keyword; of elements with the same tag the first counts.

        ``head`` is the begin of the data as Latin-1. Every character set that is read agrees
        with it on ASCII as long as no escape switches to another.
        """
        texts: dict[str, str] = {}
        limit = len(head)
        for (keyword, vr, plain, _, _), start, stop in reversed(found):
            if plain and stop <= limit and (text := head[start:stop]).isascii() and "\x1b" not in text:
                if "\\" in text:
                    text = "\\".join([part.strip(" \0") for part in text.split("\\")])
                else:
                    text = text.strip(" \0")
            else:
                value = bytes(self.data[start : min(stop, start + MAX_VALUE)])
                text = text_of(value, vr, encodings, big=self.order is _BIG)
            if text:
                texts[keyword] = text
            else:
                texts.pop(keyword, None)
        texts.pop("", None)
        return texts


def _end(position: int, end: int, *, delimited: bool) -> int:
    """No whole tag is left: that is right at the end alone."""
    if position != end or delimited:
        raise _bad("it ends inside a sequence" if delimited else "it ends inside an element")
    return position


def _closes(tag: int, last: int, *, delimited: bool) -> bool:
    """Whether a high tag ends the data set that it stands in; ``last`` is -1 inside an item."""
    if tag >> 16 == 0xFFFE:
        if delimited and tag == _ITEM_END:
            return True
        raise _bad(
            "its sequence delimiters do not match" if delimited else "it has an item delimiter outside a sequence"
        )
    return last >= 0 and (tag in _PIXEL_TAGS or tag > last)


def _deeper(depth: int) -> int:
    if depth >= 2 * MAX_DEPTH:
        raise _bad(f"its sequences are nested deeper than {MAX_DEPTH}")
    return depth + 1
