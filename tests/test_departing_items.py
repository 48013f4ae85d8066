"""What is exchanged as bytes is what pydicom makes of it: the same bytes, or the same refusal."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import config, dcmread, dcmwrite
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicomnode import deidentify as module
from dicomnode.deidentify import Departure, deidentify
from dicomnode.departing_items import NotPlain, joined, parse
from dicomnode.errors import MalformedDataSet
from dicomnode.orders import KINDS, order_for
from dicomnode.pseudonyms import Pseudonyms
from tests.encode.source_case import SOURCES, case_of
from tests.encode.test_kinds import encode
from tests.sync.index_case import secondary_capture

CODEC = Pseudonyms(b"k" * 32)
EXAMPLES = int(os.environ.get("DICOMNODE_DEPARTURE_EXAMPLES", "60"))
ONE = secondary_capture()[0]


def outcome(content: bytes) -> Departure | str:
    try:
        return deidentify(content, CODEC)
    except MalformedDataSet as error:
        return error.cause


def both_ways(content: bytes) -> tuple[Departure | str, Departure | str]:
    """As bytes where it is plain, and the long way."""
    short = outcome(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_plain_sequences", lambda _: {})
        return short, outcome(content)


def file_of(ds: Dataset) -> bytes:
    buffer = BytesIO()
    with config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["ct", "enhanced-ct", "cr"])
def test_every_kind_of_result(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = SOURCES[name]()
    for ds in sources:
        ds.PatientName, ds.PatientID, ds.BurnedInAnnotation = "Canary^Émile", "CANARY", "NO"
        ds.SpecificCharacterSet = "ISO_IR 192"
    long_ways: list[int] = []
    copy = module._copy

    def seen(ds: Dataset, rules: Any, done: Any = ()) -> Dataset:
        long_ways.append(1)
        return copy(ds, rules, done)

    for made in encode(case_of(sources, tmp_path), order_for(["pacs"], KINDS, "labelmap")):
        short, long = both_ways(made.part10)
        assert isinstance(short, Departure) and short == long, made.kind
        monkeypatch.setattr(module, "_copy", seen)
        long_ways.clear()
        deidentify(made.part10, CODEC)
        assert len(long_ways) == 1, f"all sequences of a {made.kind} are plain: that is what it is for"
        monkeypatch.setattr(module, "_copy", copy)


UIDS = st.sampled_from(
    ["", "2.25.1234", str(ONE.StudyInstanceUID), "1.2.840.10008.5.1.4.1.1.2", "1.2.3\\2.25.9", " 1.2"]
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "CANARY", "a\\b", "DCM", "SCT", "121106", "TEXT", "x ", "2026-01-02 of CANARY-ID", "Ü 王"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
)
MOMENTS = st.sampled_from(["", "20260102", "20260102030405.5+0100", "2026", "20260102\\20260103", "2026-01-02"])
LEAVES: dict[str, tuple[str, Any]] = {
    "CodeValue": ("SH", TEXTS),
    "CodingSchemeDesignator": ("SH", TEXTS),
    "CodeMeaning": ("LO", TEXTS),
    "TextValue": ("UT", TEXTS),
    "SegmentDescription": ("ST", TEXTS),
    "ContentCreatorName": ("PN", TEXTS),
    "PatientName": ("PN", TEXTS),
    "PatientID": ("LO", TEXTS),
    "UID": ("UI", UIDS),
    "ReferencedSOPInstanceUID": ("UI", UIDS),
    "Date": ("DA", MOMENTS),
    "DateTime": ("DT", MOMENTS),
    "ValueType": ("CS", st.sampled_from(["", "TEXT", "PNAME", "CODE", "text", "TEXT\\PNAME"])),
    "NumericValue": ("DS", st.sampled_from(["", "1", "1.5\\2"])),
    "GraphicData": ("FL", st.sampled_from([1.0, [1.0, 2.0]])),
    "ReferencedFrameNumber": ("IS", st.sampled_from(["1", "1\\2"])),
    "SpecificCharacterSet": ("CS", st.sampled_from(["ISO_IR 192", "ISO_IR 100"])),
}
SEQUENCES = (
    "ContentSequence", "ConceptNameCodeSequence", "ReferencedSOPSequence", "PerFrameFunctionalGroupsSequence",
    "RequestAttributesSequence",
)  # fmt: skip


def data_set(values: dict[str, Any], nested: dict[str, list[Dataset]], undefined: bool) -> Dataset:
    ds = Dataset()
    with config.disable_value_validation():
        for keyword, value in values.items():
            ds.add_new(Tag(keyword), LEAVES[keyword][0], value)
        for keyword, items in nested.items():
            element = DataElement(Tag(keyword), "SQ", Sequence(items))
            element.is_undefined_length = undefined
            ds.add(element)
    return ds


VALUES = st.fixed_dictionaries({}, optional={keyword: values for keyword, (_, values) in LEAVES.items()})


def of(children: Any) -> Any:
    nested = st.dictionaries(st.sampled_from(SEQUENCES), st.lists(children, max_size=2), max_size=2)
    return st.builds(data_set, VALUES, nested, st.booleans())


ITEMS = st.recursive(st.builds(data_set, VALUES, st.just({}), st.just(False)), of, max_leaves=6)
TOPS = st.dictionaries(st.sampled_from(SEQUENCES), st.lists(ITEMS, max_size=3), max_size=3)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(TOPS, st.sampled_from(["ISO_IR 192", "ISO_IR 100", "ISO_IR 13", None]))
def test_whatever_lies_in_the_sequences(tops: dict[str, list[Dataset]], charset: str | None) -> None:
    ds = dcmread(BytesIO(secondary_capture()[1]))
    if charset:
        ds.SpecificCharacterSet = charset
    for keyword, items in tops.items():
        ds.add(DataElement(Tag(keyword), "SQ", Sequence(items)))
    try:
        content = file_of(ds)
    except (ValueError, UnicodeError, TypeError, AttributeError):
        return  # pydicom does not write it
    short, long = both_ways(content)
    assert short == long


REPORT = dcmread(BytesIO(secondary_capture()[1]))
REPORT.StudyInstanceUID, REPORT.SeriesInstanceUID, REPORT.SOPInstanceUID = "2.25.1", "2.25.2", "2.25.3"
REPORT.file_meta.MediaStorageSOPInstanceUID = "2.25.3"
REPORT.ContentSequence = [
    data_set(
        {"ValueType": "TEXT", "TextValue": "a CANARY"},
        {"ConceptNameCodeSequence": [data_set({"CodeValue": "121106", "CodingSchemeDesignator": "DCM"}, {}, False)]},
        False,
    )
]
BYTES = file_of(REPORT)
BEGIN = BYTES.index(b"\x40\x00\x30\xa7SQ")


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(BEGIN, BEGIN + 140), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_is_broken_in_them(changes: list[tuple[int, int]]) -> None:
    content = bytearray(BYTES)
    for at, value in changes:
        content[at] = value
    short, long = both_ways(bytes(content))
    if isinstance(short, Departure):
        assert short == long
    else:
        assert isinstance(long, str)


@given(st.binary(max_size=120))
def test_bytes_are_items_or_not_plain(data: bytes) -> None:
    with contextlib.suppress(NotPlain):
        parse(data)


def test_items_within_items_have_an_end() -> None:
    data = b""
    for _ in range(40):
        data = struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data
        data = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, len(data)) + data
    with pytest.raises(NotPlain):
        parse(struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data)


def test_a_deflated_file_goes_the_long_way() -> None:
    ds = dcmread(BytesIO(BYTES))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    short, long = both_ways(file_of(ds))
    assert isinstance(short, Departure) and short == long


def test_elements_are_put_in_their_place() -> None:
    without = dcmread(BytesIO(BYTES))
    del without.ContentSequence
    at = BYTES.index(b"\xe0\x7f\x10\x00")
    assert joined(file_of(without), {0x0040A730: BYTES[BEGIN:at]}) == BYTES
    behind = b"\xfc\xff\xfc\xffOB\0\0\x02\0\0\0ab"
    assert joined(BYTES, {0xFFFCFFFC: behind}) == BYTES + behind
    assert joined(BYTES, {}) == BYTES
