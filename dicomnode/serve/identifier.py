"""Identifiers of queries and answers as bytes (PS3.4 C.2, PS3.5 7). Pure.

Values are read by the same bounded reader and character-set rules as received objects, so a
query and the index agree. Answers are written without validation: what a modality sent wrong
is shown as it is.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterable, Mapping

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.filereader import data_element_generator

from dicomnode.errors import MalformedDataSet
from dicomnode.header import IMPLICIT_LITTLE, Wanted, read_header
from dicomnode.index.matching import KNOWN_KEYS, Identifier

MAX_IDENTIFIER = 4 * 1024 * 1024
"""Bytes of an identifier; a list of 65535 UIDs is 4 MiB."""

_WANTED = Wanted(KNOWN_KEYS)
_WANTED.last = 0xFFFFFFFF  # a query has no pixel data to stop at
_KEYWORDS = {tag: keyword for tag, (keyword, _) in _WANTED.by_tag.items()}
_LONG_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_MAX_SHORT = 65534


def parse_identifier(data: bytes, transfer_syntax_uid: str) -> Identifier:
    """Raises MalformedDataSet when the bytes are no data set within the limits."""
    if len(data) > MAX_IDENTIFIER:
        raise MalformedDataSet("read identifier", f"it has more than {MAX_IDENTIFIER} bytes")
    found = read_header(data, transfer_syntax_uid, _WANTED)  # checks structure and depth first
    values: dict[str, str] = {}
    unknown: list[tuple[int, str]] = []
    for tag, vr, raw in _elements(data, transfer_syntax_uid == IMPLICIT_LITTLE):
        keyword = _KEYWORDS.get(tag)
        if keyword is None:
            if tag & 0xFFFF and tag >> 16 != 0x0002:  # no group lengths
                unknown.append((tag, vr))
        elif vr == "UI":
            values[keyword] = raw.decode("ascii", "replace").strip(" \0")  # lists may be longer than a header value
        else:
            values[keyword] = found.get(keyword, "")
    return Identifier(values, tuple(unknown))


def _elements(data: bytes, implicit: bool) -> list[tuple[int, str, bytes]]:
    """Tag, VR and value of each top-level element; a sequence has no value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            elements = list(data_element_generator(io.BytesIO(data), implicit, True))
        except Exception as error:  # noqa: BLE001 whatever pydicom stumbles over, the peer sent it
            raise MalformedDataSet("read identifier", f"it cannot be read ({type(error).__name__})") from None
    return [
        (int(e.tag), str(e.VR or _vr(int(e.tag))), e.value if isinstance(e.value, bytes) else b"") for e in elements
    ]


def _vr(tag: int) -> str:
    try:
        return str(dictionary_VR(tag))[:2]
    except KeyError:
        return "UN"


def encode_identifier(
    values: Mapping[str, str], transfer_syntax_uid: str, empty: Iterable[tuple[int, str]] = ()
) -> bytes:
    """A data set of keywords with text, and zero-length elements of the given tags.

    Text that is not ASCII goes out in UTF-8 and is declared (ISO_IR 192).
    """
    values = dict(values)
    values.pop("SpecificCharacterSet", None)
    if not all(v.isascii() for v in values.values()):
        values["SpecificCharacterSet"] = "ISO_IR 192"
    elements = {tag: (vr, b"") for tag, vr in empty}
    for keyword, text in values.items():
        tag = int(tag_for_keyword(keyword) or 0)
        vr = str(dictionary_VR(tag))[:2]
        elements[tag] = (vr, _value(vr, text))
    implicit = transfer_syntax_uid == IMPLICIT_LITTLE
    return b"".join(_element(tag, *elements[tag], implicit=implicit) for tag in sorted(elements))


def _value(vr: str, text: str) -> bytes:
    if vr in _NUMBERS:
        try:
            convert = float if vr in ("FL", "FD") else int
            return b"".join(struct.pack("<" + _NUMBERS[vr], convert(v)) for v in text.split("\\") if v)
        except (ValueError, struct.error):
            return b""
    data = text.encode("utf-8", "replace")
    if len(data) > _MAX_SHORT and vr not in _LONG_VRS:
        data = data[: data.rfind(b"\\", 0, _MAX_SHORT)] if vr == "UI" else b""
    return data + (b"\0" if vr == "UI" else b" ") * (len(data) % 2)


def _element(tag: int, vr: str, value: bytes, *, implicit: bool) -> bytes:
    group, element = tag >> 16, tag & 0xFFFF
    if implicit:
        return struct.pack("<HHI", group, element, len(value)) + value
    if vr in _LONG_VRS:
        return struct.pack("<HH2sHI", group, element, vr.encode(), 0, len(value)) + value
    return struct.pack("<HH2sH", group, element, vr.encode(), len(value)) + value
