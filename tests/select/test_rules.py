"""Rule matching: forms of a condition, and how rules that name one model are joined."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.conditions import value_matches
from dicomnode.select.rules import requests_for, rule_matches
from dicomnode.settings import Range, Rule

plain = st.text("abcXYZ 0123.-_", max_size=12)


@pytest.mark.parametrize(
    ("value", "condition", "matches"),
    [
        ("CT", "CT", True),
        ("ct ", " CT", True),
        ("CTA", "CT", False),
        ("CHEST 1.0", "chest*", True),
        ("CHEST", "ch?st", True),
        ("CHEST", "ch?t", False),
        ("a.c", "a.c*", True),
        ("abc", "a.c*", False),
        ("A\\B\\C", "b", True),
        ("A\\B\\C", "d", False),
        ("A\\B\\C", ("x", "c"), True),
        ("CT", (), False),
        ("120", 120, True),
        ("120.00", 120, True),
        ("1.2e2", 120, True),
        ("", 0, False),
        ("abc", 120, False),
        ("1", True, False),
        ("1.25", Range(max=1.5), True),
        ("1.5", Range(max=1.5), True),
        ("1.6", Range(max=1.5), False),
        ("2", Range(min=1, max=3), True),
        ("0.5\\2", Range(min=1, max=3), True),
        ("", Range(max=1.5), False),
        ("nan", Range(max=1.5), False),
        ("inf", Range(min=1.5), False),
        ("20260105", Range(min="20260101", max="20260131"), True),
        ("20260201", Range(min="20260101", max="20260131"), False),
        ("", Range(max="20260131"), False),
        ("", "*", True),
        ("", "", True),
        ("", "?*", False),
        ("x", "", False),
        ("line\nbreak", "line*", True),
    ],
)
def test_condition(value: str, condition: Any, matches: bool) -> None:
    assert value_matches(value, condition) is matches


@given(plain)
def test_a_value_matches_itself_in_any_case(value: str) -> None:
    assert value_matches(value.upper(), value.lower())
    assert value_matches(value, "*") and value_matches(value, (value, "other"))


word = st.text("abcXYZ0123.-_", max_size=12)


@given(word, word)
def test_glob_as_prefix_and_suffix(head: str, tail: str) -> None:
    assert value_matches(head + tail, f"{head}*")
    assert value_matches(head + tail, f"*{tail}")


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_range_is_inclusive(low: float, high: float, value: float) -> None:
    assert value_matches(repr(value), Range(min=low, max=high)) is (low <= value <= high)
    assert value_matches(repr(value), value)


@given(plain, st.lists(plain, min_size=1, max_size=4))
def test_list_means_any(value: str, conditions: list[str]) -> None:
    assert value_matches(value, tuple(conditions)) is any(value_matches(value, c) for c in conditions)


@given(st.text(max_size=20), st.text("*?a[].\\()+^$", max_size=10))
def test_any_pattern_is_safe(value: str, pattern: str) -> None:
    value_matches(value, pattern)


def rule(name: str, *models: str, priority: str = "routine", send_to: tuple[str, ...] = (), **match: Any) -> Rule:
    return Rule(name=name, match=match, models=models, priority=priority, send_to=send_to)


def test_every_condition_must_hold_and_missing_is_empty() -> None:
    both = rule("r", "m", Modality="CT", BodyPartExamined="CHEST")
    assert rule_matches(both, {"Modality": "CT", "BodyPartExamined": "CHEST"})
    assert not rule_matches(both, {"Modality": "CT"})
    assert not rule_matches(both, {"Modality": "CT", "BodyPartExamined": None})
    assert rule_matches(rule("r", "m", StationName="*"), {})
    assert rule_matches(rule("all", "m"), {})


def test_everyone_whom_a_matching_rule_names_is_notified() -> None:
    rules = [
        Rule(name="a", models=("lung",), notify=("ris", "ehr")),
        Rule(name="b", models=("lung",), notify=("ehr", "board")),
        Rule(name="c", models=("lung",), match={"Modality": "MR"}, notify=("never",)),
    ]
    (lung,) = requests_for(rules, {"Modality": "CT"})
    assert lung.notify == ("ris", "ehr", "board")


def test_rules_that_name_one_model_share_its_job() -> None:
    rules = [
        rule("a", "lung", "bone", priority="batch", send_to=("pacs",), Modality="CT"),
        rule("b", "lung", priority="stat", send_to=("archive", "pacs"), Modality="CT"),
        rule("c", "lung", priority="stat", send_to=("never",), Modality="MR"),
    ]
    lung, bone = requests_for(rules, {"Modality": "CT"})
    assert (lung.model, lung.rules, lung.destinations, lung.priority) == (
        "lung",
        ("a", "b"),
        ("pacs", "archive"),
        "stat",
    )
    assert (bone.model, bone.rules, bone.priority) == ("bone", ("a",), "batch")
    assert requests_for(rules, {"Modality": "US"}) == []


def test_steps_that_wait_have_jobs_of_their_own_behind_what_they_follow() -> None:
    chain = Rule(
        name="chain",
        send_to=("pacs",),
        steps=[
            {"name": "sum", "model": "sum", "after": ["detail"], "send_to": []},
            {"name": "detail", "model": "lung@2.0.0", "when": [{"step": "lungs", "measurement": "v", "min": 1}]},
            {"name": "lungs", "model": "lung", "results": ["SR"]},
        ],
    )
    lung, detail, sums = requests_for([chain, rule("plain", "lung", send_to=("archive",))], {})
    assert (lung.rules, lung.names, lung.step, lung.needs.any) == (("chain", "plain"), ("chain/lungs",), "", False)
    assert (lung.order.kinds_for("pacs"), lung.order.kinds_for("archive")) == (("SR",), ("SEG", "SR"))
    assert (detail.model, detail.step, detail.needs.steps) == ("lung@2.0.0", "chain/detail", ("chain/lungs",))
    assert (sums.step, sums.needs.after, sums.destinations) == ("chain/sum", ("chain/detail",), ())
    assert detail.destinations == ("pacs",)
