"""Plans on an index: extended matching, sequences, what is returned, and that an index is used."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.matching import Identifier, IdentifierError, Options, Root, matches, plan_find, plan_retrieve
from dicomnode.index.query import run
from tests.index.rows import instance, uid


def identifier(level: str, items: dict[str, dict[str, str]] | None = None, **values: str) -> Identifier:
    return Identifier({"QueryRetrieveLevel": level, **values}, (), items or {})


def ask(db: Database, query: Identifier, root: Root = Root.STUDY, **options: Any) -> list[dict[str, str]]:
    """The answers to a relational query, in the order of the rows."""
    plan = plan_find(root, query, relational=True, options=Options(**options))
    return [plan.answer(row) for row in run(db, plan, limit=1000, seconds=30).rows]


def studies(db: Database, **values: str) -> set[str]:
    options = {k: bool(values.pop(k)) for k in ("combined", "fuzzy", "timezone", "unknown") if k in values}
    found = ask(db, identifier("STUDY", **values), local=lambda _: timedelta(hours=1), **options)
    return {one["StudyInstanceUID"] for one in found}


def study(number: int, **fields: str) -> Any:
    return instance(f"1.20.{number}", f"1.10.{number}", PatientID=f"P{number}", **fields)


# Names


def test_names_by_key(db: Database) -> None:
    names = ["Müller^Jörg", "Meier^Anna", "Smith^John=山田^太郎", "", "Smith_^100%", "Solo"]
    Catalogue(db).commit([study(n, PatientName=name) for n, name in enumerate(names)])
    for query, expected in {
        "müller*": {0},
        "Muller*": set(),
        "MEIER^ANNA": {1},
        "*anna": {1},
        "smith*": {2, 4},
        "Smith^*": {2},
        "smith_^*": {4},
        "*%": {4},
        "山田*": {2},
        "=山田^太郎": {2},
        "*=*太郎": {2},
        "M?ier*": {1},
        "solo^*": {5},
    }.items():
        assert studies(db, PatientName=query) == {f"1.10.{n}" for n in expected}, query
        patients = ask(db, identifier("PATIENT", PatientName=query), Root.PATIENT)
        assert {p["PatientID"] for p in patients} == {f"P{n}" for n in expected}, query
    assert studies(db, PatientName="Mayr", fuzzy="1") == {"1.10.1"}
    assert studies(db, PatientName="Joerg^Muller", fuzzy="1") == {"1.10.0"}
    assert studies(db, PatientName="smith*", fuzzy="1") == {"1.10.2", "1.10.4"}
    assert studies(db, PatientName="smith*", unknown="1") == {"1.10.2", "1.10.3", "1.10.4"}
    assert studies(db, PatientName="Mayr", fuzzy="1", unknown="1") == {"1.10.1", "1.10.3"}
    assert ask(db, identifier("SERIES", PatientName="mayr"), fuzzy=True)[0]["SeriesInstanceUID"] == "1.20.1"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.text("aAbB^=ä山 ", max_size=8), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["*", "?", "a", "B", "^", "=", "ä", " ", "山"]), min_size=1, max_size=5).map("".join),
)
def test_names_in_an_index_are_those_of_the_predicate(db: Database, names: list[str], query: str) -> None:
    with db.transaction():
        for table in ("instances", "series", "studies", "patients"):
            db.execute(f"DELETE FROM {table}")
    assert db.value("SELECT count(*) FROM study_names") == 0, "keys go with their study"
    names = [" ".join(name.split(" ")).strip(" ") for name in names]
    Catalogue(db).commit([study(n, PatientName=name) for n, name in enumerate(names)])
    if query.strip(" ") in ("", "*"):
        return
    assert studies(db, PatientName=query) == {
        f"1.10.{n}" for n, name in enumerate(names) if matches("PN", query, name, single=True)
    }


# Text, by value and by prefix


def test_text_keys(db: Database) -> None:
    numbers = ["A1", "A10", "A1_", "a1", "B", "A1\\B2", "Ä9", ""]
    Catalogue(db).commit([study(n, AccessionNumber=number) for n, number in enumerate(numbers)])
    for query, expected in {
        "A1": {0},
        "A1 ": {0},
        "A1*": {0, 1, 2, 5},
        "A1?": {1, 2},
        "*1": {0, 3},
        "?1": {0, 3},
        "A1\\B": {0, 4},
        "Ä*": {6},
        "A*0": {1},
        "A*9": set(),
        "*": set(range(8)),
    }.items():
        assert studies(db, AccessionNumber=query) == {f"1.10.{n}" for n in expected}, query
    assert studies(db, AccessionNumber="B", unknown="1") == {"1.10.4", "1.10.7"}
    assert studies(db, StudyID="S", unknown="1") == {f"1.10.{n}" for n in range(8)}
    assert studies(db, StudyDescription="S", unknown="1") == set(), "it is no required key"
    assert studies(db, PatientID="", unknown="1") == {f"1.10.{n}" for n in range(8)}
    assert studies(db, PatientID="P1", unknown="1") == {"1.10.1"}


# Dates and times


def test_dates_of_any_shape(db: Database) -> None:
    dates = ["20240105", "2024.01.06", "", "20240107", "soon"]
    Catalogue(db).commit([study(n, StudyDate=date) for n, date in enumerate(dates)])
    assert studies(db, StudyDate="20240105-20240106") == {"1.10.0", "1.10.1"}
    assert studies(db, StudyDate="20240106") == {"1.10.1"}
    assert studies(db, StudyDate="-20240106") == {"1.10.0", "1.10.1"}
    assert studies(db, StudyDate="soon") == {"1.10.4"}
    assert studies(db, StudyDate="20240105", unknown="1") == {"1.10.0", "1.10.2"}


def test_date_and_time_as_one_range(db: Database) -> None:
    moments = [("20060705", "0959"), ("20060705", "1000"), ("20060706", "0300"), ("20060707", "1800"), ("20060706", "")]
    moments += [("", ""), ("20060707", "1801")]
    Catalogue(db).commit([study(n, StudyDate=d, StudyTime=t) for n, (d, t) in enumerate(moments)])
    keys = {"StudyDate": "20060705-20060707", "StudyTime": "1000-1800"}
    assert studies(db, **keys) == {"1.10.1", "1.10.3"}
    assert studies(db, **keys, combined="1") == {"1.10.1", "1.10.2", "1.10.3", "1.10.4"}
    assert studies(db, **keys, combined="1", unknown="1") == {"1.10.1", "1.10.2", "1.10.3", "1.10.4", "1.10.5"}
    open_end = {"StudyDate": "20060707-", "StudyTime": "0100-"}
    assert studies(db, **open_end, combined="1") == {"1.10.3", "1.10.6"}
    apart = {"StudyDate": "20060705-20060707", "StudyTime": "1000-"}
    assert studies(db, **apart, combined="1") == studies(db, **apart) == {"1.10.1", "1.10.3", "1.10.6"}


def test_times_in_the_zone_of_the_query(db: Database) -> None:
    rows = [("20240101", "0030", "+0100"), ("20231231", "233015.5", "+0000"), ("20231231", "2330", "-0500")]
    rows += [("20240101", "003015", ""), ("20231231", "", "+0000")]
    Catalogue(db).commit(
        [study(n, StudyDate=d, StudyTime=t, TimezoneOffsetFromUTC=z) for n, (d, t, z) in enumerate(rows)]
    )
    new_year = {"StudyDate": "20231231", "StudyTime": "2330", "TimezoneOffsetFromUTC": "+0000"}
    assert studies(db, **new_year) == {"1.10.1", "1.10.2"}, "what was not negotiated changes nothing"
    assert studies(db, **new_year, timezone="1") == {"1.10.0", "1.10.1", "1.10.3"}
    late = {"StudyDate": "20240101-", "StudyTime": "0430-", "TimezoneOffsetFromUTC": "+0000"}
    assert studies(db, **late, timezone="1", combined="1") == {"1.10.2"}
    assert studies(db, StudyDate="20231231", TimezoneOffsetFromUTC="+0000", timezone="1") == {
        "1.10.0", "1.10.1", "1.10.3", "1.10.4",
    }  # fmt: skip
    query = identifier("STUDY", StudyTime="", PatientID="P0", TimezoneOffsetFromUTC="-0330")
    (answer,) = ask(db, query, timezone=True)
    assert answer == {
        "StudyTime": "2000",
        "PatientID": "P0",
        "TimezoneOffsetFromUTC": "-0330",
        "StudyInstanceUID": "1.10.0",
    }
    patient = identifier("PATIENT", PatientID="P0", TimezoneOffsetFromUTC="-0330")
    assert ask(db, patient, Root.PATIENT, timezone=True) == [{"PatientID": "P0"}]
    assert plan_find(Root.PATIENT, patient, options=Options(timezone=True)).unsupported == ()
    for bad in ("0100", "+2500", "x"):
        with pytest.raises(IdentifierError):
            ask(db, identifier("STUDY", StudyDate="", TimezoneOffsetFromUTC=bad), timezone=True)
    assert ask(db, identifier("STUDY", StudyDate="", TimezoneOffsetFromUTC="x"))


def test_the_zone_of_series_and_images_is_their_own(db: Database) -> None:
    """A study whose second series came from equipment in another zone."""
    Catalogue(db).commit(
        [
            instance("1.20", "1.10", "1.1", SeriesDate="20240101", SeriesTime="10", TimezoneOffsetFromUTC="+0100"),
            instance("1.21", "1.10", "1.2", SeriesDate="20240101", SeriesTime="10", TimezoneOffsetFromUTC="+0300"),
        ]
    )
    for level, key in (("SERIES", "SeriesInstanceUID"), ("IMAGE", "SOPInstanceUID")):
        query = identifier(level, SeriesDate="", SeriesTime="", TimezoneOffsetFromUTC="+0000", **{key: ""})
        assert [a["SeriesTime"] for a in ask(db, query, timezone=True)] == ["09", "07"]
    query = identifier("SERIES", SeriesDate="20240101", SeriesTime="07", TimezoneOffsetFromUTC="+0000")
    assert [a["SeriesInstanceUID"] for a in ask(db, query, timezone=True)] == ["1.21"]


def test_an_offset_is_returned_with_times_and_never_empty(db: Database) -> None:
    Catalogue(db).commit([study(0, StudyTime="10", TimezoneOffsetFromUTC="+0100"), study(1, StudyTime="10")])
    with_time = ask(db, identifier("STUDY", StudyTime="", TimezoneOffsetFromUTC=""))
    assert [a.get("TimezoneOffsetFromUTC") for a in with_time] == ["+0100", None]
    assert [a.get("TimezoneOffsetFromUTC") for a in ask(db, identifier("STUDY", StudyTime=""))] == ["+0100", None]
    assert all("TimezoneOffsetFromUTC" not in a for a in ask(db, identifier("STUDY", StudyDate="")))


# Sequences


def requested(*items: dict[str, str]) -> str:
    return json.dumps(items)


ASKED = {"RequestedProcedureID": "", "ScheduledProcedureStepID": ""}


def test_sequence_matching(db: Database) -> None:
    one = {"RequestedProcedureID": "RP1", "ScheduledProcedureStepID": "SP1", "AccessionNumber": "A1"}
    two = {"RequestedProcedureID": "RP2", "ScheduledProcedureStepID": "SP2", "RequestedProcedureDescription": "Schädel"}
    Catalogue(db).commit(
        [
            instance("1.20", "1.10", RequestAttributesSequence=requested(one, two)),
            instance("1.21", "1.10", RequestAttributesSequence=requested(one)),
            instance("1.22", "1.10"),
        ]
    )

    def series(**item: str) -> dict[str, Any]:
        query = identifier("SERIES", {"RequestAttributesSequence": item}, StudyInstanceUID="1.10")
        found = ask(db, query)
        return {a["SeriesInstanceUID"]: json.loads(a["RequestAttributesSequence"]) for a in found}

    assert series() == {"1.20": [one, two], "1.21": [one], "1.22": []}, "no key: all of it is asked for"
    assert series(RequestedProcedureID="RP2", AccessionNumber="") == {
        "1.20": [{"RequestedProcedureID": "RP2", "AccessionNumber": ""}]
    }
    assert set(series(RequestedProcedureID="RP1")) == {"1.20", "1.21"}
    assert series(RequestedProcedureID="RP1", ScheduledProcedureStepID="SP2") == {}, "all keys within one item"
    assert set(series(RequestedProcedureID="RP?", ScheduledProcedureStepID="SP2")) == {"1.20"}
    assert set(series(RequestedProcedureDescription="Sch*")) == {"1.20"}
    assert series(RequestedProcedureID="rp1") == {}
    assert series(**ASKED)["1.22"] == []
    images = identifier("IMAGE", {"RequestAttributesSequence": {"RequestedProcedureID": "RP2"}}, SOPInstanceUID="")
    assert len(ask(db, images)) == 1
    plan = plan_find(Root.STUDY, identifier("STUDY", {"RequestAttributesSequence": {}}, StudyInstanceUID=""))
    assert [vr for _, vr in plan.unsupported] == ["SQ"], "it is no attribute of a study"


def test_hostile_values_in_items_are_parameters(db: Database) -> None:
    hostile = "'); DROP TABLE series_requests; --"
    Catalogue(db).commit([instance(RequestAttributesSequence=requested({"RequestedProcedureID": hostile}))])
    query = identifier("SERIES", {"RequestAttributesSequence": {"RequestedProcedureID": hostile}})
    assert json.loads(ask(db, query)[0]["RequestAttributesSequence"]) == [{"RequestedProcedureID": hostile}]
    with pytest.raises(IdentifierError):
        ask(db, identifier("SERIES", {"RequestAttributesSequence": {"RequestedProcedureID": "x" * 2000}}))


# Returned keys


def test_what_does_not_exist_at_a_level_is_not_returned(db: Database) -> None:
    Catalogue(db).commit([study(0)])
    query = Identifier({"QueryRetrieveLevel": "STUDY", "SeriesDescription": "x"}, ((0x00101000, "LO"),))
    plan = plan_find(Root.STUDY, query)
    assert plan.unsupported == ((0x0008103E, "LO"), (0x00101000, "LO"))
    assert [plan.answer(r) for r in run(db, plan, limit=9, seconds=9).rows] == [{"StudyInstanceUID": "1.10.0"}]


# Use of indexes: none of these may read a whole table.

NAMED: dict[str, tuple[Root, Identifier, dict[str, Any]]] = {
    "patient id": (Root.STUDY, identifier("STUDY", PatientID="P1", ModalitiesInStudy=""), {}),
    "patient id, patient level": (Root.PATIENT, identifier("PATIENT", PatientID="P1"), {}),
    "patient id prefix": (Root.STUDY, identifier("STUDY", PatientID="P1*"), {}),
    "accession number": (Root.STUDY, identifier("STUDY", AccessionNumber="A1"), {}),
    "accession numbers": (Root.STUDY, identifier("STUDY", AccessionNumber="A1\\A2"), {}),
    "accession number prefix": (Root.STUDY, identifier("STUDY", AccessionNumber="A1*"), {}),
    "accession number or none": (Root.STUDY, identifier("STUDY", AccessionNumber="A1"), {"unknown": True}),
    "study": (Root.STUDY, identifier("STUDY", StudyInstanceUID="1.2", SOPClassesInStudy=""), {}),
    "studies": (Root.STUDY, identifier("STUDY", StudyInstanceUID="1.2\\1.3", NumberOfStudyRelatedInstances=""), {}),
    "a day": (Root.STUDY, identifier("STUDY", StudyDate="20240105-20240105"), {}),
    "a day and a time": (
        Root.STUDY,
        identifier("STUDY", StudyDate="20240105-20240106", StudyTime="10-11"),
        {"combined": True},
    ),
    "a day elsewhere": (
        Root.STUDY,
        identifier("STUDY", StudyDate="20240105", TimezoneOffsetFromUTC="+0900"),
        {"timezone": True},
    ),
    "a day of a modality": (Root.STUDY, identifier("STUDY", StudyDate="20240105", ModalitiesInStudy="CT"), {}),
    "name": (Root.STUDY, identifier("STUDY", PatientName="Smith^John"), {}),
    "name prefix": (Root.STUDY, identifier("STUDY", PatientName="Smi*"), {}),
    "name, patient level": (Root.PATIENT, identifier("PATIENT", PatientName="Smi*"), {}),
    "fuzzy name": (Root.STUDY, identifier("STUDY", PatientName="Smith^J*"), {"fuzzy": True}),
    "series of a study": (Root.STUDY, identifier("SERIES", StudyInstanceUID="1.2", RequestAttributesSequence=""), {}),
    "series": (Root.STUDY, identifier("SERIES", SeriesInstanceUID="1.2", NumberOfSeriesRelatedInstances=""), {}),
    "request": (
        Root.STUDY,
        identifier("SERIES", {"RequestAttributesSequence": {"RequestedProcedureID": "R", "StudyInstanceUID": ""}}),
        {},
    ),
    "images of a series": (Root.STUDY, identifier("IMAGE", StudyInstanceUID="1.2", SeriesInstanceUID="1.3"), {}),
    "image": (Root.STUDY, identifier("IMAGE", SOPInstanceUID="1.2"), {}),
    "images": (Root.STUDY, identifier("IMAGE", SOPInstanceUID="1.2\\1.3", KVP=""), {}),
}
WIDE = ("patients", "studies", "series", "instances", "p", "st", "se", "i")


def scans(db: Database, sql: str, parameters: Any) -> list[str]:
    """Steps that read all of a table or of one of its indexes."""
    steps = [str(r["detail"]) for r in db.rows(f"EXPLAIN QUERY PLAN {sql}", parameters)]
    assert steps
    return [s for s in steps if s.startswith("SCAN") and s.split()[1] in WIDE]


@pytest.mark.parametrize("name", NAMED)
def test_an_index_is_used(db: Database, name: str) -> None:
    root, query, options = NAMED[name]
    plan = plan_find(root, query, relational=True, options=Options(**options))
    assert scans(db, plan.sql, plan.parameters) == []


def test_an_index_is_used_for_retrieves(db: Database) -> None:
    for level, key in (("PATIENT", "PatientID"), ("STUDY", "StudyInstanceUID"), ("IMAGE", "SOPInstanceUID")):
        for value in ("1.2", "1.2\\1.3"):
            if level != "PATIENT" or "\\" not in value:
                plan = plan_retrieve(Root.PATIENT, identifier(level, **{key: value}), relational=True)
                assert scans(db, plan.sql, plan.parameters) == [], (level, value)


def test_scans_are_seen(db: Database) -> None:
    plan = plan_find(Root.STUDY, identifier("STUDY", StudyDescription="x"))
    assert scans(db, plan.sql, plan.parameters)


def test_default_zone_is_the_machine_s(db: Database) -> None:
    moment = datetime(2024, 7, 1, 12)
    offset = moment.astimezone().utcoffset() or timedelta()
    Catalogue(db).commit([study(0, StudyDate="20240701", StudyTime="1200", sop=uid())])
    query = identifier("STUDY", StudyTime="", StudyDate="", TimezoneOffsetFromUTC="+0000")
    (answer,) = ask(db, query, timezone=True)
    assert answer["StudyDate"] + answer["StudyTime"] == f"{moment - offset:%Y%m%d%H%M}"
