"""Identifiers as bytes, against pydicom."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicomnode.errors import MalformedDataSet
from dicomnode.serve.identifier import MAX_IDENTIFIER, encode_identifier, parse_identifier

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
SYNTAXES = pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])


def read(data: bytes, syntax: str) -> Dataset:
    return read_dataset(DicomBytesIO(data), is_implicit_VR=syntax == IMPLICIT, is_little_endian=True)


def written(ds: Dataset, syntax: str) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = syntax == IMPLICIT, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dataset(buffer, ds)
    return buffer.getvalue()


def query(**tags: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


@SYNTAXES
def test_answers_are_what_pydicom_reads(syntax: str) -> None:
    items = [{"RequestedProcedureID": "RP1", "RequestedProcedureDescription": "Schädel"}, {"AccessionNumber": ""}]
    answer = {
        "PatientName": "Yamada^Tarou=山田^太郎",
        "StudyInstanceUID": "1.2.3",
        "ModalitiesInStudy": "CT\\SR",
        "Rows": "512",
        "NumberOfStudyRelatedInstances": "7",
        "StudyDescription": "",
        "ImageType": "kaputt\ufffd",
        "RequestAttributesSequence": json.dumps(items),
    }
    ds = read(encode_identifier(answer, syntax), syntax)
    assert str(ds.PatientName) == answer["PatientName"]
    assert (ds.StudyInstanceUID, list(ds.ModalitiesInStudy), ds.Rows) == ("1.2.3", ["CT", "SR"], 512)
    assert (ds.NumberOfStudyRelatedInstances, ds.StudyDescription, ds.ImageType) == (7, "", "kaputt?")
    assert [[e.keyword for e in one] for one in ds.RequestAttributesSequence] == [
        ["RequestedProcedureDescription", "RequestedProcedureID"], ["AccessionNumber"],
    ]  # fmt: skip
    assert ds.RequestAttributesSequence[0].RequestedProcedureDescription == "Schädel"
    assert ds.SpecificCharacterSet == "ISO_IR 192"
    tags = [e.tag for e in ds]
    assert tags == sorted(tags)


@SYNTAXES
def test_no_character_set_where_none_is_needed(syntax: str) -> None:
    items = json.dumps([{"RequestedProcedureID": "RP1"}])
    for text, declared in (
        (items, False),
        (items.replace("RP1", "Ü"), True),
        (json.dumps([{"RequestedProcedureID": "Ü"}]), True),
    ):
        ds = read(encode_identifier({"PatientID": "1", "RequestAttributesSequence": text}, syntax), syntax)
        assert ("SpecificCharacterSet" in ds) == declared


@SYNTAXES
def test_queries_that_pydicom_writes(syntax: str) -> None:
    inside = query(RequestedProcedureID="RP1", ScheduledProcedureStepID="", ReasonForVisit="x")
    ds = query(
        SpecificCharacterSet="ISO_IR 100",
        QueryRetrieveLevel="SERIES",
        PatientName="Jörg*",
        StudyInstanceUID=["1.2", "1.3"],
        StudyDate="20240101-",
        OtherPatientIDs="x",
        RequestAttributesSequence=[inside],
    )
    found = parse_identifier(written(ds, syntax), syntax)
    assert found.values == {
        "QueryRetrieveLevel": "SERIES",
        "PatientName": "Jörg*",
        "StudyInstanceUID": "1.2\\1.3",
        "StudyDate": "20240101-",
    }
    assert found.items == {"RequestAttributesSequence": {"RequestedProcedureID": "RP1", "ScheduledProcedureStepID": ""}}
    assert {tag for tag, _ in found.unknown} == {0x00101000, 0x00400275}


@SYNTAXES
def test_sequences_of_keys(syntax: str) -> None:
    for items, expected in (([], {}), ([Dataset()], {}), ([query(AccessionNumber="")], {"AccessionNumber": ""})):
        found = parse_identifier(written(query(RequestAttributesSequence=items), syntax), syntax)
        assert (found.items, found.unknown) == ({"RequestAttributesSequence": expected}, ())
    found = parse_identifier(written(query(RequestAttributesSequence=[query(PatientID="1")]), syntax), syntax)
    assert (found.items, [tag for tag, _ in found.unknown]) == ({}, [0x00400275])
    with pytest.raises(MalformedDataSet):
        parse_identifier(written(query(RequestAttributesSequence=[Dataset(), Dataset()]), syntax), syntax)


def test_too_long() -> None:
    with pytest.raises(MalformedDataSet):
        parse_identifier(bytes(MAX_IDENTIFIER + 1), EXPLICIT)


SAMPLE = written(
    query(
        QueryRetrieveLevel="SERIES",
        PatientName="A^B",
        StudyInstanceUID="1.2",
        RequestAttributesSequence=[query(RequestedProcedureID="RP1")],
    ),
    EXPLICIT,
)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=5),
    st.binary(max_size=20),
    st.sampled_from([IMPLICIT, EXPLICIT]),
)
def test_mutated_identifiers_raise_only_our_error(changes: list[tuple[int, int]], extra: bytes, syntax: str) -> None:
    data = bytearray(SAMPLE)
    for place, value in changes:
        data[place % len(data)] = value
    try:
        found = parse_identifier(bytes(data) + extra, syntax)
    except MalformedDataSet:
        return
    assert all(isinstance(v, str) for v in found.values.values())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=70_000 // 100)


@given(
    st.dictionaries(st.sampled_from(["PatientName", "PatientID", "StudyDate", "ImageComments", "Rows"]), TEXT),
    st.booleans(),
)
def test_any_text_can_be_answered(values: dict[str, str], implicit_vr: bool) -> None:
    syntax = IMPLICIT if implicit_vr else EXPLICIT
    found = parse_identifier(encode_identifier(values, syntax), syntax)
    assert set(found.values) - {"SpecificCharacterSet"} == set(values)
