"""dcmjs-dimse, a DICOM stack that shares no code with pynetdicom, DCMTK or Orthanc, as peer in both roles.

``scripts/test`` installs it into tests/npm (pinned by version and hash); tests/npm/peer.js is the peer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest

from tests.e2e.harness import SEG, SLICES, Node, Series, make_series, rule
from tests.peers import CT_IMAGE, Process, accepts, data_set_of, free_port, wait_for

pytestmark = pytest.mark.peers
PEER = Path(__file__).resolve().parent.parent / "npm" / "peer.js"
SUCCESS, PENDING, WARNING = 0x0000, 0xFF00, 0xB000
LABEL = "js lungs"


def javascript() -> str:
    """The interpreter; skips where it or the package is missing, fails there when CI is true."""
    node = shutil.which("node")
    if node is not None and (PEER.parent / "node_modules" / "dcmjs-dimse").is_dir():
        return node
    missing = (
        "node (Node.js) is not installed" if node is None else "dcmjs-dimse is not installed, scripts/test does it"
    )
    if os.environ.get("CI") == "true":
        pytest.fail(f"{missing}, and CI must have it")
    pytest.skip(missing)


@dataclass
class Archive:
    """A storage SCP of dcmjs-dimse; what came is kept as it was on the wire."""

    folder: Path
    port: int
    process: Process

    def arrivals(self) -> list[dict[str, str]]:
        log = self.folder / "arrivals.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def data_set(self, uid: str) -> bytes:
        return (self.folder / f"{uid}.dataset").read_bytes()

    def forget(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


@dataclass
class Site:
    node: Node
    archive: Archive
    series: Series
    statuses: list[int]
    """What the store SCU was answered, one for each slice."""

    delivered: list[dict[str, str]]
    results: dict[str, bytes]
    """Data sets that the SCP got by itself, by SOP Instance UID."""

    def ask(self, verb: str, *arguments: str) -> dict[str, Any]:
        return ask(verb, self.node.port, "JS", "DICOMNODE", *arguments)

    def stored(self) -> dict[str, bytes]:
        """Data sets of the study in the node."""
        rows = self.node.rows(
            "SELECT i.SOPInstanceUID AS uid, i.file FROM instances i JOIN series s ON s.id = i.series_id"
            " JOIN studies t ON t.id = s.study_id WHERE t.StudyInstanceUID = ?",
            (self.series.study_uid,),
        )
        return {row["uid"]: data_set_of(self.node.stored_part10(row)) for row in rows}


def ask(verb: str, port: int, calling: str, called: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [javascript(), str(PEER), verb, "127.0.0.1", str(port), calling, called, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """dcmjs sends a series, the node analyses it and delivers to dcmjs."""
    interpreter = javascript()
    folder = tmp_path_factory.mktemp("js")
    port = free_port()
    process = Process([interpreter, str(PEER), "scp", str(port), str(folder)], folder.with_suffix(".log"))
    wait_for(lambda: accepts(port), 20, "the SCP of dcmjs-dimse listens", process.output)
    every = ["echo", "store", "find", "move", "get"]
    node = Node(
        tmp_path_factory.mktemp("node"),
        peers=[{"name": "js", "ae_title": "JS", "host": "127.0.0.1", "port": port, "allow": every}],
        rules=[rule("js", {"SeriesDescription": LABEL}, to=["js"])],
        dimse={"workers": 1},
    ).start()
    archive = Archive(folder, port, process)
    series = make_series(LABEL)
    files = series.write(tmp_path_factory.mktemp("files"))
    answer = ask("store", node.port, "JS", "DICOMNODE", *map(str, files))
    node.wait_delivered(series.series_uid)
    delivered = archive.arrivals()
    yield Site(
        node, archive, series, answer["statuses"], delivered, {a["uid"]: archive.data_set(a["uid"]) for a in delivered}
    )
    process.stop()
    assert node.stop() == 0


def test_echo_both_ways(site: Site) -> None:
    assert site.ask("echo") == {"status": SUCCESS}
    site.node.cli("echo", "js")


def test_what_dcmjs_stores_is_there(site: Site) -> None:
    """dcmjs parses a file and writes it anew, so values are compared, and the pixels as bytes."""
    assert site.statuses == [SUCCESS] * SLICES
    for sent in site.series.datasets:
        row = site.node.instance(sent.SOPInstanceUID)
        assert row is not None
        got = pydicom.dcmread(site.node.data_dir / "objects" / row["file"])
        assert got.PixelData == sent.PixelData
        for keyword in ("PatientID", "PatientName", "ImagePositionPatient", "PixelSpacing", "RescaleIntercept", "KVP"):
            assert got[keyword].value == sent[keyword].value


def test_results_are_delivered_to_dcmjs(site: Site) -> None:
    """One SEG and one SR, every byte as the node holds it."""
    assert Counter(a["sopClass"] == SEG for a in site.delivered) == {True: 1, False: 1}
    results = site.node.rows("SELECT SOPInstanceUID AS uid, file FROM results ORDER BY id")
    assert {r["uid"]: data_set_of(site.node.stored_part10(r)) for r in results} == site.results


@pytest.mark.parametrize(("level", "number"), [("STUDY", 1), ("SERIES", 3), ("IMAGE", SLICES)])
def test_find(site: Site, level: str, number: int) -> None:
    keys = {
        "STUDY": {"PatientID": site.series.datasets[0].PatientID, "StudyInstanceUID": "", "PatientName": ""},
        "SERIES": {"StudyInstanceUID": site.series.study_uid, "SeriesInstanceUID": "", "Modality": ""},
        "IMAGE": {
            "StudyInstanceUID": site.series.study_uid,
            "SeriesInstanceUID": site.series.series_uid,
            "SOPInstanceUID": "",
        },
    }
    found = site.ask("find", level, json.dumps(keys[level]))
    assert found["statuses"] == [PENDING] * number + [SUCCESS]
    if level == "STUDY":
        assert found["answers"][0]["StudyInstanceUID"] == site.series.study_uid
    elif level == "SERIES":
        assert {a["Modality"] for a in found["answers"]} == {"CT", "SEG", "SR"}
    else:
        assert {a["SOPInstanceUID"] for a in found["answers"]} == {d.SOPInstanceUID for d in site.series.datasets}


def test_move_to_its_own_scp(site: Site) -> None:
    site.archive.forget()
    found = site.ask("move", "JS", site.series.study_uid)
    last = found["responses"][-1]
    assert (last["status"], last["completed"], last["failures"]) == (SUCCESS, SLICES + 2, 0)
    assert {a["uid"]: site.archive.data_set(a["uid"]) for a in site.archive.arrivals()} == site.stored()


def test_get(site: Site, tmp_path: Path) -> None:
    """It proposes no context for SEG and Comprehensive 3D SR: these two are counted as failed (PS3.4 C.4.3.1.4)."""
    found = site.ask("get", site.series.study_uid, str(tmp_path))
    last = found["responses"][-1]
    assert (last["status"], last["completed"], last["failures"]) == (WARNING, SLICES, 2)
    got = [pydicom.dcmread(path) for path in tmp_path.iterdir()]
    assert {str(ds.SOPClassUID) for ds in got} == {CT_IMAGE}
    assert {ds.SOPInstanceUID: ds.PixelData for ds in got} == {
        ds.SOPInstanceUID: ds.PixelData for ds in site.series.datasets
    }
