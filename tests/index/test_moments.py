"""Dates with their times: combined ranges and zones, against datetime."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.index.moments import (
    adjusted,
    combines,
    in_combined,
    moved,
    parse_offset,
    range_form,
    system_offset,
    widened,
)
from dicomnode.index.values import bounds, matches

OFFSETS = st.builds(lambda h, m: (h, m), st.integers(-12, 13), st.sampled_from([0, 30, 45]))
MOMENTS = st.datetimes(datetime(1950, 1, 1), datetime(2090, 1, 1))


def offset_text(hours: int, minutes: int) -> str:
    total = hours * 60 + minutes
    return f"{'-' if total < 0 else '+'}{abs(total) // 60:02}{abs(total) % 60:02}"


def none(_: datetime) -> timedelta:
    return timedelta()


@given(MOMENTS, OFFSETS, OFFSETS)
def test_moved_is_the_same_moment(moment: datetime, stored: tuple[int, int], wanted: tuple[int, int]) -> None:
    own, other = (timedelta(hours=h, minutes=m) for h, m in (stored, wanted))
    if not timedelta(hours=-12) <= own <= timedelta(hours=14):
        return
    date, time = moved(f"{moment:%Y%m%d}", f"{moment:%H%M%S.%f}", offset_text(*stored), other, none)
    assert datetime.strptime(date + time, "%Y%m%d%H%M%S.%f") - other == moment - own


@pytest.mark.parametrize(
    ("date", "time", "stored", "expected"),
    [
        ("20240101", "003000", "+0100", ("20231231", "233000")),
        ("20240229", "23", "-0100", ("20240301", "00")),
        ("20240229", "23", "-0030", ("20240229", "2330")),
        ("2024.01.01", "00:30:15", "+0100", ("20231231", "233015")),
        ("", "003000.5", "+0100", ("", "233000.5")),
        ("20240101", "", "+0100", ("20240101", "")),
        ("20240101", "noon", "+0100", ("20240101", "noon")),
        ("sometime", "1000", "+0100", ("sometime", "1000")),
        ("20240230", "1000", "+0100", ("20240230", "1000")),
        ("00010101", "0000", "+0100", ("00010101", "0000")),
        ("20240101", "2460", "+0100", ("20240101", "2460")),
        ("20240101", "1000", "", ("20240101", "0800")),
        ("20240101", "1000", "late", ("20240101", "0800")),
    ],
)
def test_moved_to_utc(date: str, time: str, stored: str, expected: tuple[str, str]) -> None:
    """What has no offset of its own is in the node's zone, here +0200."""
    assert moved(date, time, stored, timedelta(), lambda _: timedelta(hours=2)) == expected


@pytest.mark.parametrize("text", ["", "0100", "+1500", "-1300", "+0160", "+01:00", "+01٠0", "UTC"])
def test_what_is_no_offset(text: str) -> None:
    assert parse_offset(text) is None
    assert parse_offset(" +0530 ") == timedelta(hours=5, minutes=30)
    assert parse_offset("-0330") == timedelta(hours=-3, minutes=-30)


def test_system_offset_never_raises() -> None:
    assert system_offset(datetime(2024, 7, 1, 12)) == datetime(2024, 7, 1, 12).astimezone().utcoffset()
    for moment in (datetime.min, datetime.max):
        assert isinstance(system_offset(moment), timedelta)


@given(MOMENTS, MOMENTS, MOMENTS)
def test_combined_range_is_one_range(one: datetime, other: datetime, stored: datetime) -> None:
    """C.2.2.2.5.4: date and time together, not a time on each day."""
    first, last = sorted((one, other))
    for begin, end in ((first, last), (first, None), (None, last)):
        dates = "-".join("" if m is None else f"{m:%Y%m%d}" for m in (begin, end))
        times = "-".join("" if m is None else f"{m:%H%M%S.%f}" for m in (begin, end))
        assert combines(dates, times)
        expected = (begin or datetime.min) <= stored <= (end or datetime.max)
        assert in_combined(dates, times, f"{stored:%Y%m%d}", f"{stored:%H%M%S.%f}") == expected


def test_the_example_of_the_standard() -> None:
    dates, times = "20060705-20060707", "1000-1800"
    inside = [("20060705", "1000"), ("20060706", "0300"), ("20060706", ""), ("20060705", ""), ("20060707", "180030")]
    outside = [("20060705", "0959"), ("20060707", "1801"), ("20060708", ""), ("", "1200"), ("20060706", "x")]
    assert all(in_combined(dates, times, *moment) for moment in inside)
    assert not any(in_combined(dates, times, *moment) for moment in outside)
    assert not matches("TM", times, "0300"), "without negotiation it is a time of each day"


@pytest.mark.parametrize(
    ("date", "time"),
    [("20240101", "1000"), ("20240101-", "-1000"), ("20240101-20240102", "1000-"), ("20240101-", "x-"), ("-", "-")],
)
def test_what_is_not_combined(date: str, time: str) -> None:
    assert not combines(date, time)


def test_forms() -> None:
    assert [range_form(q) for q in ("a-b", " a -", "- b", "-", "a", "")] == ["a-b", "a-", "-b", "", "", ""]


@given(MOMENTS, MOMENTS, OFFSETS, OFFSETS)
def test_widened_dates_hold_every_moment_of_other_zones(
    query: datetime, stored: datetime, own: tuple[int, int], zone: tuple[int, int]
) -> None:
    key = f"{query:%Y%m%d}-"
    wanted = timedelta(hours=zone[0], minutes=zone[1])
    date, _ = moved(f"{stored:%Y%m%d}", f"{stored:%H%M}", offset_text(*own), wanted, none)
    if matches("DA", key, date):
        low, high = widened(bounds("DA", key)) or ("", "")
        assert low <= f"{stored:%Y%m%d}" <= high


def test_open_ranges_and_days_that_do_not_exist_stay_open() -> None:
    assert widened(bounds("DA", "-20240105")) == ("00000000", "20240107")
    assert widened(bounds("DA", "20240105-")) == ("20240103", "99999999")
    assert widened(bounds("DA", "20240230")) == ("00000000", "99999999")
    assert widened(None) is None


def test_a_row_is_moved_as_a_whole() -> None:
    row = {"StudyDate": "20240101", "StudyTime": "0030", "SeriesTime": "0030", "PatientID": "1", "zone": "+0100"}
    assert adjusted(row, "zone", timedelta(), none) == {
        "StudyDate": "20231231",
        "StudyTime": "2330",
        "SeriesTime": "2330",
        "PatientID": "1",
        "zone": "+0100",
    }
