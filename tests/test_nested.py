"""Whole data sets within limits: agreement with pydicom, round trips, and hostile bytes."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicomnode import nested
from dicomnode.errors import MalformedDataSet
from dicomnode.nested import EXPLICIT_LITTLE, DataSet, Element, encode, items, parse, text

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
SYNTAXES = st.sampled_from([EXPLICIT_LITTLE, IMPLICIT_LITTLE])


def written(ds: Dataset, syntax: str) -> bytes:
    buffer = DicomIO(io.BytesIO())
    buffer.is_little_endian, buffer.is_implicit_VR = True, syntax == IMPLICIT_LITTLE
    write_dataset(buffer, ds)
    return buffer.parent.getvalue()


def read(data: bytes, syntax: str) -> Dataset:
    ds = read_dataset(io.BytesIO(data), syntax == IMPLICIT_LITTLE, True)
    ds.decode()
    return ds


WORDS = st.text("abcXYZ äöß山田", max_size=12).map(str.strip)
LEAVES = st.fixed_dictionaries(
    {},
    optional={
        "PatientName": WORDS,
        "StudyDescription": WORDS,
        "ReferencedSOPInstanceUID": st.sampled_from(["1.2.3", "1.2.34", ""]),
        "Rows": st.integers(0, 65535),
        "ImageComments": WORDS,
    },
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.tuples(LEAVES, st.lists(inner, max_size=3), st.booleans()),
    max_leaves=6,
)


def dataset(tree: object) -> Dataset:
    leaves, children, undefined = tree if isinstance(tree, tuple) else (tree, [], False)
    ds = Dataset()
    for keyword, value in leaves.items():
        setattr(ds, keyword, value)
    if children:
        ds.PerformedSeriesSequence = [dataset(child) for child in children]
        ds["PerformedSeriesSequence"].is_undefined_length = undefined
        for item in ds.PerformedSeriesSequence:
            item.is_undefined_length_sequence_item = undefined
    return ds


def same(found: DataSet, ds: Dataset) -> bool:
    keywords = [e.keyword for e in ds if e.keyword != "SpecificCharacterSet"]
    return len(found) == len(keywords) and all(
        len(items(found, k)) == len(ds[k].value) and all(map(same, items(found, k), ds[k].value))
        if ds[k].VR == "SQ"
        else text(found, k) == str(ds[k].value if ds[k].value is not None else "")
        for k in keywords
    )


@given(TREES, SYNTAXES, SYNTAXES)
def test_agrees_with_pydicom_and_comes_back(tree: object, syntax: str, other: str) -> None:
    ds = dataset(tree)
    ds.SpecificCharacterSet = "ISO_IR 192"
    found = parse(written(ds, syntax), syntax)
    assert same(found, ds)
    again = encode(found, other)
    assert parse(again, other) == found
    assert same(found, read(again, other))


@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE])
def test_character_sets_of_items_are_their_own(syntax: str) -> None:
    ds, item = Dataset(), Dataset()
    ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Müller"
    item.SpecificCharacterSet, item.StudyDescription = "GB18030", "胸部"
    plain = Dataset()
    plain.StudyDescription = "Größe"
    ds.PerformedSeriesSequence = [item, plain]
    found = parse(written(ds, syntax), syntax)
    assert text(found, "PatientName") == "Müller"
    assert [text(i, "StudyDescription") for i in items(found, "PerformedSeriesSequence")] == ["胸部", "Größe"]
    assert read(encode(found, EXPLICIT_LITTLE), EXPLICIT_LITTLE).SpecificCharacterSet == "ISO_IR 192"


def test_unknown_with_undefined_length_is_an_implicit_sequence() -> None:
    inner = written(dataset({"ReferencedSOPInstanceUID": "1.2.3"}), IMPLICIT_LITTLE)
    data = struct.pack("<HH2sHI", 0x0009, 0x1010, b"UN", 0, 0xFFFFFFFF)
    data += struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    found = parse(data, EXPLICIT_LITTLE)
    assert found == {0x00091010: Element("SQ", items=({0x00081155: Element("UI", b"1.2.3\0")},))}


def sequence(content: bytes) -> bytes:
    return struct.pack("<HH2sHI", 0x0040, 0x0340, b"SQ", 0, len(content)) + content


def item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def nest(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = sequence(item(data))
    return data


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (nest(nested.MAX_DEPTH + 1), "nested deeper"),
        (sequence(item(b"") * (nested.MAX_ITEMS + 1)), "sequence items"),
        (b"".join(struct.pack("<HH2sH", 9, n % 65536, b"LO", 0) for n in (5, 5)), "twice"),
        (struct.pack("<HH2sH", 8, 5, b"LO", 9) + b"x", "longer than"),
        (struct.pack("<HH2sH", 8, 5, b"lo", 0), "value representation"),
        (struct.pack("<HH2sHI", 8, 5, b"OB", 0, 0xFFFFFFFF), "undefined length"),
        (struct.pack("<HHI", 0xFFFE, 0xE00D, 0), "delimiters"),
        (sequence(struct.pack("<HH2sH", 8, 5, b"LO", 0)), "where a sequence item"),
        (sequence(struct.pack("<HHI", 0xFFFE, 0xE000, 100)), "an item is longer"),
        (b"\x08", "ends inside"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_beyond_the_limits(data: bytes, cause: str) -> None:
    with pytest.raises(MalformedDataSet, match=cause):
        parse(data, EXPLICIT_LITTLE)


def test_as_deep_as_allowed_and_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(nest(nested.MAX_DEPTH), EXPLICIT_LITTLE)
    monkeypatch.setattr(nested, "MAX_BYTES", 10)
    with pytest.raises(MalformedDataSet, match="more than 10 bytes"):
        parse(nest(1), EXPLICIT_LITTLE)


def test_what_is_too_long_for_its_vr_is_kept_as_unknown() -> None:
    data = struct.pack("<HHI", 0x0008, 0x0060, 70_000) + b"C" * 70_000
    found = parse(data, IMPLICIT_LITTLE)
    assert parse(encode(found, EXPLICIT_LITTLE), EXPLICIT_LITTLE) == {0x00080060: Element("UN", b"C" * 70_000)}
    assert encode(found, IMPLICIT_LITTLE) == data


@given(st.binary(max_size=300), SYNTAXES)
def test_any_bytes_are_read_or_refused(data: bytes, syntax: str) -> None:
    try:
        found = parse(data, syntax)
    except MalformedDataSet as error:
        assert not error.retryable
        return
    assert parse(encode(found, EXPLICIT_LITTLE), EXPLICIT_LITTLE).keys() == found.keys()
