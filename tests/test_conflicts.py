"""Conflicts of records: decisions as functions, and the laws that hold for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.conflicts import (
    DEFAULTS,
    KIND_OF,
    Data,
    Decision,
    Kind,
    Limits,
    Outcome,
    Side,
    Strategy,
    decide,
    empty,
    filled_since,
    merge,
)
from dicomnode.conflicts import returned as came_back

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
LIMITS = Limits(tie_seconds=1.0, skew_seconds=300.0)

NAMES = st.sampled_from("abcdef")
LEAVES = st.none() | st.sampled_from(["", " ", "x", "y", "z"]) | st.integers(-1, 2) | st.booleans()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)
DATA = st.dictionaries(NAMES, VALUES, max_size=5)
ZONES = st.sampled_from(["+00:00", "+08:00", "-05:30", "Z"])


@st.composite
def times(draw: st.DrawFn) -> str:
    """Around now, some ahead of it, some without a zone, some no time at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(["", "yesterday", "2026-11-29T10:00:00"]))
    moment = datetime(2026, 11, 29, 12, 0) + timedelta(seconds=draw(st.integers(-3600, 600)) / 2)
    return moment.isoformat() + draw(ZONES)


SIDES = st.builds(Side, version=st.integers(1, 6), changed_time=times(), data=DATA)
History = tuple[Side, Side, Side | None]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Two sides and what they had in common, from which each has changed a few fields, or none."""
    common = draw(SIDES)
    if draw(st.integers(0, 4)) == 0:
        return draw(SIDES), draw(SIDES), None
    edits = [draw(st.dictionaries(NAMES, VALUES, max_size=2)) for _ in range(2)]
    gone = [draw(st.sets(NAMES, max_size=1)) for _ in range(2)]
    one, other = (
        Side(draw(st.integers(1, 6)), draw(times()), {k: v for k, v in {**common.data, **e}.items() if k not in g})
        for e, g in zip(edits, gone, strict=True)
    )
    return one, other, common


STRATEGIES = st.sampled_from(Strategy)
MIRRORED = {Outcome.edge: Outcome.cloud, Outcome.cloud: Outcome.edge}
OPPOSITE = {Strategy.edge: Strategy.cloud, Strategy.cloud: Strategy.edge}


def asked(strategy: Strategy, edge: Side, cloud: Side, common: Side | None) -> Decision:
    return decide(strategy, edge, cloud, common, now=NOW, limits=LIMITS)


def paths(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where something stands; a list is one value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from paths(inner, (*at, name))
    elif not empty(value):
        yield at


def at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(value, Mapping):
            return value
        value = value.get(name)
    return value


@given(STRATEGIES, histories())
def test_swapping_the_sides_mirrors_the_decision(strategy: Strategy, history: History) -> None:
    one, other, common = history
    first = asked(strategy, one, other, common)
    second = asked(OPPOSITE.get(strategy, strategy), other, one, common)
    assert second.outcome is MIRRORED.get(first.outcome, first.outcome)
    assert (second.conflict, second.fields, second.why) == (first.conflict, first.fields, second.why)
    if first.outcome in (Outcome.edge, Outcome.cloud):
        assert second.data == first.data  # the same side's value, whoever was asked first


@given(histories())
def test_merging_commutes_where_no_field_was_changed_by_both(history: History) -> None:
    one, other, common = history
    base = common.data if common else {}
    clash = [p for p in {*paths(one.data), *paths(other.data)} if at(one.data, p) != at(other.data, p)
             and not empty(at(one.data, p)) and not empty(at(other.data, p))
             and at(one.data, p) != at(base, p) and at(other.data, p) != at(base, p)]  # fmt: skip
    if not clash:
        a, b = merge(one.data, other.data, base), merge(other.data, one.data, base)
        assert {p: at(a, p) for p in paths(a)} == {p: at(b, p) for p in paths(b)}


@given(STRATEGIES, histories())
def test_deciding_again_changes_nothing(strategy: Strategy, history: History) -> None:
    edge, cloud, common = history
    first = asked(strategy, edge, cloud, common)
    settled = Side(max(edge.version, cloud.version) + 1, "2026-11-29T12:00:00+00:00", first.data)
    assert asked(strategy, edge, cloud, common) == first  # deterministic
    for again in (
        asked(strategy, settled, settled, common),  # both ends got it
        asked(strategy, settled, cloud, cloud),  # it is on its way to the cloud
        asked(strategy, edge, settled, edge),  # it came from there
    ):
        assert again.data == first.data
        assert not again.conflict


@given(histories())
def test_merging_loses_no_field_and_nothing_empty_overwrites(history: History) -> None:
    edge, cloud, common = history
    merged = merge(edge.data, cloud.data, common.data if common else None)
    assert merged.keys() == edge.data.keys() | cloud.data.keys()
    for path in {*paths(edge.data), *paths(cloud.data)}:
        assert not empty(at(merged, path)), path
    for path in paths(merged):  # nothing was made up
        assert at(merged, path) in (at(edge.data, path), at(cloud.data, path))
    base = common.data if common else None
    assert merge(merged, cloud.data, base) == merged
    assert merge(edge.data, merged, base) == merged


@given(STRATEGIES, histories())
def test_the_decision_is_one_side_or_a_merge_of_both(strategy: Strategy, history: History) -> None:
    edge, cloud, common = history
    made = asked(strategy, edge, cloud, common)
    if made.outcome is Outcome.merged:
        assert strategy is Strategy.merge
    elif made.outcome is Outcome.edge:
        assert made.data == edge.data
    else:
        assert made.data == cloud.data  # also under review: the cloud's value serves until then
    assert (made.outcome is Outcome.same) == (not made.fields)


@pytest.mark.parametrize(
    ("winner", "other", "common", "filled"),
    [
        ({"a": ""}, {"a": "x"}, {"a": ""}, {"a": "x"}),
        ({"a": " "}, {"a": 0}, {"a": ""}, {"a": 0}),
        ({"a": ""}, {"a": "x"}, {"a": "y"}, {}),  # it was emptied, and that won
        ({"a": ""}, {"a": "x"}, {}, {}),  # so it was here
        ({"a": ""}, {}, {"a": ""}, {}),
        ({}, {"a": "x"}, {"a": ""}, {}),  # taken away
        ({"a": None}, {"a": "x"}, {"a": ""}, {}),
        ({"a": "z"}, {"a": "x"}, {"a": ""}, {}),
    ],
)
def test_what_was_empty_and_is_filled_by_the_other_side_is_no_decision(
    winner: Data, other: Data, common: Data, filled: Data
) -> None:
    assert filled_since(winner, other, common) == filled


@pytest.mark.parametrize(
    ("edge_time", "cloud_time", "outcome"),
    [
        ("2026-11-29T10:00:00+00:00", "2026-11-29T17:59:00+08:00", Outcome.edge),  # 09:59 UTC: text would say otherwise
        ("2026-11-29T10:00:00+02:00", "2026-11-29T09:00:00+00:00", Outcome.cloud),
        ("2026-11-29T10:00:00Z", "2026-11-29T10:00:00.9+00:00", Outcome.review),
        ("2026-11-29T10:00:00", "2026-11-29T09:00:00+00:00", Outcome.review),
        ("2026-11-29T12:05:01Z", "2026-11-29T09:00:00+00:00", Outcome.review),
        ("2026-11-29T12:04:59Z", "2026-11-29T09:00:00+00:00", Outcome.edge),
        ("2026-11-29T07:00:00Z", "2026-11-29T09:00:00+00:00", Outcome.review),  # before the version that it follows
    ],
)
def test_newest(edge_time: str, cloud_time: str, outcome: Outcome) -> None:
    common = Side(1, "2026-11-29T08:00:00+00:00", {"StudyDescription": "a"})
    edge = Side(2, edge_time, {"StudyDescription": "b"})
    cloud = Side(2, cloud_time, {"StudyDescription": "c"})
    assert asked(Strategy.newest, edge, cloud, common).outcome is outcome


def test_defaults_of_the_kinds() -> None:
    common = Side(1, "2026-11-29T08:00:00+00:00", {"v": 0, "kept": 1})
    edge = Side(2, "2026-11-29T11:00:00+00:00", {"v": 1, "kept": 1, "empty": ""})
    cloud = Side(3, "2026-11-29T10:00:00+00:00", {"v": 2, "kept": 1, "empty": "said", "new": 1})

    def made(kind: str) -> tuple[Outcome, Any]:
        found = asked(DEFAULTS[KIND_OF[kind]], edge, cloud, common)
        return found.outcome, found.data

    assert made("patient") == (Outcome.review, cloud.data)
    assert made("study") == (Outcome.edge, edge.data)
    assert made("ai-result") == (Outcome.cloud, cloud.data)
    assert made("preferences") == (Outcome.edge, edge.data)
    assert made("settings") == (Outcome.merged, {"v": 1, "kept": 1, "empty": "said", "new": 1})
    assert set(DEFAULTS) == set(Kind)


def test_one_side_alone_is_no_conflict_and_may_remove() -> None:
    common = Side(1, "2026-11-29T08:00:00+00:00", {"a": 1, "b": 2})
    changed = Side(2, "2026-11-29T09:00:00+00:00", {"a": 1})
    for strategy in Strategy:
        assert asked(strategy, common, changed, common) == Decision(
            Outcome.cloud, {"a": 1}, "only the cloud's side was changed", fields=("b",)
        )
        assert asked(strategy, changed, common, common).outcome is Outcome.edge


def test_what_was_exchanged_on_its_way_out_cannot_be_changed_from_outside() -> None:
    home = {"StudyInstanceUID": "1.2.3", "StudyDescription": "CT", "count": 3, "secret": "x", "dropped": "y"}
    left = {"StudyInstanceUID": "2.25.9", "StudyDescription": "CT", "count": 3, "PatientID": "P1"}
    decided = {"StudyInstanceUID": "2.25.7", "StudyDescription": "CT chest", "PatientID": "P2", "secret": "z", "new": 1}
    assert came_back(home, left, decided) == {
        "StudyInstanceUID": "1.2.3", "StudyDescription": "CT chest", "secret": "x", "dropped": "y", "new": 1,
    }  # fmt: skip
    assert came_back(home, left, left) == home
