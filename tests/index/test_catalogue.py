"""What is stored: idempotent commits, duplicates, replacements, associations."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicomnode.index.catalogue import MAX_REQUESTS, Catalogue, NewInstance, Stored
from dicomnode.index.database import Database
from tests.index.rows import FakeClock, instance, series_row


def test_same_bytes_again_change_nothing(db: Database) -> None:
    catalogue = Catalogue(db)
    first = instance(sop="1.1", file="aa/1.dcm")
    assert catalogue.commit([first]) == [Stored.added]
    before = db.rows("SELECT * FROM instances") + db.rows("SELECT * FROM series")
    assert catalogue.commit([instance(sop="1.1", file="aa/2.dcm")]) == [Stored.duplicate]
    assert db.rows("SELECT * FROM instances") + db.rows("SELECT * FROM series") == before
    assert db.value("SELECT count(*) FROM former_instances") == 0


def test_duplicate_within_one_batch(db: Database) -> None:
    one = instance(sop="1.1")
    assert Catalogue(db).commit([one, one]) == [Stored.added, Stored.duplicate]


@pytest.mark.parametrize("other", [{"content": "b"}, {"transfer_syntax_uid": "1.2.840.10008.1.2.4.70"}])
def test_other_content_replaces_and_keeps_the_former_file(db: Database, other: dict[str, str]) -> None:
    catalogue = Catalogue(db)
    old, new = instance(sop="1.1", file="aa/old.dcm"), instance(sop="1.1", file="aa/new.dcm", **other)
    catalogue.commit([old])
    assert catalogue.commit([new]) == [Stored.replaced]
    stored = catalogue.instance("1.1")
    assert stored is not None and stored["file"] == "aa/new.dcm" and stored["sha256"] == new.sha256
    (former,) = db.rows("SELECT * FROM former_instances")
    assert (former["file"], former["sha256"], former["replaced_by_sha256"]) == ("aa/old.dcm", old.sha256, new.sha256)
    assert series_row(db, "1.2.20")["generation"] == 2, "the series is looked at again"
    assert catalogue.files_in("aa") == {"aa/old.dcm", "aa/new.dcm"}, "no file of a row is a stray"


def test_files_of_other_folders_are_not_named(db: Database) -> None:
    Catalogue(db).commit([instance(file="aa/1.dcm"), instance(file="ab/2.dcm"), instance(file="a0/3.dcm")])
    assert Catalogue(db).files_in("aa") == {"aa/1.dcm"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), max_size=15))
def test_rows_follow_the_last_content(db: Database, arrivals: list[tuple[int, str]]) -> None:
    with db.transaction():
        for table in ("instances", "former_instances", "series"):
            db.execute(f"DELETE FROM {table}")
    last: dict[str, str] = {}
    changes = 0
    for number, content in arrivals:
        sop = f"1.9.{number}"
        (outcome,) = Catalogue(db).commit([instance(sop=sop, content=content)])
        expected = Stored.added if sop not in last else Stored.duplicate if last[sop] == content else Stored.replaced
        assert outcome == expected
        changes += outcome != Stored.duplicate
        last[sop] = content
    assert {r["SOPInstanceUID"]: r["dataset_sha256"] for r in db.rows("SELECT * FROM instances")} == {
        sop: instance(sop=sop, content=content).dataset_sha256 for sop, content in last.items()
    }
    assert (db.value("SELECT generation FROM series") or 0) == changes


def test_hierarchy_is_shared(db: Database) -> None:
    catalogue = Catalogue(db)
    catalogue.commit([instance("1.20", "1.10"), instance("1.21", "1.10"), instance("1.22", "1.11")])
    catalogue.commit([instance("1.23", "1.12", PatientID="P1", IssuerOfPatientID="other")])
    assert catalogue.counts() == {"patients": 2, "studies": 3, "series": 4, "instances": 4}


def test_values_are_parameters(db: Database) -> None:
    hostile = "'); DROP TABLE instances; --"
    Catalogue(db).commit([instance(PatientID=hostile, PatientName=hostile)])
    assert db.value("SELECT PatientID FROM patients") == hostile
    assert db.value("SELECT count(*) FROM instances") == 1


def test_associations_are_evidence(db: Database, clock: FakeClock) -> None:
    catalogue = Catalogue(db)
    for name, receiver in (("a", "r1"), ("b", "r1"), ("c", "r2")):
        catalogue.association_opened(association_id=name, receiver=receiver, peer="ct", ae="CT", address="::1")
        catalogue.commit([instance(association_id=name)])
    catalogue.association_closed("a", "released")
    catalogue.association_closed("a", "aborted")  # only an open one changes
    assert catalogue.associations_lost("r1") == 1
    series = series_row(db, "1.2.20")["id"]
    assert {a["id"]: (a["state"], a["instances"]) for a in catalogue.series_associations(series)} == {
        "a": ("released", 1),
        "b": ("lost", 1),
        "c": ("open", 1),
    }


def test_result_does_not_open_its_series(db: Database) -> None:
    Catalogue(db).commit([instance("1.30", origin="result")])
    assert Catalogue(db).open_series() == []
    Catalogue(db).commit([instance("1.31")])
    assert [s["id"] for s in Catalogue(db).open_series()] == [series_row(db, "1.31")["id"]]


# What a process remembers of its series


def statements(db: Database, batch: list[NewInstance], catalogue: Catalogue) -> list[str]:
    seen: list[str] = []
    connection = db._connection()

    def note(_cursor: object, sql: str, _bindings: object) -> bool:
        seen.append(sql)
        return True

    connection.exec_trace = note
    try:
        catalogue.commit(batch)
    finally:
        connection.exec_trace = None
    return seen


def test_one_more_instance_costs_the_same_however_many_there_are(db: Database) -> None:
    catalogue = Catalogue(db)
    catalogue.association_opened(association_id="a", receiver="r", peer="ct", ae="CT", address="::1")
    catalogue.commit([instance()])
    second = statements(db, [instance(association_id="a")], catalogue)
    catalogue.commit([instance() for _ in range(200)])
    assert statements(db, [instance(association_id="a")], catalogue) == second
    assert len(second) <= 5, second  # begin, insert, series, association, commit
    many = statements(db, [instance(association_id="a") for _ in range(50)], catalogue)
    assert len(many) == len(second) + 49, "counts are updated once for a batch"
    assert db.value("SELECT generation FROM series") == 253


@pytest.mark.parametrize("reused", [False, True])
def test_a_series_that_was_deleted_is_made_anew(db: Database, reused: bool) -> None:
    catalogue = Catalogue(db)
    catalogue.commit([instance("1.20", sop="1.1")])
    with db.transaction():
        db.execute("DELETE FROM instances")
        db.execute("DELETE FROM series")
    if reused:  # another series has its number now
        Catalogue(db).commit([instance("1.21", sop="1.5")])
    assert catalogue.commit([instance("1.20", sop="1.2"), instance("1.20", sop="1.3")]) == [Stored.added] * 2
    rows = db.rows(
        "SELECT i.SOPInstanceUID FROM instances i JOIN series s ON s.id = i.series_id"
        " WHERE s.SeriesInstanceUID = '1.20' ORDER BY 1"
    )
    assert [r["SOPInstanceUID"] for r in rows] == ["1.2", "1.3"]
    assert series_row(db, "1.20")["generation"] == 2


def test_what_was_rolled_back_is_not_remembered(db: Database) -> None:
    catalogue = Catalogue(db)
    request = '[{"RequestedProcedureID":"RP"}]'
    good = instance("1.20", PatientName="A^B", RequestAttributesSequence=request)
    bad = instance("1.21")
    del bad.attributes["SeriesInstanceUID"]  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        catalogue.commit([good, bad])
    assert catalogue.counts() == {"patients": 0, "studies": 0, "series": 0, "instances": 0}
    assert catalogue.commit([good]) == [Stored.added]
    assert db.value("SELECT count(*) FROM series_requests") == 1
    assert db.value("SELECT count(*) FROM study_names") == db.value("SELECT count(*) FROM patient_names") == 5


def test_many_series_are_not_remembered_for_ever(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.index.catalogue.MAX_KNOWN", 10)
    catalogue = Catalogue(db)
    for number in range(40):
        catalogue.commit([instance(f"1.20.{number}"), instance(f"1.20.{number}")])
    assert len(catalogue._remembered) <= 12
    assert {r["generation"] for r in db.rows("SELECT generation FROM series")} == {2}


def test_requests_of_a_series_are_those_of_its_instances(db: Database) -> None:
    catalogue = Catalogue(db)
    first, second = '[{"RequestedProcedureID":"A"}]', '[{"RequestedProcedureID":"A"},{"RequestedProcedureID":"B"}]'
    for text in (first, second, "", first, second):
        catalogue.commit([instance(RequestAttributesSequence=text)])
    Catalogue(db).commit([instance(RequestAttributesSequence=second)])  # another process
    assert [r["RequestedProcedureID"] for r in db.rows("SELECT * FROM series_requests ORDER BY id")] == ["A", "B"]
    for number in range(2 * MAX_REQUESTS):
        catalogue.commit([instance(RequestAttributesSequence=f'[{{"RequestedProcedureID":"{number}"}}]')])
    assert db.value("SELECT count(*) FROM series_requests") == MAX_REQUESTS


def test_first_attributes_are_of_the_first(db: Database) -> None:
    Catalogue(db).commit([instance(KVP="120", SOPClassUID="1.9"), instance(KVP="80", SOPClassUID="1.2")])
    assert Catalogue(db).first_attributes(series_row(db, "1.2.20")["id"])["KVP"] == "120"
    assert Catalogue(db).first_attributes(99) == {}
