"""Earlier studies of the same patient: who is the same, what is earlier, which one is taken. Pure.

Attributes go by DICOM keyword and hold text, as in the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from typing import Any

from dicomnode.conditions import value_matches

INDEX = "index"
"""The name under which ``[[rules]] prior.from`` means what this node holds."""

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wish:
    """Which earlier series is wanted. ``match``: conditions as in a rule. ``sources``: INDEX or names of peers.

    ``seconds``: how long it is looked and waited for; then the work goes on without it. ``compare``:
    the model runs on it, too, and the report says what has changed.
    """

    match: Mapping[str, Any] = field(default_factory=dict)
    max_age_days: float | None = None
    sources: tuple[str, ...] = (INDEX,)
    seconds: float = 300.0
    compare: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """A series that may be taken; ``images`` is the number of its instances, 0 where it is not known."""

    attributes: Attributes
    images: int = 0

    def text(self, keyword: str) -> str:
        return str(self.attributes.get(keyword) or "").strip()


class PriorState(StrEnum):
    pending = "pending"
    asking = "asking"  # the courier speaks to a peer
    arriving = "arriving"  # a peer has sent it; its rows are not all there yet
    found = "found"
    none = "none"


class PriorEvent(StrEnum):
    ask = "ask"
    moved = "moved"
    retry = "retry"
    take = "take"
    give_up = "give_up"


PRIOR_TABLE: Mapping[tuple[PriorState, PriorEvent], PriorState] = {
    (PriorState.pending, PriorEvent.ask): PriorState.asking,
    (PriorState.pending, PriorEvent.take): PriorState.found,
    (PriorState.pending, PriorEvent.give_up): PriorState.none,
    (PriorState.asking, PriorEvent.moved): PriorState.arriving,
    (PriorState.asking, PriorEvent.retry): PriorState.pending,
    (PriorState.asking, PriorEvent.take): PriorState.found,
    (PriorState.asking, PriorEvent.give_up): PriorState.none,
    (PriorState.arriving, PriorEvent.retry): PriorState.pending,
    (PriorState.arriving, PriorEvent.take): PriorState.found,
    (PriorState.arriving, PriorEvent.give_up): PriorState.none,
}
"""``found`` and ``none`` are final: the job that wanted it goes on."""


def same_patient(one: Attributes, other: Attributes) -> bool:
    """Whether two sets of attributes surely mean one patient.

    The same Patient ID of the same issuer, and no other birth date. An ID without an issuer is
    unique nowhere, so where one side lacks it both need the same birth date.
    """
    numbers = [_text(a, "PatientID") for a in (one, other)]
    if not numbers[0] or numbers[0] != numbers[1]:
        return False
    issuers = [_text(a, "IssuerOfPatientID") for a in (one, other)]
    births = [_text(a, "PatientBirthDate") for a in (one, other)]
    if all(births) and births[0] != births[1]:
        return False
    if all(issuers):
        return issuers[0] == issuers[1]
    return bool(births[0]) and births[0] == births[1]


def is_earlier(current: Attributes, other: Attributes, max_age_days: float | None) -> bool:
    """Whether ``other`` is of another study that began before the current one, and not too long before."""
    if _text(current, "StudyInstanceUID") == _text(other, "StudyInstanceUID"):
        return False
    days = (_date(current), _date(other))
    if days[0] is None or days[1] is None:
        return False
    if days[0] == days[1]:
        times = [_text(a, "StudyTime") for a in (current, other)]
        return bool(times[0] and times[1]) and _clock(times[1]) < _clock(times[0])
    age = (days[0] - days[1]).days
    return age > 0 and (max_age_days is None or age <= max_age_days)


def fits(current: Attributes, candidate: Candidate, wish: Wish, *, lenient: bool = False) -> bool:
    """Whether a series may be taken: of the same patient, earlier, and as the wish says.

    Without a wish for it the modality is that of the current series. ``lenient``: what is
    missing is not known, as with attributes that a peer does not return.
    """
    conditions = dict(wish.match) or {"Modality": _text(current, "Modality")}
    return (
        same_patient(current, candidate.attributes)
        and is_earlier(current, candidate.attributes, wish.max_age_days)
        and all(
            value_matches(candidate.text(key), wanted) or (lenient and not candidate.text(key))
            for key, wanted in conditions.items()
        )
    )


def ranked(
    current: Attributes, candidates: Iterable[Candidate], wish: Wish, *, lenient: bool = False
) -> list[Candidate]:
    """The candidates that fit, best first: the latest study, in it the series most like the current one."""
    fitting = [c for c in candidates if fits(current, c, wish, lenient=lenient)]
    like = ("SeriesDescription", "ProtocolName", "BodyPartExamined")

    def order(c: Candidate) -> tuple[Any, ...]:
        differing = [bool(_text(current, k)) and c.text(k).casefold() != _text(current, k).casefold() for k in like]
        return (
            -(_date(c.attributes) or date.min).toordinal(),
            -_clock(c.text("StudyTime")),
            c.text("StudyInstanceUID"),
            *differing,
            -c.images,
            c.text("SeriesInstanceUID"),
        )

    return sorted(fitting, key=order)


def study_dates(current: Attributes, max_age_days: float | None) -> str:
    """Range of Study Date for a query (PS3.4 C.2.2.2.5): up to the current study's; "" where it has none."""
    day = _date(current)
    if day is None:
        return ""
    first = ""
    if max_age_days is not None:
        oldest = max(1.0, day.toordinal() - max_age_days)
        first = f"{date.fromordinal(int(oldest)):%Y%m%d}".zfill(8)
    return f"{first}-{day:%Y%m%d}"


def days_between(current: Attributes, other: Attributes) -> int | None:
    days = (_date(current), _date(other))
    return None if days[0] is None or days[1] is None else (days[0] - days[1]).days


def askable(current: Attributes) -> str:
    """Why nobody can be asked for an earlier study of this patient; "" when they can."""
    number = _text(current, "PatientID")
    if not number:
        return "the study has no Patient ID"
    if set(number) & set("*?\\"):
        return "the Patient ID holds a character that has a meaning in queries"
    if _date(current) is None:
        return "the study has no date"
    if not _text(current, "IssuerOfPatientID") and not _text(current, "PatientBirthDate"):
        return "the study has neither an issuer of the Patient ID nor a birth date"
    return ""


def dump(wish: Wish) -> str:
    return json.dumps(asdict(wish), sort_keys=True)


def load(text: str) -> Wish:
    data = json.loads(text)
    return Wish(**{**data, "sources": tuple(data["sources"])})


def changes(now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measurements of two analyses by one model, as summaries hold them, that have the same key, segment and unit."""
    known = {(m["key"], m["segment"], m["unit"]): m["value"] for m in before}
    return [
        {
            **{k: m[k] for k in ("key", "segment", "unit", "value")},
            "before": known[at],
            "change": m["value"] - known[at],
        }
        for m in now
        if (at := (m["key"], m["segment"], m["unit"])) in known
    ]


def _text(attributes: Attributes, keyword: str) -> str:
    return str(attributes.get(keyword) or "").strip()


def _date(attributes: Attributes) -> date | None:
    text = _text(attributes, "StudyDate").replace(".", "")
    if len(text) != 8 or not (text.isascii() and text.isdigit()):
        return None
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None


def _clock(text: str) -> float:
    """Seconds of the day of a TM; -1 where it is none."""
    digits = text.replace(":", "")
    try:
        whole = digits.partition(".")[0].ljust(6, "0")
        seconds = timedelta(hours=int(whole[:2]), minutes=int(whole[2:4]), seconds=int(whole[4:6])).total_seconds()
        return seconds + float(f"0.{digits.partition('.')[2] or 0}")
    except ValueError:
        return -1.0
