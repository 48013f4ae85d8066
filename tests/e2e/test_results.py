"""Results as rules ask for them, by a whole node: label map and fallback, pictures, failures, critical ones."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tests.e2e.harness import Node, Series, make_series, rule
from tests.peers import ScriptedScp, StoreScp, item_of, send_items

LABELMAP_CLASS = "1.2.840.10008.5.1.4.1.1.66.7"
SECRET = "a secret of more than sixteen bytes"
EVERYTHING = ["SEG", "SR", "GSPS", "SC", "KOS"]


@dataclass
class Hook:
    """The other end of the webhook: refuses the first request, then takes all."""

    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.requests.append((dict(self.headers), body))
                self.send_response(503 if len(hook.requests) == 1 else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/critical"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Site:
    node: Node
    old: StoreScp
    new: ScriptedScp
    hook: Hook


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """``old`` is DCMTK, which does not know label maps; ``new`` takes them."""
    folder = tmp_path_factory.mktemp("results")
    old, new, hook = StoreScp(folder / "old"), ScriptedScp(lambda number, uid: 0x0000), Hook()
    (folder / "secret").write_text(SECRET + "\n")
    wants: dict[str, Any] = {"seg": "labelmap", "report_failures": True}
    running = Node(
        folder / "node",
        peers=[
            {"name": "old", "ae_title": "PACS", "host": "127.0.0.1", "port": old.port},
            {"name": "new", "ae_title": "NEW", "host": "127.0.0.1", "port": new.port},
        ],
        rules=[
            rule("both", {"SeriesDescription": "both"}, to=["old", "new"]) | wants | {"results": EVERYTHING},
            rule("refused", {"SeriesDescription": "refused"}, to=["old"]) | wants,
            rule("silent", {"SeriesDescription": "silent"}, to=["old"]),
            rule("critical", {"SeriesDescription": "critical"}, to=["new"])
            | {"critical": {"volume_ml": {"min": 1}, "absent_key": True}},
            rule("frames", {"SeriesDescription": "frames"}, to=["new"]) | {"results": [*EVERYTHING, "PM"]},
        ],
        alerts={"url": hook.url, "secret_file": folder / "secret"},
    ).start()
    yield Site(running, old, new, hook)
    assert running.stop() == 0
    old.stop()
    new.stop()
    hook.stop()


def send(site: Site, series: Series) -> str:
    assert set(send_items(site.node.port, series.items)) == {0x0000}
    return series.series_uid


def read(site: Site, row: dict[str, Any]) -> Dataset:
    (result,) = site.node.rows("SELECT * FROM results WHERE SOPInstanceUID = ?", (row["SOPInstanceUID"],))
    return pydicom.dcmread(site.node.data_dir / "objects" / result["file"])


@pytest.mark.peers
def test_who_takes_no_label_map_gets_binary_with_its_own_report(site: Site) -> None:
    series = send(site, make_series("both"))
    site.node.wait_delivered(series, 12)
    rows = site.node.deliveries(series)
    by_peer = {p: {r["kind"]: r for r in rows if r["destination"] == p} for p in ("old", "new")}
    assert set(by_peer["new"]) == {"LABELMAP", "LABELMAP-SR", "GSPS", "SC", "KOS"}
    assert set(by_peer["old"]) == {"SEG", "SR", "GSPS", "SC", "KOS"}
    assert by_peer["old"]["SEG"]["instead_of"] == "LABELMAP"
    assert by_peer["old"]["SR"]["instead_of"] == "LABELMAP-SR"
    assert {str(pydicom.dcmread(f).Modality) for f in site.old.files()} >= {"SEG", "SR", "PR", "OT", "KO"}
    # What the report refers to is what its peer has.
    for peer, seg, sr in (("old", "SEG", "SR"), ("new", "LABELMAP", "LABELMAP-SR")):
        evidence = read(site, by_peer[peer][sr]).to_json()
        assert by_peer[peer][seg]["SOPInstanceUID"] in evidence
    assert by_peer["new"]["LABELMAP"]["SOPInstanceUID"] in site.new.stored
    site.node.wait(lambda: site.node.events("delivery-fallback"), 20, "the event is there")
    listed = json.loads(site.node.cli("deliveries", "list", "--json"))
    assert {"LABELMAP", "LABELMAP-SR"} <= {d["instead_of"] for d in listed}


@pytest.mark.peers
def test_a_refused_series_is_reported_where_the_rule_asks(site: Site) -> None:
    before = len(site.old.files())
    quiet = send(site, make_series("silent", slices=8))
    site.node.wait_job(quiet, state="refused")
    series = send(site, make_series("refused", slices=8))
    site.node.wait_job(series, state="refused")
    (row,) = site.node.wait_delivered(series, 1)
    sr = read(site, row)
    texts = [str(i.TextValue) for i in sr.ContentSequence[-1].ContentSequence if i.ValueType == "TEXT"]
    assert texts[0].startswith("This series was NOT analysed by ct-lung") and "TOO_FEW_SLICES" in texts[1]
    assert sr.SeriesDescription.endswith("NOT ANALYSED")
    site.node.wait(lambda: len(site.old.files()) == before + 1, 20, "one report has arrived")
    assert site.node.deliveries(quiet) == []
    # The missing slices come: the result names the report that it replaces.
    more = make_series("refused")
    for number, ds in enumerate(more.datasets):
        ds.StudyInstanceUID, ds.SeriesInstanceUID = sr.StudyInstanceUID, series
        ds.SOPInstanceUID = generate_uid()
        assert number < 40
    send_items(site.node.port, [i for i in Series(more.datasets).items])
    job = site.node.wait(
        lambda: [j for j in site.node.jobs(series) if j["revision"] == 2 and j["state"] in ("done", "refused")],
        60,
        "r2",
    )[0]
    rows = site.node.wait(
        lambda: [r for r in site.node.deliveries(series) if r["revision"] == 2 and r["kind"] == "SR"], 30, "its SR"
    )
    later = read(site, rows[0])
    assert job["revision"] == 2
    named = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert named.ReferencedSOPInstanceUID == sr.SOPInstanceUID


@pytest.mark.peers
def test_a_critical_result_is_marked_and_told_without_patient_data(site: Site) -> None:
    made = make_series("critical")
    series = send(site, made)
    rows = site.node.wait_delivered(series, 2)
    assert read(site, rows[1]).SeriesDescription.startswith("CRITICAL")
    assert {r["priority"] for r in rows} == {0}
    site.node.wait(
        lambda: json.loads(site.node.cli("alerts", "list", "--json"))[0]["state"] == "stored", 40, "the alert is taken"
    )
    assert len(site.hook.requests) == 2, "once refused, once taken"
    for headers, body in site.hook.requests:
        stamp, mark = (part.split("=", 1)[1] for part in headers["X-Dicomnode-Signature"].split(","))
        assert mark == hmac.new(SECRET.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    told = json.loads(site.hook.requests[1][1])
    assert site.hook.requests[0][1] == site.hook.requests[1][1]
    assert told["critical"] == ["volume_ml"] and told["rules"] == ["critical"]
    assert told["study"] == hmac.new(SECRET.encode(), made.study_uid.encode(), hashlib.sha256).hexdigest()
    for secret in (str(made.datasets[0].PatientID), made.study_uid, series, "Xylocanary"):
        assert secret.encode() not in site.hook.requests[1][1]
    (job,) = site.node.jobs(series)
    assert json.loads(job["critical"]) == ["volume_ml", "volume_ml"]


def as_one_object(series: Series) -> Dataset:
    """The series as Enhanced CT, frames from head to feet."""
    slices = sorted(series.datasets, key=lambda ds: -float(ds.ImagePositionPatient[2]))
    first = slices[0]
    ds = Dataset()
    gone = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
            "RescaleType", "SliceThickness", "WindowCenter", "WindowWidth", "PixelData", "InstanceNumber")  # fmt: skip
    for element in first:
        if element.keyword not in gone:
            ds.add_new(element.tag, element.VR, element.value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.InstanceNumber, ds.NumberOfFrames = 1, len(slices)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]

    def item(**values: object) -> Dataset:
        out = Dataset()
        for keyword, value in values.items():
            setattr(out, keyword, value)
        return out

    ds.SharedFunctionalGroupsSequence = Sequence(
        [
            item(
                PixelMeasuresSequence=Sequence(
                    [item(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)]
                ),
                PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=first.ImageOrientationPatient)]),
                PixelValueTransformationSequence=Sequence(
                    [item(RescaleSlope=first.RescaleSlope, RescaleIntercept=first.RescaleIntercept, RescaleType="HU")]
                ),
            )
        ]
    )
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [item(PlanePositionSequence=Sequence([item(ImagePositionPatient=s.ImagePositionPatient)])) for s in slices]
    )
    ds.PixelData = b"".join(s.PixelData for s in slices)
    ds["PixelData"].VR = "OW"
    return ds


@pytest.mark.peers
def test_a_multi_frame_ct_is_analysed_like_its_slices(site: Site, tmp_path: Path) -> None:
    single = make_series("frames")
    slices = send(site, single)
    multi = as_one_object(make_series("frames"))
    multi.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    assert send_items(site.node.port, [item_of(tmp_path / "enhanced.dcm")]) == [0x0000]
    site.node.wait_delivered(slices, 5)
    rows = site.node.wait_delivered(str(multi.SeriesInstanceUID), 5)
    assert {r["kind"] for r in rows} == set(EVERYTHING)
    measured = [json.loads(site.node.jobs(uid)[0]["summary"]) for uid in (slices, str(multi.SeriesInstanceUID))]
    assert measured[0]["measurements"] == measured[1]["measurements"] and measured[1]["slices"] == len(single.items)
    seg = read(site, next(r for r in rows if r["kind"] == "SEG"))
    positions = [list(map(float, g.PlanePositionSequence[0].ImagePositionPatient))
                 for g in multi.PerFrameFunctionalGroupsSequence]  # fmt: skip
    for group in seg.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == multi.SOPInstanceUID
        where = list(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        assert positions[int(source.ReferencedFrameNumber) - 1] == where
    picture = read(site, next(r for r in rows if r["kind"] == "SC")).pixel_array
    assert picture.ndim == 3 and np.ptp(picture) == 255
