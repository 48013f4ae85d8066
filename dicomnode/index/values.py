"""One key of a query against one stored attribute (PS3.4 C.2.2.2), and the same as SQL. Pure.

The SQL is a necessary condition that can use an index; the predicate decides. Values of a
query only ever become parameters.

Decisions where the standard leaves room: ``*`` alone is universal for every VR; several
values in a query key match when one of them does, as does any value of a stored attribute;
a date or time of less precision stands for all that it covers.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from pydicom.datadict import dictionary_VM, dictionary_VR

from dicomnode.index.names import longest_literal, next_prefix, person, person_condition, wild

Condition = tuple[str, tuple[object, ...]]

WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
ONE_VALUE_VRS = frozenset({"LT", "ST", "UR", "UT"})
TIME_VRS = frozenset({"DA", "TM", "DT"})
NUMBER_VRS = frozenset({"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"})


@lru_cache(maxsize=1000)
def vr_of(keyword: str) -> str:
    return str(dictionary_VR(keyword))[:2]


@lru_cache(maxsize=1000)
def is_single(keyword: str) -> bool:
    """Whether an attribute has one value (PS3.6), so that a backslash in it separates nothing."""
    return str(dictionary_VM(keyword)) == "1"


def is_universal(query: str) -> bool:
    """Zero length or ``*`` alone (C.2.2.2.3, C.2.2.2.4)."""
    return query.strip(" ") in ("", "*")


def matches(vr: str, query: str, stored: str, *, single: bool = False) -> bool:
    """Whether a stored attribute (values joined by a backslash, unless ``single``) matches a key of the query."""
    if is_universal(query):
        return True
    if not stored:
        return False
    wanted = [query] if vr in ONE_VALUE_VRS else [q.strip(" ") for q in query.split("\\")]
    parts = [stored] if single else stored.split("\\")
    values = [stored] if vr in ONE_VALUE_VRS else [s.strip(" ") for s in parts]
    return any(_one(vr, q, s) for q in wanted if q for s in values if s)


def _one(vr: str, query: str, stored: str) -> bool:
    if vr == "PN":
        return person(query, stored)
    if vr in WILDCARD_VRS:
        return wild(query, stored)
    if vr in TIME_VRS:
        return _in_range(vr, query, stored)
    if vr in NUMBER_VRS:
        return _number(query) == _number(stored)
    return query == stored


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_PUNCTUATION = {"DA": ".", "TM": ":", "DT": ""}
_SHAPES = {
    "DA": re.compile(r"\d{8}", re.ASCII),
    "TM": re.compile(r"(?:\d\d){1,3}|\d{6}\.\d{1,6}", re.ASCII),
    "DT": re.compile(r"\d{4}|\d{6}|\d{8}|\d{10}|\d{12}|\d{14}|\d{14}\.\d{1,6}", re.ASCII),
}
MAX_MOMENT = 26
"""Characters of the longest date and time, a DT with all its parts (PS3.5 6.2)."""
LOWEST = {"DA": "00000000", "TM": "000000.000000", "DT": "00000101000000.000000"}
HIGHEST = {"DA": "99999999", "TM": "235960.999999", "DT": "99991231235960.999999"}


def span(vr: str, text: str) -> tuple[str, str] | None:
    """First and last moment that a DA, TM or DT stands for, in full precision; None when it is none."""
    text = text.strip(" ")
    return _span(vr, text) if len(text) <= MAX_MOMENT else None


@lru_cache(maxsize=4096)
def _span(vr: str, text: str) -> tuple[str, str] | None:
    if vr == "DT":
        text = re.sub(r"[+&-]\d{4}$", "", text) if len(text) > 8 else text
    if _PUNCTUATION[vr]:
        text = text.replace(_PUNCTUATION[vr], "")
    if vr == "TM" and re.fullmatch(r"\d{6}\.", text):
        text = text[:-1]
    if not _SHAPES[vr].fullmatch(text):
        return None
    low, high = LOWEST[vr], HIGHEST[vr]
    if vr == "TM" and len(text) == 6:
        return text + low[6:], text + high[6:]
    return text + low[len(text) :], text + high[len(text) :]


@lru_cache(maxsize=256)
def bounds(vr: str, query: str) -> tuple[str, str] | None:
    """Lowest and highest moment that a query key allows (C.2.2.2.5); None when it is no date or time."""
    if "-" not in query:
        return span(vr, query)
    first, _, last = query.partition("-")
    low = span(vr, first) if first.strip(" ") else (LOWEST[vr], "")
    high = span(vr, last) if last.strip(" ") else ("", HIGHEST[vr])
    if low is None or high is None or not query.strip(" -"):
        return None
    return low[0], high[1]


def _in_range(vr: str, query: str, stored: str) -> bool:
    allowed, moment = bounds(vr, query), span(vr, stored)
    if allowed is None or moment is None:
        return query == stored
    return allowed[0] <= moment[0] <= allowed[1]


# The same as SQL: never narrower than the predicate.


def condition(expression: str, vr: str, query: str, *, single: bool = False) -> Condition:
    """A condition that every match meets, on the column ``expression`` (ours, never the peer's).

    Of a ``single`` attribute, which the index holds without padding, it can use an index.
    """
    filled: Condition = (f"{expression} <> ''", ())
    if vr == "UI" and (single or not expression.startswith("(")):  # else computed from several rows: several values
        return _one_of(expression, [q.strip(" ") for q in query.split("\\") if q.strip(" ")])
    if "\\" in query and vr not in ONE_VALUE_VRS:
        values = [q.strip(" ") for q in query.split("\\") if q.strip(" ")]
        exact = single and vr in WILDCARD_VRS and vr != "PN" and not any(c in q for q in values for c in "*?")
        return _one_of(expression, values) if exact else filled
    if vr == "PN":
        return person_condition(expression, query)
    if vr == "DA":
        return date_condition(expression, bounds("DA", query))
    if vr in WILDCARD_VRS:
        return _text_condition(expression, query if vr in ONE_VALUE_VRS else query.strip(" "), single=single)
    return filled


def _one_of(expression: str, values: list[str]) -> Condition:
    if len(values) == 1:
        return f"{expression} = ?", (values[0],)
    return f"{expression} IN (SELECT value FROM json_each(?))", (json.dumps(values),)


def date_condition(expression: str, allowed: tuple[str, str] | None) -> Condition:
    """Dates of another shape than YYYYMMDD are left to the predicate; an index has them apart (schema, m0005)."""
    if allowed is None:
        return f"{expression} <> ''", ()
    # The comparison with '' says nothing new; it lets SQLite search the partial index instead of all rows.
    odd = f"{expression} > '' AND length({expression}) NOT IN (0, 8)"
    return f"({expression} BETWEEN ? AND ? OR {odd})", allowed


def _text_condition(expression: str, query: str, *, single: bool) -> Condition:
    if single and "*" not in query and "?" not in query:
        return f"{expression} = ?", (query,)
    prefix = re.split(r"[*?]", query, maxsplit=1)[0]
    if single and prefix:
        above = next_prefix(prefix)
        found: Condition = (f"{expression} >= ?", (prefix,))
        return found if above is None else (f"{found[0]} AND {expression} < ?", (prefix, above))
    chunk = longest_literal(query, "*?", " ")
    return (f"instr({expression}, ?) > 0", (chunk,)) if chunk else (f"{expression} <> ''", ())
