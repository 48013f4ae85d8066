"""The proof matrix: each kind of source, each transfer syntax, each kind of result, judged by dciodvfy.

From files to results by the node's own stages: read, decode, stack, network on ONNX Runtime, labels,
measurements, encoding. Radiographs go the same way in tests/infer/test_projection.py and are encoded
in tests/encode/test_kinds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicomnode.encode.failure import Failure, encode_failure
from dicomnode.errors import UnsuitableSeries
from dicomnode.identity import failure_identity
from dicomnode.orders import KINDS, LABELMAP, LABELMAP_SR, order_for
from dicomnode.records import Analysis, EncodedObject, SourceInstance
from tests.encode.encode_case import MODEL, STATION, read
from tests.encode.source_case import SOURCES, ct, save
from tests.encode.test_kinds import errors, references
from tests.proof.proof_case import analyse, brightness, marker, results
from tests.proof.syntaxes import BITS, LOSSLESS, LOSSY, METHODS, in_syntax

KINDS_OF_SOURCE = ["ct", "tilted-ct", "mr", "enhanced-ct", "enhanced-mr"]
PICTURES = order_for(["pacs"], ["SEG", "SR", "SC", "PM"], "labelmap")


def judged(objects: Sequence[EncodedObject], folder: Path) -> dict[str, list[str]]:
    """Errors by kind, of all objects at once; what Debian's dciodvfy does not know is left out (STANDARDS.md)."""

    def judge(number: int) -> tuple[str, list[str]]:
        item = objects[number]
        path = folder / f"result-{number}.dcm"
        path.write_bytes(item.part10)
        if item.kind == LABELMAP:
            return item.kind, []
        found = errors(path)
        if item.kind == LABELMAP_SR:
            found = [line for line in found if "ReferencedSegmentNumber" not in line]
        return item.kind, found

    with ThreadPoolExecutor(2) as pool:
        return {kind: found for kind, found in pool.map(judge, range(len(objects))) if found}


def failure(sources: Sequence[SourceInstance], *, refused: bool) -> EncodedObject:
    identity = failure_identity(
        inputs="proof", model="ct-lung", revision=1, reason="GAP", content_datetime="2026-05-06T07:08:09+02:00"
    )
    reason = "GAP: 2 gap(s) between slices. Send the missing slices" if refused else "out of memory"
    return encode_failure(Failure(refused, reason, 3), identity, MODEL, sources, station=STATION)


@pytest.mark.peers
@pytest.mark.parametrize("name", KINDS_OF_SOURCE)
def test_each_result_of_each_source(name: str, tmp_path: Path) -> None:
    datasets = SOURCES[name]()
    sources = save(datasets, tmp_path)
    modality = str(datasets[0].Modality)
    analysis = analyse(sources, marker(modality))
    truth = truth_of(datasets, analysis)
    marked = analysis.labels == 2
    if name == "tilted-ct":  # seen on a straight grid and brought back
        assert 2 * (marked & truth).sum() / (marked.sum() + truth.sum()) > 0.97
    else:
        np.testing.assert_array_equal(marked, truth)
    objects = [*results(analysis, sources), failure(sources, refused=True), failure(sources, refused=False)]
    assert {o.kind for o in objects} == {*KINDS, LABELMAP, LABELMAP_SR}
    assert judged(objects, tmp_path) == {}
    known = {s.sop_instance_uid for s in sources} | {o.sop_instance_uid for o in objects}
    for item in objects:
        assert {uid for uid, _ in references(read(item.part10))} <= known, item.kind
    assert volume_of(analysis) == pytest.approx(float(marked.sum()) * voxel_ml(datasets), rel=1e-6)


def truth_of(datasets: Sequence[Dataset], analysis: Analysis) -> np.ndarray:
    """What is brighter than 0 by numpy's reading of the same files, slices as the analysis has them."""
    if analysis.source_frames:
        (one,) = datasets
        intercept = -24 if one.Modality == "CT" else 0
        return one.pixel_array[[n - 1 for n in analysis.source_frames]] + intercept > 0
    by_uid = {ds.SOPInstanceUID: ds for ds in datasets}
    return brightness([by_uid[uid] for uid in analysis.source_uids]) > 0


def voxel_ml(datasets: Sequence[Dataset]) -> float:
    """1.4 x 0.7 mm pixels; slices 2.5 mm apart along the table, to which a tilted gantry leans by 20 degrees."""
    step = 2.5 * np.cos(np.radians(20)) if "GantryDetectorTilt" in datasets[0] else 2.5
    return 1.4 * 0.7 * step / 1000


def volume_of(analysis: Analysis) -> float:
    return next(m.value for m in analysis.measurements if m.key == "volume_ml" and m.segment == 2)


@cache
def reference(bits: int, folder: Path) -> tuple[tuple[SourceInstance, ...], Analysis]:
    """Uncompressed files of ``bits`` bits, and the analysis of them."""
    datasets = ct()[:4]
    for ds in datasets:
        if bits == 16:
            continue
        pixels = np.clip(ds.pixel_array, 0, 255 if bits == 8 else 4095)
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit, ds.BitsAllocated = 0, bits, bits - 1, 8 if bits == 8 else 16
        ds.PixelData = pixels.astype("u1" if bits == 8 else "<u2").tobytes()
        ds["PixelData"].VR = "OB" if bits == 8 else "OW"
        ds.RescaleIntercept = -100
    sources = save(datasets, folder)
    return sources, analyse(sources, marker())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {bits: tmp_path_factory.mktemp(f"plain{bits}") for bits in (8, 12, 16)}


@pytest.mark.peers
@pytest.mark.parametrize("uid", LOSSLESS)
def test_lossless_syntaxes_give_the_same_results(uid: str, tmp_path: Path, plain: dict[int, Path]) -> None:
    sources, wanted = reference(16, plain[16])
    again = [in_syntax(s, uid, tmp_path) for s in sources]
    analysis = analyse(again, marker())
    np.testing.assert_array_equal(analysis.labels, wanted.labels)
    assert analysis.measurements == wanted.measurements
    np.testing.assert_array_equal(analysis.probability_maps[0].values, wanted.probability_maps[0].values)
    objects = results(analysis, again, PICTURES)
    assert judged(objects, tmp_path) == {}
    for item in objects:
        assert read(item.part10).get("LossyImageCompression") != "01", item.kind
        # Nothing in a result hangs on how its source was kept.
    assert [o.part10 for o in objects] == [o.part10 for o in results(wanted, sources, PICTURES)]


@pytest.mark.peers
@pytest.mark.parametrize(
    "uid", ["1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90"]
)
def test_frames_are_told_apart_in_lossless_syntaxes(uid: str, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    datasets = SOURCES["enhanced-mr"]()
    (source,) = save(datasets, folder)
    analysis = analyse([in_syntax(source, uid, tmp_path)], marker("MR"))
    np.testing.assert_array_equal(analysis.labels == 2, truth_of(datasets, analysis))


@pytest.mark.peers
@pytest.mark.parametrize("uid", LOSSY)
def test_lossy_syntaxes_give_valid_results_that_say_so(uid: str, tmp_path: Path, plain: dict[int, Path]) -> None:
    bits = BITS.get(uid, 16)
    sources, wanted = reference(bits, plain[bits])
    again = [in_syntax(s, uid, tmp_path) for s in sources]
    analysis = analyse(again, marker())
    assert analysis.labels is not None and wanted.labels is not None
    both = (analysis.labels == 2) & (wanted.labels == 2)
    assert 2 * both.sum() / ((analysis.labels == 2).sum() + (wanted.labels == 2).sum()) > 0.97
    objects = results(analysis, again, PICTURES)
    assert judged(objects, tmp_path) == {}
    for item in objects:
        ds = read(item.part10)
        if item.kind in ("SR", LABELMAP_SR):
            continue
        assert ds.LossyImageCompression == "01", item.kind
        assert ds.LossyImageCompressionMethod == METHODS[uid], item.kind
        assert float(ds.LossyImageCompressionRatio) > 1, item.kind


@pytest.mark.peers
def test_jpeg_extended_of_12_bits_is_refused_with_its_reason(tmp_path: Path, plain: dict[int, Path]) -> None:
    sources, _ = reference(12, plain[12])
    again = [in_syntax(s, "1.2.840.10008.1.2.4.51", tmp_path) for s in sources]
    with pytest.raises(UnsuitableSeries, match=r"JPEG Extended.*another transfer syntax"):
        analyse(again, marker())


def test_the_table_has_every_syntax_of_the_shared_files() -> None:
    shared = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "transfer-syntaxes"
    if not shared.is_dir():
        pytest.skip("shared/data/transfer-syntaxes is absent")
    assert {p.stem for p in shared.glob("*.dcm")} <= LOSSLESS.keys() | LOSSY.keys()
