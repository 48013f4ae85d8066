"""Radiographs through the shipped bundle to each kind of result, in each transfer syntax, judged by dciodvfy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from dicomnode.demo.radiograph import to_dataset
from dicomnode.encode import encode_results
from dicomnode.encode.failure import Failure, encode_failure
from dicomnode.identity import failure_identity, result_identity
from dicomnode.infer.golden import ReadyModel
from dicomnode.orders import KINDS, LABELMAP, LABELMAP_SR, order_for
from dicomnode.records import Analysis, EncodedObject, SourceInstance
from tests.encode.encode_case import STATION, read
from tests.encode.source_case import save
from tests.encode.test_kinds import comments, references
from tests.infer.infer_case import DATA
from tests.infer.radiograph_case import numbered, picture, quality_model
from tests.proof.syntaxes import LOSSLESS, in_syntax
from tests.proof.test_matrix import judged

REAL = DATA / "cr-chest" / "gdcm-CR-MONO1-10-chest.dcm"
EVERYTHING = order_for(["pacs"], KINDS, "labelmap")
SEG_AND_SR = order_for(["pacs"], ["SEG", "SR"])
MADE = {"SEG", "SR", "GSPS", "SC", "KOS", LABELMAP, LABELMAP_SR}
"""A probability map is made of volumes alone."""


@cache
def model() -> ReadyModel:
    return quality_model()


def encoded(analysis: Analysis, sources: Any, order: Any = EVERYTHING) -> tuple[EncodedObject, ...]:
    identity = result_identity(
        inputs="radiograph", model_digest=model().identity.digest, parameters="", revision=1,
        segment_numbers=[s.number for s in analysis.segments], content_datetime="2026-05-06T07:08:09.123456+02:00",
    )  # fmt: skip
    return encode_results(analysis, identity, model().identity, sources, station=STATION, order=order)


def numbers(sr: pydicom.Dataset) -> dict[tuple[str, str], float]:
    """Every measured number of a report by its concept."""
    found: dict[tuple[str, str], float] = {}

    def walk(item: pydicom.Dataset) -> None:
        for child in item.get("ContentSequence", []):
            if child.ValueType == "NUM":
                name = child.ConceptNameCodeSequence[0]
                value = child.MeasuredValueSequence[0]
                found[str(name.CodeValue), str(name.CodingSchemeDesignator)] = float(value.NumericValue)
            walk(child)

    walk(sr)
    return found


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["CR", "DX"])
def test_each_result_of_a_radiograph_is_valid(kind: Any, tmp_path: Path) -> None:
    sources = save([to_dataset(picture(mm=2.0), kind)], tmp_path)
    analysis = model().analyse(sources)
    failure = encode_failure(
        Failure(True, "WRONG_VIEW: the view is not PA or AP", 1),
        failure_identity(
            inputs="x", model="cxr-quality", revision=1, reason="WRONG_VIEW",
            content_datetime="2026-05-06T07:08:09+02:00",
        ),
        model().identity, sources, station=STATION,
    )  # fmt: skip
    objects = [*encoded(analysis, sources), failure]
    assert {o.kind for o in objects} == MADE
    assert judged(objects, tmp_path) == {}
    known = {s.sop_instance_uid for s in sources} | {o.sop_instance_uid for o in objects}
    for item in objects:
        assert {uid for uid, _ in references(read(item.part10))} <= known, item.kind
    sr = read(next(o.part10 for o in objects if o.kind == "SR"))
    values = {m.key: m.value for m in analysis.measurements}
    found = numbers(sr)
    assert found["CXRTILT", "99DICOMNODE"] == pytest.approx(values["tilt"])
    assert ("113845", "DCM") in found if kind == "DX" else ("113845", "DCM") not in found
    (scheme,) = sr.CodingSchemeIdentificationSequence
    assert (scheme.CodingSchemeDesignator, scheme.CodingSchemeResponsibleOrganization) == (
        "99DICOMNODE", "dicomnode project",
    )  # fmt: skip


@pytest.mark.peers
def test_two_images_in_one_series(tmp_path: Path) -> None:
    datasets = [numbered(to_dataset(picture(mm=mm)), n) for n, mm in ((1, 2.0), (2, 2.5))]
    side = numbered(to_dataset(picture(mm=2.5)), 3)
    side.ViewPosition, side.SeriesInstanceUID = "LL", datasets[0].SeriesInstanceUID
    datasets[1].SeriesInstanceUID = datasets[0].SeriesInstanceUID
    datasets[1].StudyInstanceUID = side.StudyInstanceUID = datasets[0].StudyInstanceUID
    sources = save([*datasets, side], tmp_path)
    objects = encoded(model().analyse(sources), sources)
    assert sorted(o.kind for o in objects).count("SEG") == 2
    assert judged(objects, tmp_path) == {}
    sr = read(next(o.part10 for o in objects if o.kind == "SR"))
    assert any("Image 3 was left out: the view is not PA or AP" in text for text in comments(sr))


@pytest.mark.peers
@pytest.mark.parametrize("uid", [*LOSSLESS, "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91"])
def test_each_transfer_syntax_gives_the_same_numbers(uid: str, tmp_path: Path) -> None:
    """But for JPEG Baseline, which has 8 bits, and JPEG Extended of 12, which no decoder here reads."""
    kind: Any = "CR"
    (source,) = save([to_dataset(picture(mm=2.0), kind)], tmp_path)
    wanted = {m.key: m.value for m in model().analyse([source]).measurements}
    (tmp_path / "other").mkdir()
    other: SourceInstance = in_syntax(source, uid, tmp_path / "other")
    analysis = model().analyse([other])
    found = {m.key: m.value for m in analysis.measurements}
    assert found.keys() == wanted.keys()
    if uid in LOSSLESS:
        assert found == wanted
    else:
        assert found["tilt"] == pytest.approx(wanted["tilt"], abs=0.5)
        assert found["lung_grey"] == pytest.approx(wanted["lung_grey"], abs=0.2)
    assert judged(encoded(analysis, [other], SEG_AND_SR), tmp_path) == {}


@pytest.mark.peers
@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not here")
def test_a_real_radiograph(tmp_path: Path) -> None:
    ds = pydicom.dcmread(REAL, stop_before_pixels=True)
    sources = [
        SourceInstance(str(ds.SOPInstanceUID), str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID), REAL, "0" * 64)
    ]
    objects = encoded(model().analyse(sources), sources)
    assert {o.kind for o in objects} == MADE
    assert judged(objects, tmp_path) == {}
    seg = read(next(o.part10 for o in objects if o.kind == "SEG"))
    assert (seg.Rows, seg.Columns) == (440, 440)
    assert seg.pixel_array.shape[0] == 2
    assert np.all(seg.pixel_array.reshape(2, -1).mean(axis=1) > 0.08)
