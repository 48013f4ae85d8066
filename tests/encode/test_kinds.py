"""Every kind of result of every kind of source: valid, readable by others, and in the right place."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from dicomnode.encode import encode_results
from dicomnode.encode.picture import MARK
from dicomnode.orders import KINDS, LABELMAP, LABELMAP_SR, Condition, order_for
from tests.encode.encode_case import Case, program, read
from tests.encode.source_case import SOURCES, case_of, ct

EVERYTHING = order_for(["pacs"], KINDS, "labelmap")


def encode(case: Case, order=EVERYTHING):
    return encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station, order=order)


def by_kind(objects) -> dict[str, list[Dataset]]:
    found: dict[str, list[Dataset]] = {}
    for item in objects:
        found.setdefault(item.kind, []).append(read(item.part10))
    return found


def comments(sr: Dataset) -> list[str]:
    return [str(c.TextValue) for c in sr.ContentSequence[-1].ContentSequence if c.ValueType == "TEXT"]


def errors(path: Path) -> list[str]:
    done = subprocess.run([program("dciodvfy"), "-new", path], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line and not line.startswith(("Error", "Warning")) for line in lines), lines  # it knew the kind
    return [line for line in lines if line.startswith("Error")]


def references(ds: Dataset) -> list[tuple[str, list[int]]]:
    """Every reference to an image below ``ds``: UID and frame numbers."""
    out = []
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                if "ReferencedSOPInstanceUID" in item:
                    numbers = item.get("ReferencedFrameNumber")
                    several = [] if numbers is None else [numbers] if isinstance(numbers, int) else list(numbers)
                    out.append((str(item.ReferencedSOPInstanceUID), several))
                out += references(item)
    return out


@pytest.mark.peers
@pytest.mark.parametrize("name", list(SOURCES))
def test_every_kind_of_every_source_is_valid(name: str, tmp_path: Path) -> None:
    case = case_of(SOURCES[name](), tmp_path)
    objects = encode(case)
    kinds = {item.kind for item in objects}
    missing = {"PM"} if name in ("cr", "dx") else set()  # projections have no geometry to put it in
    assert kinds == {*KINDS, LABELMAP, LABELMAP_SR} - missing
    sources = {s.sop_instance_uid for s in case.sources} | {item.sop_instance_uid for item in objects}
    for number, item in enumerate(objects):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(item.part10)
        ds = pydicom.dcmread(path)
        named = references(ds)
        assert {uid for uid, _ in named} <= sources, "a reference to nothing that exists"
        if len(case.sources) == 1 and case.analysis.source_frames and item.kind not in ("SR", LABELMAP_SR):
            numbers = [n for uid, several in named if uid == case.sources[0].sop_instance_uid for n in several]
            assert numbers and all(1 <= n <= len(case.analysis.source_frames) for n in numbers)
        if item.kind == LABELMAP:
            continue  # Debian's dciodvfy does not know the class (STANDARDS.md)
        found = errors(path)
        if item.kind == LABELMAP_SR:  # nor that it is one with segments
            found = [e for e in found if "ReferencedSegmentNumber" not in e]
        assert found == [], item.kind


@pytest.mark.parametrize("name", ["ct", "enhanced-ct", "tilted-ct", "cr"])
def test_frames_lie_where_the_source_has_them(name: str, tmp_path: Path) -> None:
    case = case_of(SOURCES[name](), tmp_path)
    found = by_kind(encode(case))
    labels = case.analysis.labels
    if name == "cr":
        label_map = found[LABELMAP][0]
        assert np.array_equal(label_map.pixel_array.reshape(labels.shape[1:]), labels[0])
        return
    positions = {}
    for index in range(len(labels)):
        if case.analysis.source_frames:
            group = case.datasets[0].PerFrameFunctionalGroupsSequence[case.analysis.source_frames[index] - 1]
            position, place = group.PlanePositionSequence[0].ImagePositionPatient, case.analysis.source_frames[index]
        else:
            position, place = case.datasets[index].ImagePositionPatient, 0
        positions[tuple(float(v) for v in position)] = (index, place)
    for kind, number_of in (("SEG", 2), (LABELMAP, 1), ("PM", 1)):
        ds = found[kind][0]
        frames = ds.pixel_array
        assert len(frames) >= number_of
        for frame, group in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
            index, place = positions[tuple(float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient)]
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            assert source.get("ReferencedFrameNumber", 0) == place
            if kind == "SEG":
                assert np.array_equal(
                    frame, labels[index] == group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
                )
            elif kind == LABELMAP:
                assert np.array_equal(frame, labels[index])
            else:
                wanted = case.analysis.probability_maps[0].values[index]
                mapping = group.get("RealWorldValueMappingSequence") or (
                    ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
                )
                got = frame * float(mapping[0].RealWorldValueSlope) + float(mapping[0].RealWorldValueIntercept)
                assert np.abs(got - wanted).max() < 1e-5


def test_highdicom_reads_what_it_did_not_read_before(tmp_path: Path) -> None:
    objects = {item.kind: item.part10 for item in encode(case_of(ct(), tmp_path))}
    assert hd.seg.segread(BytesIO(objects[LABELMAP])).segment_numbers == [1, 2]
    report = hd.sr.srread(BytesIO(objects["SR"]))
    groups = report.content.get_image_measurement_groups()
    assert [g.finding_type.value for g in groups][-2:] == ["36118008", "60046008"]
    (evaluation,) = [e for e in groups[-2].get_qualitative_evaluations() if e.name.value == "121052"]
    assert evaluation.value.meaning == "Present"
    (measurement,) = groups[-2].get_measurements()
    assert (measurement.name.meaning, measurement.value) == ("Probability", pytest.approx(0.87))
    assert hd.ko.KeyObjectSelectionDocument.from_dataset(read(objects["KOS"])).content.get_references()


def test_each_report_names_the_segmentation_beside_it(tmp_path: Path) -> None:
    found = by_kind(encode(case_of(ct(), tmp_path)))
    for seg, sr in (("SEG", "SR"), (LABELMAP, LABELMAP_SR)):
        uid, classes = found[seg][0].SOPInstanceUID, found[seg][0].SOPClassUID
        other = found[LABELMAP if seg == "SEG" else "SEG"][0].SOPInstanceUID
        named = {uid for uid, _ in references(found[sr][0])}
        assert uid in named and other not in named and classes != found[sr][0].SOPClassUID
    uids = [ds.SOPInstanceUID for several in found.values() for ds in several]
    assert len(set(uids)) == len(uids)
    # One series has one modality and one kind of object (PS3.3 C.7.3.1).
    assert len({(ds.SeriesInstanceUID, ds.SOPClassUID) for s in found.values() for ds in s}) == len(
        {ds.SeriesInstanceUID for s in found.values() for ds in s}
    )


def test_the_default_order_makes_what_it_always_made(tmp_path: Path) -> None:
    case = case_of(ct(), tmp_path)
    assert [o.kind for o in encode(case, order_for(["a"]))] == ["SEG", "SR"]
    whole = {o.sop_instance_uid: o.part10 for o in encode(case)}
    for item in encode(case, order_for(["a"])):
        assert whole[item.sop_instance_uid] == item.part10, "what else is made must not change it"


def test_a_report_without_a_segmentation_is_another_object(tmp_path: Path) -> None:
    case = case_of(ct(), tmp_path)
    (plain,) = encode(case, order_for(["a"], ["SR"]))
    beside = encode(case, order_for(["a"], ["SEG", "SR"]))[1]
    assert plain.sop_instance_uid != beside.sop_instance_uid
    assert {uid for uid, _ in references(read(plain.part10))} == {s.sop_instance_uid for s in case.sources}


def test_nothing_found_makes_a_report_and_no_pictures(tmp_path: Path) -> None:
    case = case_of(ct(), tmp_path)
    case = case.with_analysis(
        labels=np.zeros_like(case.analysis.labels), measurements=(), findings=(), probability_maps=()
    )
    (report,) = encode(case)
    assert any(text.startswith("No finding") for text in comments(read(report.part10)))


def test_a_negative_answer_is_no_finding_and_is_shown(tmp_path: Path) -> None:
    case = case_of(SOURCES["cr"](), tmp_path)
    case = case.with_analysis(
        labels=None, segments=(), measurements=(), probability_maps=(), findings=case.analysis.findings[1:]
    )
    found = by_kind(encode(case))
    assert set(found) == {"SR", "SC", "KOS"}
    summary = found["SR"][0].ContentSequence[-1].ContentSequence[0].ConceptCodeSequence[0]
    assert summary.CodeValue == "111241"  # All algorithms succeeded; without findings


def test_an_image_that_does_not_decode_costs_its_picture_only(tmp_path: Path) -> None:
    case = case_of(ct(), tmp_path)
    for source in case.sources:
        ds = pydicom.dcmread(source.path)
        ds.PixelData = ds.PixelData[:10]
        ds.save_as(source.path)
    found = by_kind(encode(case))
    assert "SC" not in found and {"SEG", "SR", "GSPS", "KOS"} <= set(found)
    assert sum("No key image" in text for text in comments(found["SR"][0])) == 1


def test_critical_findings_are_marked(tmp_path: Path, dump_report) -> None:
    case = case_of(ct(), tmp_path)
    order = replace(EVERYTHING, critical=(Condition("volume_ml", maximum=20.0), Condition("effusion", value="*")))
    report = next(o for o in encode(case, order) if o.kind == "SR")
    ds = read(report.part10)
    assert ds.SeriesDescription.startswith("CRITICAL")
    marked = [text for text in comments(ds) if text.startswith("CRITICAL")]
    assert marked == ["CRITICAL by the rules of this site: Volume of Right lung: 12.5 ml."]
    assert "ACR Category 1 Actionable Finding" in dump_report(report.part10)


def test_probabilities_out_of_range_are_refused(tmp_path: Path) -> None:
    case = case_of(ct(), tmp_path)
    for wrong in (np.nan, -0.1, 1.5):
        values = case.analysis.probability_maps[0].values.copy()
        values[0, 0, 0] = wrong
        maps = (replace(case.analysis.probability_maps[0], values=values),)
        with pytest.raises(Exception, match=r"not in 0\.\.1"):
            encode(case.with_analysis(probability_maps=maps))


@pytest.mark.parametrize("name", ["ct", "enhanced-ct"])
@pytest.mark.parametrize("said", ["YES", "NO", "", None])
def test_key_images_say_of_identity_in_pixels_what_their_source_says(
    name: str, said: str | None, tmp_path: Path
) -> None:
    sources = SOURCES[name]()
    for ds in sources:
        if said is not None:
            ds.BurnedInAnnotation = said
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made = encode(case_of(sources, tmp_path), order_for(["pacs"], ["SC"], "labelmap"))
    assert {ds.get("BurnedInAnnotation") for ds in by_kind(made)["SC"]} == {said or None}
    assert {o.shows for o in made} == {said or ("unsaid" if name == "enhanced-ct" else "primary")}


def test_the_mark_is_said_in_words_too(tmp_path: Path) -> None:
    found = by_kind(encode(case_of(ct(), tmp_path)))
    for ds in found["SC"]:
        assert MARK in ds.SeriesDescription and ds.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert all(MARK in layer.GraphicLayerDescription for layer in found["GSPS"][0].GraphicLayerSequence)
