"""Dates and times that belong together: combined matching and time zones (PS3.4 C.2.2.2.5.4). Pure.

Both only where they were negotiated. Times are adjusted by moving what is stored into the
zone of the query, Timezone Offset From UTC (0008,0201); it is matched and returned so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from dicomnode.index.keys import TIMES
from dicomnode.index.values import HIGHEST, LOWEST, bounds, span

LocalOffset = Callable[[datetime], timedelta]
"""Offset from UTC of this node's own zone at a local moment: of what is stored without an offset."""

_OFFSET = re.compile(r"([+-])(\d\d)([0-5]\d)", re.ASCII)
_TIME = re.compile(r"(\d\d)(?::?(\d\d)(?::?(\d\d)(\.\d{1,6})?)?)?", re.ASCII)


def system_offset(moment: datetime) -> timedelta:
    """By the machine's zone, summer time included."""
    try:
        return moment.astimezone().utcoffset() or timedelta()
    except (OverflowError, OSError, ValueError):  # years that the C library cannot do
        return timedelta()


def parse_offset(text: str) -> timedelta | None:
    """Timezone Offset From UTC, ``+0100``; None when it is none (PS3.3 C.12.1.1.8: -1200 to +1400)."""
    found = _OFFSET.fullmatch(text.strip(" "))
    if found is None:
        return None
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    offset = -offset if found[1] == "-" else offset
    return offset if timedelta(hours=-12) <= offset <= timedelta(hours=14) else None


def moved(date: str, time: str, stored: str, wanted: timedelta, local: LocalOffset) -> tuple[str, str]:
    """A stored date and time in the zone of the query; unchanged where there is no time or it is not one.

    ``stored`` is the object's own offset as text. A time without a date moves within its day.
    """
    found = _TIME.fullmatch(time.strip(" "))
    day = span("DA", date) if date.strip(" ") else ("20000101", "")
    if found is None or day is None:
        return date, time
    try:
        year, month, of_month = int(day[0][:4]), int(day[0][4:6]), int(day[0][6:])
        moment = datetime(year, month, of_month, int(found[1]), int(found[2] or "00"))
        own = parse_offset(stored)
        there = moment + (wanted - (own if own is not None else local(moment)))
    except (ValueError, OverflowError):
        return date, time
    text = f"{there.year:04}" + there.strftime("%m%d%H%M")
    tail = (found[3] or "") + (found[4] or "")
    precise = found[2] is not None or text[10:12] != "00"
    return (text[:8] if date.strip(" ") else date), text[8:10] + (text[10:12] if precise else "") + tail


def adjusted(row: Mapping[str, str], offset_key: str, wanted: timedelta, local: LocalOffset) -> dict[str, str]:
    """A row with each date and time that it has both of, or a time alone, in the zone of the query."""
    found = dict(row)
    for date, time in TIMES.items():
        if time in found:
            day, found[time] = moved(found.get(date, ""), found[time], found[offset_key], wanted, local)
            if date in found:
                found[date] = day
    return found


def widened(dates: tuple[str, str] | None) -> tuple[str, str] | None:
    """A range of dates as it may stand in other zones: two of them are at most 26 hours apart."""
    if dates is None:
        return None
    return _days_from(dates[0], -2) or LOWEST["DA"], _days_from(dates[1], 2) or HIGHEST["DA"]


def _days_from(date: str, days: int) -> str:
    """Empty for what is no date of the calendar, as the ends of an open range."""
    try:
        moment = datetime.strptime(date, "%Y%m%d") + timedelta(days=days)
    except (ValueError, OverflowError):
        return ""
    return f"{moment.year:04}{moment:%m%d}"


def range_form(query: str) -> str:
    """``a-b``, ``a-``, ``-b``, or nothing where a key is no range."""
    first, dash, last = query.partition("-")
    if not dash or not (first.strip(" ") or last.strip(" ")):
        return ""
    return ("a" if first.strip(" ") else "") + "-" + ("b" if last.strip(" ") else "")


def combines(date: str, time: str) -> bool:
    """Whether a pair of keys is one range: both are ranges, and of the same form."""
    form = range_form(date)
    return bool(form) and form == range_form(time) and bounds("DA", date) is not None and bounds("TM", time) is not None


def in_combined(date_key: str, time_key: str, date: str, time: str) -> bool:
    """A stored date and time against two keys that are one range.

    A date without a time stands for its whole day: it matches when some of that is in the range.
    """
    dates, times = bounds("DA", date_key), bounds("TM", time_key)
    day = span("DA", date)
    if dates is None or times is None or day is None:
        return False
    moment = span("TM", time) if time.strip(" ") else (LOWEST["TM"], HIGHEST["TM"])
    if moment is None:
        return False
    last = moment[0] if time.strip(" ") else moment[1]
    return dates[0] + times[0] <= day[0] + last and day[0] + moment[0] <= dates[1] + times[1]
