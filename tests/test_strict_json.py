"""JSON from somebody else takes memory by what it says, not by what it could be made to take."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from dicomnode.strict_json import MOST_VALUES, many, read
from dicomnode.sync.feed_page import MOST_DATA_BYTES

TINY = [b"[]", b"{}", b'{"":0}', b"0", b'"ab"', b"1.5", b'{"a":{"b":[{}]}}', b'["\\",[{\\\\"]']


@pytest.mark.parametrize("tiny", TINY)
def test_more_values_than_there_is_memory_for_are_not_made(tiny: bytes) -> None:
    body = b"[" + (tiny + b",") * MOST_VALUES + tiny + b"]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"more than {MOST_VALUES} values"):
            read(body)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_stands_in_texts_is_no_value() -> None:
    text = ',[{\\"' * MOST_VALUES
    found = read(json.dumps({"records": [{"text": text}]}).encode())
    assert found == {"records": [{"text": text}]}


def test_a_record_within_its_limits_is_read_whatever_it_holds() -> None:
    row = {"data": {"n": [0] * (MOST_DATA_BYTES // 2)}, "settled": [""] * (MOST_DATA_BYTES // 3)}
    body = json.dumps(row, separators=(",", ":")).encode()
    assert read(body) == row and not many(body, MOST_VALUES)


@pytest.mark.parametrize("most", range(6))
def test_values_are_counted_by_what_begins_them(most: int) -> None:
    body = b'{"a,[{": [1, {}], "b": 2}'
    assert many(body, most) is (most < 5), "two brackets of objects, one of a list, two commas"


@pytest.mark.parametrize(
    "body", [b'"' + b'\\"' * (4 << 20), b'""' * (4 << 20), b'"' + b"," * (4 << 20), b"\\" * 9 + b'"']
)
def test_what_is_no_json_is_looked_at_once(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"values|no JSON"):
        read(b"[" * 9 + body + b"," * MOST_VALUES)
