"""The bounded header reader: against pydicom on what is well-formed, alone against what is not."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID
from pydicom.valuerep import PersonName

from dicomnode.errors import MalformedDataSet
from dicomnode.header import MAX_ITEM_VALUE, MAX_ITEMS, MAX_KEPT_ITEMS, MAX_VALUE, Wanted, read_header
from dicomnode.index.keys import HEADER_KEYS

IMPLICIT, EXPLICIT, BIG, DEFLATED = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)
WANTED = Wanted(HEADER_KEYS)
PLAIN_KEYS = [k for k in HEADER_KEYS if "." not in k]
SEQUENCES: dict[str, list[str]] = {}
for _key in HEADER_KEYS:
    if "." in _key:
        SEQUENCES.setdefault(_key.split(".")[0], []).append(_key.split(".")[1])


def text_of(ds: Dataset, keyword: str) -> str:
    """What the reader should give for an attribute, from pydicom's parse."""
    if keyword not in ds:
        return ""
    element = ds[keyword]
    value = element.value
    if value is None:
        return ""
    if dictionary_VR(element.tag)[:2] in ("ST", "LT", "UT"):
        return str(value).rstrip(" \0")
    many = value if isinstance(value, list | tuple | pydicom.multival.MultiValue) else [value]
    parts = [str(v if isinstance(v, PersonName) else getattr(v, "original_string", v)) for v in many]
    return "\\".join(p.strip(" \0") for p in parts)


def texts_of(ds: Dataset) -> dict[str, str]:
    """What the reader should give for a data set, sequences as JSON."""
    found = {k: t for k in PLAIN_KEYS if (t := text_of(ds, k))}
    for keyword, parts in SEQUENCES.items():
        items = [{k: t for k in parts if (t := text_of(item, k))} for item in ds.get(keyword) or []]
        if kept := [item for item in items[:MAX_KEPT_ITEMS] if item]:
            found[keyword] = json.dumps(kept)
    return found


def comparable(found: dict[str, str]) -> dict[str, Any]:
    return {k: json.loads(t) if k in SEQUENCES else t for k, t in found.items()}


def part10(path: Path) -> tuple[bytes, str]:
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 140)[0]
    return data[144 + length :], str(pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID)


def real_files(root: Path) -> list[Path]:
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != "README.md"]
    # one series of hundreds of equal slices: every eighth is enough
    slices = [p for p in files if p.parent.name == "ct-chest-ricord"]
    return [p for p in files if p not in slices] + slices[::8]


def test_agrees_with_pydicom_on_real_files(shared_data: Path) -> None:
    compared = 0
    for path in real_files(shared_data):
        try:
            data, syntax = part10(path)
        except (InvalidDicomError, AttributeError, struct.error):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ours = read_header(data, syntax, WANTED)
            except MalformedDataSet:
                assert path.parent.name == "malformed", f"{path.name} is well-formed"
                continue
            expected = comparable(texts_of(pydicom.dcmread(path, stop_before_pixels=True)))
            read = comparable(ours)
            differ = [k for k in {*expected, *read} if expected.get(k) != read.get(k)]
            assert not differ, f"{path.name}: {differ}"
            compared += 1
    assert compared > 50


# Well-formed data sets of every shape

text = st.text("ABCxyz 0123456789-", max_size=16).map(str.strip)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "PatientName": st.sampled_from(["Muster^Jörg", "Yamada^Tarou=山田^太郎", "A^B"]),
    "PatientID": text,
    "StudyInstanceUID": st.sampled_from(["1.2.3", "1.2.840.99999.1"]),
    "SOPInstanceUID": st.just("1.2.3.4"),
    "ImageType": st.lists(st.sampled_from(["ORIGINAL", "PRIMARY", "AXIAL"]), min_size=1, max_size=3),
    "Rows": st.integers(0, 65535),
    "Columns": st.integers(0, 65535),
    "SliceThickness": st.sampled_from(["1.25", "0.5"]),
    "ImagePositionPatient": st.just(["1.5", "-2", "3"]),
    "ImageComments": st.text("AB\r\n c", max_size=40).map(str.strip),
    "GantryDetectorTilt": st.just("0"),
    "AccessionNumber": text,
    "RequestedProcedureID": text,
    "ScheduledProcedureStepDescription": st.sampled_from(["Schädel", "頭部", "", "A\\B"]),
    "ReferencedSOPInstanceUID": st.just("1.2.3.4.5"),
}


@st.composite
def data_sets(draw: st.DrawFn, depth: int = 2) -> Dataset:
    ds = Dataset()
    for keyword in draw(st.sets(st.sampled_from(sorted(VALUES)))):
        setattr(ds, keyword, draw(VALUES[keyword]))
    if depth:
        for tag in draw(
            st.sets(st.sampled_from([0x00081111, 0x00081140, 0x00400275, 0x00290101, 0x00189999]), max_size=3)
        ):
            items = draw(st.lists(data_sets(depth - 1), max_size=3))  # type: ignore[call-arg]  # composite
            for item in items:
                item.is_undefined_length_sequence_item = draw(st.booleans())
            sequence = DataElement(tag, "SQ", Sequence(items))
            sequence.is_undefined_length = draw(st.booleans())
            ds.add(sequence)
        if draw(st.booleans()):
            ds.add_new(0x00091001, "UN", draw(st.binary(max_size=20)))
        if draw(st.booleans()):
            ds.add_new(0x00091002, "OB", draw(st.binary(max_size=20).map(lambda b: b + bytes(len(b) % 2))))
    return ds


def encoded(ds: Dataset, syntax: str) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = syntax == IMPLICIT, syntax != BIG
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dataset(buffer, ds, parent_encoding="utf-8")
    data = buffer.getvalue()
    if syntax == DEFLATED:
        squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = squeezer.compress(data) + squeezer.flush()
    return data


@given(data_sets(), st.sampled_from([IMPLICIT, EXPLICIT, BIG, DEFLATED]), st.booleans())
def test_agrees_with_pydicom_on_made_files(ds: Dataset, syntax: str, pixels: bool) -> None:
    ds.SpecificCharacterSet = "ISO_IR 192"
    if pixels:
        ds.add_new(0x7FE00010, "OW", bytes(64))
    assert comparable(read_header(encoded(ds, syntax), syntax, WANTED)) == comparable(texts_of(ds))


@given(data_sets())
def test_unknown_sequence_of_undefined_length_is_skipped(nested: Dataset) -> None:
    """PS3.5 6.2.2: UN of undefined length holds an implicit VR sequence, whatever surrounds it."""
    body = encoded(nested, IMPLICIT)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + body + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    unknown = struct.pack("<HH2sHI", 0x0009, 0x1001, b"UN", 0, 0xFFFFFFFF) + item
    unknown += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    after = Dataset()
    after.PatientID = "AFTER"
    assert read_header(unknown + encoded(after, EXPLICIT), EXPLICIT, WANTED) == {"PatientID": "AFTER"}


SAMPLES = [
    (encoded_sample, syntax)
    for syntax in (IMPLICIT, EXPLICIT, BIG, DEFLATED)
    for encoded_sample in [
        encoded(
            Dataset.from_json(
                '{"00080005":{"vr":"CS","Value":["ISO_IR 192"]},"00080018":{"vr":"UI","Value":["1.2.3"]},'
                '"00081140":{"vr":"SQ","Value":[{"00081155":{"vr":"UI","Value":["1.2"]}},{}]},'
                '"00100010":{"vr":"PN","Value":[{"Alphabetic":"A^B"}]},"00280010":{"vr":"US","Value":[4]}}'
            ),
            syntax,
        )
    ]
]


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 10_000),
    st.binary(max_size=40),
)
def test_mutated_bytes_raise_only_our_error(
    sample: tuple[bytes, str], changes: list[tuple[int, int]], cut: int, extra: bytes
) -> None:
    data = bytearray(sample[0])
    for place, value in changes:
        data[place % len(data)] = value
    data = data[: len(data) if cut > 5000 else cut % len(data)] + extra
    begin = time.process_time()
    try:
        found = read_header(data, sample[1], WANTED)
    except MalformedDataSet:
        found = {}
    assert all(isinstance(v, str) for v in found.values())
    assert time.process_time() - begin < 2.0, "of the processor: what a busy machine adds does not count"


@given(st.binary(max_size=300), st.sampled_from([IMPLICIT, EXPLICIT, BIG, DEFLATED, "1.2.840.10008.1.2.4.70", "", "x"]))
def test_noise_raises_only_our_error(data: bytes, syntax: str) -> None:
    try:
        read_header(data, syntax, WANTED)
    except MalformedDataSet as error:
        assert str(error).startswith("read header: ") and "\n" not in str(error)


# Attacks; figures of RELIABILITY.md

ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
SEQUENCE = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
IMPLICIT_SEQUENCE = struct.pack("<HHI", 0x0008, 0x1140, 0xFFFFFFFF)
UNKNOWN = struct.pack("<HH2sHI", 0x0009, 0x1001, b"UN", 0, 0xFFFFFFFF)
END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
EMPTY_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
EMPTY_ELEMENT = struct.pack("<HHI", 0x0008, 0x0000, 0)
EMPTY_EXPLICIT = struct.pack("<HH2sH", 0x0008, 0x0100, b"SH", 0)


def deflated(data: bytes) -> bytes:
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeezer.compress(data) + squeezer.flush()


ATTACKS = {
    "nested 200 deep": (EXPLICIT, (SEQUENCE + ITEM) * 200),
    "nested 200 deep, implicit": (IMPLICIT, (IMPLICIT_SEQUENCE + ITEM) * 200),
    "nested 200 deep in UN": (EXPLICIT, UNKNOWN + (ITEM + IMPLICIT_SEQUENCE) * 200),
    "nested 100,000 deep": (EXPLICIT, (SEQUENCE + ITEM) * 100_000),
    "15 MB of empty items": (EXPLICIT, SEQUENCE + EMPTY_ITEM * (15_000_000 // 8)),
    "15 MB of empty elements": (EXPLICIT, EMPTY_EXPLICIT * (15_000_000 // 8)),
    "15 MB of empty elements, deep": (EXPLICIT, (SEQUENCE + ITEM) * 60 + EMPTY_EXPLICIT * (15_000_000 // 8)),
    "40 MB of sequences in UN": (EXPLICIT, (UNKNOWN + EMPTY_ELEMENT * 99_000 + END) * 50),
    "many UN of one item": (EXPLICIT, (UNKNOWN + END) * 500_000),
    "deflated zeros": (DEFLATED, deflated(bytes(300_000_000))),
    "undefined length of a text": (EXPLICIT, struct.pack("<HH2sHI", 0x0008, 0x1140, b"UT", 0, 0xFFFFFFFF) + b"x" * 99),
    "length beyond the end": (IMPLICIT, struct.pack("<HHI", 0x0010, 0x0010, 0xFFFFFFFE) + b"x" * 99),
    "VR that does not exist": (EXPLICIT, struct.pack("<HH2sH", 0x0010, 0x0010, b"?!", 4) + b"x" * 99),
    "item outside": (EXPLICIT, EMPTY_ITEM * 3),
    "end outside": (EXPLICIT, END * 3),
    "item beyond its sequence": (
        EXPLICIT,
        struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0x7FFFFFFF),
    ),
    "element instead of an item": (EXPLICIT, SEQUENCE + EMPTY_EXPLICIT * 3),
    "wrong delimiter": (EXPLICIT, SEQUENCE + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)),
    "unfinished": (EXPLICIT, SEQUENCE + ITEM),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_quickly_and_in_little_memory(name: str) -> None:
    syntax, data = ATTACKS[name]
    begin = time.process_time()
    with pytest.raises(MalformedDataSet) as caught:
        read_header(data, syntax, WANTED)
    assert time.process_time() - begin < 5.0
    assert caught.value.retryable is False


def test_memory_of_the_deflate_bomb() -> None:
    data = ATTACKS["deflated zeros"][1]
    tracemalloc.start()
    try:
        with pytest.raises(MalformedDataSet):
            read_header(data, DEFLATED, WANTED)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * 1024 * 1024


def test_limits_leave_room_for_what_is_real() -> None:
    data = SEQUENCE + EMPTY_ITEM * (MAX_ITEMS - 1) + END + encoded(Dataset.from_json(
        '{"00100020":{"vr":"LO","Value":["ID"]}}'), EXPLICIT)  # fmt: skip
    assert read_header(data, EXPLICIT, WANTED) == {"PatientID": "ID"}


def test_overlong_value_is_cut() -> None:
    wanted = Wanted(["ImageComments", "StudyID"])
    data = struct.pack("<HHI", 0x0020, 0x4000, 40_000) + b"x" * 40_000
    assert len(read_header(data, IMPLICIT, wanted)["ImageComments"]) == 40_000
    data = struct.pack("<HHI", 0x0020, 0x4000, 3 * MAX_VALUE) + b"x" * (3 * MAX_VALUE)
    assert len(read_header(data, IMPLICIT, wanted)["ImageComments"]) == MAX_VALUE


def test_unknown_character_set_is_the_default_repertoire() -> None:
    ds = Dataset()
    ds.add_new(0x00080005, "CS", "NO_SUCH_SET")
    data = encoded(ds, IMPLICIT) + struct.pack("<HHI", 0x0010, 0x0010, 4) + "Jörg".encode("latin-1")
    assert read_header(data, IMPLICIT, WANTED)["PatientName"] == "J\ufffdrg"


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"])
def test_referenced_deflate_syntaxes_are_inflated(syntax: str) -> None:
    ds = Dataset()
    ds.PatientID = "ID"
    assert read_header(deflated(encoded(ds, EXPLICIT)), syntax, WANTED) == {"PatientID": "ID"}


def test_reads_what_pydicom_saves_with_file_meta() -> None:
    ds = Dataset()
    ds.PatientID, ds.SOPClassUID, ds.SOPInstanceUID = "ID", UID("1.2.840.10008.5.1.4.1.1.2"), UID("1.2.3")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    length = struct.unpack_from("<I", data, 140)[0]
    assert read_header(memoryview(data)[144 + length :], EXPLICIT, WANTED)["PatientID"] == "ID"


@pytest.mark.parametrize("inside", [False, True], ids=["SQ", "UN"])
def test_depth_has_a_limit_even_where_every_level_is_closed(inside: bool) -> None:
    item_end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)

    def nested(levels: int) -> bytes:
        if inside:
            return UNKNOWN + (ITEM + IMPLICIT_SEQUENCE) * (levels - 1) + (END + item_end) * (levels - 1) + END
        return (SEQUENCE + ITEM) * levels + (item_end + END) * levels

    assert read_header(nested(60), EXPLICIT, WANTED) == {}
    with pytest.raises(MalformedDataSet, match="nested deeper than 64"):
        read_header(nested(70), EXPLICIT, WANTED)


@pytest.mark.parametrize("name", [b"A\x80\xff^B ", b"A\x1b$B\x80\x81\x1b(B^B"])
def test_undecodable_text_is_replaced_without_a_warning(name: bytes) -> None:
    """A warning would quote the value on stderr, and with other filters it would raise."""
    declared = b"ISO_IR 192" if b"\x1b" not in name else b"\\ISO 2022 IR 87 "
    name += b" " * (len(name) % 2)
    data = b"\x08\x00\x05\x00CS" + struct.pack("<H", len(declared)) + declared
    data += b"\x10\x00\x10\x00PN" + struct.pack("<H", len(name)) + name
    text = read_header(data, "1.2.840.10008.1.2.1", Wanted(["SpecificCharacterSet", "PatientName"]))["PatientName"]
    assert text.startswith("A")


# Items of wanted sequences


def item(content: bytes, *, delimited: bool = False) -> bytes:
    if delimited:
        return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + content + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def element(tag: int, vr: str, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value


def requests(content: bytes, *, delimited: bool = False) -> bytes:
    length = 0xFFFFFFFF if delimited else len(content)
    return struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, length) + content + (END if delimited else b"")


@pytest.mark.parametrize("delimited", [False, True])
def test_items_keep_their_own_character_set(delimited: bool) -> None:
    german = element(0x00080005, "CS", b"ISO_IR 100") + element(0x00400007, "LO", "Schädel".encode("latin-1"))
    utf8 = element(0x00400007, "LO", "頭部".encode())
    data = element(0x00080005, "CS", b"ISO_IR 192")
    data += requests(item(german, delimited=delimited) + item(utf8), delimited=delimited)
    data += element(0x00401001, "SH", b"NOT IN AN ITEM")
    assert json.loads(read_header(data, EXPLICIT, WANTED)["RequestAttributesSequence"]) == [
        {"ScheduledProcedureStepDescription": "Schädel"},
        {"ScheduledProcedureStepDescription": "頭部"},
    ]


def test_what_is_kept_of_items_is_bounded() -> None:
    long = element(0x00401002, "LO", b"x" * 20_000)
    data = requests(item(long + element(0x00401001, "SH", b"RP")) * 5000)
    found = json.loads(read_header(data, EXPLICIT, WANTED)["RequestAttributesSequence"])
    assert len(found) == MAX_KEPT_ITEMS
    assert {len(one["ReasonForTheRequestedProcedure"]) for one in found} == {MAX_ITEM_VALUE}
    assert {one["RequestedProcedureID"] for one in found} == {"RP"}


def test_a_sequence_with_a_length_is_passed_over_whatever_is_in_it() -> None:
    after = element(0x00400280, "ST", b"")
    good = item(element(0x00401001, "SH", b"RP"))
    for inside in (b"\xff" * 10, item(b"\0" * 7), EMPTY_ELEMENT, good[:-1], good + EMPTY_ELEMENT):
        assert read_header(requests(inside) + after, EXPLICIT, WANTED) == {}
    with pytest.raises(MalformedDataSet):
        read_header(requests(item(b"\0" * 7), delimited=True), EXPLICIT, WANTED)


def test_sequences_in_items_are_passed_over() -> None:
    nested = requests(item(element(0x00401001, "SH", b"INNER")), delimited=True)
    inside = element(0x00401001, "SH", b"OUTER") + nested + element(0x00401002, "LO", b"WHY")
    for delimited in (False, True):
        found = read_header(requests(item(inside, delimited=delimited), delimited=delimited), EXPLICIT, WANTED)
        assert json.loads(found["RequestAttributesSequence"]) == [
            {"RequestedProcedureID": "OUTER", "ReasonForTheRequestedProcedure": "WHY"}
        ]


def test_fragments_in_a_sequence_are_passed_over() -> None:
    """The pixel data of an icon may be encapsulated (PS3.5 A.4)."""
    fragments = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + item(b"") + item(b"\xff\xd8" * 30) + END
    icon = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + item(fragments, delimited=True) + END
    assert read_header(icon + element(0x00100020, "LO", b"ID"), EXPLICIT, WANTED) == {"PatientID": "ID"}


def test_of_an_attribute_that_is_there_twice_the_first_counts() -> None:
    data = element(0x00100020, "LO", b"ONE") + element(0x00100020, "LO", b"TWO")
    assert read_header(data, EXPLICIT, WANTED) == {"PatientID": "ONE"}
    assert read_header(element(0x00100020, "LO", b"") + data, EXPLICIT, WANTED) == {}


@pytest.mark.parametrize("keywords", [["PatientID"], ["RequestAttributesSequence"], ["NoKeyword", "A.B", "PatientID."]])
def test_a_sequence_that_is_not_wanted_is_not_read(keywords: list[str]) -> None:
    data = element(0x00100020, "LO", b"ID") + requests(item(element(0x00401001, "SH", b"RP")))
    assert set(read_header(data, EXPLICIT, Wanted(keywords))) <= {"PatientID"}


def test_the_character_set_is_heeded_though_nobody_asked_for_it() -> None:
    data = element(0x00080005, "CS", b"ISO_IR 192") + element(0x00100010, "PN", "Jörg".encode())
    assert read_header(data, EXPLICIT, Wanted(["PatientName"])) == {"PatientName": "Jörg"}


def test_values_behind_a_large_private_element_are_read() -> None:
    data = element(0x00080005, "CS", b"ISO_IR 100")
    data += struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 200_000) + bytes(200_000)
    data += element(0x00100010, "PN", "Jörg^A".encode("latin-1")) + element(0x00100020, "LO", b" ID \\ 2 ")
    assert read_header(data, EXPLICIT, WANTED) == {
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Jörg^A",
        "PatientID": "ID\\2",
    }


# Mutations that know the grammar: right bytes in wrong places, wrong lengths, delimiters that do not match

PIECES = [
    ITEM, SEQUENCE, IMPLICIT_SEQUENCE, UNKNOWN, END, EMPTY_ITEM, EMPTY_ELEMENT, EMPTY_EXPLICIT,
    struct.pack("<HHI", 0xFFFE, 0xE00D, 0), struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF),
    struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 24), struct.pack("<HHI", 0x0040, 0x0275, 0xFFFFFFFF),
    struct.pack("<HHI", 0xFFFE, 0xE000, 16), element(0x00401001, "SH", b"RP1 "),
    element(0x00080005, "CS", b"ISO_IR 192"), element(0x00080005, "CS", b"\\ISO 2022 IR 87"),
    element(0x00100010, "PN", b"A\x1b$B;3ED\x1b(B^B=\xff"),
    element(0x00280010, "US", b"\0\2"), struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 4) + bytes(4),
    struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 0xFFFFFFFF),
]  # fmt: skip


@given(
    st.lists(st.sampled_from(PIECES), max_size=40),
    st.lists(st.tuples(st.integers(0, 2000), st.sampled_from([0, 1, 0x7F, 0x80, 0xFE, 0xFF])), max_size=3),
    st.sampled_from([IMPLICIT, EXPLICIT, BIG]),
)
def test_pieces_in_any_order_raise_only_our_error(
    pieces: list[bytes], changes: list[tuple[int, int]], syntax: str
) -> None:
    data = bytearray(b"".join(pieces))
    if syntax == BIG:
        data = bytearray(
            struct.pack(f">{len(data) // 2}H", *struct.unpack(f"<{len(data) // 2}H", data[: len(data) // 2 * 2]))
        )
    for place, value in changes:
        if data:
            data[place % len(data)] = value
    try:
        found = read_header(data, syntax, WANTED)
    except MalformedDataSet as error:
        assert "\n" not in str(error)
        return
    for keyword in SEQUENCES:
        assert all(isinstance(one, dict) for one in json.loads(found.get(keyword, "[]")))
