"""Matching against a naive reference, and as SQL: the statement never loses a match."""

from __future__ import annotations

import re
import threading
from typing import Any

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.index import matching
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.matching import Identifier, IdentifierError, Root, condition, matches, plan_find, plan_retrieve
from dicomnode.index.query import Ended, run
from tests.index.rows import instance, uid

ALPHABET = "aAbBzsß'\"%_[]^-!\\*?= .ÄäÖé山ſK0179"
TEXT = st.text(ALPHABET, max_size=12)
PLAIN = st.text("aAbB%_[-!Ää山", min_size=1, max_size=8)
DATES = st.dates().map(lambda d: d.strftime("%Y%m%d").zfill(8))
TIMES = st.times().flatmap(
    lambda t: st.sampled_from([t.strftime("%H"), t.strftime("%H%M"), t.strftime("%H%M%S"), t.strftime("%H%M%S.%f")])
)


def reference(vr: str, query: str, stored: str) -> bool:
    """The text VRs as a reader of PS3.4 would write them, without a thought for speed."""
    if query.strip(" ") in ("", "*"):
        return True
    whole = vr in ("LT", "ST", "UT", "UR")
    wanted = [query] if whole else [q.strip(" ") for q in query.split("\\")]
    values = [stored] if whole else [s.strip(" ") for s in stored.split("\\")]
    return any(
        re.fullmatch("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in q), s, re.DOTALL) is not None
        for q in wanted
        if q
        for s in values
        if s
    )


@given(st.sampled_from(["LO", "SH", "CS", "LT", "UT", "AE"]), TEXT, TEXT)
def test_text_is_the_reference(vr: str, query: str, stored: str) -> None:
    assert matches(vr, query, stored) == reference(vr, query, stored)


@given(st.lists(st.sampled_from(["*", "?", "a", "b"]), max_size=10), st.text("ab", max_size=8))
def test_wildcards_are_the_reference(query: list[str], stored: str) -> None:
    assert matches("LO", "".join(query), stored) == reference("LO", "".join(query), stored)


def in_sqlite(vr: str, query: str, stored: str) -> bool:
    found = condition("v", vr, query)
    assert found is not None
    sql, parameters = found
    with apsw.Connection(":memory:") as connection:
        return bool(connection.execute(f"SELECT {sql} FROM (SELECT ? AS v)", (*parameters, stored)).fetchone()[0])


@given(st.sampled_from(["LO", "SH", "LT", "PN", "UI", "DA", "TM", "IS", "CS"]), TEXT, TEXT)
def test_sql_is_never_narrower_than_the_predicate(vr: str, query: str, stored: str) -> None:
    if vr == "UI":  # as the index holds them
        stored = stored.replace("\\", "").strip(" ")
    if not matching.is_universal(query) and matches(vr, query, stored):
        assert in_sqlite(vr, query, stored)


@given(st.lists(PLAIN, min_size=1, max_size=3), st.sampled_from(["", "^", "^^^"]), st.booleans())
def test_person_names_by_sql_and_predicate(parts: list[str], tail: str, upper: bool) -> None:
    stored = "^".join(parts)
    query = (stored.upper() if upper else stored.lower()) + tail
    for pattern in (query, parts[0] + "*", "*" + parts[-1], stored + "^*"):
        if pattern.strip("^ "):
            assert matches("PN", pattern, stored)
            assert in_sqlite("PN", pattern, stored)


@given(DATES, DATES, DATES)
def test_date_ranges(low: str, high: str, stored: str) -> None:
    for query, expected in (
        (f"{low}-{high}", low <= stored <= high),
        (f"{low}-", stored >= low),
        (f"-{high}", stored <= high),
        (low, stored == low),
    ):
        assert matches("DA", query, stored) == expected
        assert not expected or in_sqlite("DA", query, stored)
    assert not matches("DA", f"{low}-{high}", "")


@given(TIMES, TIMES, TIMES)
def test_time_ranges(low: str, high: str, stored: str) -> None:
    def first(text: str) -> str:
        return text + "000000.000000"[len(text) :]

    def last(text: str) -> str:
        return text + "235959.999999"[len(text) :] if len(text) in (0, 6) else text + "5959.999999"[len(text) - 2 :]

    expected = first(low) <= first(stored) <= last(high)
    assert matches("TM", f"{low}-{high}", stored) == expected


@pytest.mark.parametrize(
    ("vr", "query", "stored", "expected"),
    [
        ("PN", "smith^john", "Smith^John^^", True),
        ("PN", "Smith^*", "Smith", True),
        ("PN", "smith^john=", "SMITH^JOHN=山田", True),
        ("PN", "山田^*", "Yamada^Tarou=山田^太郎", True),
        ("PN", "=山田^太郎", "Yamada^Tarou=山田^太郎=やまだ", True),
        ("PN", "Yamada=田中", "Yamada=山田", False),
        ("PN", "GROSS", "groß", True),
        ("CS", "ct", "CT", False),
        ("CS", "PRIMARY", "ORIGINAL\\PRIMARY\\AXIAL", True),
        ("CS", "CT\\MR", "MR", True),
        ("UI", "1.2\\1.3", "1.3", True),
        ("UI", "1.*", "1.3", False),
        ("IS", "7", "007", True),
        ("US", "512", "512", True),
        ("TM", "10", "103000", True),
        ("TM", "10:30", "103000.5", True),
        ("TM", "-", "103000", False),
        ("TM", "1000-1015", "101559.9", True),
        ("DA", "2024.01.05", "20240105", True),
        ("DA", "20240101-", "2024.01.05", True),
        ("DA", "yesterday", "20240105", False),
        ("DT", "20240105-20240106", "20240106235959.5+0100", True),
        ("DT", "2024", "20240105", True),
        ("LT", "a\\b", "a\\b", True),
        ("LO", "*", "", True),
        ("LO", "a", "", False),
    ],
)
def test_single_cases(vr: str, query: str, stored: str, expected: bool) -> None:
    assert matches(vr, query, stored) is expected


def test_wildcards_take_no_exponential_time() -> None:
    assert not matches("LO", "*a" * 500 + "b", "a" * 60_000)
    assert not matches("PN", "?*" * 500 + "b", "a" * 1000)


def identifier(level: str, **values: str) -> Identifier:
    return Identifier({"QueryRetrieveLevel": level, **values})


@pytest.mark.parametrize(
    ("root", "query"),
    [
        (Root.STUDY, identifier("PATIENT", PatientID="1")),
        (Root.STUDY, identifier("")),
        (Root.STUDY, identifier("SERIES", SeriesInstanceUID="")),
        (Root.STUDY, identifier("SERIES", StudyInstanceUID="1.2\\1.3")),
        (Root.PATIENT, identifier("STUDY", PatientID="A*")),
        (Root.PATIENT, identifier("STUDY", PatientName="x" * 2000, PatientID="1")),
    ],
)
def test_find_refuses(root: Root, query: Identifier) -> None:
    with pytest.raises(IdentifierError):
        plan_find(root, query)


@pytest.mark.parametrize(
    "query",
    [
        identifier("STUDY"),
        identifier("STUDY", StudyInstanceUID=""),
        identifier("STUDY", StudyInstanceUID="*"),
        identifier("STUDY", StudyInstanceUID="1.2*"),
        identifier("STUDY", StudyInstanceUID="1.2\\"),
        identifier("SERIES", SeriesInstanceUID="1.2"),
        identifier("IMAGE", StudyInstanceUID="1", SeriesInstanceUID="1\\2", SOPInstanceUID="1"),
    ],
)
def test_retrieve_refuses(query: Identifier) -> None:
    with pytest.raises(IdentifierError):
        plan_retrieve(Root.STUDY, query)
    for level, key in (("PATIENT", "PatientID"), ("STUDY", "StudyInstanceUID"), ("IMAGE", "SOPInstanceUID")):
        with pytest.raises(IdentifierError):
            plan_retrieve(Root.PATIENT, identifier(level, **{key: ""}), relational=True)


def search(db: Database, query: Identifier, root: Root = Root.STUDY, **options: Any) -> list[dict[str, Any]]:
    return run(db, plan_find(root, query, **options), limit=1000, seconds=30).rows


def test_an_index(db: Database) -> None:
    Catalogue(db).commit(
        [
            instance("1.20", "1.10", PatientName="A^B", StudyDate="20240105", KVP="120"),
            instance("1.20", "1.10", PatientName="A^B"),
            instance("1.21", "1.10", PatientName="A^B", Modality="SR,X"),
            instance("1.22", "1.11", PatientID="P2", PatientName="Ä^B", Modality="MR"),
        ]
    )
    counts = dict.fromkeys(
        ("ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances", "SOPClassesInStudy"), ""
    )
    found = search(db, identifier("STUDY", PatientID="P1", NumberOfPatientRelatedStudies="", **counts))
    assert found == [
        {
            "PatientID": "P1",
            "NumberOfPatientRelatedStudies": 1,
            "ModalitiesInStudy": "CT\\SR,X",
            "NumberOfStudyRelatedSeries": 2,
            "NumberOfStudyRelatedInstances": 3,
            "SOPClassesInStudy": "1.2.840.10008.5.1.4.1.1.2",
            "StudyInstanceUID": "1.10",
        }
    ]
    assert len(search(db, identifier("STUDY", ModalitiesInStudy="M?"))) == 1
    Catalogue(db).commit([instance("1.23", "1.11", SOPClassUID="1.2.9", PatientID="P2", Modality="MR")])
    assert len(search(db, identifier("STUDY", SOPClassesInStudy="1.2.8\\1.2.9"))) == 1
    assert len(search(db, identifier("STUDY", PatientName="ä*"))) == 1
    assert len(search(db, identifier("PATIENT", NumberOfPatientRelatedInstances="3"), Root.PATIENT)) == 1
    assert len(search(db, identifier("IMAGE", KVP="120.0"), relational=True)) == 1
    assert len(search(db, identifier("IMAGE", SOPInstanceUID=""), relational=True)) == 5
    retrieve = plan_retrieve(Root.PATIENT, identifier("PATIENT", PatientID="P1"))
    assert len(run(db, retrieve, limit=10, seconds=5).rows) == 3


def test_limit_deadline_and_cancel(db: Database) -> None:
    Catalogue(db).commit([instance("1.20", "1.10", uid()) for _ in range(50)])
    plan = plan_find(Root.STUDY, identifier("IMAGE", SOPInstanceUID=""), relational=True)
    limited = run(db, plan, limit=50, seconds=30)
    assert (len(limited.rows), limited.ended) == (50, Ended.complete)
    limited = run(db, plan, limit=49, seconds=30)
    assert (len(limited.rows), limited.ended) == (49, Ended.limit)
    assert run(db, plan, limit=50, seconds=-1).ended is Ended.deadline
    assert run(db, plan, limit=50, seconds=30, cancelled=lambda: True).ended is Ended.cancelled
    endless = matching.Plan(
        plan.level,
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0",
        (),
        lambda _: True,
    )
    assert run(db, endless, limit=1, seconds=0.05).ended is Ended.deadline
    assert run(db, plan, limit=50, seconds=30).ended is Ended.complete


def test_work_of_the_same_thread_goes_on_during_a_query(db: Database) -> None:
    """Looking for a cancel may bring an object, whose row is written while another process writes, too."""
    Catalogue(db).commit([instance("1.20", "1.10", uid())])
    endless = matching.Plan(
        matching.Level.IMAGE,
        "WITH RECURSIVE n(i) AS (SELECT count(*) FROM instances UNION ALL SELECT i + 1 FROM n)"
        " SELECT i FROM n WHERE i < 0",
        (),
        lambda _: True,
    )
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            other = threading.Thread(target=Catalogue(db).commit, args=([instance("1.21", "1.11", uid())],))
            other.start()
            other.join()
            Catalogue(db).commit([instance("1.22", "1.12", uid())])
        return looks > 2

    assert run(db, endless, limit=1, seconds=30, cancelled=look).ended is Ended.cancelled
    assert db.value("SELECT count(*) FROM instances") == 3
