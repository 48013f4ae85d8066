"""Whole small data sets, sequences included, within limits (PS3.5 7). Pure.

For normalized services, whose data sets carry references to thousands of instances but no
pixel data. Depth, items, elements and bytes are limited before anything is made of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicomnode.chartext import PLAIN, charset_encodings, text_of
from dicomnode.errors import MalformedDataSet
from dicomnode.header import IMPLICIT_LITTLE

MAX_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 16
MAX_ITEMS = 100_000
MAX_ELEMENTS = 400_000

EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_UNDEFINED = 0xFFFFFFFF
_CHARSET = 0x00080005
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_TEXT_VRS = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})
_MAX_SHORT = 65534


@dataclass(frozen=True, slots=True)
class Element:
    """One attribute: ``items`` of a sequence, else the ``value`` as little endian bytes."""

    vr: str
    value: bytes = b""
    items: tuple[DataSet, ...] = ()

    @property
    def empty(self) -> bool:
        """Zero length, or nothing but padding."""
        return not self.items and not self.value.strip(b" \0")


DataSet = dict[int, "Element"]
"""Tag -> element; text is UTF-8 and Specific Character Set is not in it."""


def _bad(cause: str) -> MalformedDataSet:
    return MalformedDataSet("read data set", cause, "Check the message at its sender")


def tag_of(keyword: str) -> int:
    """Raises KeyError for what is no keyword of PS3.6."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return int(tag)


@lru_cache(maxsize=10_000)
def _dictionary_vr(tag: int) -> str:
    try:
        return str(dictionary_VR(tag))[:2]
    except KeyError:
        return "UN"


def element(ds: Mapping[int, Element], keyword: str) -> Element | None:
    return ds.get(tag_of(keyword))


def text(ds: Mapping[int, Element], keyword: str) -> str:
    """Decoded text of an attribute, values joined by a backslash; "" when it is not there."""
    found = element(ds, keyword)
    return "" if found is None else text_of(found.value, found.vr, ("utf-8",))


def items(ds: Mapping[int, Element], keyword: str) -> tuple[DataSet, ...]:
    """The items of a sequence; none when it is not there."""
    found = element(ds, keyword)
    return () if found is None else found.items


def parse(data: bytes, transfer_syntax_uid: str) -> DataSet:
    """Explicit or implicit VR little endian. Raises MalformedDataSet beyond the limits of this module.

    Text is taken over into UTF-8 by the character sets that the data set and its items
    declare; what does not decode becomes U+FFFD. Group lengths are left out.
    """
    if len(data) > MAX_BYTES:
        raise _bad(f"it has more than {MAX_BYTES} bytes")
    parser = _Parser(data)
    found, _ = parser.data_set(0, len(data), implicit=transfer_syntax_uid == IMPLICIT_LITTLE, depth=0, delimited=False)
    return _in_utf8(found, PLAIN)


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._elements = self._items = 0

    def data_set(self, at: int, end: int, *, implicit: bool, depth: int, delimited: bool) -> tuple[DataSet, int]:
        """The elements from ``at`` on and where they end; ``delimited``: with an item delimiter."""
        found: DataSet = {}
        while delimited or at < end:
            tag, vr, length, at = self._head(at, end, implicit)
            if tag == _ITEM_END and delimited:
                return found, at
            if tag >> 16 == 0xFFFE:
                raise _bad("its sequence delimiters do not match")
            self._elements += 1
            if self._elements > MAX_ELEMENTS:
                raise _bad(f"it has more than {MAX_ELEMENTS} elements")
            if tag in found:
                raise _bad("it has an element twice")
            if vr == "SQ" or length == _UNDEFINED:
                if vr not in ("SQ", "UN"):
                    raise _bad("it has an element of undefined length that is no sequence")
                stop = end if length == _UNDEFINED else at + length
                if stop > end:
                    raise _bad("an element is longer than what is left of it")
                # PS3.5 6.2.2: UN of undefined length is an implicit VR sequence.
                nested, at = self._sequence(
                    at, stop, implicit=implicit or vr == "UN", depth=depth + 1, delimited=length == _UNDEFINED
                )
                found[tag] = Element("SQ", items=nested)
                continue
            if at + length > end:
                raise _bad("an element is longer than what is left of it")
            if tag & 0xFFFF:
                found[tag] = Element(vr, self._data[at : at + length])
            at += length
        return found, at

    def _head(self, at: int, end: int, implicit: bool) -> tuple[int, str, int, int]:
        """Tag, VR, length and where the value begins."""
        if at + 8 > end:
            raise _bad("it ends inside an element")
        group, number = struct.unpack_from("<HH", self._data, at)
        tag = group << 16 | number
        if implicit or group == 0xFFFE:
            (length,) = struct.unpack_from("<I", self._data, at + 4)
            vr = _dictionary_vr(tag)
            return tag, "SQ" if length == _UNDEFINED else vr, length, at + 8
        vr = self._data[at + 4 : at + 6].decode("latin-1")
        if vr in _LONG_VRS:
            if at + 12 > end:
                raise _bad("it ends inside an element")
            return tag, vr, struct.unpack_from("<I", self._data, at + 8)[0], at + 12
        if not (vr.isascii() and vr.isalpha() and vr.isupper()):
            raise _bad("it has a value representation that does not exist")
        return tag, vr, struct.unpack_from("<H", self._data, at + 6)[0], at + 8

    def _sequence(
        self, at: int, end: int, *, implicit: bool, depth: int, delimited: bool
    ) -> tuple[tuple[DataSet, ...], int]:
        if depth > MAX_DEPTH:
            raise _bad(f"its sequences are nested deeper than {MAX_DEPTH}")
        found: list[DataSet] = []
        while delimited or at < end:
            tag, _, length, at = self._head(at, end, implicit=True)
            if tag == _SEQUENCE_END and delimited:
                break
            if tag != _ITEM:
                raise _bad("it has an element where a sequence item must be")
            self._items += 1
            if self._items > MAX_ITEMS:
                raise _bad(f"it has more than {MAX_ITEMS} sequence items")
            stop = end if length == _UNDEFINED else at + length
            if stop > end:
                raise _bad("an item is longer than what is left of it")
            item, at = self.data_set(at, stop, implicit=implicit, depth=depth, delimited=length == _UNDEFINED)
            found.append(item)
        return tuple(found), at


def _in_utf8(ds: DataSet, inherited: tuple[str, ...]) -> DataSet:
    """PS3.3 C.12.1.1.2: an item without a character set of its own has that of the data set around it."""
    declared = ds.get(_CHARSET)
    encodings = inherited if declared is None else charset_encodings(declared.value)
    return {tag: _element_in_utf8(e, encodings) for tag, e in ds.items() if tag != _CHARSET}


def _element_in_utf8(one: Element, encodings: tuple[str, ...]) -> Element:
    if one.vr == "SQ":
        return Element("SQ", items=tuple(_in_utf8(item, encodings) for item in one.items))
    if one.vr not in _TEXT_VRS or (one.value.isascii() and b"\x1b" not in one.value):
        return one
    value = text_of(one.value, one.vr, encodings).encode("utf-8")
    if len(value) > _MAX_SHORT and one.vr not in _LONG_VRS:
        raise _bad("a text is too long")
    return Element(one.vr, value)


def encode(ds: DataSet, transfer_syntax_uid: str) -> bytes:
    """In ascending order of tags, sequences with lengths; text that is not ASCII is declared as ISO_IR 192."""
    if not _is_ascii(ds):
        ds = {**ds, _CHARSET: Element("CS", b"ISO_IR 192")}
    return b"".join(_encoded(ds, implicit=transfer_syntax_uid == IMPLICIT_LITTLE))


def _is_ascii(ds: DataSet) -> bool:
    return all(
        all(_is_ascii(item) for item in e.items) and (e.vr not in _TEXT_VRS or e.value.isascii()) for e in ds.values()
    )


def _encoded(ds: DataSet, *, implicit: bool) -> Iterator[bytes]:
    for tag in sorted(ds):
        one = ds[tag]
        value = one.value
        if one.vr == "SQ":
            parts = [b"".join(_encoded(item, implicit=implicit)) for item in one.items]
            value = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(part)) + part for part in parts)
        if len(value) % 2:
            value += b"\0" if one.vr in ("UI", "OB", "UN") else b" "
        group, number = tag >> 16, tag & 0xFFFF
        if implicit:
            yield struct.pack("<HHI", group, number, len(value)) + value
        elif one.vr in _LONG_VRS or len(value) > _MAX_SHORT:  # PS3.5 6.2.2: UN for what its VR cannot hold
            vr = one.vr if one.vr in _LONG_VRS else "UN"
            yield struct.pack("<HH2sHI", group, number, vr.encode(), 0, len(value)) + value
        else:
            yield struct.pack("<HH2sH", group, number, one.vr.encode(), len(value)) + value
