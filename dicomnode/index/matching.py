"""Queries and retrieves as statements: an identifier becomes SQL with parameters and a predicate. Pure.

The SQL is a necessary condition that can use the index; the predicate on each row decides
(:mod:`dicomnode.index.values` for one key, :mod:`dicomnode.index.names` for names,
:mod:`dicomnode.index.moments` for dates with their times). Values of a query only ever
become parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pydicom.datadict import tag_for_keyword

from dicomnode.index import moments
from dicomnode.index.columns import (
    CONTEXT_KEYS,
    FROM,
    KNOWN_KEYS,
    LEVELS,
    OWN_ZONES,
    UNIQUE_KEYS,
    ZONE_KEY,
    Level,
    Root,
    columns,
)
from dicomnode.index.corrections import NONE, Corrections
from dicomnode.index.keys import REQUIRED_KEYS, TIMES
from dicomnode.index.names import fuzzy_person, name_condition
from dicomnode.index.values import (
    Condition,
    bounds,
    condition,
    date_condition,
    is_single,
    is_universal,
    matches,
    vr_of,
)

__all__ = [
    "KNOWN_KEYS",
    "LEVELS",
    "UNIQUE_KEYS",
    "Identifier",
    "IdentifierError",
    "Level",
    "Options",
    "Plan",
    "Root",
    "Row",
    "columns",
    "condition",
    "is_universal",
    "level_of",
    "matches",
    "plan_find",
    "plan_retrieve",
]

Row = dict[str, Any]
Check = Callable[[Mapping[str, str]], bool]

MAX_KEYS = 64
"""Keys with a value in one query; real ones have ten."""
MAX_VALUE = 1024
"""Characters of one value; UID lists may be longer."""
_OWN_ZONE = "own zone"
"""Name of a column that is selected for adjustment alone; no keyword has a space."""
_OWNERS = {"patient row": "p.id", "study row": "st.id"}
"""The same for corrections: whose row it is."""
_MERGED = ("PatientID", "IssuerOfPatientID")


class IdentifierError(Exception):
    """Identifier does not match SOP class (0xA900). The text names keywords, never values."""


@dataclass(frozen=True, slots=True)
class Identifier:
    """A decoded query.

    ``values``: keyword -> text for known keywords (empty: asked for). ``items``: the same for
    the one item of a known sequence; without keys all of the sequence is asked for.
    ``unknown``: tags of the rest with their VR, a sequence also when one of its item keys is not known.
    """

    values: Mapping[str, str]
    unknown: tuple[tuple[int, str], ...] = ()
    items: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """Extended matching (PS3.4 C.5.1.1), each where it was negotiated, and one decision of the site.

    ``unknown``: a required key that is empty in the index matches any value (C.2.2.1.2).
    ``corrections``: what is matched and returned in place of what was received.
    """

    combined: bool = False
    fuzzy: bool = False
    timezone: bool = False
    unknown: bool = False
    local: moments.LocalOffset = moments.system_offset
    corrections: Corrections = NONE


def _as_texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {k: "" if v is None else str(v) for k, v in row.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """A statement whose rows, where ``predicate`` holds, are the matches; :meth:`answer` says what to return of one.

    ``returned`` are the keywords to answer with; ``unsupported`` the (tag, VR) of keys that
    were asked for and do not exist at this level: they are not returned (C.2.2.1.3).
    """

    level: Level
    sql: str
    parameters: tuple[Any, ...]
    predicate: Callable[[Row], bool]
    returned: tuple[str, ...] = ()
    unsupported: tuple[tuple[int, str], ...] = field(default=())
    adjust: Callable[[Row], dict[str, str]] = _as_texts
    items: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    corrected: bool = False

    def answer(self, row: Row) -> dict[str, str]:
        """Keyword -> text of one match; a sequence as JSON, a list with an object for each item."""
        texts = self.adjust(row)
        found = {keyword: texts[keyword] for keyword in self.returned}
        for keyword, wanted in self.items.items():
            found[keyword] = _matching_items(texts[keyword], wanted)
        if not found.get(ZONE_KEY):
            found.pop(ZONE_KEY, None)  # never with zero length (C.4.1.1.3.2)
        return found

    def answers(self, rows: Sequence[Row]) -> Iterator[dict[str, str]]:
        """Of all matches; patients who have one ID since a correction are one answer, with all that they have."""
        if self.level is not Level.PATIENT or not self.corrected:
            yield from map(self.answer, rows)
            return
        merged: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            texts, found = self.adjust(row), self.answer(row)
            first = merged.setdefault(tuple(texts[k] for k in _MERGED), found)
            if first is not found:
                for count in (k for k in found if k.startswith("NumberOfPatientRelated")):
                    first[count] = str(int(first[count]) + int(found[count]))
        yield from merged.values()


# Query

_NOT_MATCHED = CONTEXT_KEYS | {ZONE_KEY}
_MAY_BE_UNKNOWN = REQUIRED_KEYS - {"PatientID"}
"""Who a patient is is never guessed."""


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


def plan_find(root: Root, identifier: Identifier, *, relational: bool = False, options: Options | None = None) -> Plan:
    """C-FIND. Raises IdentifierError."""
    options = options or Options()
    level = level_of(root, identifier)
    _check_above(root, level, identifier, relational)
    known = columns(level)
    keys = {k: v for k, v in identifier.values.items() if k in known}
    whole: dict[str, Mapping[str, str]] = {k: {} for k in keys if vr_of(k) == "SQ"}
    items = whole | {k: v for k, v in identifier.items.items() if k in known}
    wanted = {k: v for k, v in keys.items() if k not in _NOT_MATCHED and k not in items and not is_universal(v)}
    _check_size(wanted, items)
    zone = _zone(identifier, options)
    match = _Matching(level, wanted, items, options, zone)
    returned = tuple(dict.fromkeys([*(k for k in keys if k not in items), *_unique_keys(root, level)]))
    selected = {k: known[k] for k in dict.fromkeys([*returned, *items, *match.needs])}
    if any(vr_of(k) in ("TM", "DT") for k in returned):
        returned = tuple(dict.fromkeys([*returned, ZONE_KEY]))
        selected.setdefault(ZONE_KEY, known[ZONE_KEY])
    adjust: Callable[[Row], dict[str, str]] = _as_texts
    if options.corrections:
        selected |= {name: column for name, column in _OWNERS.items() if level is not Level.PATIENT or "p." in column}
        selected |= {k: known[k] for k in _MERGED} if level is Level.PATIENT else {}
        adjust = _correction(options.corrections)
    if zone is not None:
        selected[_OWN_ZONE] = OWN_ZONES[level]
        adjust = _adjustment(adjust, zone, identifier.values[ZONE_KEY].strip(" "), options.local)
    checks, judged = match.checks(), tuple({*wanted, *items})
    whole_row = zone is not None or bool(options.corrections)

    def predicate(row: Row) -> bool:
        texts = adjust(row) if whole_row else _as_texts({k: row[k] for k in judged})
        return all(check(texts) for check in checks)

    conditions = match.conditions()
    missing = sorted((set(identifier.values) | set(identifier.items)) - set(known) - _NOT_MATCHED)
    unsupported = (*identifier.unknown, *((int(tag_for_keyword(k) or 0), vr_of(k)) for k in missing))
    return Plan(
        level,
        f"SELECT {_named(selected)} FROM {FROM[level]}{_where(conditions)}",
        tuple(p for _, parameters in conditions for p in parameters),
        predicate,
        returned,
        tuple(sorted(unsupported)),
        adjust,
        items,
        bool(options.corrections),
    )


def _named(selected: Mapping[str, str]) -> str:
    return ", ".join(f'{column} AS "{name}"' for name, column in selected.items())


def _check_size(wanted: Mapping[str, str], items: Mapping[str, Mapping[str, str]]) -> None:
    """Raises IdentifierError for more than a query can sensibly have."""
    pairs = [*wanted.items(), *(pair for item in items.values() for pair in item.items())]
    if len(pairs) > MAX_KEYS:
        raise IdentifierError("too many keys have a value")
    if any(len(v) > MAX_VALUE for k, v in pairs if vr_of(k) != "UI"):
        raise IdentifierError("the value of a key is too long")


def _zone(identifier: Identifier, options: Options) -> timedelta | None:
    """The zone that times of the query are in, where that was negotiated and is told."""
    text = identifier.values.get(ZONE_KEY, "").strip(" ") if options.timezone else ""
    if not text:
        return None
    zone = moments.parse_offset(text)
    if zone is None:
        raise IdentifierError(f"{ZONE_KEY} is no offset from UTC")
    return zone


def _adjustment(
    before: Callable[[Row], dict[str, str]], zone: timedelta, told: str, local: moments.LocalOffset
) -> Callable[[Row], dict[str, str]]:
    def adjust(row: Row) -> dict[str, str]:
        texts = moments.adjusted(before(row), _OWN_ZONE, zone, local)
        texts[ZONE_KEY] = told
        return texts

    return adjust


def _correction(corrections: Corrections) -> Callable[[Row], dict[str, str]]:
    def adjust(row: Row) -> dict[str, str]:
        texts = _as_texts(row)
        values = corrections.values(*(row.get(name) for name in _OWNERS))
        return {**texts, **{k: v for k, v in values.items() if k in texts}} if values else texts

    return adjust


def _or_corrected(found: Condition, keyword: str, corrections: Corrections) -> Condition:
    """What was corrected is looked at, whatever was received: the predicate decides by what serves."""
    where = corrections.of(keyword)
    if where is None:
        return found
    text = f"({found[0]} OR {where[0]}.id IN (SELECT value FROM json_each(?)))"
    return text, (*found[1], json.dumps(where[1]))


_NAME_TABLES = {
    'p."PatientName"': ("p.id", "patient_names", "patient_id"),
    'st."PatientName"': ("st.id", "study_names", "study_id"),
}


@dataclass(frozen=True, slots=True)
class _Matching:
    """How the keys of one query with a value are matched."""

    level: Level
    wanted: Mapping[str, str]
    items: Mapping[str, Mapping[str, str]]
    options: Options
    zone: timedelta | None

    @property
    def _combined(self) -> dict[str, str]:
        """Dates and times whose keys are one range."""
        if not self.options.combined:
            return {}
        wanted = self.wanted
        return {
            d: t for d, t in TIMES.items() if d in wanted and t in wanted and moments.combines(wanted[d], wanted[t])
        }

    @property
    def needs(self) -> list[str]:
        """Keywords that have to be selected to judge, and to adjust, a row."""
        found = list(self.wanted)
        if self.zone is not None:
            known = columns(self.level)
            found += [key for pair in TIMES.items() for key in pair if key in known]
        return found

    def checks(self) -> list[Check]:
        combined = self._combined
        apart = {k: v for k, v in self.wanted.items() if k not in combined and k not in combined.values()}
        found = [self._check(keyword, value) for keyword, value in apart.items()]
        found += [self._pair(date, time) for date, time in combined.items()]
        found += [_item_check(keyword, item) for keyword, item in self.items.items() if _has_values(item)]
        return found

    def _check(self, keyword: str, value: str) -> Check:
        vr, single = vr_of(keyword), is_single(keyword)
        unknown = self.options.unknown and keyword in _MAY_BE_UNKNOWN
        if vr == "PN" and self.options.fuzzy:
            return lambda row: fuzzy_person(value, row[keyword]) if row[keyword] else unknown
        return lambda row: matches(vr, value, row[keyword], single=single) or (unknown and not row[keyword])

    def _pair(self, date: str, time: str) -> Check:
        date_key, time_key = self.wanted[date], self.wanted[time]
        unknown = self.options.unknown and date in _MAY_BE_UNKNOWN
        return lambda row: moments.in_combined(date_key, time_key, row[date], row[time]) or (unknown and not row[date])

    def conditions(self) -> list[Condition]:
        """What every match meets, as SQL."""
        known = columns(self.level)
        found = [
            _or_corrected(self._condition(keyword, known[keyword], value), keyword, self.options.corrections)
            for keyword, value in self.wanted.items()
            # A time of a combined pair, or of another zone, says nothing without its date.
            if not (vr_of(keyword) == "TM" and (self.zone is not None or keyword in self._combined.values()))
        ]
        return found + [_item_condition(item) for item in self.items.values() if _has_values(item)]

    def _condition(self, keyword: str, column: str, value: str) -> Condition:
        vr = vr_of(keyword)
        unknown = self.options.unknown and keyword in _MAY_BE_UNKNOWN
        if column in _NAME_TABLES:
            return name_condition(*_NAME_TABLES[column], value, fuzzy=self.options.fuzzy, unknown=unknown)
        if vr == "PN" and self.options.fuzzy:
            found: Condition = (f"{column} <> ''", ())
        elif vr == "DA" and self.zone is not None:
            found = date_condition(column, moments.widened(bounds("DA", value)))
        else:
            found = condition(column, vr, value, single=is_single(keyword) and not column.startswith("("))
        return (f"({found[0]} OR {column} = '')", found[1]) if unknown else found


# Sequences


def _has_values(item: Mapping[str, str]) -> bool:
    return any(not is_universal(v) for v in item.values())


def _item_matches(wanted: Mapping[str, str], item: Mapping[str, str]) -> bool:
    """All item keys match within one item (C.2.2.2.6)."""
    return all(matches(vr_of(k), v, str(item.get(k) or ""), single=is_single(k)) for k, v in wanted.items())


def _stored_items(text: str) -> list[dict[str, str]]:
    return [{k: str(v or "") for k, v in item.items()} for item in json.loads(text or "[]")]


def _item_check(keyword: str, wanted: Mapping[str, str]) -> Check:
    return lambda row: any(_item_matches(wanted, item) for item in _stored_items(row[keyword]))


def _matching_items(text: str, wanted: Mapping[str, str]) -> str:
    """The items that match with the attributes that were asked for; all of them, whole, when no key was given."""
    stored = _stored_items(text)
    if not wanted:
        return json.dumps([{k: v for k, v in item.items() if v} for item in stored])
    return json.dumps([{k: item.get(k, "") for k in wanted} for item in stored if _item_matches(wanted, item)])


def _item_condition(wanted: Mapping[str, str]) -> Condition:
    parts = [condition(f'r."{k}"', vr_of(k), v, single=is_single(k)) for k, v in wanted.items() if not is_universal(v)]
    where = " AND ".join(text for text, _ in parts)
    return f"se.id IN (SELECT r.series_id FROM series_requests r WHERE {where})", tuple(
        p for _, ps in parts for p in ps
    )


# Retrieve


def plan_retrieve(
    root: Root, identifier: Identifier, *, relational: bool = False, corrections: Corrections = NONE
) -> Plan:
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
        conditions.append(_serving(_unique_condition(key, value), key, value, corrections))
    issuer = identifier.values.get("IssuerOfPatientID", "")
    if level is Level.PATIENT and not is_universal(issuer):
        own: Condition = ('p."IssuerOfPatientID" = ?', (issuer,))
        conditions.append(_serving(own, "IssuerOfPatientID", issuer, corrections))
    return Plan(
        level,
        "SELECT i.SOPClassUID, i.SOPInstanceUID, i.TransferSyntaxUID, i.file, i.size"
        f" FROM {FROM[Level.IMAGE]}{_where(conditions)} ORDER BY st.id, se.id, i.id",
        tuple(p for _, parameters in conditions for p in parameters),
        lambda _row: True,
    )


def _serving(found: Condition, key: str, value: str, corrections: Corrections) -> Condition:
    """A patient's ID is the corrected one, and no longer the one that was received: as C-FIND tells it."""
    where = corrections.of(key) if key in _MERGED else None
    if where is None:
        return found
    rows = "p.id {} (SELECT value FROM json_each(?))"
    now = [row for row in where[1] if corrections.patients[row][key] == value]
    text = f"(({found[0]} AND {rows.format('NOT IN')}) OR {rows.format('IN')})"
    return text, (*found[1], json.dumps(where[1]), json.dumps(now))


def _unique_condition(key: str, value: str) -> Condition:
    expression = columns(Level.IMAGE)[key]
    if key == "PatientID":
        if "\\" in value:
            raise IdentifierError(f"{key} must have one value")
        return f"{expression} = ?", (value,)
    uids = [uid.strip(" ") for uid in value.split("\\")]
    if not all(re.fullmatch(r"[0-9.]{1,64}", uid) for uid in uids):
        raise IdentifierError(f"{key} holds something that is no UID")
    return condition(expression, "UI", value, single=True)


def _unique_keys(root: Root, level: Level) -> Sequence[str]:
    return [UNIQUE_KEYS[one] for one in LEVELS[root][: LEVELS[root].index(level) + 1]]


def _where(conditions: Sequence[Condition]) -> str:
    return " WHERE " + " AND ".join(c for c, _ in conditions) if conditions else ""
