"""Radiographs through a whole node: sent by storescu, measured, and the answers at a PACS (storescp)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from dicomnode.demo.radiograph import to_dataset
from dicomnode.identity import derived_uid
from tests.e2e.harness import CANARY, Node, rule
from tests.infer.radiograph_case import numbered, picture, saved
from tests.peers import StoreScp, run_program

pytestmark = pytest.mark.peers


@dataclass
class Site:
    node: Node
    pacs: StoreScp


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("radiographs")
    pacs = StoreScp(folder / "pacs")
    running = Node(
        folder / "node",
        peers=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port}],
        rules=[
            rule("radiographs", {"Modality": ["CR", "DX"]}, to=["pacs"], model="cxr-quality")
            | {"report_failures": True, "critical": {"clipped_white": {"min": 5}}}
        ],
    ).start()
    yield Site(running, pacs)
    assert running.stop() == 0
    pacs.stop()


def send(site: Site, folder: Path, datasets: list[Dataset]) -> None:
    paths = [saved(ds, folder, f"{n}.dcm") for n, ds in enumerate(datasets)]
    run_program("storescu", "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", site.node.port, *paths)


def named(ds: Dataset) -> Dataset:
    ds.PatientName = f"{CANARY}^Radiograph"
    return ds


def at_pacs(site: Site, series: str) -> dict[str, Dataset]:
    uids = {str(d["SOPInstanceUID"]) for d in site.node.deliveries(series)}
    found = [pydicom.dcmread(f) for f in site.pacs.files()]
    return {str(ds.Modality): ds for ds in found if str(ds.SOPInstanceUID) in uids}


def test_a_cr_and_a_dx_come_back_with_their_numbers(site: Site, tmp_path: Path) -> None:
    sent = [named(to_dataset(picture(mm=1.0, gain=1.3 if kind == "CR" else 1.0), kind)) for kind in ("CR", "DX")]
    send(site, tmp_path, sent)
    for ds in sent:
        series = str(ds.SeriesInstanceUID)
        site.node.wait_delivered(series, 2)
        (job,) = site.node.jobs(series)
        summary = json.loads(job["summary"])
        found = {m["key"]: m["value"] for m in summary["measurements"]}
        assert ("exposure_index" in found) == (ds.Modality == "DX")
        assert (found["clipped_white"] > 5) == (ds.Modality == "CR")
        came = at_pacs(site, series)
        assert came.keys() == {"SEG", "SR"}
        assert (came["SEG"].Rows, came["SEG"].Columns) == (ds.Rows, ds.Columns)
        text = came["SR"].to_json()
        assert ds.SOPInstanceUID in text and came["SEG"].SOPInstanceUID in text
        assert "CXRNOISE" in text
        assert str(came["SR"].SeriesDescription).startswith("CRITICAL") == (ds.Modality == "CR")
        shown = site.node.cli("jobs", "show", str(job["id"]))
        assert "series: noise = " in shown


def test_an_image_for_processing_is_refused_and_the_report_says_why(site: Site, tmp_path: Path) -> None:
    ds: Any = named(to_dataset(picture(mm=1.0)))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1.1"
    ds.PresentationIntentType = "FOR PROCESSING"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("e2e", "processing")
    ds.SeriesInstanceUID = derived_uid("e2e", "processing", "series")
    send(site, tmp_path, [ds])
    series = str(ds.SeriesInstanceUID)
    job = site.node.wait_job(series, state="refused")
    assert "FOR_PROCESSING: the image is For Processing" in job["last_error"]
    site.node.wait_delivered(series, 1)
    assert "raw detector values" in at_pacs(site, series)["SR"].to_json()


def test_images_of_one_series_are_measured_one_by_one_and_a_late_one_revises(site: Site, tmp_path: Path) -> None:
    datasets = [numbered(named(to_dataset(picture(mm=mm))), n) for n, mm in ((1, 2.0), (2, 2.5), (3, 1.0))]
    series = datasets[0].SeriesInstanceUID = derived_uid("e2e", "several")
    for ds in datasets:
        ds.StudyInstanceUID, ds.SeriesInstanceUID = derived_uid("e2e", "study"), series
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid(series, str(ds.InstanceNumber))
    send(site, tmp_path, datasets[:2])
    site.node.wait_job(series)
    send(site, tmp_path, datasets[2:])
    site.node.wait_job(series, revision=2)
    site.node.wait_delivered(series, 7)
    first, second = (json.loads(j["summary"]) for j in sorted(site.node.jobs(series), key=lambda j: j["revision"]))
    assert (first["slices"], second["slices"]) == (2, 3)
    for summary, parts in ((first, {"image 1", "image 2"}), (second, {"image 1", "image 2", "image 3"})):
        assert {m["segment"] for m in summary["measurements"]} == parts
    uids = {str(d["SOPInstanceUID"]) for d in site.node.deliveries(series)}
    found = [ds for ds in map(pydicom.dcmread, site.pacs.files()) if str(ds.SOPInstanceUID) in uids]
    assert sorted(str(ds.Modality) for ds in found) == ["SEG"] * 5 + ["SR"] * 2
    later = next(ds for ds in found if ds.Modality == "SR" and ds.InstanceNumber == 2)
    assert "PredecessorDocumentsSequence" in later
