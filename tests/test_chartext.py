"""Specific Character Set: defined terms are Python encodings, everything else is the default repertoire."""

from __future__ import annotations

import encodings
import pkgutil
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import charset

from dicomnode.chartext import charset_encodings, text_of
from dicomnode.header import Wanted, read_header
from dicomnode.index.matching import Root, plan_find
from dicomnode.serve.identifier import parse_identifier

IMPLICIT = "1.2.840.10008.1.2"
TERMS = sorted(charset.python_encoding)
NOT_OF_DICOM = sorted(
    {m.name for m in pkgutil.iter_modules(encodings.__path__)}
    | {"hex", "bz2", "zip", "rot13", "idna", "punycode", "utf-7", "unicode_escape", "mbcs", "undefined", "utf-16"}
    - {"aliases"}
)


@pytest.mark.parametrize("term", TERMS)
def test_defined_terms(term: str) -> None:
    for written in (term, term.lower(), f" {term} "):
        assert charset_encodings(written.encode()) == (charset.python_encoding[term],)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("", ("iso8859",)),
        ("ISO-IR 100", ("latin_1",)),
        ("ISO IR 100", ("latin_1",)),
        ("ISO_IR_192", ("UTF8",)),
        ("utf-8", ("UTF8",)),
        ("ISO_2022_IR_87", ("iso2022_jp",)),
        ("\\ISO 2022 IR 87", ("iso8859", "iso2022_jp")),
        ("ISO_IR 192\\ISO 2022 IR 87", ("UTF8",)),
        ("ISO 2022 IR 100\\ISO_IR 192\\hex\\ISO 2022 IR 87", ("latin_1", "iso2022_jp")),
        ("ISO_IR 203", ("iso8859_15",)),
        ("ISO_IR 999", ("ascii",)),
        ("a\0b", ("ascii",)),
    ],
)
def test_spellings_and_lists(declared: str, expected: tuple[str, ...]) -> None:
    assert charset_encodings(declared.encode()) == expected


@pytest.mark.parametrize("name", NOT_OF_DICOM)
def test_names_of_pythons_codecs_are_the_default_repertoire(name: str) -> None:
    if name.upper().replace("_", "-") in ("GBK", "GB18030", "UTF-8"):
        return
    assert charset_encodings(name.encode()) == ("ascii",)
    assert text_of(b"M\xfcller", "PN", charset_encodings(name.encode())) == "M\ufffdller"


@given(st.lists(st.sampled_from([*TERMS, "hex", "idna", ""]), max_size=3), st.binary(max_size=40))
def test_any_bytes_become_text_that_can_be_stored(terms: list[str], value: bytes) -> None:
    declared = "\\".join(terms).encode()
    for vr in ("PN", "LO", "UT"):
        for data in (value, b"\x1b$B" + value, value[:5] + b"\x1b(J" + value):
            text_of(data, vr, charset_encodings(declared)).encode("utf-8")


def element(group: int, number: int, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    return struct.pack("<HHI", group, number, len(value)) + value


@pytest.mark.parametrize("name", ["hex", "idna", "rot13", "unicode_escape", "ISO_IR 100\\hex"])
def test_a_query_and_an_object_with_such_a_name_are_read(name: str) -> None:
    data = element(8, 5, name.encode()) + element(8, 0x52, b"STUDY") + element(0x10, 0x10, b"ab\\u0041\xff")
    found = parse_identifier(data, IMPLICIT)
    last = "ÿ" if name.startswith("ISO") else "\ufffd"
    assert found.values["PatientName"] == f"ab\\u0041{last}"
    plan_find(Root.STUDY, found)
    stored = read_header(
        element(8, 5, name.encode()) + element(0x10, 0x10, b"ab\xff"), IMPLICIT, Wanted({"PatientName"})
    )
    assert stored["PatientName"] == f"ab{last}"
