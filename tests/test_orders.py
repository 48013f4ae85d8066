"""What rules ask for: joining, sharing out, storing; and what counts as critical."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dicomnode.critical import critical_hits, is_positive, unknown_keys, within
from dicomnode.orders import (
    ALTERNATIVE,
    DEFAULT_KINDS,
    KINDS,
    LABELMAP,
    LABELMAP_SR,
    Condition,
    Order,
    dump,
    join,
    load,
    order_for,
    shares,
    with_proposed,
)
from dicomnode.records import Analysis, Code, Finding, Measurement
from dicomnode.select.rules import order_of, requests_for
from dicomnode.settings import Range, Rule

conditions = st.builds(
    Condition,
    st.sampled_from(["a", "b"]),
    st.none() | st.floats(-5, 5),
    st.none() | st.floats(-5, 5),
    st.sampled_from(["", "*", "x"]),
)
orders = st.builds(
    order_for,
    st.lists(st.sampled_from(["pacs", "viewer", "ris"]), max_size=3),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.sampled_from(["binary", "labelmap"]),
    report_failures=st.booleans(),
    critical=st.lists(conditions, max_size=2),
)
EVERYTHING = [(n, kind) for n, kind in enumerate([LABELMAP, LABELMAP_SR, *KINDS, "SC"], start=1)]


@given(orders)
def test_a_stored_order_is_the_order(order: Order) -> None:
    assert load(dump(order)) == order


def test_a_job_of_an_older_version_has_the_order_of_then() -> None:
    assert load(None).made == DEFAULT_KINDS and not load(None).labelmap
    assert shares([(1, "SEG"), (2, "SR")], load(None), "pacs") == [(1, None), (2, None)]


@given(orders, orders)
def test_joined_orders_give_each_destination_what_its_rules_ask(one: Order, other: Order) -> None:
    both = join(one, other)
    assert both == join(join(one, other), other)
    for destination in {*one.kinds, *other.kinds}:
        asked = {k for o in (one, other) for k in o.kinds.get(destination, ())}
        assert set(both.kinds_for(destination)) == asked
        forms = {o.seg[destination] for o in (one, other) if destination in o.seg}
        assert both.seg.get(destination) == ("binary" if "binary" in forms else next(iter(forms), None))
    assert set(both.made) == {*one.made, *other.made}
    assert set(both.report_to) == {*one.report_to, *other.report_to}


@given(orders, st.sampled_from(["pacs", "viewer", "ris", ""]))
def test_nobody_gets_a_segmentation_twice_or_what_was_not_asked(order: Order, destination: str) -> None:
    kinds = dict(EVERYTHING)
    items = shares(EVERYTHING, order, destination)
    got = [kinds[result] for result, _ in items]
    assert not {"SEG", LABELMAP} <= set(got) and not {"SR", LABELMAP_SR} <= set(got)
    back = {alternative: kind for kind, alternative in ALTERNATIVE.items()}
    assert {back.get(kind, kind) for kind in got} == set(order.kinds_for(destination))
    for result, fallback in items:
        assert (fallback is None) == (kinds[result] not in back)
        assert fallback is None or kinds[fallback] == back[kinds[result]]


def test_without_a_finding_there_is_no_label_map_to_fall_back_from() -> None:
    order = order_for(["pacs"], seg="labelmap")
    assert order.labelmap and shares([(7, "SR")], order, "pacs") == [(7, None)]


def test_rules_that_share_a_model_share_the_work_not_the_wishes() -> None:
    rules = [
        Rule(name="a", models=("m",), send_to=("pacs",), results=("SEG",), seg="labelmap", report_failures=True),
        Rule(name="b", models=("m",), send_to=("viewer",), results=("SC", "SR"), critical={"v": Range(min=1)}),
    ]
    (request,) = requests_for(rules, {})
    assert request.order.made == ("SEG", "SR", "SC")
    assert request.order.kinds_for("viewer") == ("SR", "SC") and request.order.report_to == ("pacs",)
    assert request.order.critical == (Condition("v", 1.0),)
    assert order_of(Rule(name="c", models=("m",))).kinds == {"": DEFAULT_KINDS}


def test_a_rule_decides_whether_what_a_bundle_proposes_is_critical() -> None:
    proposed = (Condition("v", 1.0), Condition("f", value="*"))
    silent = order_of(Rule(name="a", models=("m",), critical={"w": True}))
    assert with_proposed(silent, proposed) is silent
    taken = order_of(Rule(name="b", models=("m",), critical={"*": True, "v": Range(min=1)}))
    assert load(dump(taken)) == taken
    assert with_proposed(taken, proposed).critical == (Condition("v", 1.0), Condition("f", value="*"))
    assert with_proposed(taken, ()).critical == (Condition("v", 1.0),)
    assert with_proposed(join(silent, taken), proposed).critical == (
        Condition("w", value="*"), Condition("v", 1.0), Condition("f", value="*")
    )  # fmt: skip
    for wrong in (False, "proposed", Range(min=1)):
        with pytest.raises(ValidationError, match="bundle proposes"):
            Rule(name="c", models=("m",), critical={"*": wrong})


def finding(value: Code | None, probability: float | None, threshold: float | None = 0.5) -> Finding:
    return Finding("f", Code("1", "X", "Something"), value, probability, threshold)


def analysis(*findings: Finding, value: float = 5.0) -> Analysis:
    unit = Code("ml", "UCUM", "ml")
    return Analysis(None, (), (), (Measurement("m", Code("2", "X", "Size"), value, unit),), findings=findings)


PRESENT, ABSENT = Code("52101004", "SCT", "Present"), Code("272519000", "SCT", "Absent")


def test_positive_by_value_else_by_threshold() -> None:
    assert is_positive(finding(PRESENT, 0.1)) and not is_positive(finding(ABSENT, 0.9))
    assert is_positive(finding(None, 0.5)) and not is_positive(finding(None, 0.49))
    assert not is_positive(finding(None, 0.9, None)) and is_positive(finding(Code("9", "X", "Grade 3"), None))


@given(st.floats(), st.none() | st.floats(-9, 9), st.none() | st.floats(-9, 9))
def test_bounds_are_inclusive_and_nothing_contains_nan(value: float, low: float | None, high: float | None) -> None:
    expected = math.isfinite(value) and (low is None or low <= value) and (high is None or value <= high)
    assert within(value, Condition("k", low, high)) is expected


def test_hits_name_what_was_met() -> None:
    found = analysis(finding(PRESENT, 0.8))
    wanted = [Condition("m", maximum=5.0), Condition("f", value="*"), Condition("f", minimum=0.9), Condition("q", 1.0)]
    hits = critical_hits(found, wanted)
    assert [(h.key, h.text) for h in hits] == [
        ("m", "Size of the series: 5 ml"),
        ("f", "Something: Present, probability 0.8"),
    ]
    assert unknown_keys(found, wanted) == ("q",)
    assert [h.key for h in critical_hits(found, [Condition("f", value="PRESENT"), Condition("f", value="absent")])] == [
        "f"
    ]
    assert critical_hits(analysis(value=math.nan), [Condition("m", minimum=-1.0)]) == ()
