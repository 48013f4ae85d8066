"""Pseudonyms for what leaves the building: keyed, always the same, and meaningless without key or mapping. Pure.

HMAC-SHA-256 under a key of this node. Whoever has no key can neither compute a pseudonym of a
known patient nor tell which of two nodes' patients are one.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Set
from datetime import date, timedelta
from hashlib import sha256

KEY_BYTES = 32
STANDARD_ROOT = "1.2.840.10008."
"""UIDs of the standard itself (classes, syntaxes, frames of atlases): they identify nobody."""

LONGEST_SHIFT_DAYS = 365
_DOTTED = re.compile(r"(?<!\d)(?<!\d\.)\d++(?:\.\d++){2,}+", re.ASCII)
_UID = re.compile(r"2\.25\.\d+|[012](?:\.\d+){3,}")
_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")
_DAY = re.compile(r"([12]\d{3})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII)
"""DA, PS3.5 6.2."""
_ISO_DATE = re.compile(r"(?<!\d)(\d{4})-(\d{2})-(\d{2})(?!\d)")


class Pseudonyms:
    """``key``: :data:`KEY_BYTES` random bytes. Raises ValueError for a shorter one."""

    def __init__(self, key: bytes) -> None:
        if len(key) < KEY_BYTES:
            raise ValueError("the key is too short")
        self._key = key

    def _digest(self, *parts: str) -> bytes:
        message = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
        return hmac.new(self._key, message, sha256).digest()

    def uid(self, uid: str) -> str:
        """UID under 2.25 (PS3.5 B.2); one of the standard, or an empty one, stays."""
        if not uid or uid.startswith(STANDARD_ROOT):
            return uid
        raw = bytearray(self._digest("uid", uid)[:16])
        raw[6] = (raw[6] & 0x0F) | 0x80  # RFC 9562 version 8
        raw[8] = (raw[8] & 0x3F) | 0x80
        return f"2.25.{int.from_bytes(raw, 'big')}"

    def patient(self, patient_id: str, issuer: str = "") -> str:
        """Patient ID and name of one patient: ``P`` and 20 letters or digits."""
        return "P" + base64.b32encode(self._digest("patient", issuer, patient_id)).decode()[:20]

    def issuer(self, pseudonym: str, original: str) -> str | None:
        """The issuer of the patient whom a pseudonym stands for, of all that :func:`readings` of the original tell.

        None where this key makes that pseudonym of none of them.
        """
        return next((i for number, i in readings(original) if self.patient(number, i) == pseudonym), None)

    def record(self, kind: str, name: str) -> str:
        return base64.b32encode(self._digest("record", kind, name)).decode()[:32].lower()

    def days(self, patient_id: str, issuer: str = "") -> int:
        """By how much all dates of one patient are earlier than they were: 1 to 365 days; intervals stay."""
        number = int.from_bytes(self._digest("days", issuer, patient_id)[:8], "big")
        return 1 + number % LONGEST_SHIFT_DAYS

    def text(self, text: str, days: int, known: Set[str] = frozenset()) -> str:
        """Free text with its UIDs exchanged and its ISO dates shifted.

        ``known``: UIDs that are exchanged whatever they look like. Of the others, numbers of three
        parts that are not under 2.25 (versions) stay, and those of four that could be an IP address.
        """

        def exchanged(found: re.Match[str]) -> str:
            number = found[0]
            if number in known or (_UID.fullmatch(number) and not _ADDRESS.fullmatch(number)):
                return self.uid(number)
            return number

        return _ISO_DATE.sub(lambda m: _iso(m[0], days), _DOTTED.sub(exchanged, text))


def readings(original: str) -> list[tuple[str, str]]:
    """Patient ID and issuer that ``ID`` or ``ID^ISSUER`` may mean: either may hold a ^ itself."""
    parts = original.split("^")
    return [(original, ""), *(("^".join(parts[:n]), "^".join(parts[n:])) for n in range(1, len(parts)))]


def shifted(value: str, days: int) -> str:
    """DA or DT (PS3.5 6.2) so many days earlier; what has no whole date becomes empty."""
    head, rest = value[:8], value[8:]
    try:
        moment = date(int(head[:4]), int(head[4:6]), int(head[6:8])) - timedelta(days=days)
    except (ValueError, OverflowError):
        return ""
    return moment.strftime("%Y%m%d") + rest if head.isdigit() else ""


def _iso(text: str, days: int) -> str:
    moved = shifted(text.replace("-", ""), days)
    return f"{moved[:4]}-{moved[4:6]}-{moved[6:]}" if moved else ""


def traces(*values: str) -> re.Pattern[str] | None:
    """What would give a patient away in free text: names and numbers, as whole words without regard to case.

    ``values``: names by their components, identifiers, dates. Words of fewer than three ASCII
    characters are too common; of other scripts two characters count, wherever they stand. A date counts as
    people write it in numbers, too.
    """
    words: set[str] = set()
    for value in values:
        for part in {value, *re.split(r"[\^=\s,]+", value)}:
            word = part.strip()
            if len(word) >= (3 if word.isascii() else 2):
                words.add(word)
    if not words:
        return None
    some = sorted(words, key=lambda w: (-len(w), w))
    parts = [rf"(?<!\w){re.escape(w)}(?!\w)" if w.isascii() else re.escape(w) for w in some]
    parts += [_written(*found.groups()) for w in some if (found := _DAY.fullmatch(w))]
    return re.compile("|".join(parts), re.IGNORECASE)


def _written(year: str, month: str, day: str) -> str:
    """A day with its year first, or last and then of two digits, too; month first or second; also as in Chinese."""
    m, d, gap = f"0?{int(month)}", f"0?{int(day)}", r"\s?[./-]\s?"
    end = r"(?!\w|\.\d)"
    last = rf"(?:{d}{gap}{m}|{m}{gap}{d}){gap}(?:{year}|{year[2:]}){end}"
    first = rf"{year}{gap}{m}{gap}{d}{end}|{year}\s?年\s?{m}\s?月\s?{d}(?!\d)(?:\s?日)?"
    return rf"(?<!\w)(?<!\d\.)(?:{last}|{first})"
