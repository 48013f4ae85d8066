"""Earlier studies: who is the same patient, what is earlier, which series is taken."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.chains import Fate, Needs, When, decide_prior
from dicomnode.chains import dump as dump_needs
from dicomnode.chains import load as load_needs
from dicomnode.priors import (
    PRIOR_TABLE,
    Candidate,
    PriorState,
    Wish,
    askable,
    changes,
    days_between,
    dump,
    is_earlier,
    load,
    ranked,
    same_patient,
    study_dates,
)

NOW = {
    "PatientID": "P1",
    "IssuerOfPatientID": "KH",
    "PatientBirthDate": "19600101",
    "StudyInstanceUID": "1.9",
    "StudyDate": "20260112",
    "StudyTime": "093015",
    "Modality": "CT",
    "BodyPartExamined": "CHEST",
    "SeriesDescription": "Lung 1.0",
}


def series(**changed: Any) -> Candidate:
    images = int(changed.pop("images", 100))
    old = {"StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.1.1", "StudyDate": "20250112", "StudyTime": "080000"}
    return Candidate({**NOW, **old, **changed}, images)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"PatientID": "P2"}, False),
        ({"PatientID": ""}, False),
        ({"PatientID": " P1 "}, True),
        ({"IssuerOfPatientID": "OTHER"}, False),
        ({"IssuerOfPatientID": ""}, True),
        ({"IssuerOfPatientID": "", "PatientBirthDate": ""}, False),
        ({"IssuerOfPatientID": "", "PatientBirthDate": "19600102"}, False),
        ({"PatientBirthDate": "19600102"}, False),
        ({"PatientBirthDate": ""}, True),
    ],
)
def test_same_patient(changed: dict[str, str], same: bool) -> None:
    assert same_patient(NOW, {**NOW, **changed}) is same
    assert same_patient({**NOW, **changed}, NOW) is same


@pytest.mark.parametrize(
    ("changed", "age", "earlier"),
    [
        ({}, None, False),
        ({"StudyInstanceUID": "1.1"}, None, False),
        ({"StudyInstanceUID": "1.1", "StudyTime": "093014"}, None, True),
        ({"StudyInstanceUID": "1.1", "StudyTime": "093015.5"}, None, False),
        ({"StudyInstanceUID": "1.1", "StudyTime": ""}, None, False),
        ({"StudyInstanceUID": "1.1", "StudyDate": "20260111"}, None, True),
        ({"StudyInstanceUID": "1.1", "StudyDate": "20260113"}, None, False),
        ({"StudyInstanceUID": "1.1", "StudyDate": "20250112"}, 365, True),
        ({"StudyInstanceUID": "1.1", "StudyDate": "20250112"}, 364, False),
        ({"StudyInstanceUID": "1.1", "StudyDate": "not a date"}, None, False),
        ({"StudyInstanceUID": "1.1", "StudyDate": ""}, None, False),
    ],
)
def test_earlier(changed: dict[str, str], age: float | None, earlier: bool) -> None:
    assert is_earlier(NOW, {**NOW, **changed}, age) is earlier


def test_latest_study_and_the_series_most_like_the_current_one() -> None:
    old = series(StudyInstanceUID="1.0", SeriesInstanceUID="old", StudyDate="20240101")
    thick = series(SeriesInstanceUID="thick", SeriesDescription="Lung 5.0", images=500)
    short = series(SeriesInstanceUID="short", images=20)
    right = series(SeriesInstanceUID="right")
    wrong = [
        series(Modality="SR"),
        series(PatientID="P2"),
        series(StudyDate="20270101"),
        series(StudyInstanceUID="1.9"),
    ]
    found = ranked(NOW, [old, thick, *wrong, short, right], Wish())
    assert [c.text("SeriesInstanceUID") for c in found] == ["right", "short", "thick", "old"]
    assert ranked(NOW, [old, thick], Wish(max_age_days=400)) == [thick]
    thin = Wish(match={"Modality": "CT", "SliceThickness": {"min": None, "max": 1.5}})
    given = [series(SliceThickness="1.0"), series(SliceThickness="5"), series()]
    assert ranked(NOW, given, thin) == [given[0]]
    assert len(ranked(NOW, given, thin, lenient=True)) == 2, "what a peer did not return is not known"


dates = st.dates().map(lambda d: f"{d.year:04}{d.month:02}{d.day:02}")
texts = st.one_of(st.text(max_size=12), dates)


@given(
    st.lists(st.fixed_dictionaries({k: texts for k in ("StudyDate", "StudyTime", "SeriesDescription")}), max_size=6),
    texts,
    texts,
)
def test_any_text_is_ranked_and_nothing_of_the_future_is_taken(rows: list[dict[str, str]], day: str, time: str) -> None:
    current = {**NOW, "StudyDate": day, "StudyTime": time}
    found = ranked(current, [series(**row) for row in rows], Wish())
    ages = [days_between(current, c.attributes) for c in found]
    assert all(age is not None and age >= 0 for age in ages) and ages == sorted(ages)  # type: ignore[type-var]
    assert ranked(current, found, Wish()) == found
    assert isinstance(askable(current), str) and isinstance(study_dates(current, 30.5), str)


def test_who_cannot_be_asked_for() -> None:
    assert askable(NOW) == ""
    assert "no Patient ID" in askable({**NOW, "PatientID": " "})
    assert "meaning in queries" in askable({**NOW, "PatientID": "P*"})
    assert "no date" in askable({**NOW, "StudyDate": ""})
    assert "neither an issuer" in askable({**NOW, "IssuerOfPatientID": "", "PatientBirthDate": ""})
    assert study_dates(NOW, None) == "-20260112" and study_dates(NOW, 11) == "20260101-20260112"


def test_a_wish_is_kept_as_it_is() -> None:
    wish = Wish({"Modality": ["CT", "MR"], "KVP": {"min": 100, "max": None}}, 700, ("index", "pacs"), 30, compare=False)
    assert load(dump(wish)) == wish
    needs = Needs(("a",), (When(prior=True),), wish)
    assert load_needs(dump_needs(needs, {"a": 1})) == (needs, {"a": 1})


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("found", [True, False])
def test_condition_on_an_earlier_study(wanted: bool | None, found: bool) -> None:
    needs = Needs(when=() if wanted is None else (When(prior=wanted),), prior=Wish())
    decision = decide_prior(needs, found=found, cause="none in index")
    assert decision.fate is (Fate.run if wanted in (None, found) else Fate.skip)
    assert (decision.fate is Fate.run) == (decision.reason == "")


def test_every_state_can_end() -> None:
    """From each state that is not final there is a way to both ends, and none leads out of them."""
    final = {PriorState.found, PriorState.none}
    for state in PriorState:
        reached = {to for (at, _), to in PRIOR_TABLE.items() if at is state}
        assert (final <= reached) if state not in final else not reached


def test_changes_need_the_same_key_segment_and_unit() -> None:
    now = [
        {"key": "v", "segment": "L", "value": 5.0, "unit": "ml"},
        {"key": "v", "segment": "R", "value": 1.0, "unit": "ml"},
    ]
    before = [
        {"key": "v", "segment": "L", "value": 3.0, "unit": "ml"},
        {"key": "v", "segment": "R", "value": 1.0, "unit": "l"},
    ]
    assert changes(now, before) == [
        {"key": "v", "segment": "L", "unit": "ml", "value": 5.0, "before": 3.0, "change": 2.0}
    ]
