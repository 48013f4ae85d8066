"""STOW-RS to Orthanc with its DICOMweb plug-in: an endpoint that others wrote."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicomnode import durable
from dicomnode.encode import encode_results
from dicomnode.index.database import Database
from dicomnode.pseudonyms import Pseudonyms
from tests.encode.source_case import SOURCES, case_of
from tests.peers import Process, accepts, free_port, program, run_program, wait_for
from tests.sync.index_case import FakeClock, add_objects, add_results, as_they_are, make_settings, sender_of, states

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")

pytestmark = pytest.mark.peers


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[str]:
    """Address of its HTTP server."""
    binary = program("Orthanc")
    if not PLUGIN.exists():
        if os.environ.get("CI") == "true":
            pytest.fail("orthanc-dicomweb is not installed, and CI must have it")
        pytest.skip("orthanc-dicomweb is not installed")
    folder = tmp_path / "orthanc"
    folder.mkdir()
    http, dicom = free_port(), free_port()
    config = {
        "Name": "cloud",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "DicomPort": dicom,
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    process = Process([binary, str(folder / "orthanc.json")], folder / "log")
    try:
        wait_for(lambda: accepts(http), 30, "Orthanc is up", process.output)
        yield f"http://127.0.0.1:{http}"
    finally:
        process.stop()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


def test_results_reach_orthanc_once_and_whole(tmp_path: Path, orthanc: str) -> None:
    clock = FakeClock()
    db = Database(tmp_path / "data", clock)
    uids = add_results(db, tmp_path / "data", 5)
    as_they_are(db)
    settings = make_settings(tmp_path / "data", cloud={"stow_url": f"{orthanc}/dicom-web/studies"})
    sender = sender_of(settings, db)
    assert asyncio.run(sender.flush()) == 5
    assert states(db) == ["stored"] * 5

    stored = {i["MainDicomTags"]["SOPInstanceUID"]: i["ID"] for i in get(f"{orthanc}/instances?expand")}
    assert sorted(stored) == sorted(uids)
    store = durable.ObjectStore(tmp_path / "data")
    for row in db.rows("SELECT SOPInstanceUID, file FROM results"):
        data = fetch(f"{orthanc}/instances/{stored[row['SOPInstanceUID']]}/file")
        assert dcmread(BytesIO(data)) == dcmread(store.path(row["file"]))

    # The reply was lost: the node sends again, Orthanc keeps one.
    db._connection().execute("UPDATE sync_items SET state = 'pending', next_at = 0, identified = 1")
    assert asyncio.run(sender.flush()) == 5
    assert len(get(f"{orthanc}/instances")) == 5
    db.close()


def test_orthanc_shows_seg_and_sr_without_the_patient(tmp_path: Path, orthanc: str) -> None:
    """As they leave by default: found under the pseudonym, valid, and nothing of the patient in them."""
    data = tmp_path / "data"
    db = Database(data, FakeClock())
    (tmp_path / "source").mkdir()
    case = case_of(SOURCES["mr"](), tmp_path / "source")
    made = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    add_objects(db, data, [(m.kind, m.part10) for m in made])
    settings = make_settings(data, cloud={"stow_url": f"{orthanc}/dicom-web/studies"})
    assert asyncio.run(sender_of(settings, db).flush()) == 2
    home = dcmread(BytesIO(made[0].part10))
    codec = Pseudonyms((data / "cloud-pseudonyms.key").read_bytes())
    [patient] = get(f"{orthanc}/patients?expand")
    assert patient["MainDicomTags"]["PatientID"] == codec.patient(str(home.PatientID)) != str(home.PatientID)
    [study] = get(f"{orthanc}/studies?expand")
    assert study["MainDicomTags"]["StudyInstanceUID"] == codec.uid(str(home.StudyInstanceUID))
    assert sorted(s["MainDicomTags"]["Modality"] for s in get(f"{orthanc}/series?expand")) == ["SEG", "SR"]
    left = {}
    for one in get(f"{orthanc}/instances?expand"):
        content = fetch(f"{orthanc}/instances/{one['ID']}/file")
        for word in (home.PatientID, home.StudyInstanceUID, *str(home.PatientName).split("^")):
            assert str(word).encode() not in content
        path = tmp_path / f"{one['ID']}.dcm"
        path.write_bytes(content)
        done = run_program("dciodvfy", "-new", path)
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == []
        left[dcmread(BytesIO(content)).Modality] = dcmread(BytesIO(content))
    evidence = [
        i.ReferencedSOPInstanceUID
        for s in left["SR"].CurrentRequestedProcedureEvidenceSequence
        for r in s.ReferencedSeriesSequence
        for i in r.ReferencedSOPSequence
    ]
    assert left["SEG"].SOPInstanceUID in evidence, "the report still names its segmentation"
    db.close()


def test_orthanc_refuses_what_is_not_dicom(tmp_path: Path, orthanc: str) -> None:
    """One bad object among good ones is parked with a reason, the others arrive."""
    db = Database(tmp_path / "data", FakeClock())
    uids = add_results(db, tmp_path / "data", 3)
    as_they_are(db)
    row = db.row("SELECT id, file FROM results WHERE SOPInstanceUID = ?", (uids[1],))
    assert row is not None
    path = durable.ObjectStore(tmp_path / "data").path(row["file"])
    path.write_bytes(b"this is not DICOM")
    db._connection().execute("UPDATE results SET sha256 = ? WHERE id = ?", (durable.sha256_file(path), row["id"]))
    settings = make_settings(tmp_path / "data", cloud={"stow_url": f"{orthanc}/dicom-web/studies"})
    asyncio.run(sender_of(settings, db).flush())
    found = states(db)
    assert (found[0], found[2]) == ("stored", "stored")
    assert found[1] != "stored"
    assert len(get(f"{orthanc}/instances")) == 2
    db.close()
