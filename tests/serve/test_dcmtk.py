"""DCMTK's findscu, movescu and getscu against a running receiver; storescp as move target."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest

from tests.e2e.harness import CANARY
from tests.peers import StoreScp, item_of, run_program
from tests.serve.cases import SERIES_A1, SERIES_A2, SERIES_D, STUDY_A, STUDY_B, STUDY_C, STUDY_D, UIDS, items
from tests.serve.conftest import Site

pytestmark = pytest.mark.peers
SENT = {item.sop_instance_uid: item for item in items()}


def find(site: Site, folder: Path, *keys: str, model: str = "-S", more: tuple[str, ...] = ()) -> list[pydicom.Dataset]:
    """The answers of findscu, which it writes as files."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("rsp*.dcm"):
        old.unlink()
    arguments = [a for key in keys for a in ("-k", key)]
    done = run_program(
        "findscu", model, "-X", "-od", folder, "-aet", "ASKER", "-aec", "DICOMNODE", *more, *arguments,
        "127.0.0.1", site.node.port,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return [pydicom.dcmread(p, force=True) for p in sorted(folder.glob("rsp*.dcm"))]


def test_study_root(site: Site, tmp_path: Path) -> None:
    found = find(
        site,
        tmp_path / "f",
        "QueryRetrieveLevel=STUDY",
        "PatientID=P1",
        "PatientName",
        "StudyInstanceUID",
        "StudyDate",
        "AccessionNumber",
        "ModalitiesInStudy",
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
        "InstanceAvailability",
        "RetrieveAETitle",
    )
    assert len(found) == 1
    ds = found[0]
    assert ds.StudyInstanceUID == STUDY_A
    assert str(ds.PatientName) == f"{CANARY}^Anna"
    assert list(ds.ModalitiesInStudy) == ["CT", "MR"]
    assert (ds.NumberOfStudyRelatedSeries, ds.NumberOfStudyRelatedInstances) == (2, 4)
    assert (ds.InstanceAvailability, ds.RetrieveAETitle) == ("ONLINE", "DICOMNODE")
    assert (ds.StudyDate, ds.AccessionNumber, ds.QueryRetrieveLevel) == ("20240105", "A_1%", "STUDY")
    assert "SpecificCharacterSet" not in ds


@pytest.mark.parametrize(
    ("keys", "studies"),
    [
        (["PatientName=xylo*"], {STUDY_A, STUDY_D}),
        (["PatientName=XYLOCANARY^ANNA^^"], {STUDY_A, STUDY_D}),
        (["AccessionNumber=A?1*"], {STUDY_A, STUDY_B, STUDY_C, STUDY_D}),
        (["AccessionNumber=A_1%"], {STUDY_A}),
        (["AccessionNumber=a_1%"], set()),
        (["AccessionNumber=' OR 1=1 --"], set()),
        (["StudyDate=20240101-20240131"], {STUDY_A}),
        (["StudyDate=20240105-"], {STUDY_A, STUDY_B}),
        (["StudyDate=-20230101"], {STUDY_C, STUDY_D}),
        (["StudyDate=20240101-", "StudyTime=1015"], {STUDY_A, STUDY_B}),
        (["StudyTime=1016-"], set()),
        (["ModalitiesInStudy=MR"], {STUDY_A, STUDY_C}),
        (["ModalitiesInStudy=M*"], {STUDY_A, STUDY_C}),
        ([f"StudyInstanceUID={STUDY_B}\\{STUDY_C}\\1.2.3"], {STUDY_B, STUDY_C}),
        (["PatientSex=F", "PatientID=P2"], {STUDY_B}),
    ],
)
def test_matching(site: Site, tmp_path: Path, keys: list[str], studies: set[str]) -> None:
    found = find(site, tmp_path / "f", "QueryRetrieveLevel=STUDY", "StudyInstanceUID", *keys)
    assert {ds.StudyInstanceUID for ds in found} == studies


def test_patient_root_levels(site: Site, tmp_path: Path) -> None:
    patients = find(site, tmp_path / "f", "QueryRetrieveLevel=PATIENT", "PatientID=P*", model="-P")
    assert {ds.PatientID for ds in patients} == {"P1", "P2", "P3", "P4"}
    series = find(
        site,
        tmp_path / "f",
        "QueryRetrieveLevel=SERIES",
        "PatientID=P1",
        f"StudyInstanceUID={STUDY_A}",
        "SeriesInstanceUID",
        "Modality",
        "NumberOfSeriesRelatedInstances",
        model="-P",
    )
    assert {(ds.SeriesInstanceUID, ds.Modality, ds.NumberOfSeriesRelatedInstances) for ds in series} == {
        (SERIES_A1, "CT", 3),
        (SERIES_A2, "MR", 1),
    }
    images = find(
        site,
        tmp_path / "f",
        "QueryRetrieveLevel=IMAGE",
        "PatientID=P1",
        f"StudyInstanceUID={STUDY_A}",
        f"SeriesInstanceUID={SERIES_A1}",
        "SOPInstanceUID",
        "InstanceNumber=2",
        "Rows",
        "BitsAllocated",
        model="-P",
    )
    assert [(ds.SOPInstanceUID, ds.Rows, ds.BitsAllocated) for ds in images] == [(UIDS[1], 16, 16)]


def test_cancelled_find(site: Site) -> None:
    done = run_program(
        "findscu", "-S", "-d", "-aet", "ASKER", "-aec", "DICOMNODE", "--cancel", 2, "-k", "QueryRetrieveLevel=IMAGE",
        "-k", f"StudyInstanceUID={STUDY_A}", "-k", f"SeriesInstanceUID={SERIES_A1}", "-k", "SOPInstanceUID",
        "127.0.0.1", site.node.port,
    )  # fmt: skip
    # A cancel may come too late for so few answers; both ends are right (PS3.4 C.4.1.2.2).
    assert "0xfe00" in done.stderr + done.stdout or "0x0000: Success" in done.stderr + done.stdout


def retrieve(site: Site, program: str, *arguments: object) -> str:
    done = run_program(
        program, "-d", "-S", "-aet", "ASKER", "-aec", "DICOMNODE", *arguments, "127.0.0.1", site.node.port
    )
    return done.stderr + done.stdout


def assert_as_stored(folder: Path, uids: set[str]) -> None:
    got = {item.sop_instance_uid: item for item in map(item_of, folder.iterdir())}
    assert set(got) == uids
    for uid, item in got.items():
        assert item.transfer_syntax_uid == SENT[uid].transfer_syntax_uid
        assert pydicom.dcmread(next(p for p in folder.iterdir() if uid in p.name), force=True).SOPInstanceUID == uid
        assert item.data == SENT[uid].data


def test_move_study(site: Site, sink: StoreScp) -> None:
    out = retrieve(
        site, "movescu", "-aem", "SINK", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY_D}"
    )
    assert "DIMSE Status                  : 0x0000: Success" in out, out
    assert_as_stored(sink.folder, {UIDS[6], UIDS[7]})


def test_a_target_that_does_not_answer(site: Site, tmp_path: Path) -> None:
    scp = StoreScp(tmp_path / "mute", "--sleep-after", "60", port=site.sink_port, aet="SINK")
    try:
        out = retrieve(
            site, "movescu", "-aem", "SINK", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY_A}"
        )
    finally:
        scp.stop()
    assert "0xb000" in out, out  # it answered the first object before it fell asleep
    assert "Failed Suboperations          : 3" in out, out


def test_move_uid_list_of_images(site: Site, sink: StoreScp) -> None:
    out = retrieve(
        site, "movescu", "-aem", "SINK", "-k", "QueryRetrieveLevel=IMAGE", "-k", f"StudyInstanceUID={STUDY_A}",
        "-k", f"SeriesInstanceUID={SERIES_A1}", "-k", f"SOPInstanceUID={UIDS[0]}\\{UIDS[2]}\\1.2.3",
    )  # fmt: skip
    assert "DIMSE Status                  : 0x0000: Success" in out, out
    assert_as_stored(sink.folder, {UIDS[0], UIDS[2]})


def test_move_transcodes_for_a_plain_peer(site: Site, tmp_path: Path) -> None:
    from tests.peers import Process, accepts, program, wait_for

    folder = tmp_path / "plain"
    folder.mkdir()
    argv = [program("storescp"), "--fork", "-aet", "PLAIN", "+xe", "-od", str(folder), str(site.plain_port)]
    scp = Process(argv, tmp_path / "plain.log")
    try:
        wait_for(lambda: accepts(site.plain_port), 10, "storescp listens", scp.output)
        out = retrieve(
            site, "movescu", "-aem", "PLAIN", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY_D}"
        )
        assert "DIMSE Status                  : 0x0000: Success" in out, out
        got = [pydicom.dcmread(p) for p in folder.iterdir()]
        assert {ds.SOPInstanceUID for ds in got} == {UIDS[6], UIDS[7]}
        assert all(not ds.file_meta.TransferSyntaxUID.is_compressed for ds in got)
        assert all(ds.pixel_array[0, 5] == 5 and ds.pixel_array[15, 15] == 255 for ds in got)
    finally:
        scp.stop(5)


@pytest.mark.parametrize(("target", "status"), [("STRANGER", "0xa801"), ("NOWHERE", "0xa801"), ("AWAY", "0xa702")])
def test_move_elsewhere(site: Site, target: str, status: str) -> None:
    out = retrieve(
        site, "movescu", "-aem", target, "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY_D}"
    )
    assert status in out, out


@pytest.mark.parametrize("keys", [["StudyInstanceUID"], ["StudyInstanceUID=*"], [], ["StudyInstanceUID=1.2\\"]])
@pytest.mark.parametrize("program", ["movescu", "getscu"])
def test_an_empty_unique_key_is_not_everything(
    site: Site, sink: StoreScp, tmp_path: Path, program: str, keys: list[str]
) -> None:
    where = ["-aem", "SINK"] if program == "movescu" else ["-od", tmp_path]
    out = retrieve(site, program, *where, "-k", "QueryRetrieveLevel=STUDY", *(a for k in keys for a in ("-k", k)))
    assert "0xa900" in out, out
    assert not sink.files()


def test_get_as_plain(site: Site, tmp_path: Path) -> None:
    out = retrieve(
        site, "getscu", "-od", tmp_path, "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY_A}"
    )
    assert "DIMSE Status                  : 0x0000: Success" in out, out
    assert_as_stored(tmp_path, set(UIDS[:4]))


def test_get_transcodes(site: Site, tmp_path: Path) -> None:
    out = retrieve(
        site, "getscu", "-od", tmp_path, "-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={STUDY_D}",
        "-k", f"SeriesInstanceUID={SERIES_D}",
    )  # fmt: skip
    assert "DIMSE Status                  : 0x0000: Success" in out, out
    got = [pydicom.dcmread(p) for p in tmp_path.iterdir()]
    assert {ds.SOPInstanceUID for ds in got} == {UIDS[6], UIDS[7]}, out
    assert all(ds.pixel_array[0, 5] == 5 for ds in got)


def test_move_cancelled(site: Site, sink: StoreScp) -> None:
    out = retrieve(
        site, "movescu", "-aem", "SINK", "--cancel", 1, "-k", "QueryRetrieveLevel=STUDY",
        "-k", f"StudyInstanceUID={STUDY_A}",
    )  # fmt: skip
    assert "0xfe00" in out or "DIMSE Status                  : 0x0000: Success" in out, out
