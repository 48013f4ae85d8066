"""Which records people may change, and what they hold. Pure.

``patient``     corrections of demographics, by the patient's pseudonym
``study``       metadata of a study, by its UID
``result-review``  what a reader says of a result, by the id of its ``ai-result``
``preferences`` ``dashboard``: language and refresh of the page
``limits``      ``warnings``: from where on the dashboard and ``dicomnode_warning_limit`` warn
``ai-result`` and ``settings`` are what the node tells; people do not change them here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

Check = Callable[[Any], bool]
REVIEW_STATES = ("accepted", "rejected", "unclear")
MOST_TEXT = 1024
DASHBOARD, WARNINGS = "dashboard", "warnings"


def _text(most: int) -> Check:
    return lambda v: isinstance(v, str) and len(v) <= most and (v.isprintable() or not v)


def _value(most: int) -> Check:
    """One value of DICOM (PS3.5 6.2): a backslash would make two of it."""
    return lambda v: _text(most)(v) and "\\" not in v


def _name(v: Any) -> bool:
    """PN: up to three representations of up to five components."""
    groups = v.split("=") if _value(324)(v) else []
    return 1 <= len(groups) <= 3 and all(len(g) <= 64 and g.count("^") <= 4 for g in groups)


def _one_of(*values: str) -> Check:
    return lambda v: v in values


def _match(pattern: str) -> Check:
    return lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None


def _number(least: float, most: float) -> Check:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most


def _date(v: Any) -> bool:
    """DA, or empty; a day that there is: what is encoded with another one is no DICOM."""
    if not _match(r"([0-9]{8})?")(v):
        return False
    try:
        return v == "" or bool(date(int(v[:4]), int(v[4:6]), int(v[6:])))
    except ValueError:
        return False


FIELDS: Mapping[str, Mapping[str, tuple[Check, str]]] = {
    "patient": {
        "PatientID": (_value(64), "at most 64 characters without a backslash"),
        "IssuerOfPatientID": (_value(64), "at most 64 characters without a backslash"),
        "PatientName": (_name, "a person name, FAMILY^GIVEN"),
        "PatientBirthDate": (_date, "YYYYMMDD"),
        "PatientSex": (_one_of("M", "F", "O", ""), "M, F, O or empty"),
    },
    "study": {
        "StudyDescription": (_value(64), "at most 64 characters without a backslash"),
        "AccessionNumber": (_value(16), "at most 16 characters without a backslash"),
        "StudyDate": (_date, "YYYYMMDD"),
        "StudyTime": (_match(r"(([01][0-9]|2[0-3])([0-5][0-9]([0-5][0-9](\.[0-9]{1,6})?)?)?)?"), "HHMMSS"),
        "StudyID": (_value(16), "at most 16 characters without a backslash"),
        "ReferringPhysicianName": (_name, "a person name, FAMILY^GIVEN"),
    },
    "result-review": {
        "status": (_one_of(*REVIEW_STATES, ""), f"one of {', '.join(REVIEW_STATES)}"),
        "reason": (_text(MOST_TEXT), f"at most {MOST_TEXT} characters"),
    },
    "preferences": {
        "language": (_one_of("en", "zh", ""), "en, zh or empty"),
        "refresh_seconds": (_number(2, 3600), "2 to 3600"),
    },
    "limits": {
        "disk_free_mb": (_number(0, 1e9), "MiB from 0"),
        "oldest_job_minutes": (_number(0, 1e6), "minutes from 0"),
        "oldest_sync_hours": (_number(0, 1e6), "hours from 0"),
        "open_reviews": (_number(0, 1e6), "a number from 0"),
    },
}
"""Type -> field -> check, and what would be right."""

MAY_BE_EMPTY: Mapping[str, frozenset[str]] = {
    "patient": frozenset({"PatientBirthDate", "PatientSex"}),
    "study": frozenset(FIELDS["study"]),
}
"""Attributes that a decision may empty, since what was received is wrong and nobody knows what is right: Type 2, or 3,
in PS3.3 C.7.1.1 and C.7.2.1. By whom results are (name, ID and its issuer) is never taken away."""

_NAMES: Mapping[str, str] = {"preferences": DASHBOARD, "limits": WARNINGS}
_OPEN = frozenset({"study", "ai-result", "settings"})
"""The node tells more in these than people may change; what comes along is kept."""


def fault(kind: str, name: str, data: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> str:
    """What is wrong with a record of people, by field and never by value; empty when nothing is.

    ``known``: what it says here already. A value that stays is not held against it: modalities send much.
    """
    if kind in _NAMES and name != _NAMES[kind]:
        return f"the only record of type {kind} is {_NAMES[kind]}"
    fields = FIELDS.get(kind, {})
    for key, value in data.items():
        if key in fields:
            check, right = fields[key]
            if value is not None and not check(value) and (not known or known.get(key) != value):
                return f"{key} is not {right}"
        elif kind not in _OPEN:
            return f"a field is unknown; known: {', '.join(fields)}"
    return ""


def read_field(kind: str, key: str, text: str) -> Any:
    """A value as somebody typed it: a number where the field is one."""
    numeric = kind in ("limits", "preferences") and key != "language"
    if not numeric:
        return text
    try:
        return int(text) if re.fullmatch(r"\d{1,15}", text) else float(text)
    except ValueError:
        return text
