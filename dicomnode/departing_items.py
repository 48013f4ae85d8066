"""Sequences of what leaves, rewritten as bytes: what pydicom makes of them, at a fraction of its time. Pure.

A report has a thousand elements within its sequences, and to make an object of each costs fifty milliseconds.
Here they are walked as they lie in the file. Only what is plain is done so: Explicit VR Little Endian with
lengths, tags in order, ASCII or UTF-8. For anything else :class:`NotPlain` is raised and the element goes
the long way (:func:`dicomnode.deidentify._copy`), which decides what is right: a test compares both, byte for byte.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pydicom.datadict import tag_for_keyword

from dicomnode.departing_keywords import EMPTY, KEPT
from dicomnode.pseudonyms import shifted


def tags_of(keywords: Iterable[str]) -> frozenset[int]:
    tags = {k: tag_for_keyword(k) for k in keywords}
    unknown = [k for k, t in tags.items() if t is None]
    assert not unknown, unknown
    return frozenset(int(t) for t in tags.values() if t is not None)


KEPT_TAGS, EMPTY_TAGS = tags_of(KEPT), tags_of(EMPTY)
CODE_MEANING, CODE_VALUE, SCHEME = (tags_of([k]) for k in ("CodeMeaning", "CodeValue", "CodingSchemeDesignator"))
CREATOR = tags_of(["ContentCreatorName"])
PER_FRAME = tags_of(["PerFrameFunctionalGroupsSequence"])

PUBLIC_SCHEMES = frozenset({"DCM", "SCT", "SRT", "LN", "UCUM", "RADLEX", "FMA", "UMLS", "NCIt", "ISO639_1", "RFC5646"})
"""Of other coding schemes the meaning may be anybody's free text; it is replaced."""

LOCAL_MEANING = "local code"

TEXT_CONCEPTS = frozenset(
    {
        "121106",  # Comment
        "113012",  # Key Object Description
        "112039",  # Tracking Identifier
        "111001",  # Algorithm Name
        "111002",  # Algorithm Parameters
        "111003",  # Algorithm Version
        "122405",  # Algorithm Manufacturer
        "121013",  # Device Observer Name
        "121014",  # Device Observer Manufacturer
        "121015",  # Device Observer Model Name
    }
)
"""Text content items that this node writes itself (PS3.16, DCM)."""

DROPPED_VALUE_TYPES = frozenset({"PNAME"})
FREE_TEXT = frozenset({"LO", "LT", "SH", "ST", "UC", "UT"})
_MULTI = frozenset({"LO", "SH", "UC"})

_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UR", b"UT", b"UV"}
_SHORT = {
    *(b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT"),
    *(b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"),
}
_CHARSET, _VALUE_TYPE, _CONCEPT = 0x00080005, 0x0040A040, 0x0040A043
_ITEM, _UNDEFINED, _MOST_SHORT, _MOST_DEPTH = 0xFFFEE000, 0xFFFFFFFF, 65534, 32
_UIDS = re.compile(r"[0-9.\\]*")
_MOMENT = re.compile(r"[0-9.+-]*")
_VALUE_TYPES = re.compile(r"[A-Z0-9_]*")
_TEXT = re.compile(r"[^\0\x1b\\]*", re.DOTALL)
_LINES = re.compile(r"[^\0\x1b]*", re.DOTALL)
_HEAD, _LENGTH = struct.Struct("<HH2sH"), struct.Struct("<I")
_META_END = 144
_ITEM_HEAD = struct.Struct("<HHI")


class NotPlain(Exception):
    """It has to go the long way; no fault."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One element: ``items`` of a sequence, else its value; ``raw`` with its header, as it lies there."""

    tag: int
    vr: str
    value: bytes
    raw: bytes
    items: tuple[Items, ...] = ()


Items = tuple[Leaf, ...]
"""The elements of one item."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """How values are exchanged. ``charset``: what text is decoded by, ``ascii`` or ``utf-8``."""

    uid: Callable[[str], str]
    days: int
    said: Callable[[str], str]
    charset: str


def parse(value: bytes, depth: int = 0) -> tuple[Items, ...]:
    """The items of a sequence. Raises NotPlain."""
    if depth > _MOST_DEPTH:
        raise NotPlain
    found, at = [], 0
    while at < len(value):
        if len(value) - at < _ITEM_HEAD.size:
            raise NotPlain
        group, element, length = _ITEM_HEAD.unpack_from(value, at)
        at += _ITEM_HEAD.size
        if group << 16 | element != _ITEM or length == _UNDEFINED or at + length > len(value):
            raise NotPlain
        found.append(tuple(_elements(value[at : at + length], depth)))
        at += length
    return tuple(found)


def _elements(data: bytes, depth: int) -> Iterator[Leaf]:
    at, last = 0, -1
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise NotPlain
        group, element, vr, length = _HEAD.unpack_from(data, at)
        tag, begin = group << 16 | element, at + _HEAD.size
        if vr in _LONG:
            if length or len(data) - begin < _LENGTH.size:  # reserved bytes are 0
                raise NotPlain
            (length,) = _LENGTH.unpack_from(data, begin)
            begin += _LENGTH.size
        elif vr not in _SHORT:
            raise NotPlain
        end = begin + length
        if tag <= last or tag == _CHARSET or length % 2 or end > len(data):
            raise NotPlain
        value = data[begin:end]
        items = parse(value, depth + 1) if vr == b"SQ" and tag in KEPT_TAGS else ()
        yield Leaf(tag, vr.decode("ascii"), value, data[at:end], items)
        at, last = end, tag


def uids_of(items: Iterable[Items]) -> Iterator[str]:
    """UIDs among the elements that leave; those of single frames are in lists of references, too."""
    for elements in items:
        for leaf in elements:
            if leaf.tag not in KEPT_TAGS or leaf.tag in PER_FRAME:
                continue
            if leaf.vr == "SQ":
                yield from uids_of(leaf.items)
            elif leaf.vr == "UI":
                yield from _plain(leaf.value, _UIDS, "ascii").split("\\")


def written(items: Iterable[Items], how: Exchange) -> bytes:
    """The value of a sequence of the items that may leave, exchanged. Raises NotPlain."""
    out = bytearray()
    for elements in items:
        if _may_leave(elements, how.charset):
            body = _item(elements, how)
            out += _ITEM_HEAD.pack(_ITEM >> 16, _ITEM & 0xFFFF, len(body)) + body
    return bytes(out)


def _item(elements: Items, how: Exchange) -> bytes:
    scheme = next((_text(e, how.charset) for e in elements if e.tag in SCHEME), "")
    out = bytearray()
    for leaf in elements:
        if leaf.tag not in KEPT_TAGS:
            continue
        if leaf.vr == "SQ":
            out += element_of(leaf.tag, "SQ", written(leaf.items, how))
        elif leaf.vr == "UI":
            new = "\\".join(map(how.uid, _plain(leaf.value, _UIDS, "ascii").split("\\")))
            out += element_of(leaf.tag, "UI", new.encode("ascii"), b"\0")
        elif leaf.vr in ("DA", "DT"):
            out += element_of(
                leaf.tag, leaf.vr, shifted(_plain(leaf.value, _MOMENT, "ascii"), how.days).encode("ascii")
            )
        elif leaf.vr == "PN":
            if leaf.tag in CREATOR:
                raise NotPlain
        elif leaf.vr in FREE_TEXT:
            if leaf.tag in CODE_MEANING and scheme not in PUBLIC_SCHEMES:
                out += element_of(leaf.tag, "LO", LOCAL_MEANING.encode())
            else:
                text = _text(leaf, how.charset)
                exchanged = text if leaf.tag in CODE_VALUE or leaf.tag in SCHEME else how.said(text)
                out += element_of(leaf.tag, leaf.vr, _encoded(exchanged))
        elif leaf.tag == _VALUE_TYPE:  # it was looked at, so pydicom writes it anew
            out += element_of(leaf.tag, leaf.vr, _value_type(leaf).encode("ascii"))
        else:
            out += leaf.raw
    return bytes(out)


def _may_leave(elements: Items, charset: str) -> bool:
    """As :func:`dicomnode.deidentify._may_leave`."""
    kind = next((e for e in elements if e.tag == _VALUE_TYPE), None)
    if kind is None:
        return True
    name = _value_type(kind)
    if name in DROPPED_VALUE_TYPES:
        return False
    if name != "TEXT":
        return True
    concepts = next((e for e in elements if e.tag == _CONCEPT), None)
    if concepts is not None and concepts.vr != "SQ":
        raise NotPlain
    first = concepts.items[0] if concepts and concepts.items else ()
    return next((_text(e, charset) for e in first if e.tag in CODE_VALUE), "") in TEXT_CONCEPTS


def _value_type(leaf: Leaf) -> str:
    if leaf.vr != "CS":
        raise NotPlain
    return _plain(leaf.value, _VALUE_TYPES, "ascii")


def _plain(value: bytes, form: re.Pattern[str], charset: str) -> str:
    """Raises NotPlain for what pydicom might read otherwise."""
    try:
        text = value.decode(charset).rstrip("\0 ")
    except UnicodeDecodeError:
        raise NotPlain from None
    if not form.fullmatch(text):
        raise NotPlain
    return text


def _text(leaf: Leaf, charset: str) -> str:
    if leaf.vr not in FREE_TEXT:
        raise NotPlain
    return _plain(leaf.value, _TEXT if leaf.vr in _MULTI else _LINES, charset)


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise NotPlain from None


def joined(part10: bytes, elements: Mapping[int, bytes]) -> bytes:
    """A Part 10 file in Explicit VR Little Endian with further top-level ``elements``, each at its place."""
    at = _META_END + int(_LENGTH.unpack_from(part10, _META_END - 4)[0])  # PS3.10 7.1: group length of the meta header
    out, begin, left = [], 0, sorted(elements)
    while left and at < len(part10):
        group, element, vr, length = _HEAD.unpack_from(part10, at)
        while left and left[0] < group << 16 | element:
            out += [part10[begin:at], elements[left.pop(0)]]
            begin = at
        at += _HEAD.size + length
        if vr in _LONG or vr == b"UN":
            at += int(_LENGTH.unpack_from(part10, at)[0]) + _LENGTH.size
    return b"".join([*out, part10[begin:], *(elements[tag] for tag in left)])


def element_of(tag: int, vr: str, value: bytes, padding: bytes = b" ") -> bytes:
    if len(value) % 2:
        value += padding
    name = vr.encode("ascii")
    if name in _LONG:
        return _HEAD.pack(tag >> 16, tag & 0xFFFF, name, 0) + _LENGTH.pack(len(value)) + value
    if len(value) > _MOST_SHORT:
        raise NotPlain
    return _HEAD.pack(tag >> 16, tag & 0xFFFF, name, len(value)) + value
