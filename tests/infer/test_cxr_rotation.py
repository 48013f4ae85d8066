"""cxr-quality says to which side a patient was turned, or that it cannot say: never the wrong side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from dicomnode.demo.radiograph import to_dataset
from dicomnode.infer.golden import ReadyModel
from dicomnode.records import Analysis
from tests.encode.encode_case import read
from tests.infer.infer_case import DATA
from tests.infer.radiograph_case import numbered, of_real_ct, picture, quality_model, saved

REAL = DATA / "cr-chest" / "gdcm-CR-MONO1-10-chest.dcm"
NOT_DETERMINED = ("Undetermined", "Undetermined")
TURNED = {15.0: ("Absent", "Present"), -15.0: ("Present", "Absent")}
"""Answers of ``right_to_front`` and ``left_to_front``."""


@pytest.fixture(scope="module")
def model() -> ReadyModel:
    return quality_model()


def answers(analysis: Analysis) -> tuple[str, ...]:
    found = {f.key: f.value.meaning for f in analysis.findings if f.value}
    return found["right_to_front"], found["left_to_front"]


def reason(analysis: Analysis) -> str:
    (text,) = {f.text for f in analysis.findings}
    return text


def mirrored(ds: pydicom.Dataset) -> pydicom.Dataset:
    """The other way round, with nothing that says so: another patient, turned the other way."""
    ds.PixelData = np.ascontiguousarray(ds.pixel_array[:, ::-1]).tobytes()
    return ds


@pytest.fixture
def asked(model: ReadyModel, tmp_path: Path) -> Any:
    def ask(ds: pydicom.Dataset) -> Analysis:
        return model.analyse([saved(ds, tmp_path)])

    return ask


@pytest.mark.parametrize("kind", ["DX", "CR"])
@pytest.mark.parametrize("degrees", TURNED)
def test_the_side_of_a_patient_who_was_turned(asked: Any, degrees: float, kind: Any) -> None:
    """CR stores black for high values (MONOCHROME1)."""
    analysis = asked(to_dataset(picture(turned=degrees), kind))
    assert answers(analysis) == TURNED[degrees]
    assert ("left side to the front" in reason(analysis)) == (degrees > 0)


@pytest.mark.parametrize("photons", [1e3, 1e5])
def test_never_the_wrong_side(asked: Any, photons: float) -> None:
    """Small turns are not determined; the phantom's heart and aorta shift where that ends."""
    found = {
        degrees: answers(asked(to_dataset(picture(turned=float(degrees), photons=photons, mm=1.0))))
        for degrees in range(-15, 16, 3)
    }
    for degrees, answer in found.items():
        assert answer in (NOT_DETERMINED, TURNED[15.0 if degrees > 0 else -15.0]), degrees
    assert {found[d] for d in (-3, 0, 3)} == {NOT_DETERMINED}
    assert {found[d] for d in (-15, -12)} == {TURNED[-15.0]}
    assert {found[d] for d in (9, 12, 15)} == {TURNED[15.0]}


@pytest.mark.parametrize("degrees", TURNED)
def test_leaning_does_not_matter(asked: Any, degrees: float) -> None:
    assert answers(asked(to_dataset(picture(turned=degrees, leaning=5.0)))) == TURNED[degrees]
    assert answers(asked(to_dataset(picture(leaning=5.0)))) == NOT_DETERMINED


@pytest.mark.parametrize("degrees", TURNED)
def test_a_mirrored_picture_is_the_other_side_unless_its_header_says_so(asked: Any, degrees: float) -> None:
    ds = mirrored(to_dataset(picture(turned=degrees)))
    assert answers(asked(ds)) == TURNED[-degrees]
    ds.PatientOrientation = ["R", "F"]
    assert answers(asked(ds)) == TURNED[degrees]
    ds.ViewPosition = "AP"
    assert answers(asked(ds)) == TURNED[degrees]


@pytest.mark.parametrize("degrees", [15.0, 0.0, -8.0])
@pytest.mark.parametrize("side", [1, 2])
def test_an_opacity_on_one_side_is_no_turn(model: ReadyModel, tmp_path: Path, degrees: float, side: int) -> None:
    """It moves the border of its lung field and makes it brighter, and must not pass for a turn by that."""
    labels = model.analyse([saved(to_dataset(picture(turned=degrees)), tmp_path, "clear.dcm")]).labels
    assert labels is not None
    rows = np.flatnonzero((labels[0] == side).any(axis=1))
    for upper in (0.25, 0.5, 1.0):
        for strength in (200, 300, 500):
            ds = to_dataset(picture(turned=degrees))
            opaque = labels[0] == side
            opaque[int(rows[0] + upper * len(rows)) :] = False
            pixels = np.clip(ds.pixel_array + opaque * strength, 0, 4095)
            ds.PixelData = pixels.astype("<u2").tobytes()
            found = answers(model.analyse([saved(ds, tmp_path, "opaque.dcm")]))
            right = [TURNED[15.0]] if degrees > 0 else [TURNED[-15.0]] if degrees < 0 else []
            assert found in (NOT_DETERMINED, *right), (upper, strength)


def test_one_lung_or_none(asked: Any) -> None:
    ds = to_dataset(picture(field=(0, 1, 0, 0.75)))
    assert "not both lung fields" in reason(asked(ds))
    ds.PixelData = np.full((ds.Rows, ds.Columns), 2000, "<u2").tobytes()
    analysis = asked(ds)
    assert answers(analysis) == NOT_DETERMINED and "not both lung fields" in reason(analysis)


@pytest.mark.skipif(not (DATA / "ct-chest-ricord").is_dir(), reason="ct-chest-ricord is not here")
def test_a_real_chest_with_infiltrates_on_one_side_is_not_determined(asked: Any) -> None:
    """Radiographs computed from a real CT: neither estimate has its zero where this patient lies straight."""
    for degrees in (-6.0, 0.0, 6.0):
        analysis = asked(to_dataset(of_real_ct(turned=degrees)))
        assert answers(analysis) == NOT_DETERMINED
        assert "equally high" in reason(analysis) or "much brighter" in reason(analysis)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not here")
def test_a_real_radiograph_and_its_mirror_image(asked: Any) -> None:
    found = answers(asked(pydicom.dcmread(REAL)))
    other = answers(asked(mirrored(pydicom.dcmread(REAL))))
    assert other == (found[1], found[0])
    assert found == NOT_DETERMINED, "the strip between the lungs stands in the middle"


def test_the_report_says_so_with_the_reason(model: ReadyModel, tmp_path: Path) -> None:
    from dicomnode.encode import encode_results
    from dicomnode.identity import result_identity
    from tests.encode.encode_case import STATION
    from tests.encode.source_case import save

    sources = save([numbered(to_dataset(picture(turned=15.0)), 1)], tmp_path)
    analysis = model.analyse(sources)
    identity = result_identity(
        inputs="i", model_digest="d", parameters="", revision=1, segment_numbers=[1, 2],
        content_datetime="2026-05-06T07:08:09+02:00",
    )  # fmt: skip
    objects = encode_results(analysis, identity, model.identity, sources, station=STATION)
    (report,) = [read(o.part10) for o in objects if o.kind == "SR"]
    texts = [str(element.value) for element in report.iterall() if element.keyword in ("TextValue", "CodeMeaning")]
    assert {"Patient turned, left side to the front", "Patient turned, right side to the front", "Present"} <= set(
        texts
    )
    assert any(text.startswith("Rotation: left side to the front; the strip between the lungs lies") for text in texts)
