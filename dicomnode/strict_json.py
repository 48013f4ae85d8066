"""JSON from somebody else, read so that whatever is wrong with one value can be told of that value alone. Pure.

``json`` of the standard library takes some of what RFC 8259 leaves open (a name twice, NaN), and refuses a
whole text for other things (a number of 5,000 digits, one byte that is no UTF-8). Here such a value is
marked instead, and :func:`unfit` says why it cannot be kept. Only what is nested beyond the recursion limit
(about 1,000), holds more values than there is memory for, or is no JSON at all is refused as a whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

MOST_DEPTH = 32  # config/cloud-api.yaml, also of what follows
MOST_DIGITS = 300
MOST_VALUES = 1 << 19
"""In one text. A record within its limits has half as many at most (256 KiB of data, 256 KiB of ``settled``), and
10,000 ordinary ones have fewer. An empty object of three bytes takes 70 as a value, one with a name 240: 64 MiB of
them took 1.9 GB."""

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)
"""A text, or the beginning of what may hold a value. Whatever the bytes are, each is looked at once."""


class Twice(dict[str, Any]):
    """An object in which a name occurs twice: readers differ in which of the values they take."""


class Long(int):
    """Stands for a whole number of more than MOST_DIGITS digits; beyond every limit."""


def read(body: bytes, most_values: int = MOST_VALUES) -> Any:
    """The value. Bytes that are no UTF-8 become lone surrogates, which :func:`unfit` finds.

    Raises ValueError for what is no JSON, nested too deeply to be read, or of more than ``most_values`` values.
    """
    if many(body, most_values):
        raise ValueError(f"it holds more than {most_values} values")
    text = body.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg}") from None


def many(body: bytes, most: int) -> bool:
    """Whether a text holds more than ``most`` values, before any of them is made.

    Each value but the first follows a comma or the bracket that it is the first in.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) <= most:
        return False
    texts = others = 0
    for token in _TOKEN.finditer(body):  # those within texts do not count
        if body[token.start()] == 0x22:
            texts += 1
        else:
            others += 1
        if others > most or texts > 2 * most + 1:  # a name and a text to each comma, or it is no JSON
            return True
    return False


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(found)


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= MOST_DIGITS else Long(1 << 63)


def unfit(value: Any, most_bytes: int) -> str:
    """Why a value cannot be kept: too deep, too long, ambiguous, no Unicode, no number; empty when it can."""
    why = _marked(value)
    if why:
        return why
    size = size_of(value)
    if size == math.inf:
        return "a text in it is no Unicode, or a number is none (NaN, Infinity)"
    return f"it is longer than {most_bytes} bytes" if size > most_bytes else ""


def _marked(value: Any) -> str:
    """Level by level, without recursion; no value within more than MOST_DEPTH others."""
    level = [value]
    for depth in range(MOST_DEPTH + 1):
        if any(isinstance(one, Twice) for one in level):
            return "an object in it has a name twice"
        if any(isinstance(one, Long) for one in level):
            return f"a number in it has more than {MOST_DIGITS} digits"
        inner = [one for one in level if isinstance(one, dict | list)]
        if not inner:
            return ""
        if depth == MOST_DEPTH:
            return f"it is nested more than {MOST_DEPTH} deep"
        level = [v for one in inner for v in (one.values() if isinstance(one, dict) else one)]
    return ""


def size_of(value: Any) -> float:
    """Bytes as JSON; infinite for what is no Unicode or no number of JSON."""
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        return math.inf
