"""Results in programs that share no code with this one: SimpleITK, dcmjs, and Orthanc as archive."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dicomnode.orders import KINDS, LABELMAP, LABELMAP_SR
from dicomnode.records import Analysis, EncodedObject, SourceInstance
from tests.e2e.test_dcmjs import javascript
from tests.encode.encode_case import program, read
from tests.encode.source_case import SOURCES, save
from tests.peers import Orthanc, StoreScp, data_set_of, item_of, send_items
from tests.proof.proof_case import analyse, marker, results

READER = Path(__file__).resolve().parent.parent / "npm" / "read.js"


def made(name: str, folder: Path) -> tuple[tuple[SourceInstance, ...], Analysis, dict[str, EncodedObject]]:
    datasets = SOURCES[name]()
    sources = save(datasets, folder)
    analysis = analyse(sources, marker(str(datasets[0].Modality)))
    return sources, analysis, {o.kind: o for o in results(analysis, sources)}


def positions(name: str, analysis: Analysis) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image Position (Patient) and the two directions times spacing of each slice, from the source's own headers."""
    datasets = SOURCES[name]()
    out = []
    for number, uid in enumerate(analysis.source_uids):
        if analysis.source_frames:
            (ds,) = datasets
            group = ds.PerFrameFunctionalGroupsSequence[analysis.source_frames[number] - 1]
            position = group.PlanePositionSequence[0].ImagePositionPatient
            orientation = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
        else:
            ds = next(d for d in datasets if d.SOPInstanceUID == uid)
            position, orientation = ds.ImagePositionPatient, ds.ImageOrientationPatient
        axes = np.array(orientation, float).reshape(2, 3) * [[0.7], [1.4]]
        out.append((np.array(position, float), axes))
    return out


@pytest.mark.parametrize("name", ["ct", "mr", "enhanced-ct", "enhanced-mr"])
def test_simpleitk_finds_each_voxel_where_the_source_has_it(name: str, tmp_path: Path) -> None:
    _, analysis, objects = made(name, tmp_path)
    path = tmp_path / "seg.dcm"
    path.write_bytes(objects["SEG"].part10)
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image) > 0  # one segment: a frame for each slice
    assert analysis.labels is not None
    assert int(values.sum()) == int(np.count_nonzero(analysis.labels))
    for plane, (position, (along_row, along_column)) in zip(analysis.labels, positions(name, analysis), strict=True):
        at = np.argwhere(plane == 2)[::17]
        for row, column in at:
            place = position + row * along_column + column * along_row
            i, j, k = image.TransformPhysicalPointToIndex([float(v) for v in place])
            assert values[k, j, i]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["ct", "tilted-ct", "enhanced-mr"])
def test_dcmjs_reads_segmentation_and_report(name: str, tmp_path: Path) -> None:
    node = javascript()
    _, analysis, objects = made(name, tmp_path)
    paths = []
    for kind in ("SEG", "SR"):
        paths.append(tmp_path / f"{kind}.dcm")
        paths[-1].write_bytes(objects[kind].part10)
    done = subprocess.run([node, READER, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seg, sr = (json.loads(line) for line in done.stdout.splitlines())
    assert seg["segments"] == {"1": "bright"}
    assert analysis.labels is not None
    found = {tuple(f["position"]): f for f in seg["frames"]}
    for plane, (position, _), uid in zip(analysis.labels, positions(name, analysis), analysis.source_uids, strict=True):
        frame = found.pop(tuple(float(v) for v in position), None)
        voxels = int(np.count_nonzero(plane))
        assert (frame["voxels"], frame["source"]) == (voxels, uid) if frame else voxels == 0
    assert not found
    volumes = [n["value"] for n in sr["numbers"] if (n["name"], n["unit"]) == ("Volume", "ml")]
    wanted = [m.value for m in analysis.measurements if m.key == "volume_ml"]
    assert volumes == pytest.approx(wanted, rel=1e-7) and volumes[0] == 0
    assert sr["referenced"] == [[seg["uid"], 1]]
    assert "Not found: the model marked no voxel as never." in sr["texts"]


@pytest.mark.peers
def test_orthanc_keeps_and_gives_back_every_kind(tmp_path: Path) -> None:
    """C-STORE into it, C-MOVE and the REST interface out of it: the data sets are as they were."""
    sent: dict[str, bytes] = {}
    folder = tmp_path / "sent"
    folder.mkdir()
    kinds = set()
    for name in ("ct", "enhanced-ct"):
        sources, _, objects = made(name, tmp_path)
        kinds |= objects.keys()
        for item in (*objects.values(), *sources):
            part10 = item.part10 if isinstance(item, EncodedObject) else item.path.read_bytes()
            sent[item.sop_instance_uid] = data_set_of(part10)
            (folder / item.sop_instance_uid).write_bytes(part10)
    assert kinds == {*KINDS, LABELMAP, LABELMAP_SR}
    wanted = dict(sent)
    archive = StoreScp(tmp_path / "back", "--promiscuous", aet="BACK")
    orthanc = Orthanc(
        tmp_path / "orthanc",
        DicomModalities={"back": ["BACK", "127.0.0.1", archive.port]},
        UnknownSopClassAccepted=True,
    ).start()
    try:
        statuses = send_items(orthanc.dicom_port, [item_of(p) for p in sorted(folder.iterdir())], called="PACS")
        assert set(statuses) == {0x0000}
        study = str(read((folder / next(iter(sent))).read_bytes()).StudyInstanceUID)
        held = orthanc.instances(study)
        assert set(held) == {"CT", "SEG", "SR", "PR", "OT", "KO"} | ({"RWV"} & set(held))
        for ids in held.values():
            for identifier in ids:
                part10 = orthanc.file(identifier)
                uid = str(read(part10).SOPInstanceUID)
                assert data_set_of(part10) == sent.pop(uid), uid
        assert not sent
        ask = ["movescu", "-S", "-aec", "PACS", "-aem", "BACK", "-k", "QueryRetrieveLevel=STUDY",
               "-k", f"StudyInstanceUID={study}", "127.0.0.1", str(orthanc.dicom_port)]  # fmt: skip
        done = subprocess.run([program(ask[0]), *ask[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        moved = {str(read(p.read_bytes()).SOPInstanceUID): p for p in archive.files()}
        assert {uid: data_set_of(p.read_bytes()) for uid, p in moved.items()} == wanted
    finally:
        archive.stop()
        orthanc.stop()
