"""Several single images in one series, each analysed by itself: sizes differ, every group names its image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicomnode.encode import encode_results
from dicomnode.identity import derived_uid
from dicomnode.orders import KINDS, LABELMAP, LABELMAP_SR, order_for, shares
from dicomnode.records import Analysis, Change, Code, Finding, Measurement, Prior
from tests.encode.encode_case import LUNG, SEGMENTS, Case, identity
from tests.encode.source_case import ABSENT, COLUMNS, PNEUMOTHORAX, PRESENT, ROWS, dx, pixels, save, with_pixels
from tests.encode.test_kinds import by_kind, errors, references

AREA = Code("42798000", "SCT", "Area")
SQUARE = Code("mm2", "UCUM", "square millimeter")
PERCENT = Code("%", "UCUM", "percent")
EVERYTHING = order_for(["pacs"], KINDS, "labelmap")


def two_images(folder: Path) -> Case:
    """A frontal view, and a lateral one that lies across: 64 rows of 48 pixels."""
    (front,), (side,) = dx(), dx()
    side.SOPInstanceUID = side.file_meta.MediaStorageSOPInstanceUID = derived_uid("test", "side")
    side.Rows, side.Columns, side.InstanceNumber, side.ViewPosition = COLUMNS, ROWS, 2, "LL"
    side.PatientOrientation = ["P", "F"]
    with_pixels(side, np.ascontiguousarray(pixels(0).T), signed=False, bits=12)
    side.PhotometricInterpretation = "MONOCHROME1"
    sources = save([front, side], folder)
    labels = np.zeros((2, COLUMNS, COLUMNS), np.uint8)
    labels[0, 5:20, 40:60], labels[0, 5:20, 4:20] = 1, 2
    labels[1, 50:62, 10:30] = 3
    segments = (
        replace(SEGMENTS[0], image=0),
        replace(SEGMENTS[1], image=0),
        replace(SEGMENTS[0], number=3, label="Right lung, image 2", image=1),
    )
    analysis = Analysis(
        labels=labels,
        source_uids=tuple(s.sop_instance_uid for s in sources),
        segments=segments,
        measurements=(
            Measurement("area_mm2", AREA, 12.0, SQUARE, 1),
            Measurement("area_mm2", AREA, 9.6, SQUARE, 3),
            Measurement("share", AREA, 50.0, PERCENT, image=0),
            Measurement("share", AREA, 25.0, PERCENT, image=1),
        ),
        findings=(
            Finding("pneumothorax", PNEUMOTHORAX, ABSENT, 0.1, 0.5, image=0),
            Finding("pneumothorax", PNEUMOTHORAX, PRESENT, 0.9, 0.5, image=1),
        ),
        projection=True,
    )
    tracked = identity()
    tracked = replace(tracked, tracking_uids={s.number: derived_uid("t", str(s.number)) for s in segments})
    return Case(analysis, tracked, sources, datasets=(front, side))


def encode(case: Case, order=EVERYTHING):
    return encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station, order=order)


def groups(sr: Dataset) -> list[Dataset]:
    (container,) = [c for c in sr.ContentSequence if c.ConceptNameCodeSequence[0].CodeValue == "126010"]
    return list(container.ContentSequence)


def test_changes_since_an_earlier_study_stand_with_their_image(tmp_path: Path) -> None:
    case = two_images(tmp_path)
    whole = [m for m in case.analysis.measurements if m.segment is None]
    changes = tuple(Change(m, before) for m, before in zip(whole, (40.0, 40.0), strict=True))
    prior = Prior("1.2.3", "1.2.4", "20200101", "DX", (("1.2.840.10008.5.1.4.1.1.1.1", "1.2.5"),), "1.0.0", changes)
    found = by_kind(encode(case.with_analysis(prior=prior)))
    numbers = [
        [float(c.MeasuredValueSequence[0].NumericValue) for c in group.ContentSequence if c.ValueType == "NUM"]
        for group in groups(found["SR"][0])
    ]
    assert numbers[-2:] == [[50.0, 10.0], [25.0, -15.0]]


@pytest.mark.peers
def test_two_images_of_different_size_give_valid_results(tmp_path: Path) -> None:
    case = two_images(tmp_path)
    objects = encode(case)
    kinds = sorted(o.kind for o in objects)
    assert kinds == sorted(["SEG", "SEG", LABELMAP, LABELMAP, "SR", LABELMAP_SR, "GSPS", "GSPS", "SC", "SC", "KOS"])
    assert len({o.sop_instance_uid for o in objects}) == len(objects)
    known = {s.sop_instance_uid for s in case.sources} | {o.sop_instance_uid for o in objects}
    for number, item in enumerate(objects):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(item.part10)
        if item.kind != LABELMAP:  # Debian's dciodvfy does not know the class
            wrong = errors(path)
            if item.kind == LABELMAP_SR:  # nor that it has segments and frames
                wrong = [e for e in wrong if "ReferencedSegmentNumber" not in e and "not multi-frame" not in e]
            assert wrong == [], item.kind
    for ds in (d for several in by_kind(objects).values() for d in several):
        assert {uid for uid, _ in references(ds)} <= known


def test_each_segmentation_is_on_its_own_image(tmp_path: Path) -> None:
    case = two_images(tmp_path)
    found = by_kind(encode(case))
    for index, (seg, labelmap) in enumerate(zip(found["SEG"], found[LABELMAP], strict=True)):
        source = case.datasets[index]
        cut = case.analysis.labels[index, : source.Rows, : source.Columns]
        assert (seg.Rows, seg.Columns) == (source.Rows, source.Columns)
        assert {uid for uid, _ in references(seg)} == {source.SOPInstanceUID}
        frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
        numbers = [n for n in np.unique(cut) if n]
        assert [np.array_equal(f, cut == n) for f, n in zip(frames, numbers, strict=True)] == [True] * len(numbers)
        assert np.array_equal(labelmap.pixel_array.reshape(cut.shape) > 0, cut > 0)
    sizes = [(d.DisplayedAreaSelectionSequence[0].DisplayedAreaBottomRightHandCorner) for d in found["GSPS"]]
    assert [list(s) for s in sizes] == [[COLUMNS, ROWS], [ROWS, COLUMNS]]


def test_every_group_of_the_report_names_its_image_and_segment(tmp_path: Path) -> None:
    case = two_images(tmp_path)
    found = by_kind(encode(case))
    uids = [str(d.SOPInstanceUID) for d in case.datasets]
    segs = [str(d.SOPInstanceUID) for d in found["SEG"]]
    named = [{uid for uid, _ in references(group)} for group in groups(found["SR"][0])]
    assert named == [
        {segs[0], uids[0]}, {segs[0], uids[0]}, {segs[1], uids[1]},
        {uids[0]}, {uids[1]}, {uids[0]}, {uids[1]},
    ]  # fmt: skip
    for report, keyword in (("SR", "ReferencedFrameNumber"), (LABELMAP_SR, "ReferencedSegmentNumber")):
        numbers = [
            int(c.ReferencedSOPSequence[0][keyword].value)
            for group in groups(found[report][0])[:3]
            for c in group.ContentSequence
            if c.ValueType == "IMAGE" and keyword in c.ReferencedSOPSequence[0]
        ]
        assert numbers == [1, 2, 1], "a binary SEG has a frame for each segment, a label map one for all"
    trackers = [str(c.UID) for g in groups(found["SR"][0]) for c in g.ContentSequence if c.ValueType == "UIDREF"]
    assert len(set(trackers)) == 7, "what is said of two images is tracked apart"


def test_the_image_with_the_positive_answer_comes_first_among_the_pictures(tmp_path: Path) -> None:
    case = two_images(tmp_path).with_analysis(labels=None, segments=(), measurements=())
    found = by_kind(encode(case))
    assert len(found["SC"]) == 1
    assert found["SC"][0].SourceImageSequence[0].ReferencedSOPInstanceUID == case.datasets[1].SOPInstanceUID
    assert LUNG not in [s.type for s in case.analysis.segments]


def test_each_label_map_has_its_own_binary_stand_in() -> None:
    made = [(1, LABELMAP), (2, LABELMAP), (3, LABELMAP_SR), (4, "SEG"), (5, "SEG"), (6, "SR")]
    assert shares(made, order_for(["a"], ["SEG", "SR"], "labelmap"), "a") == [(1, 4), (2, 5), (3, 6)]
    assert shares(made, order_for(["a"], ["SEG", "SR"]), "a") == [(4, None), (5, None), (6, None)]
