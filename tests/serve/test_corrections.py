"""Corrected patients and studies in queries and retrieves: DCMTK asks a receiver that applies them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest

from dicomnode.cloud_settings import OFF
from dicomnode.index.cloud_rows import put_record, study_metadata
from dicomnode.index.corrections import NONE, read_corrections, serving_corrections
from dicomnode.index.database import Database
from dicomnode.index.mapping import PseudonymRows
from dicomnode.index.record_reviews import Reviews, demographics
from tests.e2e.harness import CANARY, Node
from tests.peers import item_of, run_program, send_items
from tests.serve.cases import STUDY_A, STUDY_B, STUDY_C, STUDY_D, UIDS, items
from tests.sync.index_case import make_settings

pytestmark = pytest.mark.peers
ASKER = {"name": "asker", "ae_title": "ASKER", "allow": ["echo", "find", "get"]}
SENT = {item.sop_instance_uid: item for item in items()}
NAME = f"{CANARY}corrected^Änne"


@dataclass
class Corrected:
    """A receiver with the studies of tests.serve.cases, and its index."""

    node: Node
    db: Database

    def correct(self, number: str, **values: str) -> None:
        """As ``dicomnode records set patient`` does."""
        PseudonymRows(self.db).keep({("patient", f"pseudo-{number}"): number})
        begin = demographics(self.db, number, "")
        Reviews(self.db, OFF).change("patient", f"pseudo-{number}", values, begin=begin)

    def correct_study(self, uid: str, *blank: str, **values: str) -> None:
        study = int(self.db.value("SELECT id FROM studies WHERE StudyInstanceUID = ?", (uid,)))
        with self.db.transaction():
            put_record(self.db, OFF, "study", uid, study_metadata(self.db, study))
        Reviews(self.db, OFF).change("study", uid, values, blank=blank)

    def find(self, folder: Path, *keys: str, model: str = "-S") -> list[pydicom.Dataset]:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("rsp*.dcm"):
            old.unlink()
        wanted = [a for key in keys for a in ("-k", key)]
        called = ("-aet", "ASKER", "-aec", "DICOMNODE", *wanted, "127.0.0.1", self.node.port)
        done = run_program("findscu", model, "-X", "-od", folder, *called)
        assert done.returncode == 0, done.stderr + done.stdout
        return [pydicom.dcmread(p, force=True) for p in sorted(folder.glob("rsp*.dcm"))]

    def studies(self, folder: Path, *keys: str) -> set[str]:
        return {str(ds.StudyInstanceUID) for ds in self.find(folder, "QueryRetrieveLevel=STUDY", *keys)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrected]:
    folder = tmp_path_factory.mktemp("corrected")
    node = Node(folder, peers=[ASKER], dimse={"workers": 1}, sync={"apply_corrections": True}).start("run", "receiver")
    assert set(send_items(node.port, items())) == {0x0000}
    node.rows("SELECT 1 AS one")  # waits until all of it is in the index
    found = Corrected(node, Database(node.data_dir))
    found.correct("P1", PatientName=NAME, PatientBirthDate="19700203", PatientID="P4")
    found.correct_study(STUDY_B, AccessionNumber="B77", StudyDate="20240211")
    found.correct_study(STUDY_C, "AccessionNumber", "StudyDate")
    yield found
    found.db.close()
    assert node.stop() == 0  # looks for the canary in the log


def test_answers_and_matches_are_those_that_serve(site: Corrected, tmp_path: Path) -> None:
    found = site.find(
        tmp_path / "f", "QueryRetrieveLevel=STUDY", "PatientName=*CORRECTED^*", "PatientID", "PatientBirthDate",
        "PatientSex", "StudyInstanceUID", "AccessionNumber",
    )  # fmt: skip
    assert [str(ds.StudyInstanceUID) for ds in found] == [STUDY_A]
    [ds] = found
    assert (str(ds.PatientName), ds.PatientBirthDate, ds.PatientID) == (NAME, "19700203", "P4")
    assert (ds.PatientSex, ds.AccessionNumber) == ("F", "A_1%"), "what was not corrected is as received"
    folder = tmp_path / "g"
    assert site.studies(folder, f"PatientName={CANARY}^Anna") == {STUDY_D}, "the former name finds the others only"
    assert site.studies(folder, "PatientBirthDate=19700102-19700103") == {STUDY_B, STUDY_C, STUDY_D}
    assert site.studies(folder, "PatientBirthDate=19700203") == {STUDY_A}
    assert site.studies(folder, "PatientID=P1") == set()
    assert site.studies(folder, "PatientID=P4") == {STUDY_A, STUDY_D}
    assert site.studies(folder, "AccessionNumber=B77") == {STUDY_B}
    assert site.studies(folder, "AccessionNumber=A21") == set()
    assert site.studies(folder, "StudyDate=20240211") == {STUDY_B}
    assert site.studies(folder, "StudyDate=20240210") == set()


def test_what_is_decided_to_be_empty_is_answered_empty_and_not_found_by_what_was_received(
    site: Corrected, tmp_path: Path
) -> None:
    [was] = site.db.rows("SELECT AccessionNumber, StudyDate FROM studies WHERE StudyInstanceUID = ?", (STUDY_C,))
    assert was["AccessionNumber"] and was["StudyDate"]
    keys = ("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={STUDY_C}", "AccessionNumber", "StudyDate", "StudyTime")
    [ds] = site.find(tmp_path / "f", *keys)
    assert (ds.AccessionNumber, ds.StudyDate) == ("", "") and ds.StudyTime
    folder = tmp_path / "g"
    assert STUDY_C not in site.studies(folder, f"AccessionNumber={was['AccessionNumber']}")
    assert STUDY_C not in site.studies(folder, f"StudyDate={was['StudyDate']}")


def test_two_patients_who_are_one_since_are_one_answer(site: Corrected, tmp_path: Path) -> None:
    keys = ("NumberOfPatientRelatedStudies", "NumberOfPatientRelatedInstances")
    patients = site.find(tmp_path / "f", "QueryRetrieveLevel=PATIENT", "PatientID=P*", *keys, model="-P")
    assert {ds.PatientID: int(ds.NumberOfPatientRelatedStudies) for ds in patients} == {"P4": 2, "P2": 1, "P3": 1}
    assert {ds.PatientID: int(ds.NumberOfPatientRelatedInstances) for ds in patients}["P4"] == 6


def test_a_retrieve_goes_by_the_corrected_id_and_sends_the_bytes_that_were_received(
    site: Corrected, tmp_path: Path
) -> None:
    def get(number: str) -> list[Path]:
        folder = tmp_path / number
        folder.mkdir()
        called = ("-aet", "ASKER", "-aec", "DICOMNODE", "127.0.0.1", site.node.port)
        wanted = ("-k", "QueryRetrieveLevel=PATIENT", "-k", f"PatientID={number}")
        run_program("getscu", "-P", "+B", "-od", folder, *wanted, *called)
        return sorted(folder.iterdir())

    assert get("P1") == []
    got = {item_of(path).sop_instance_uid: item_of(path) for path in get("P4")}
    assert got.keys() == {*UIDS[:4], *UIDS[6:8]}
    for uid in UIDS[:4]:
        assert got[uid].data == SENT[uid].data and CANARY.encode() in got[uid].data


def test_off_by_default(site: Corrected) -> None:
    assert read_corrections(site.db)
    assert serving_corrections(make_settings(site.node.data_dir), site.db) is NONE
