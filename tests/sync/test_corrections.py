"""Corrections that travel as records: applied when they are decided, and one pseudonym whatever was corrected."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicomnode.conflicts import moment
from dicomnode.deidentify import deidentify
from dicomnode.encode import Correction, encode_results
from dicomnode.errors import OperatorError
from dicomnode.index.corrections import CORRECTED_STUDIES, corrected_study, read_corrections
from dicomnode.index.database import Database
from dicomnode.index.mapping import PseudonymRows
from dicomnode.index.operation import Models
from dicomnode.index.record_reviews import Reviews, demographics
from dicomnode.infer.golden import ReadyModel
from dicomnode.pseudonyms import Pseudonyms
from tests.encode.conftest import assert_valid, make_case  # noqa: F401 fixtures
from tests.encode.encode_case import Case, read
from tests.infer.life_case import add_series, add_version, boxes, settings_of, worker_on
from tests.sync.index_case import CANARY, CANARY_ID, add_results
from tests.sync.test_records import Cloud, Node, run

NAME = {"PatientName": "Right^Name"}


def own_patient(node: Node, **values: str) -> str:
    """A correction made here; the pseudonym of the patient."""
    pseudonym = str(node.db.value("SELECT pseudonym FROM pseudonyms WHERE kind = 'patient'"))
    begin = demographics(node.db, CANARY_ID, "")
    node.reviews.change("patient", pseudonym, values, begin=begin, identified=True)
    return pseudonym


def patients(node: Node) -> list[Any]:
    return list(read_corrections(node.db).patients.values())


def test_a_correction_counts_once_it_is_decided(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        pseudonym = own_patient(node, PatientBirthDate="19800102")
        await node.exchange()
        assert patients(node) == [{"PatientBirthDate": "19800102"}]
        held = cloud.holds("patient", pseudonym)
        own_patient(node, PatientName="Wrong^Name", PatientSex="O")
        await cloud.change("patient", pseudonym, **{**held, **NAME})
        await node.exchange()
        [conflict] = node.reviews.listing(state="open")
        assert set(conflict["fields"]) == {"PatientName", "PatientSex"}
        assert node.holds("patient", pseudonym)["PatientName"] == "Right^Name", "the cloud's serves as a record"
        assert patients(node) == [{"PatientBirthDate": "19800102"}], "but what is in dispute corrects nothing"
        node.reviews.decide(conflict["id"], "cloud", who="test")
        assert patients(node) == [{"PatientBirthDate": "19800102", **NAME}]
        await node.exchange()
        assert patients(node) == [{"PatientBirthDate": "19800102", **NAME}] and cloud.open() == []
        [row] = node.db.rows("SELECT SOPInstanceUID FROM instances LIMIT 1")
        found = corrected_study(node.db, row["SOPInstanceUID"])
        assert found is not None and found.values == {"PatientBirthDate": "19800102", **NAME} and found.changed_time
        own_patient(node, PatientName="", PatientBirthDate="")
        assert patients(node) == [], "taken back"
        assert node.db.rows("SELECT PatientName FROM patients")[0]["PatientName"] == CANARY, "rows stay as received"

    run(tmp_path, body, patients_identity="kept")


def test_a_time_that_is_none_stops_no_result(tmp_path: Path) -> None:
    """``changed_time`` is anybody's text: what it says must not decide whether a study is analysed."""

    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        own_patient(node, **NAME)
        [row] = node.db.rows("SELECT SOPInstanceUID FROM instances LIMIT 1")
        for told in ("yesterday", "2026-11-29T10:00:00", ""):
            with node.db.transaction():
                node.db.execute("UPDATE records SET changed_time = ? WHERE type = 'patient'", (told,))
            found = corrected_study(node.db, row["SOPInstanceUID"])
            assert found is not None and moment(found.changed_time) == node.clock.wall().replace(
                microsecond=node.clock.wall().microsecond // 1000 * 1000
            )

    run(tmp_path, body, patients_identity="kept")


def test_a_corrected_name_does_not_leave_in_a_text(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        own_patient(node, PatientName="Corrected^Person", PatientID="NEW-4711")
        result = str(node.db.value("SELECT record_id FROM records WHERE type = 'ai-result'"))
        node.reviews.change("result-review", result, {"reason": f"Mr Person (NEW-4711, {CANARY_ID}) moved"})
        await node.exchange()
        [left] = cloud.storage.rows("SELECT data FROM records WHERE type = 'result-review'")
        assert json.loads(left["data"])["reason"] == "Mr *** (***, ***) moved"

    run(tmp_path, body)


OLD = {"AccessionNumber": "OLD-77", "ReferringPhysicianName": "Former^Doctor", "StudyID": "OLD-ID"}


def test_who_a_study_is_of_does_not_leave_in_a_text_whatever_it_was_when(tmp_path: Path) -> None:
    """What was received, what is corrected, and what was correct in between."""

    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        with node.db.transaction():
            node.db.execute(f"UPDATE studies SET {', '.join(f'{k} = ?' for k in OLD)}", tuple(OLD.values()))
            node.db.execute("UPDATE patients SET PatientBirthDate = '19700102'")
        await node.exchange()
        study = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))
        node.reviews.change("study", study, {"AccessionNumber": "MID-88", "ReferringPhysicianName": "Middle^Person"})
        node.reviews.change("study", study, {"AccessionNumber": "NEW-99", "ReferringPhysicianName": "Later^Colleague"})
        result = str(node.db.value("SELECT record_id FROM records WHERE type = 'ai-result'"))
        words = "Former, OLD-77, OLD-ID, 19700102, Middle, MID-88, Colleague, NEW-99"
        node.reviews.change("result-review", result, {"reason": f"seen by {words}"})
        await node.exchange()
        [left] = cloud.storage.rows("SELECT data FROM records WHERE type = 'result-review'")
        assert json.loads(left["data"])["reason"] == f"seen by {', '.join(['***'] * 8)}"

    run(tmp_path, body)


def test_an_object_leaves_without_the_corrected_and_the_former_numbers_in_its_texts(
    make_case: Callable[..., Case],  # noqa: F811
) -> None:
    case = make_case()
    correction = Correction(
        {"AccessionNumber": "NEW-99", "ReferringPhysicianName": "Later^Colleague"}, "2026-11-29T10:00:00+00:00", "N"
    )
    arguments = (case.analysis, case.identity, case.model, case.sources)
    for result in encode_results(*arguments, station=case.station, correction=correction):
        ds = read(result.part10)
        [former] = ds.OriginalAttributesSequence[0].ModifiedAttributesSequence
        former.AccessionNumber, former.ReferringPhysicianName = "OLD-77", "Former^Doctor"
        ds.SeriesDescription = "for Colleague, Former: NEW-99, OLD-77"
        buffer = BytesIO()
        ds.save_as(buffer)
        left = read(deidentify(buffer.getvalue(), Pseudonyms(b"k" * 32)).content)
        assert left.SeriesDescription == "for ***, ***: ***, ***"


def test_a_decision_may_leave_an_attribute_empty_and_be_taken_back(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        with node.db.transaction():  # as received
            for column in ("data", "reported"):
                node.db.execute(
                    f"UPDATE records SET {column} = json_set(data, '$.AccessionNumber', 'A7', '$.StudyID', 'S7')"
                    " WHERE type = 'study'"
                )
            node.db.execute("UPDATE sync_items SET identified = 1")
            was = "(SELECT r.data FROM records r WHERE r.type = 'study')"
            node.db.execute(f"UPDATE sync_items SET data = {was} WHERE type = 'study'")
            node.db.execute("UPDATE patients SET PatientSex = 'M'")
        await node.exchange()
        study = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))

        def studies() -> list[Any]:
            return list(read_corrections(node.db).studies.values())

        node.reviews.change("study", study, {}, blank=["AccessionNumber"])
        assert studies() == [{"AccessionNumber": ""}]
        await node.exchange()
        assert cloud.holds("study", study)["AccessionNumber"] == "", "the cloud knows the decision"
        node.reviews.change("study", study, {"AccessionNumber": None})
        assert studies() == [], "taken back"
        await node.exchange()
        await cloud.change("study", study, **{**cloud.holds("study", study), "StudyID": "", "AccessionNumber": None})
        await node.exchange()
        assert studies() == [{"StudyID": ""}], "of two fields the one that was decided; null says nothing"
        PseudonymRows(node.db).keep({("patient", "PSEUDO"): CANARY_ID})
        pseudonym = own_patient(node, PatientSex="F")
        node.reviews.change("patient", pseudonym, {}, blank=["PatientSex"], identified=True)
        assert patients(node) == [{"PatientSex": ""}]
        await node.exchange()
        held = cloud.holds("patient", pseudonym)
        await cloud.change("patient", pseudonym, **{**held, "PatientID": "", "PatientName": "", "PatientSex": "O"})
        await node.exchange()
        assert patients(node) == [{"PatientSex": "O"}], "who it is is not taken away"
        for kind, name, field in (
            ("patient", pseudonym, "PatientID"), ("patient", pseudonym, "IssuerOfPatientID"),
            ("patient", pseudonym, "PatientName"), ("limits", "warnings", "open_reviews"),
        ):  # fmt: skip
            with pytest.raises(OperatorError, match="must not be empty"):
                node.reviews.change(kind, name, {}, blank=[field])

    run(tmp_path, body, patients_identity="kept")


@pytest.mark.parametrize(("strategy", "serves"), [("cloud", ""), ("newest", ""), ("merge", "here"), ("review", "")])
def test_an_empty_side_of_a_conflict_serves_where_it_wins_and_not_by_merging(
    tmp_path: Path, strategy: str, serves: str
) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        node.db._connection().execute("UPDATE sync_items SET identified = 1")
        await node.exchange()
        study = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))
        node.reviews.change("study", study, {"StudyDescription": "both"})
        await node.exchange()
        node.clock.now -= 60.0
        node.reviews.change("study", study, {"StudyDescription": "here"})
        node.clock.now += 60.0
        await cloud.change("study", study, **{**cloud.holds("study", study), "StudyDescription": ""})
        await node.exchange()
        if strategy == "review":
            [conflict] = node.reviews.listing(state="open")
            node.reviews.decide(conflict["id"], "cloud", who="test")
        await node.exchange()
        assert (
            node.holds("study", study)["StudyDescription"] == cloud.holds("study", study)["StudyDescription"] == serves
        )

    run(tmp_path, body, conflicts={"studies": strategy})


@pytest.mark.parametrize("at_cloud", [True, False])
def test_what_was_empty_all_along_is_no_decision_against_what_came_since(tmp_path: Path, *, at_cloud: bool) -> None:
    """The side that wins has the whole value: what it never knew must not blank what the other has learnt."""

    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        node.db._connection().execute("UPDATE sync_items SET identified = 1")
        await node.exchange()
        study = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))
        told = cloud.holds("study", study)
        assert told["AccessionNumber"] == "" == told["StudyDescription"]
        here, there = {"StudyDescription": "learnt"}, {"AccessionNumber": "A9"}
        if at_cloud:
            here, there = there, here
        node.clock.now += -60.0 if at_cloud else 60.0
        node.reviews.change("study", study, here)
        node.clock.now += 60.0 if at_cloud else -60.0
        await cloud.change("study", study, **{**told, **there})
        for _ in range(3):
            await node.exchange()
        [conflict] = node.reviews.listing()
        assert conflict["outcome"] == ("cloud" if at_cloud else "edge")
        assert node.holds("study", study) == cloud.holds("study", study) == {**told, **here, **there}
        assert cloud.open() == []

    run(tmp_path, body, conflicts={"studies": "newest"})


UNFIT = {
    "PatientID": "ID\\2",
    "PatientName": "A=B=C=D",
    "PatientBirthDate": "\u0661\u0669\u0668\u0660\u0660\u0661\u0660\u0661",
    "StudyDate": "20260230",
    "StudyTime": "2500",
    "AccessionNumber": "A\\B",
}


@pytest.mark.parametrize("keyword", UNFIT)
def test_what_would_be_no_dicom_corrects_nothing(tmp_path: Path, keyword: str) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        kind = "patient" if keyword.startswith("Patient") else "study"
        if kind == "study":
            node.db._connection().execute("UPDATE sync_items SET identified = 1")
        await node.exchange()
        if kind == "patient":
            own_patient(node, PatientSex="O")
            await node.exchange()
        name = str(node.db.value("SELECT record_id FROM records WHERE type = ?", (kind,)))
        before = node.holds(kind, name)
        with pytest.raises(OperatorError, match=keyword):
            node.reviews.change(kind, name, {keyword: UNFIT[keyword]})
        await cloud.change(kind, name, **{**cloud.holds(kind, name), keyword: UNFIT[keyword]})
        await node.exchange()
        assert node.holds(kind, name) == before and [r["cloud_id"] for r in node.reviews.refused()] == [name]

    run(tmp_path, body, patients_identity="kept")


def test_what_a_modality_sent_so_does_not_stop_another_correction(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        with node.db.transaction():
            node.db.execute("UPDATE sync_items SET identified = 1")
            was = "data = json_set(data, '$.AccessionNumber', 'A\\B')"
            node.db.execute(f"UPDATE sync_items SET {was} WHERE type = 'study'")
            node.db.execute("UPDATE records SET data = (SELECT data FROM sync_items WHERE type = 'study')")
        await node.exchange()
        uid = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))
        node.reviews.change("study", uid, {"StudyDescription": "one"})
        await node.exchange()
        assert cloud.holds("study", uid)["AccessionNumber"] == "A\\B"
        await cloud.change("study", uid, **{**cloud.holds("study", uid), "StudyDescription": "two"})
        await node.exchange()
        assert node.holds("study", uid)["StudyDescription"] == "two" and not node.reviews.refused()

    run(tmp_path, body)


def test_what_the_node_tells_of_a_study_is_no_correction(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        node.db._connection().execute("UPDATE sync_items SET identified = 1")
        await node.exchange()
        uid = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))
        assert not read_corrections(node.db).studies
        await cloud.change("study", uid, **{**cloud.holds("study", uid), "AccessionNumber": "A77", "Note": "x"})
        await node.exchange()
        assert list(read_corrections(node.db).studies.values()) == [{"AccessionNumber": "A77"}]

    run(tmp_path, body)


def test_what_there_is_to_correct_is_found_without_looking_at_every_study(tmp_path: Path) -> None:
    db = Database(tmp_path)
    try:
        plan = db.rows(f"EXPLAIN QUERY PLAN {CORRECTED_STUDIES}", (9,))
        assert "idx_records_corrected" in plan[0]["detail"] and plan[0]["detail"].startswith("SCAN r USING"), plan
    finally:
        db.close()


def test_settings_of_the_node_are_told_and_not_set(tmp_path: Path) -> None:
    """The way to set something here is the desired state; a record only says what is so."""

    async def body(cloud: Cloud, node: Node) -> None:
        from dicomnode.sync.node_record import describe_node

        describe_node(node.settings, node.db)
        await node.exchange()
        told = node.holds("settings", "NODE0")
        await cloud.change("settings", "NODE0", **{**told, "engine": "somebody's", "more": 1})
        await node.exchange()
        assert node.holds("settings", "NODE0") == told == cloud.holds("settings", "NODE0")
        assert describe_node(node.settings, node.db) == 0 and cloud.open() == []
        version = cloud.storage.record("settings", "NODE0")
        await node.exchange()
        assert cloud.storage.record("settings", "NODE0") == version, "it is told once"

    run(tmp_path, body)


def test_a_corrected_result_leaves_under_the_same_pseudonym(make_case: Callable[..., Case]) -> None:  # noqa: F811
    case, codec = make_case(), Pseudonyms(b"k" * 32)
    correction = Correction({"PatientID": "ID-2", "PatientName": "Other^Canary"}, "2026-11-29T10:00:00+00:00", "N")
    arguments = (case.analysis, case.identity, case.model, case.sources)
    for plain, corrected in zip(
        encode_results(*arguments, station=case.station),
        encode_results(*arguments, station=case.station, correction=correction),
        strict=True,
    ):
        before, after = deidentify(plain.part10, codec), deidentify(corrected.part10, codec)
        assert read(after.content).PatientID == read(before.content).PatientID == codec.patient("ID-1")
        assert after.mapping == before.mapping
        for word in (b"Canary", b"ID-2", b"Example^Test", b"OriginalAttributes"):
            assert word not in after.content


@pytest.mark.parametrize("on", [True, False])
def test_the_worker_applies_them_where_the_site_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, on: bool
) -> None:
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    add_version(tmp_path, "1.0.0")
    settings = settings_of(tmp_path)
    settings = settings.model_copy(update={"sync": settings.sync.model_copy(update={"apply_corrections": on})})
    db = Database(tmp_path / "data")
    try:
        Models(db).activate("ct-lung", "1.0.0")
        worker = worker_on(settings, db)
        job = add_series(db)
        [patient] = db.rows("SELECT PatientID FROM patients")
        PseudonymRows(db).keep({("patient", "pseudo"): patient["PatientID"]})
        begin = demographics(db, patient["PatientID"], "")
        Reviews(db, settings.cloud_plan).change("patient", "pseudo", NAME, begin=begin)
        assert worker.run_once()
        rows = db.rows("SELECT i.file FROM results r JOIN instances i ON i.SOPInstanceUID = r.SOPInstanceUID")
        assert rows and db.value("SELECT state FROM jobs WHERE id = ?", (job,)) == "done"
        for row in rows:
            ds = dcmread(BytesIO((tmp_path / "data" / "objects" / row["file"]).read_bytes()))
            assert (str(ds.PatientName) == "Right^Name", "OriginalAttributesSequence" in ds) == (on, on)
    finally:
        db.close()
