"""Pseudonyms: keyed, steady, and no way back without the mapping."""

from __future__ import annotations

import re
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.identity import derived_uid
from dicomnode.pseudonyms import Pseudonyms, shifted, traces

ONE, OTHER = Pseudonyms(b"k" * 32), Pseudonyms(b"l" * 32)
uids = st.lists(st.integers(0, 10**9), min_size=3, max_size=6).map(lambda n: "1.3." + ".".join(map(str, n)))


@given(uids, uids)
def test_uids(one: str, other: str) -> None:
    alias = ONE.uid(one)
    assert re.fullmatch(r"2\.25\.\d{1,39}", alias) and alias == ONE.uid(one)
    assert alias != OTHER.uid(one), "another key, another pseudonym"
    assert (ONE.uid(other) == alias) == (one == other)
    assert ONE.uid("1.2.840.10008.5.1.4.1.1.2") == "1.2.840.10008.5.1.4.1.1.2" and ONE.uid("") == ""
    assert ONE.text(f"see {one}, of 2026-01-31.", 31) == f"see {alias}, of 2025-12-31."


def test_uids_in_text_and_what_only_looks_like_one() -> None:
    for uid in (derived_uid("series"), "1.2.3.4444", "1.2.3.4.5"):
        assert (
            ONE.text(f"Input x: series {uid}. Then ({uid})", 0)
            == f"Input x: series {ONE.uid(uid)}. Then ({ONE.uid(uid)})"
        )
    plain = "engine 1.32.0, at 127.0.0.1 and 1.1.1.1; 2.5 ml, 1.2.840.10008.1.1"
    assert ONE.text(plain, 0) == plain
    known = frozenset({"1.32.0", "1.1.1.1", "3.7.9"})
    assert ONE.text("1.32.0 1.1.1.1 3.7.9 3.7.9.1", 0, known) == " ".join(
        [ONE.uid("1.32.0"), ONE.uid("1.1.1.1"), ONE.uid("3.7.9"), "3.7.9.1"]
    )


@given(st.text(max_size=20), st.text(max_size=20), st.dates(date(1900, 1, 1)), st.dates(date(1900, 1, 1)))
def test_patients_and_dates(patient: str, issuer: str, one: date, other: date) -> None:
    patient, issuer = (t.encode("utf-8", "replace").decode() for t in (patient, issuer))
    assert re.fullmatch(r"P[A-Z2-7]{20}", ONE.patient(patient, issuer))
    days = ONE.days(patient, issuer)
    assert 1 <= days <= 365
    moved = [date.fromisoformat(shifted(d.strftime("%Y%m%d").zfill(8), days)) for d in (one, other)]
    assert moved[1] - moved[0] == other - one, "intervals stay"


@pytest.mark.parametrize("value", ["", "2026", "20261301", "nonsense", "00010101"])
def test_what_is_no_whole_date_becomes_empty(value: str) -> None:
    assert shifted(value, 365) == ""


def test_moments_keep_their_time() -> None:
    assert shifted("20260131235959.5+0100", 31) == "20251231235959.5+0100"


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        Pseudonyms(b"short")


@pytest.mark.parametrize(
    "text",
    ["09.03.1970", "9.3.1970", "9. 3. 70", "03/09/1970", "3-9-70", "1970/03/09", "19700309", "1970年3月9日",
     "1970 年 03 月 09 日"],
)  # fmt: skip
def test_a_birth_date_in_text_is_a_trace_however_it_is_written(text: str) -> None:
    known = traces("Do^Li", "19700309")
    assert known is not None
    assert known.sub("*", f"(born {text}), size 3.9 mm") == "(born *), size 3.9 mm"
    assert known.sub("*", f"born {text}.") == "born *."


@pytest.mark.parametrize(
    "text", ["9.3.1971", "19.3.1970", "9.3.19701", "1970.3", "3.9 cm, 70 years", "13.9.70", "1.9.3.70"]
)
def test_other_days_and_numbers_are_none(text: str) -> None:
    known = traces("19700309", "4711")
    assert known is not None and known.sub("*", text) == text


def test_what_looks_like_no_day_is_a_trace_as_it_is() -> None:
    known = traces("19701309")
    assert known is not None and known.sub("*", "19701309 9.13.1970") == "* 9.13.1970"


def test_traces_of_a_patient_in_text() -> None:
    known = traces("Mustermann^Eva=王^小明", "ID-4711", "")
    assert known is not None
    said = "Report of EVA mustermann (ID-4711), 王小明; medieval Evaluation"
    assert known.sub("*", said) == "Report of * * (*), 王*; medieval Evaluation"
    assert traces("", "A1") is None
