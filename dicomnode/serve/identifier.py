"""Identifiers of queries and answers as bytes (PS3.4 C.2, PS3.5 7). Pure.

Values are read by the same character-set rules as received objects, so a query and the index
agree. Answers are written without validation: what a modality sent wrong is shown as it is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import lru_cache

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from dicomnode import nested
from dicomnode.chartext import text_of
from dicomnode.errors import MalformedDataSet
from dicomnode.header import IMPLICIT_LITTLE
from dicomnode.index.keys import REQUEST_KEYS, REQUEST_SEQUENCE
from dicomnode.index.matching import KNOWN_KEYS, Identifier

MAX_IDENTIFIER = 4 * 1024 * 1024
"""Bytes of an identifier; a list of 65535 UIDs is 4 MiB."""

_KEYWORDS = {int(tag_for_keyword(keyword) or 0): keyword for keyword in KNOWN_KEYS}
_ITEM_KEYS: Mapping[str, frozenset[str]] = {REQUEST_SEQUENCE: frozenset(REQUEST_KEYS)}
"""What is known of the items of sequences."""

_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_TEXT_VRS = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})
_LONG_VRS = frozenset({"SQ", "UC", "UR", "UT"})
_ITEM = struct.Struct("<HHI")
_CHARSET = 0x00080005
_MAX_SHORT = 65534


def parse_identifier(data: bytes, transfer_syntax_uid: str) -> Identifier:
    """Raises MalformedDataSet when the bytes are no data set within the limits, or a key sequence has several items."""
    if len(data) > MAX_IDENTIFIER:
        raise MalformedDataSet("read identifier", f"it has more than {MAX_IDENTIFIER} bytes")
    values: dict[str, str] = {}
    unknown: list[tuple[int, str]] = []
    items: dict[str, dict[str, str]] = {}
    for tag, element in nested.parse(data, transfer_syntax_uid).items():
        keyword = _KEYWORDS.get(tag)
        if keyword is None:
            if tag >> 16 != 0x0002:
                unknown.append((tag, element.vr))
        elif keyword not in _ITEM_KEYS:
            values[keyword] = _text(tag, element)
        elif len(element.items) > 1:
            raise MalformedDataSet("read identifier", "a sequence of keys has more than one item")  # C.2.2.2.6
        else:
            found = {
                keyword_for_tag(t): _text(t, e) for item in element.items for t, e in item.items() if t != _CHARSET
            }
            items[keyword] = {k: v for k, v in found.items() if k in _ITEM_KEYS[keyword]}
            if found and not items[keyword]:
                items.pop(keyword)  # nothing of it is known: without keys all of the sequence would be asked for
            if set(found) - _ITEM_KEYS[keyword]:
                unknown.append((tag, element.vr))
    return Identifier(values, tuple(unknown), items)


def _text(tag: int, element: nested.Element) -> str:
    """Text of a key; :mod:`nested` has put it into UTF-8."""
    vr = _vr(tag)
    return "" if element.vr == "SQ" else text_of(element.value, vr, ("utf-8",))


@lru_cache(maxsize=10_000)
def _vr(tag: int) -> str:
    try:
        return str(dictionary_VR(tag))[:2]
    except KeyError:
        return "UN"


@lru_cache(maxsize=1000)
def _tag(keyword: str) -> int:
    return int(tag_for_keyword(keyword) or 0)


def encode_identifier(values: Mapping[str, str], transfer_syntax_uid: str) -> bytes:
    """A data set of keywords with text; a sequence is JSON text, a list with an object for each item.

    Text that is not ASCII goes out in UTF-8 and is declared (ISO_IR 192).
    """
    implicit = transfer_syntax_uid == IMPLICIT_LITTLE
    data = _encoded(values, implicit=implicit)
    if all(map(str.isascii, values.values())) and "\\u" not in values.get(REQUEST_SEQUENCE, ""):
        return data
    return _encoded({"SpecificCharacterSet": "ISO_IR 192"}, implicit=implicit) + data  # no answer has a lower tag


def _encoded(values: Mapping[str, str], *, implicit: bool) -> bytes:
    parts: list[bytes] = []
    for keyword, vr, head, size, pad in _layout(tuple(values), implicit):
        text = values[keyword]
        if pad and len(text) <= _MAX_SHORT and text.isascii():
            value = text.encode()
            if len(value) % 2:
                value += pad
        else:
            value = _items(text, implicit=implicit) if vr == "SQ" else _value(vr, text)
        parts += (head, len(value).to_bytes(size, "little"), value)
    return b"".join(parts)


@lru_cache(maxsize=256)
def _layout(keywords: tuple[str, ...], implicit: bool) -> tuple[tuple[str, str, bytes, int, bytes], ...]:
    """In order of tags: keyword, VR, what stands before the length, bytes of the length, padding of text.

    All answers of a query have the same attributes, so this is made once for them.
    """
    found = []
    for keyword in sorted(keywords, key=_tag):
        tag = _tag(keyword)
        vr = _vr(tag)
        head, long = struct.pack("<HH", tag >> 16, tag & 0xFFFF), implicit or vr in _LONG_VRS
        if not implicit:  # PS3.5 7.1.2
            head += vr.encode() + (b"\0\0" if long else b"")
        pad = b"" if vr == "SQ" or vr in _NUMBERS else b"\0" if vr == "UI" else b" "
        found.append((keyword, vr, head, 4 if long else 2, pad))
    return tuple(found)


def _items(text: str, *, implicit: bool) -> bytes:
    found = [_encoded(item, implicit=implicit) for item in json.loads(text or "[]")]
    return b"".join(_ITEM.pack(0xFFFE, 0xE000, len(item)) + item for item in found)


def _value(vr: str, text: str) -> bytes:
    if vr in _NUMBERS:
        try:
            convert = float if vr in ("FL", "FD") else int
            return b"".join(struct.pack("<" + _NUMBERS[vr], convert(v)) for v in text.split("\\") if v)
        except (ValueError, struct.error):
            return b""
    data = text.encode("utf-8" if vr in _TEXT_VRS else "ascii", "replace")
    if len(data) > _MAX_SHORT and vr not in _LONG_VRS:
        data = data[: data.rfind(b"\\", 0, _MAX_SHORT)] if vr == "UI" else b""
    return data + (b"\0" if vr == "UI" else b" ") if len(data) % 2 else data
