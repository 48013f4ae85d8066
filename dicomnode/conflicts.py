"""Which side of a record serves when it was changed at both ends; pure.

A record has an edge side (this node) and a cloud side, and perhaps a last version that both had
in common. Where only one side has moved since, there is no conflict and nothing to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

Data = Mapping[str, Any]


class Strategy(StrEnum):
    newest = "newest"
    cloud = "cloud"
    edge = "edge"
    merge = "merge"
    review = "review"


class Outcome(StrEnum):
    """``same``: both sides hold the same. ``review``: a person decides, and the cloud's value serves until then."""

    same = "same"
    edge = "edge"
    cloud = "cloud"
    merged = "merged"
    review = "review"


class Kind(StrEnum):
    """Kinds of data with a policy of their own."""

    patients = "patients"
    studies = "studies"
    results = "results"
    preferences = "preferences"
    settings = "settings"


DEFAULTS: Mapping[Kind, Strategy] = {
    Kind.patients: Strategy.review,
    Kind.studies: Strategy.newest,
    Kind.results: Strategy.cloud,
    Kind.preferences: Strategy.edge,
    Kind.settings: Strategy.merge,
}
KIND_OF: Mapping[str, Kind] = {
    "patient": Kind.patients,
    "study": Kind.studies,
    "ai-result": Kind.results,
    "result-review": Kind.results,
    "preferences": Kind.preferences,
    "settings": Kind.settings,
    "limits": Kind.settings,
}
"""Type of a record -> kind. An unknown type is a matter for people: :data:`Strategy.review`."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one end holds. ``changed_time`` is ISO 8601 with a zone; ``version`` counts from 1."""

    version: int
    changed_time: str
    data: Data


@dataclass(frozen=True, slots=True)
class Limits:
    """``tie_seconds``: closer times do not tell which is newer. ``skew_seconds``: a time so far ahead is wrong."""

    tie_seconds: float = 1.0
    skew_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Decision:
    """``data`` serves from now on. ``conflict``: both ends had moved, so both sides are kept.

    ``fields``: top-level names whose values differ between the sides, never the values.
    """

    outcome: Outcome
    data: Data
    why: str
    conflict: bool = False
    fields: tuple[str, ...] = field(default=())


def decide(
    strategy: Strategy, edge: Side, cloud: Side, common: Side | None, *, now: datetime, limits: Limits | None = None
) -> Decision:
    """``common``: the last version that both ends had, None where there never was one.

    ``now`` (aware) is what times are held against for a clock that is ahead.
    """
    fields = differing(edge.data, cloud.data)
    if not fields:
        return Decision(Outcome.same, cloud.data, "both ends hold the same")
    if common is not None and not differing(edge.data, common.data):
        return Decision(Outcome.cloud, cloud.data, "only the cloud's side was changed", fields=fields)
    if common is not None and not differing(cloud.data, common.data):
        return Decision(Outcome.edge, edge.data, "only this node's side was changed", fields=fields)

    def decision(outcome: Outcome, data: Data, why: str) -> Decision:
        return Decision(outcome, data, why, conflict=True, fields=fields)

    if strategy is Strategy.edge:
        return decision(Outcome.edge, edge.data, "this node's side wins for this kind of data")
    if strategy is Strategy.cloud:
        return decision(Outcome.cloud, cloud.data, "the cloud's side wins for this kind of data")
    if strategy is Strategy.merge:
        merged = merge(edge.data, cloud.data, common.data if common else None)
        return decision(Outcome.merged, merged, "fields of both sides were merged")
    if strategy is Strategy.newest:
        outcome, why = _newest(edge, cloud, common, now, limits or Limits())
        return decision(outcome, edge.data if outcome is Outcome.edge else cloud.data, why)
    return decision(Outcome.review, cloud.data, "a person decides for this kind of data")


def _newest(edge: Side, cloud: Side, common: Side | None, now: datetime, limits: Limits) -> tuple[Outcome, str]:
    """Times decide only while nothing speaks against a clock: a zone, an order after the common version, no future."""
    times = (moment(edge.changed_time), moment(cloud.changed_time))
    if times[0] is None or times[1] is None:
        return Outcome.review, "a time of change has no zone or cannot be read"
    skew, tie = timedelta(seconds=limits.skew_seconds), timedelta(seconds=limits.tie_seconds)
    if max(times[0], times[1]) - now > skew:
        return Outcome.review, "a time of change lies in the future: a clock is wrong"
    before = moment(common.changed_time) if common else None
    for side, when in ((edge, times[0]), (cloud, times[1])):
        if common is not None and side.version > common.version and before is not None and before - when > skew:
            return Outcome.review, "a later version has an earlier time: a clock is wrong"
    if abs(times[0] - times[1]) <= tie:
        return Outcome.review, "both were changed at the same time"
    if times[0] > times[1]:
        return Outcome.edge, "this node's change is the newer one"
    return Outcome.cloud, "the cloud's change is the newer one"


def moment(text: str) -> datetime | None:
    """An aware time; None for what has no zone or is no time."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.utcoffset() is not None else None


def empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, or a container of such. Zero and false say something."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(empty(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(empty(v) for v in value)
    return False


def merge(edge: Data, cloud: Data, common: Data | None) -> dict[str, Any]:
    """Field by field, three-way, objects inside objects likewise; lists are one value.

    The side that moved since the common version is taken; where both did, the edge's. An empty
    value never takes the place of one, and a field that one side alone has is kept.
    """
    base = common or {}
    out: dict[str, Any] = {}
    for name in (*cloud, *(k for k in edge if k not in cloud)):
        out[name] = _field(edge.get(name), cloud.get(name), base.get(name))
    return out


def _field(edge: Any, cloud: Any, common: Any) -> Any:
    if empty(edge) or empty(cloud):
        return cloud if empty(edge) and cloud is not None else edge
    if isinstance(edge, Mapping) and isinstance(cloud, Mapping):
        return merge(edge, cloud, common if isinstance(common, Mapping) else None)
    return cloud if _same(edge, common) else edge


def filled_since(winner: Data, other: Data, common: Data) -> dict[str, Any]:
    """Fields that were an empty text at both ends, and that the side that did not win has filled since.

    The winner decided nothing about them: it has them empty as they came. One that it emptied itself stays so.
    """

    def blank(value: Any) -> bool:
        return isinstance(value, str) and not value.strip()

    return {k: other[k] for k, v in winner.items() if blank(v) and blank(common.get(k)) and not empty(other.get(k))}


def differing(one: Data, other: Data) -> tuple[str, ...]:
    """Names of top-level fields that are not the same on both sides, sorted."""
    return tuple(
        sorted(k for k in one.keys() | other.keys() if k not in one or k not in other or not _same(one[k], other[k]))
    )


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, but 1.0 is 1."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def returned(home: Data, left: Data, decided: Data) -> dict[str, Any]:
    """The home form of a value that came from outside.

    ``left``: what leaves in place of ``home``. A field that leaves as it is at home takes the decided
    value; one that is exchanged, added or held back on its way out cannot be changed from outside.
    """
    out = {k: v for k, v in home.items() if k in decided or k not in left or not _same(v, left[k])}
    for name, value in decided.items():
        known = name in home
        if known == (name in left) and (not known or _same(home[name], left[name])):
            out[name] = value
    return out
