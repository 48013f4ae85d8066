"""Corrected demographics in new results: what serves in the header, what the images say beside it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dicomnode.encode import Correction, Failure, encode_failure, encode_results
from dicomnode.orders import Order
from dicomnode.record_shapes import MAY_BE_EMPTY
from tests.encode.encode_case import Case, program, read

CORRECTION = Correction(
    {"PatientName": "Ünder^Correction", "PatientID": "ID-2", "PatientBirthDate": "19710203", "PatientSex": "F"},
    "2026-11-29T10:00:00.5+01:00",
    "DICOMNODE",
)
KINDS = ("SEG", "SR", "GSPS", "SC", "KOS")


def made(case: Case, correction: Correction | None) -> dict[str, bytes]:
    results = encode_results(
        case.analysis, case.identity, case.model, case.sources,
        station=case.station, order=Order(kinds={"pacs": KINDS}), correction=correction,
    )  # fmt: skip
    return {r.kind: r.part10 for r in results}


def with_pixels(ds: Dataset, _: int) -> None:
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 15, 1, 1, "MONOCHROME2"
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.PixelData = bytes(2 * ds.Rows * ds.Columns)
    ds["PixelData"].VR = "OW"


def test_every_result_has_the_corrected_patient_and_the_former_values(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case = make_case(change=with_pixels)
    results = made(case, CORRECTION)
    assert results.keys() >= {"SEG", "SR", "SC"}
    plain = made(case, None)
    assert made(case, CORRECTION) == results, "the same bytes again"
    for kind, part10 in results.items():
        ds, before = read(part10), read(plain[kind])
        assert (str(ds.PatientName), ds.PatientID, ds.PatientBirthDate) == ("Ünder^Correction", "ID-2", "19710203")
        assert (ds.SOPInstanceUID, ds.StudyInstanceUID) == (before.SOPInstanceUID, before.StudyInstanceUID)
        assert ds.AccessionNumber == "A1" and "OriginalAttributesSequence" not in before
        [item] = ds.OriginalAttributesSequence
        assert (item.ReasonForTheAttributeModification, item.ModifyingSystem) == ("CORRECT", "DICOMNODE")
        assert item.AttributeModificationDateTime == "20261129100000.500000+0100"
        assert item["SourceOfPreviousValues"].value in ("", None)
        [former] = item.ModifiedAttributesSequence
        assert (str(former.PatientName), former.PatientID) == ("Example^Test", "ID-1")
        assert former.PatientBirthDate == "19700101" and "PatientSex" not in former, "what is the same is no correction"
        path = tmp_path / f"{kind}.dcm"
        path.write_bytes(part10)
        done = subprocess.run([program("dciodvfy"), "-new", path], capture_output=True, text=True, check=False)
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == [], kind


EMPTY = (
    "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName", "StudyDescription",
    "PatientBirthDate", "PatientSex",
)  # fmt: skip


def test_what_is_decided_to_be_empty_is_empty_in_valid_results(make_case: Callable[..., Case], tmp_path: Path) -> None:
    assert set(EMPTY) == {k for fields in MAY_BE_EMPTY.values() for k in fields}
    for kind, part10 in made(
        make_case(change=with_pixels), replace(CORRECTION, values=dict.fromkeys(EMPTY, ""))
    ).items():
        ds = read(part10)
        [former] = ds.OriginalAttributesSequence[0].ModifiedAttributesSequence
        assert {k: str(ds.get(k) or "") for k in EMPTY} == dict.fromkeys(EMPTY, "")
        assert former.AccessionNumber == "A1" and former.PatientBirthDate == "19700101"
        assert (str(ds.PatientName), ds.PatientID) == ("Example^Test", "ID-1")
        path = tmp_path / f"{kind}.dcm"
        path.write_bytes(part10)
        done = subprocess.run([program("dciodvfy"), "-new", path], capture_output=True, text=True, check=False)
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == [], kind


def test_the_report_says_that_it_differs_from_the_images(
    make_case: Callable[..., Case], dump_report: Callable[[bytes], str]
) -> None:
    case = make_case(change=with_pixels)
    assert "attributes differ from the images" in dump_report(made(case, CORRECTION)["SR"])
    assert "attributes differ from the images" not in dump_report(made(case, None)["SR"])


def test_a_report_of_a_failure_has_it_too(make_case: Callable[..., Case], assert_valid: Callable[..., None]) -> None:
    case = make_case()
    failure = Failure(refused=True, reason="GAP: a slice is missing")
    result = encode_failure(
        failure, case.identity, case.model, case.sources, station=case.station, correction=CORRECTION
    )
    assert_valid(result.part10)
    assert read(result.part10).PatientID == "ID-2"


@pytest.mark.parametrize("values", [{}, {"PatientID": "ID-1", "PatientName": "Example^Test"}])
def test_what_says_the_same_changes_nothing(make_case: Callable[..., Case], values: dict[str, str]) -> None:
    case = make_case(change=with_pixels)
    assert made(case, replace(CORRECTION, values=values)) == made(case, None)
