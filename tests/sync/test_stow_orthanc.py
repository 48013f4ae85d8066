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
from dicomnode.index.database import Database
from tests.peers import Process, accepts, free_port, program, wait_for
from tests.sync.index_case import FakeClock, add_results, as_they_are, make_settings, sender_of, states

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
