"""The real chest CT from a modality's sender to the PACS, judged by programs of others."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode.infer.engine import choose_engine
from dicomnode.infer.golden import open_model
from tests.e2e.harness import ROOT, SEG, Node, make_series, placed_labels, rule, sr_volumes
from tests.peers import Orthanc, run_program, wait_for

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def sources(real_ct: list[Path]) -> list[pydicom.Dataset]:
    """Headers of the real CT, along the slice normal."""
    headers = [pydicom.dcmread(p, stop_before_pixels=True) for p in real_ct]
    first = np.array(headers[0].ImageOrientationPatient, float)
    normal = np.cross(first[:3], first[3:])
    return sorted(headers, key=lambda h: float(np.dot(np.array(h.ImagePositionPatient, float), normal)))


@pytest.fixture(scope="module")
def delivered(
    tmp_path_factory: pytest.TempPathFactory, pacs: Orthanc, real_ct: list[Path], sources: list[pydicom.Dataset]
) -> Iterator[tuple[Node, dict[str, bytes]]]:
    """The node's results for the real CT as they lie at the PACS: modality -> Part 10 file."""
    peer = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port}
    running = Node(
        tmp_path_factory.mktemp("journey"), peers=[peer], rules=[rule("ct", {"Modality": "CT"}, to=["pacs"])]
    ).start()
    done = run_program("storescu", "-xs", "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", str(running.port), *real_ct)
    assert done.returncode == 0, done.stderr
    running.wait_delivered(str(sources[0].SeriesInstanceUID), seconds=120)
    found = pacs.instances(str(sources[0].StudyInstanceUID))
    yield running, {modality: pacs.file(ids[0]) for modality, ids in found.items() if len(ids) == 1}
    assert running.stop() == 0


@pytest.mark.slow
def test_exactly_one_seg_and_one_sr_arrive(
    delivered: tuple[Node, dict[str, bytes]], sources: list[pydicom.Dataset]
) -> None:
    node, found = delivered
    assert sorted(found) == ["SEG", "SR"]
    job = node.jobs(str(sources[0].SeriesInstanceUID))
    assert [(j["state"], j["revision"]) for j in job] == [("done", 1)]
    assert job[0]["reason"].startswith("association-released, contiguous geometry: 248 slices")


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["SEG", "SR"])
def test_dciodvfy_finds_no_error(delivered: tuple[Node, dict[str, bytes]], modality: str, tmp_path: Path) -> None:
    path = tmp_path / "result.dcm"
    path.write_bytes(delivered[1][modality])
    done = run_program("dciodvfy", "-new", path)
    assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == []


@pytest.mark.slow
def test_volumes_in_the_sr_are_those_of_the_seg(
    delivered: tuple[Node, dict[str, bytes]], sources: list[pydicom.Dataset]
) -> None:
    """SimpleITK computes them from the SEG and the geometry of the source."""
    sitk = pytest.importorskip("SimpleITK")
    seg = pydicom.dcmread(io.BytesIO(delivered[1]["SEG"]))
    assert seg.SOPClassUID == SEG
    image = sitk.GetImageFromArray(placed_labels(seg, sources))
    positions = np.array([s.ImagePositionPatient for s in sources], float)
    between = float(np.median(np.linalg.norm(np.diff(positions, axis=0), axis=1)))
    rows, columns = (float(v) for v in sources[0].PixelSpacing)
    image.SetSpacing((columns, rows, between))
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(image)
    expected = {int(n): statistics.GetPhysicalSize(n) / 1000 for n in statistics.GetLabels()}
    volumes = sr_volumes(pydicom.dcmread(io.BytesIO(delivered[1]["SR"])))
    assert volumes.keys() == expected.keys() == {1, 2}
    assert volumes == pytest.approx(expected, rel=1e-3)
    assert min(volumes.values()) > 500


@pytest.mark.slow
def test_the_seg_equals_the_bundle_run_offline(
    delivered: tuple[Node, dict[str, bytes]], sources: list[pydicom.Dataset], real_ct: list[Path]
) -> None:
    engine, _ = choose_engine("onnxruntime-cpu")
    model = open_model(ROOT / "models" / "ct-lung" / "1.0.0", engine)
    analysis = model.analyse(real_ct)
    model.close()
    assert list(analysis.source_uids) == [s.SOPInstanceUID for s in sources]
    seg = pydicom.dcmread(io.BytesIO(delivered[1]["SEG"]))
    np.testing.assert_array_equal(placed_labels(seg, sources), analysis.labels)


@pytest.mark.slow
def test_sent_again_nothing_new_happens(
    delivered: tuple[Node, dict[str, bytes]], sources: list[pydicom.Dataset], real_ct: list[Path], pacs: Orthanc
) -> None:
    """The whole series a second time, by dcmsend: success, no second job, no second object."""
    node, _ = delivered
    before = node.rows("SELECT count(*) AS n FROM instances")[0]["n"]
    done = run_program("dcmsend", "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", str(node.port), *real_ct)
    assert done.returncode == 0, done.stderr
    assert node.rows("SELECT count(*) AS n FROM instances")[0]["n"] == before
    assert len(node.jobs(str(sources[0].SeriesInstanceUID))) == 1
    assert {m: len(i) for m, i in pacs.instances(str(sources[0].StudyInstanceUID)).items()} == {"SEG": 1, "SR": 1}


def test_dcmsend_brings_a_series_and_results_arrive(node: Node, pacs: Orthanc, tmp_path: Path) -> None:
    series = make_series("pacs dcmsend")
    files = series.write(tmp_path / "series")
    done = run_program("dcmsend", "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", str(node.port), *files)
    assert done.returncode == 0, done.stderr
    node.wait_delivered(series.series_uid)
    found = wait_for(lambda: pacs.instances(series.study_uid), 20, "the PACS has the study")
    assert {modality: len(ids) for modality, ids in found.items()} == {"SEG": 1, "SR": 1}
