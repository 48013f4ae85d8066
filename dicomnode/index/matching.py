"""Matching as PS3.4 C.2.2.2 has it: an identifier becomes SQL with parameters and a predicate. Pure.

The SQL is a necessary condition that can use the index; the predicate on each row decides.
Values of a query only ever become parameters.

Decisions where the standard leaves room: ``*`` alone is universal for every VR; several
values in a query key match when one of them does, as does any value of a stored attribute;
a date or time of less precision stands for all that it covers; a person name with one
component group matches any stored group.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicomnode.index.keys import HEADER_KEYS, INSTANCE_KEYS, PATIENT_KEYS, SERIES_KEYS, STUDY_KEYS

Row = dict[str, Any]
Condition = tuple[str, tuple[Any, ...]]

WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
ONE_VALUE_VRS = frozenset({"LT", "ST", "UR", "UT"})
TIME_VRS = frozenset({"DA", "TM", "DT"})
NUMBER_VRS = frozenset({"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"})
MAX_KEYS = 64
"""Keys with a value in one query; real ones have ten."""
MAX_VALUE = 1024
"""Characters of one value; UID lists may be longer."""


class Level(StrEnum):
    """Query/Retrieve Level (0008,0052)."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class Root(StrEnum):
    PATIENT = "PATIENT"
    STUDY = "STUDY"


LEVELS: Mapping[Root, tuple[Level, ...]] = {
    Root.PATIENT: (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE),
    Root.STUDY: (Level.STUDY, Level.SERIES, Level.IMAGE),
}
UNIQUE_KEYS: Mapping[Level, str] = {
    Level.PATIENT: "PatientID",
    Level.STUDY: "StudyInstanceUID",
    Level.SERIES: "SeriesInstanceUID",
    Level.IMAGE: "SOPInstanceUID",
}


class IdentifierError(Exception):
    """Identifier does not match SOP class (0xA900). The text names keywords, never values."""


@dataclass(frozen=True, slots=True)
class Identifier:
    """A decoded query: keyword -> text for known keywords (empty: asked for), tags of the rest with their VR."""

    values: Mapping[str, str]
    unknown: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A statement whose rows, where ``predicate`` holds, are the matches.

    ``returned`` are the keywords to answer with; ``empty`` the (tag, VR) of keys that were asked
    for and are not supported at this level.
    """

    level: Level
    sql: str
    parameters: tuple[Any, ...]
    predicate: Callable[[Row], bool]
    returned: tuple[str, ...] = ()
    empty: tuple[tuple[int, str], ...] = field(default=())


# One value against one stored attribute.


def vr_of(keyword: str) -> str:
    return str(dictionary_VR(keyword))[:2]


def is_universal(query: str) -> bool:
    """Zero length or ``*`` alone (C.2.2.2.3, C.2.2.2.4)."""
    return query.strip(" ") in ("", "*")


def matches(vr: str, query: str, stored: str) -> bool:
    """Whether a stored attribute (values joined by a backslash) matches a key of the query."""
    if is_universal(query):
        return True
    if not stored:
        return False
    wanted = [query] if vr in ONE_VALUE_VRS else [q.strip(" ") for q in query.split("\\")]
    values = [stored] if vr in ONE_VALUE_VRS else [s.strip(" ") for s in stored.split("\\")]
    return any(_one(vr, q, s) for q in wanted if q for s in values if s)


def _one(vr: str, query: str, stored: str) -> bool:
    if vr == "PN":
        return _person(query, stored)
    if vr in WILDCARD_VRS:
        return _wild(query, stored)
    if vr in TIME_VRS:
        return _in_range(vr, query, stored)
    if vr in NUMBER_VRS:
        return _number(query) == _number(stored)
    return query == stored


def _wild(query: str, stored: str) -> bool:
    """``*`` is any run of characters, ``?`` any one (C.2.2.2.4); linear in time, unlike a regular expression."""
    if "*" not in query:
        return len(query) == len(stored) and all(q in ("?", s) for q, s in zip(query, stored, strict=True))
    parts = query.split("*")
    first, last = parts[0], parts[-1]
    if len(stored) < len(first) + len(last) or not _wild(first, stored[: len(first)]):
        return False
    end = len(stored) - len(last)
    if not _wild(last, stored[end:]):
        return False
    position = len(first)
    for part in parts[1:-1]:
        found = _find(part, stored, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _find(part: str, stored: str, position: int, end: int) -> int:
    """First place of ``part`` (which may hold ``?``) in stored[position:end], or -1."""
    if "?" not in part:
        return stored.find(part, position, end)
    return next((i for i in range(position, end - len(part) + 1) if _wild(part, stored[i : i + len(part)])), -1)


def fold(text: str) -> str:
    """Person names are compared without case (PS3.4 C.2.2.2.1)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _person(query: str, stored: str) -> bool:
    groups = [g.rstrip("^ ") for g in fold(query).rstrip("= ").split("=")]
    names = [g.rstrip("^ ") for g in fold(stored).rstrip("= ").split("=")]
    if len(groups) == 1:
        return any(_group(groups[0], name) for name in names if name)
    names += [""] * (len(groups) - len(names))
    return all(not g or (n and _group(g, n)) for g, n in zip(groups, names, strict=False))


def _group(query: str, name: str) -> bool:
    """One component group; ``Smith^*`` also finds a name that has no given name."""
    return _wild(query, name) or (query.endswith("*") and _wild(query, name + "^" * (4 - name.count("^"))))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_PUNCTUATION = {"DA": ".", "TM": ":", "DT": ""}
_SHAPES = {
    "DA": re.compile(r"\d{8}"),
    "TM": re.compile(r"(?:\d\d){1,3}|\d{6}\.\d{1,6}"),
    "DT": re.compile(r"\d{4}|\d{6}|\d{8}|\d{10}|\d{12}|\d{14}|\d{14}\.\d{1,6}"),
}
_LOWEST = {"DA": "00000000", "TM": "000000.000000", "DT": "00000101000000.000000"}
_HIGHEST = {"DA": "99999999", "TM": "235960.999999", "DT": "99991231235960.999999"}


def _span(vr: str, text: str) -> tuple[str, str] | None:
    """First and last moment that a DA, TM or DT stands for, in full precision; None when it is none."""
    text = text.strip(" ")
    if vr == "DT":
        text = re.sub(r"[+&-]\d{4}$", "", text) if len(text) > 8 else text
    if _PUNCTUATION[vr]:
        text = text.replace(_PUNCTUATION[vr], "")
    if vr == "TM" and re.fullmatch(r"\d{6}\.", text):
        text = text[:-1]
    if not _SHAPES[vr].fullmatch(text):
        return None
    low, high = _LOWEST[vr], _HIGHEST[vr]
    if vr == "TM" and len(text) == 6:
        return text + low[6:], text + high[6:]
    return text + low[len(text) :], text + high[len(text) :]


@lru_cache(maxsize=256)
def _bounds(vr: str, query: str) -> tuple[str, str] | None:
    """Lowest and highest moment that a query key allows (C.2.2.2.5); None when it is no date or time."""
    if "-" not in query:
        return _span(vr, query)
    first, _, last = query.partition("-")
    low = _span(vr, first) if first.strip(" ") else (_LOWEST[vr], "")
    high = _span(vr, last) if last.strip(" ") else ("", _HIGHEST[vr])
    if low is None or high is None or not query.strip(" -"):
        return None
    return low[0], high[1]


def _in_range(vr: str, query: str, stored: str) -> bool:
    bounds, moment = _bounds(vr, query), _span(vr, stored)
    if bounds is None or moment is None:
        return query == stored
    return bounds[0] <= moment[0] <= bounds[1]


# The same as SQL: never narrower than the predicate.


def condition(expression: str, vr: str, query: str) -> Condition | None:
    """A condition that every match meets, on the column ``expression`` (ours, never the peer's)."""
    filled = (f"{expression} <> ''", ())
    if "\\" in query and vr not in ONE_VALUE_VRS and vr != "UI":
        return filled
    if vr == "UI" and expression.startswith("("):  # computed from several rows: several values
        return filled
    if vr == "UI":
        wanted = json.dumps([q.strip(" ") for q in query.split("\\") if q.strip(" ")])
        return f"{expression} IN (SELECT value FROM json_each(?))", (wanted,)
    if vr == "PN":
        return _person_condition(expression, query)
    if vr == "DA":
        bounds = _bounds("DA", query)
        if bounds is None:
            return filled
        return f"({expression} BETWEEN ? AND ? OR length({expression}) <> 8)", bounds
    if vr in WILDCARD_VRS:
        chunk = max((part.strip(" ") for part in re.split(r"[*?]", query)), key=len)
        return (f"instr({expression}, ?) > 0", (chunk,)) if chunk else filled
    return filled


def _longest_literal(pattern: str) -> str:
    """The longest run without wildcards: every match holds it, and looking for it takes linear time."""
    return max((chunk.strip(" ^") for chunk in re.split(r"[*?=]", pattern)), key=len)


def _person_condition(expression: str, query: str) -> Condition:
    """LIKE folds case in ASCII alone, so rows with other characters are left to the predicate."""
    folded = fold(query)
    chunk = _longest_literal(folded)
    if not folded.isascii() or not chunk:
        return f"{expression} <> ''", ()
    escaped = "".join("!" + c if c in "!%_" else c for c in chunk)
    return f"({expression} LIKE ? ESCAPE '!' OR {expression} GLOB '*[^ -~]*')", (f"%{escaped}%",)


# Levels, columns, statements.

_FROM = {
    Level.PATIENT: "patients p",
    Level.STUDY: "studies st JOIN patients p ON p.id = st.patient_id",
    Level.SERIES: "series se JOIN studies st ON st.id = se.study_id JOIN patients p ON p.id = st.patient_id",
    Level.IMAGE: "instances i JOIN series se ON se.id = i.series_id JOIN studies st ON st.id = se.study_id"
    " JOIN patients p ON p.id = st.patient_id",
}


def _distinct(column: str, source: str) -> str:
    return (
        f"(SELECT coalesce((SELECT group_concat(v, '\\') FROM (SELECT DISTINCT {column} AS v FROM {source}"
        f" AND {column} <> '' ORDER BY 1)), ''))"
    )


def _count(source: str) -> str:
    return f"(SELECT count(*) FROM {source})"


_OF_STUDY = "series x JOIN instances y ON y.series_id = x.id WHERE x.study_id = st.id"
_OF_PATIENT = "studies w JOIN series x ON x.study_id = w.id"
_COMPUTED: Mapping[Level, Mapping[str, str]] = {
    Level.PATIENT: {
        "NumberOfPatientRelatedStudies": _count("studies w WHERE w.patient_id = p.id"),
        "NumberOfPatientRelatedSeries": _count(f"{_OF_PATIENT} WHERE w.patient_id = p.id"),
        "NumberOfPatientRelatedInstances": _count(
            f"{_OF_PATIENT} JOIN instances y ON y.series_id = x.id WHERE w.patient_id = p.id"
        ),
    },
    Level.STUDY: {
        "ModalitiesInStudy": _distinct("Modality", "series WHERE study_id = st.id"),
        "SOPClassesInStudy": _distinct("y.SOPClassUID", _OF_STUDY),
        "NumberOfStudyRelatedSeries": _count("series x WHERE x.study_id = st.id"),
        "NumberOfStudyRelatedInstances": _count(_OF_STUDY),
    },
    Level.SERIES: {"NumberOfSeriesRelatedInstances": _count("instances y WHERE y.series_id = se.id")},
    Level.IMAGE: {},
}

CONTEXT_KEYS = frozenset({"QueryRetrieveLevel", "SpecificCharacterSet", "RetrieveAETitle", "InstanceAvailability"})
"""Not matched: they frame the query, or say the same for every answer."""

_NOT_MATCHED = CONTEXT_KEYS | {"TimezoneOffsetFromUTC"}


@lru_cache
def columns(level: Level) -> Mapping[str, str]:
    """Keyword -> SQL expression of what can be asked for at a level: its own keys and those above."""
    depth = LEVELS[Root.PATIENT].index(level)
    found = {k: f'p."{k}"' for k in PATIENT_KEYS}
    if depth >= 1:
        found |= {k: f'st."{k}"' for k in STUDY_KEYS} | {"PatientName": 'st."PatientName"'}
    if depth >= 2:
        found |= {k: f'se."{k}"' for k in SERIES_KEYS}
    if depth >= 3:
        found |= {k: f'i."{k}"' for k in INSTANCE_KEYS}
        further = set(HEADER_KEYS) - set(found) - CONTEXT_KEYS
        found |= {k: f"coalesce(json_extract(i.attributes, '$.{k}'), '')" for k in sorted(further)}
    for above in LEVELS[Root.PATIENT][: depth + 1]:
        found |= _COMPUTED[above]
    return found


KNOWN_KEYS = tuple(sorted({*HEADER_KEYS, *CONTEXT_KEYS, *columns(Level.IMAGE), *_COMPUTED[Level.STUDY]}))
"""Keywords that a query is read for."""


def level_of(root: Root, identifier: Identifier) -> Level:
    """Raises IdentifierError for a level that the root does not have (PATIENT on Study Root)."""
    text = identifier.values.get("QueryRetrieveLevel", "").strip(" ")
    level = next((one for one in LEVELS[root] if one.value == text), None)
    if level is None:
        raise IdentifierError("QueryRetrieveLevel is missing or not one of this information model")
    return level


def _check_above(root: Root, level: Level, identifier: Identifier, relational: bool) -> None:
    """Hierarchical queries name one entity at each level above (C.4.1.2.1)."""
    if relational:
        return
    for above in LEVELS[root][: LEVELS[root].index(level)]:
        key = UNIQUE_KEYS[above]
        value = identifier.values.get(key, "")
        if is_universal(value) or "\\" in value or (above is Level.PATIENT and any(c in value for c in "*?")):
            raise IdentifierError(f"{key} must have one value at this level")


def plan_find(root: Root, identifier: Identifier, *, relational: bool = False) -> Plan:
    """C-FIND. Raises IdentifierError."""
    level = level_of(root, identifier)
    _check_above(root, level, identifier, relational)
    known = columns(level)
    keys = {k: v for k, v in identifier.values.items() if k in known}
    wanted = {k: v for k, v in keys.items() if k not in _NOT_MATCHED and not is_universal(v)}
    if len(wanted) > MAX_KEYS:
        raise IdentifierError("too many keys have a value")
    if any(len(v) > MAX_VALUE for k, v in wanted.items() if vr_of(k) != "UI"):
        raise IdentifierError("the value of a key is too long")
    conditions: list[Condition] = []
    for keyword, value in wanted.items():
        found = condition(known[keyword], vr_of(keyword), value)
        if found is not None:
            conditions.append(found)
    checks = tuple((keyword, vr_of(keyword), value) for keyword, value in wanted.items())
    returned = tuple(dict.fromkeys([*keys, *_unique_keys(root, level)]))
    select = ", ".join(f'{known[k]} AS "{k}"' for k in returned)
    missing = sorted(set(identifier.values) - set(known) - CONTEXT_KEYS)
    empty = (*identifier.unknown, *((int(tag_for_keyword(k) or 0), vr_of(k)) for k in missing))
    return Plan(
        level,
        f"SELECT {select} FROM {_FROM[level]}{_where(conditions)}",
        tuple(p for _, parameters in conditions for p in parameters),
        lambda row: all(matches(vr, value, str(row[keyword] or "")) for keyword, vr, value in checks),
        returned,
        tuple(sorted(empty)),
    )


def plan_retrieve(root: Root, identifier: Identifier, *, relational: bool = False) -> Plan:
    """C-MOVE and C-GET: instances by unique keys alone. Raises IdentifierError.

    An empty unique key never means everything; a UID list is allowed at the level itself.
    """
    level = level_of(root, identifier)
    _check_above(root, level, identifier, relational)
    above = LEVELS[root][: LEVELS[root].index(level)]
    conditions: list[Condition] = []
    for one in (*above, level):
        key = UNIQUE_KEYS[one]
        value = identifier.values.get(key, "")
        if is_universal(value):
            if one is level:
                raise IdentifierError(f"{key} is empty")
            continue
        conditions.append(_unique_condition(key, value))
    issuer = identifier.values.get("IssuerOfPatientID", "")
    if level is Level.PATIENT and not is_universal(issuer):
        conditions.append(('p."IssuerOfPatientID" = ?', (issuer,)))
    return Plan(
        level,
        "SELECT i.SOPClassUID, i.SOPInstanceUID, i.TransferSyntaxUID, i.file, i.size"
        f" FROM {_FROM[Level.IMAGE]}{_where(conditions)} ORDER BY st.id, se.id, i.id",
        tuple(p for _, parameters in conditions for p in parameters),
        lambda _row: True,
    )


def _unique_condition(key: str, value: str) -> Condition:
    expression = columns(Level.IMAGE)[key]
    if key == "PatientID":
        if "\\" in value:
            raise IdentifierError(f"{key} must have one value")
        return f"{expression} = ?", (value,)
    uids = [uid.strip(" ") for uid in value.split("\\")]
    if not all(re.fullmatch(r"[0-9.]{1,64}", uid) for uid in uids):
        raise IdentifierError(f"{key} holds something that is no UID")
    return f"{expression} IN (SELECT value FROM json_each(?))", (json.dumps(uids),)


def _unique_keys(root: Root, level: Level) -> Sequence[str]:
    return [UNIQUE_KEYS[one] for one in LEVELS[root][: LEVELS[root].index(level) + 1]]


def _where(conditions: Sequence[Condition]) -> str:
    return " WHERE " + " AND ".join(c for c, _ in conditions) if conditions else ""
