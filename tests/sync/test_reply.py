"""What replies mean, as functions on values."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.sync.reply import Fate, Reply, judge, parse_reply, retry_after_seconds

A, B = "1.2.3", "1.2.4"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

JSON = json.dumps(
    {
        "00081190": {"vr": "UR", "Value": ["http://x"]},
        "00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [A]}}]},
        "00081198": {
            "vr": "SQ",
            "Value": [{"00081155": {"vr": "UI", "Value": [B]}, "00081197": {"vr": "US", "Value": [43264]}}],
        },
    }
).encode()
XML = f"""<?xml version="1.0" encoding="utf-8"?><!-- hello --><NativeDicomModel xml:space="preserve">
<DicomAttribute keyword="ReferencedSOPSequence" tag="00081199" vr="SQ"><Item number="1">
<DicomAttribute tag="00081150" vr="UI"><Value number="1">1.2.840.10008.5.1.4.1.1.7</Value></DicomAttribute>
<DicomAttribute tag="00081155" vr="UI"><Value number="1">{A}</Value></DicomAttribute></Item></DicomAttribute>
<DicomAttribute tag="00081198" vr="SQ"><Item number="1"><DicomAttribute tag="00081155" vr="UI">
<Value number="1">{B}</Value></DicomAttribute><DicomAttribute tag="00081197" vr="US"><Value number="1">43264</Value>
</DicomAttribute></Item></DicomAttribute></NativeDicomModel>""".encode()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/dicom+json; charset=utf-8", JSON),
        ("application/dicom+json", b"[" + JSON + b"]"),
        ("application/json", JSON),
        ("text/plain", JSON),
        ("application/dicom+xml; charset=UTF-8", XML),
        ("multipart/related", XML),
    ],
)
def test_names_stored_and_failed(kind: str, body: bytes) -> None:
    assert parse_reply(kind, body) == Reply(frozenset([A]), {B: 43264})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"3",
        JSON[:-9],
        XML[:-9],
        b"[" * 100_000,
        b"\xff\xfe",
        b"<html>",
        b'<!DOCTYPE x [<!ENTITY a "b">]><NativeDicomModel>&a;</NativeDicomModel>',
    ],
)
def test_damaged_replies_are_not_replies(body: bytes) -> None:
    for kind in ("application/dicom+json", "application/dicom+xml", ""):
        with pytest.raises(ValueError):
            parse_reply(kind, body)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_raise_value_error(body: bytes) -> None:
    for kind in ("application/dicom+json", "application/dicom+xml", ""):
        with contextlib.suppress(ValueError):
            parse_reply(kind, body)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda c: (
            st.lists(c) | st.dictionaries(st.sampled_from(["00081199", "00081198", "Value", "00081155", "00081197"]), c)
        ),
    )
)
def test_any_json_parses_or_raises_value_error(value: object) -> None:
    with contextlib.suppress(ValueError):
        parse_reply("application/dicom+json", json.dumps(value).encode())


@pytest.mark.parametrize(
    ("status", "reply", "fate"),
    [
        (200, Reply(frozenset([A])), Fate.stored),
        (202, Reply(frozenset([A])), Fate.stored),
        (200, Reply(), Fate.retry),  # success without naming the instance is no success
        (200, None, Fate.retry),
        (409, Reply(failed={A: 0xA900}), Fate.reject),
        (409, Reply(failed={A: 0xC000}), Fate.reject),
        (202, Reply(failed={A: 0x0122}), Fate.reject),
        (409, Reply(failed={A: 0xA700}), Fate.retry),
        (409, Reply(failed={A: 0x0110}), Fate.retry),
        (409, Reply(failed={A: 0}), Fate.retry),
        (409, Reply(failed={A: 0x0111}), Fate.stored),
        (409, Reply(failed={A: 45070}), Fate.stored),
        (409, Reply(failed={A: 0x0124}), Fate.operator),
        (409, None, Fate.retry),
        (301, None, Fate.operator),
        (401, None, Fate.operator),
        (403, None, Fate.operator),
        (404, None, Fate.operator),
        (400, None, Fate.reject),
        (413, None, Fate.reject),
        (415, Reply(frozenset([A])), Fate.reject),
        (408, None, Fate.retry),
        (429, None, Fate.retry),
        (500, Reply(frozenset([A])), Fate.retry),
        (503, None, Fate.retry),
        (204, None, Fate.retry),
    ],
)
def test_judgement(status: int, reply: Reply | None, fate: Fate) -> None:
    assert judge(status, reply, [A])[A].fate is fate


def test_a_refused_request_of_many_is_tried_one_by_one() -> None:
    assert {v.fate for v in judge(400, None, [A, B]).values()} == {Fate.alone}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Fri, 02 Jan 2026 03:05:05 GMT", 60.0),
        ("Fri, 02 Jan 2026 03:00:00 GMT", 0.0),
        ("99999999999999999999", 3600.0),
        ("Fri, 02 Jan 2099 03:00:00 GMT", 3600.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds
