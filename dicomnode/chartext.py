"""Text of encoded values: character sets (PS3.3 C.12.1.1.2, PS3.5 6.1) and value representations. Pure."""

from __future__ import annotations

import re
import struct
import warnings
from functools import lru_cache

from pydicom import charset
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

PLAIN: tuple[str, ...] = ("iso8859",)
"""Of a data set that declares none; what is not ASCII in it is read as Latin-1."""

_TEXT_VRS = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})
_ONE_VALUE_VRS = frozenset({"ST", "LT", "UT"})
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_STRUCTS = {
    (vr, big): struct.Struct((">" if big else "<") + code) for vr, code in _NUMBERS.items() for big in (False, True)
}


def is_plain(vr: str) -> bool:
    """Whether a value that is ASCII becomes text by removing the padding of each of its parts."""
    return vr not in _NUMBERS and vr not in _ONE_VALUE_VRS and vr not in ("PN", "SQ")


def text_of(value: bytes, vr: str, encodings: tuple[str, ...], *, big: bool = False) -> str:
    """Decoded text of one value, multiple values joined by a backslash, padding removed; none for a sequence."""
    if vr in _NUMBERS:
        number = _STRUCTS[vr, big]
        if len(value) < 2 * number.size:
            return str(number.unpack_from(value)[0]) if len(value) >= number.size else ""
        whole = len(value) - len(value) % number.size
        return "\\".join([str(n) for (n,) in number.iter_unpack(value[:whole])])
    if vr == "SQ":
        return ""
    if vr not in _TEXT_VRS:
        text = value.decode("ascii", "replace")
    elif b"\x1b" not in value:
        text = value.decode(encodings[0], "replace")
    else:
        text = _extended(value, encodings, PN_DELIMS if vr == "PN" else TEXT_VR_DELIMS)
    if vr in _ONE_VALUE_VRS:
        return text.rstrip(" \0")
    if "\\" in text:
        parts = [part.strip(" \0") for part in text.split("\\")]
        if vr == "PN":  # trailing component groups that are empty may be left out (PS3.5 6.2.1)
            parts = [part.rstrip("=") for part in parts]
        return "\\".join(parts)
    text = text.strip(" \0")
    return text.rstrip("=") if vr == "PN" else text


def _extended(value: bytes, encodings: tuple[str, ...], delimiters: set[int]) -> str:
    """Text with code extensions (ISO 2022, an escape in the value); what does not decode becomes U+FFFD.

    Only these need pydicom, which warns about undecodable bytes: those are the sender's, and
    the bytes stay as they came.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(charset.decode_bytes(value, encodings, delimiters))


_LATER_TERMS = {"ISO_IR 203": "iso8859_15", "ISO 2022 IR 203": "iso8859_15"}
"""Latin-9, which the standard took up after pydicom's table was made."""
_TERMS: dict[str, str] = {**charset.python_encoding, **_LATER_TERMS}
_MISSPELT = {"UTF-8": "ISO_IR 192", "UTF8": "ISO_IR 192", "ISO-8859-1": "ISO_IR 100", "ISO8859-1": "ISO_IR 100"}
_PARTS = re.compile(r"ISO[ _-]?(2022[ _-])?IR[ _-]?([0-9]{1,3})")
_UNKNOWN = "ascii"


@lru_cache(maxsize=1000)
def charset_encodings(declared: bytes) -> tuple[str, ...]:
    """Python encodings of a Specific Character Set value; never raises.

    Only defined terms count (PS3.3 C.12.1.1.2), in any case and with the separators that are
    often mistaken (ISO-IR 100), and the usual names of UTF-8 and Latin-1. Any other term stands
    for the default repertoire, in which what is not ASCII becomes U+FFFD: guessing would show a
    name that nobody has, and names that Python gives to its codecs (hex, idna, utf-7) are a
    peer's way to run one.
    """
    names = [_term(v) for v in declared.decode("ascii", "replace").split("\\")]
    first, *others = names
    if first in charset.STAND_ALONE_ENCODINGS:
        return (_TERMS[first],)
    further = [n for n in others if n in _TERMS and n not in charset.STAND_ALONE_ENCODINGS]
    return (_TERMS.get(first, _UNKNOWN), *(_TERMS[n] for n in further))


def _term(value: str) -> str:
    text = value.strip(" \0\t\r\n").upper()
    text = _MISSPELT.get(text, text)
    parts = _PARTS.fullmatch(text)
    if parts is None:
        return text
    return f"ISO 2022 IR {parts[2]}" if parts[1] else f"ISO_IR {parts[2]}"
