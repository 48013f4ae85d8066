"""The demo end to end as a person runs it, and the judge that it relies on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from dicomnode.demo.check import Comparison, compare, dice
from dicomnode.demo.inputs import read_inputs, slice_spacing
from dicomnode.demo.objects import Number, place_seg, volume_affine
from dicomnode.demo.outcome import conclude
from dicomnode.demo.pacs import CHOICE, OwnPacs, make_pacs
from dicomnode.demo.phantom import LungTruth, thorax, write_series
from dicomnode.demo.workspace import MARK, prepare
from dicomnode.errors import NodeError, OperatorError

ROOT = Path(__file__).resolve().parents[2]


def demo(folder: Path, *arguments: str, pacs: str = "own") -> subprocess.CompletedProcess[str]:
    """The CLI in a process of its own; stdout holds only the JSON report."""
    command = [sys.executable, "-m", "dicomnode", "demo", "--once", "--json", "--output", str(folder), *arguments]
    environment = {**os.environ, CHOICE: pacs, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""}
    return subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_phantom_goes_round_and_comes_back_right(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run = demo(folder, "--slices", "40")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["ok"] is True
    assert report["sent"]["stored"] == 40
    (job,) = report["jobs"]
    assert (job["state"], [r["kind"] for r in job["results"]]) == ("done", ["SEG", "SR"])
    assert all(r["at_pacs"] for r in job["results"])
    assert {c["quantity"] for c in report["comparisons"]} == {"volume", "mean density", "below -950 HU"}
    assert len(report["comparisons"]) == 6
    assert {"wait", "read", "inference", "postprocess", "encode", "deliver", "end to end"} <= set(job["seconds"])
    assert report["seconds"]["last_response_to_results"] > 0
    assert (folder / "montage.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "report.json").read_text()) == report
    assert sorted(p.name[:2] for p in (folder / "results").iterdir()) == ["SE", "SR"]
    for lock in (folder / "node" / "run").glob("*.lock"):  # nothing of it runs any more
        with lock.open("rb") as file:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_radiographs_go_round_and_come_back_right(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run = demo(folder, "--radiograph")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert [(j["state"], sorted(r["kind"] for r in j["results"])) for j in report["jobs"]] == 2 * [
        ("done", ["SC", "SEG", "SR"])
    ]
    assert [(c["quantity"], c["true"], c["ok"]) for c in report["comparisons"]] == 2 * [("tilt", 4.0, True)]
    quantities = {m["quantity"] for j in report["jobs"] for m in j["measurements"]}
    assert {"Exposure Index", "Noise, standard deviation, share of grey scale"} <= quantities
    assert sorted(p.name for p in folder.glob("radiograph-*.png")) == ["radiograph-1.png", "radiograph-2.png"]


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies: a chest CT, and one with a CT of five slices, an MR series and a text file."""
    folder = tmp_path_factory.mktemp("own")
    phantom = thorax(slices=32, rows=128, columns=128, pixel_spacing=2.0, slice_spacing=10.0)
    write_series(phantom, folder / "chest", patient_id="A")
    short = write_series(phantom, folder / "short", patient_id="B")
    for path in short[5:]:
        path.unlink()
    for path in write_series(phantom, folder / "mr", patient_id="B", series_uid="2.25.77")[:3]:
        ds = pydicom.dcmread(path)
        ds.Modality, ds.SeriesNumber = "MR", 9
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        ds.save_as(path)
    for path in sorted((folder / "mr").iterdir())[3:]:
        path.unlink()
    (folder / "readme.txt").write_text("not DICOM")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_own_folder_reports_every_series(tmp_path: Path, own_folder: Path) -> None:
    run = demo(tmp_path / "out", str(own_folder))
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert [job["state"] for job in report["jobs"]].count("done") == 1
    refused = next(job for job in report["jobs"] if job["state"] == "refused")
    assert "TOO_FEW_SLICES" in refused["error"]
    assert "TOO_FEW_SLICES" in run.stderr
    assert [row["series"] for row in report["unmatched"]] == ["MR series 9, 3 images"]
    assert report["sent"]["skipped_files"] == 1
    assert "own" not in [p.name for p in tmp_path.iterdir()]
    done = next(job for job in report["jobs"] if job["state"] == "done")
    assert Path(done["montage"]).exists()
    assert {m["structure"] for m in done["measurements"]} == {"Right lung", "Left lung"}


def test_wrong_paths_are_refused_before_anything_starts(tmp_path: Path) -> None:
    missing = demo(tmp_path / "out", str(tmp_path / "nowhere"))
    assert missing.returncode == 78
    assert "does not exist" in missing.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    foreign = demo(tmp_path / "mine")
    assert foreign.returncode == 78
    assert "was not made by a demo" in foreign.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


# The folder


def test_former_demo_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    space = prepare(tmp_path / "out")
    (space.results / "SEG-1.dcm").touch()
    (space.root / "montage-3.png").touch()
    (space.root / "notes.txt").write_text("mine")
    again = prepare(tmp_path / "out")
    assert (again.root / MARK).exists()
    assert list(again.results.iterdir()) == []
    assert not (again.root / "montage-3.png").exists()
    assert (again.root / "notes.txt").read_text() == "mine"


def test_folder_of_a_running_demo_is_refused(tmp_path: Path) -> None:
    import fcntl

    space = prepare(tmp_path / "out")
    (space.data_dir / "run").mkdir(parents=True)
    with (space.data_dir / "run" / "serve.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OperatorError, match="still runs"):
            prepare(tmp_path / "out")
    prepare(tmp_path / "out")


# The PACS


@pytest.fixture
def own_pacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnPacs]:
    monkeypatch.setenv(CHOICE, "own")
    pacs = make_pacs(tmp_path / "pacs", 1, prefer_known_ports=False)
    assert isinstance(pacs, OwnPacs)
    pacs.start()
    yield pacs
    pacs.stop()


def test_own_pacs_keeps_what_it_is_sent(own_pacs: OwnPacs, tmp_path: Path) -> None:
    from dicomnode.deliver.files import find_files, send_files
    from dicomnode.settings import Delivery, Peer

    phantom = thorax(slices=2, rows=8, columns=8, pixel_spacing=40.0, slice_spacing=100.0)
    paths = write_series(phantom, tmp_path / "images")
    files, _ = find_files([tmp_path / "images"])
    peer = Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=own_pacs.port)
    outcomes = send_files("MODALITY", peer, Delivery(), files)
    assert [o.sent for o in outcomes] == ["stored", "stored"]
    held = own_pacs.objects()
    for path in paths:
        sent = pydicom.dcmread(path)
        back = pydicom.dcmread(pydicom.filebase.DicomBytesIO(held[str(sent.SOPInstanceUID)]))
        assert back == sent


def test_unknown_pacs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "dropbox")
    with pytest.raises(OperatorError, match="dropbox"):
        make_pacs(tmp_path, 1, prefer_known_ports=False)


# The judge: it has to see what is wrong


def truth(**changed: float) -> LungTruth:
    values = {"voxels": 1000, "volume_ml": 100.0, "emphysema_voxels": 50, "voxels_below_950": 50, "mean_hu": -800.0}
    return LungTruth(label=1, name="right lung", emphysema_ml=5.0, **{**values, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "right"), [(100.0, True), (102.9, True), (103.1, False), (96.9, False)])
def test_volume_is_right_within_three_percent(value: float, right: bool) -> None:
    number = Number(1, "118565006 SCT", "Volume", value, "ml")
    (comparison,) = compare([number], {1: "Right lung"}, {1: truth()})
    assert isinstance(comparison, Comparison)
    assert comparison.ok is right


def test_numbers_of_other_structures_are_not_compared() -> None:
    number = Number(2, "118565006 SCT", "Volume", 100.0, "ml")
    assert compare([number], {2: "Liver"}, {1: truth()}) == []


def test_dice_of_nothing_is_no_success() -> None:
    empty = np.zeros((2, 2), bool)
    assert dice(empty, empty) == 0.0
    assert dice(~empty, ~empty) == 1.0


def frame(z: float, number: int = 1) -> Dataset:
    groups = Dataset()
    groups.PlanePositionSequence = [Dataset()]
    groups.PlanePositionSequence[0].ImagePositionPatient = [-10, -20, z]
    groups.SegmentIdentificationSequence = [Dataset()]
    groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber = number
    return groups


@pytest.fixture
def small_seg() -> SimpleNamespace:
    """Two frames of 2 x 3 pixels, 0.5 mm apart in rows and columns, at z 0 and 4 mm."""
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.5, 0.5]
    segment = Dataset()
    segment.SegmentNumber, segment.SegmentLabel = 1, "Right lung"
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0, 0] = pixels[1, 1, 2] = 1
    return SimpleNamespace(
        Rows=2,
        Columns=3,
        pixel_array=pixels,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[frame(0), frame(4)],
        SegmentSequence=[segment],
    )


AFFINE = volume_affine((-10, -20, -4), (1, 0, 0, 0, 1, 0), (4.0, 0.5, 0.5))


def test_seg_is_placed_by_its_own_positions(small_seg: SimpleNamespace) -> None:
    labels = place_seg(small_seg, AFFINE, (3, 2, 3)).labels  # type: ignore[arg-type]
    assert np.argwhere(labels).tolist() == [[1, 0, 0], [2, 1, 2]]


@pytest.mark.parametrize("what", ["between", "outside", "spacing", "direction", "no position"])
def test_seg_out_of_place_is_refused(small_seg: SimpleNamespace, what: str) -> None:
    shared = small_seg.SharedFunctionalGroupsSequence[0]
    first = small_seg.PerFrameFunctionalGroupsSequence[0]
    if what == "between":
        first.PlanePositionSequence[0].ImagePositionPatient = [-10, -20, 1]
    elif what == "outside":
        first.PlanePositionSequence[0].ImagePositionPatient = [-10, -20, 40]
    elif what == "spacing":
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.5, 0.6]
    elif what == "direction":
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    else:
        del first.PlanePositionSequence
    with pytest.raises(NodeError, match="place the SEG"):
        place_seg(small_seg, AFFINE, (3, 2, 3))  # type: ignore[arg-type]


def test_missing_and_foreign_objects_are_wrong(tmp_path: Path) -> None:
    write_series(thorax(slices=2, rows=8, columns=8, pixel_spacing=40.0, slice_spacing=100.0), tmp_path / "images")
    inputs = read_inputs(tmp_path / "images")
    space = prepare(tmp_path / "out")
    foreign = (tmp_path / "images" / "00001.dcm").read_bytes()
    job = {
        "id": 1, "state": "done", "model": "ct-lung", "model_version": "1.0.0", "reason": "", "last_error": None,
        "notes": [], "summary": {}, "seconds": {}, "deliveries": [],
        "SeriesInstanceUID": inputs.series[0].series_uid,
        "results": [{"kind": "SEG", "SOPInstanceUID": "2.25.1"}, {"kind": "SR", "SOPInstanceUID": "2.25.2"}],
    }  # fmt: skip
    wrong = {c.what for c in conclude(inputs, [], [job], {"2.25.9": foreign}, space).checks if not c.ok}
    assert wrong >= {"results at the PACS", "other objects at the PACS"}
    lost = conclude(inputs, ["refused"], [], {}, space)
    assert [c.what for c in lost.checks if not c.ok] == ["images stored at the node"]
    failed = deepcopy(job) | {"state": "failed", "results": []}
    assert "jobs" in {c.what for c in conclude(inputs, [], [failed], {}, space).checks if not c.ok}


@pytest.mark.parametrize(("slices", "spacing"), [(128, 2.5), (40, 8.0), (320, 1.0), (24, 10.0)])
def test_phantom_covers_the_chest_within_the_contract(slices: int, spacing: float) -> None:
    assert slice_spacing(slices) == spacing
