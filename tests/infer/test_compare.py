"""Two versions side by side: masks of every kind of source, classifications, and what is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dicomnode.encode import encode_results
from dicomnode.infer.compare import (
    Finding,
    Masks,
    compare,
    masks_of_labels,
    masks_of_seg,
    masks_of_segs,
    planes_of,
)
from dicomnode.infer.stages.inputs import SegMask, mask_volume
from dicomnode.infer.summary import summary_of
from dicomnode.infer.volume import Volume
from dicomnode.records import Analysis
from tests.encode.encode_case import MODEL, STATION, Case
from tests.encode.source_case import case_of, ct, enhanced
from tests.encode.test_projection import EVERYTHING, two_images


def finding(**masks: list[int]) -> Finding:
    """One image of one row."""
    planes = {k: {("1.2", 1): np.array([v], bool)} if any(v) else {} for k, v in masks.items()}
    return Finding(planes, frozenset(k for k, v in masks.items() if any(v)))


def test_compare_by_label_and_key() -> None:
    found = compare(finding(a=[1, 1, 0], b=[0, 0, 0], c=[0, 0, 1]), finding(a=[1, 0, 0], b=[0, 0, 0]))
    assert found.dice == {"a": pytest.approx(2 / 3), "c": 0.0}
    assert not found.same_findings
    assert found.fields()["least_dice"] == 0.0
    one = Finding({}, measurements={"v": 10.0, "only": 1.0, "n": np.nan})
    other = Finding({}, measurements={"v": 8.0, "n": np.nan})
    assert compare(one, other).differences == {"v": pytest.approx(0.2), "only": 1.0, "n": 0.0}


def test_nothing_in_both_agrees_and_in_one_of_them_does_not() -> None:
    nothing = compare(finding(a=[0]), finding())
    assert nothing.same_findings and nothing.fields()["least_dice"] is None
    half = compare(finding(a=[0, 1]), finding(a=[0, 0]))
    assert (half.same_findings, half.dice) == (False, {"a": 0.0})


def test_a_job_that_kept_no_segmentation_is_compared_by_what_its_summary_says() -> None:
    """Its rule asked for a report alone: there is no mask to compare with, and that is no disagreement."""
    made = Finding.of({"segments": ["a"], "measurements": [], "findings": []}, None)
    found = compare(finding(a=[0, 1]), made)
    assert (found.dice, found.fields()["least_dice"], found.same_findings) == ({}, None, True)
    assert not compare(finding(a=[0, 0]), made).same_findings


def test_answers_and_probabilities_of_classifications_are_compared() -> None:
    def classified(code: str | None, probability: float, positive: bool = True, key: str = "effusion") -> Finding:
        entry = {"key": key, "code": code, "positive": positive, "probability": probability}
        return Finding.of({"segments": [], "measurements": [], "findings": [entry]}, {})

    same = compare(classified("52101004", 0.9), classified("52101004", 0.7))
    assert same.same_findings and same.differences == {"effusion": pytest.approx(0.2)}
    assert not compare(classified("52101004", 0.51), classified("272519000", 0.49, False)).same_findings
    assert compare(classified(None, 0.2, False), classified(None, 0.2, False)).same_findings
    assert not compare(classified("52101004", 0.9), classified("52101004", 0.9, key="nodule")).same_findings
    small = compare(classified(None, 0.001, False), classified(None, 0.004, False))
    assert small.differences["effusion"] == pytest.approx(0.003), "no share: both say that there is nothing"


MASKS = hnp.arrays(bool, (2, 3, 4))


def as_masks(values: Any) -> Masks:
    return {"s": {("1.2", n): plane for n, plane in enumerate(values, start=1) if plane.any()}}


@given(MASKS, MASKS)
def test_dice_is_symmetric_and_one_for_itself(a: Any, b: Any) -> None:
    def of(mask: Any, value: float) -> Finding:
        return Finding(as_masks(mask), frozenset({"s"} if mask.any() else ()), {"v": value})

    there, back = compare(of(a, 1.0), of(b, 2.0)), compare(of(b, 2.0), of(a, 1.0))
    assert (there.dice, there.differences) == (back.dice, back.differences)
    if a.any() or b.any():
        assert there.dice["s"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert all(d == 1 for d in compare(of(a, 1.0), of(a, 1.0)).dice.values())


def test_masks_of_other_size_fit_where_nothing_lies_outside() -> None:
    small = Finding({"a": {("1", 1): np.ones((2, 3), bool)}}, frozenset("a"))
    wide = np.zeros((4, 4), bool)
    wide[:2, :3] = True
    assert compare(small, Finding({"a": {("1", 1): wide}}, frozenset("a"))).dice == {"a": 1.0}
    wide[3, 3] = True
    with pytest.raises(ValueError, match="masks of"):
        compare(small, Finding({"a": {("1", 1): wide}}, frozenset("a")))


def volume(folder: Path) -> Case:
    return case_of(ct(), folder)


def multi_frame(folder: Path) -> Case:
    return case_of(enhanced("CT"), folder)


def own_masks(analysis: Analysis) -> dict[str, Any]:
    names = {s.number: s.label for s in analysis.segments}
    return masks_of_labels(analysis.labels, names, planes_of(analysis.source_uids, analysis.source_frames))


@pytest.mark.parametrize("kind", ["SEG", "LABELMAP"])
@pytest.mark.parametrize("source", [volume, multi_frame, two_images])
def test_a_stored_result_agrees_with_the_analysis_that_it_was_made_of(
    tmp_path: Path, source: Callable[[Path], Case], kind: str
) -> None:
    """Single images, frames of one object, and images of different size with a segmentation each."""
    case = source(tmp_path)
    made = encode_results(case.analysis, case.identity, MODEL, case.sources, station=STATION, order=EVERYTHING)
    paths = []
    for number, encoded in enumerate(m for m in made if m.kind == kind):
        paths.append(tmp_path / f"made-{number}.dcm")
        paths[-1].write_bytes(encoded.part10)
    masks = own_masks(case.analysis)
    summary = json.loads(json.dumps(summary_of(case.analysis)))
    found = compare(Finding.of(summary_of(case.analysis), masks), Finding.of(summary, masks_of_segs(paths)))
    assert len(found.dice) > 1 and set(found.dice.values()) == {1.0}
    assert found.same_findings and set(found.differences.values()) == {0.0}
    assert case.analysis.labels is not None
    labels = case.analysis.labels.copy()
    filled = [index for index, plane in enumerate(labels) if plane.any()]
    assert len({plane for planes in masks.values() for plane in planes}) == len(filled) > 1
    labels[filled[0]] = 0  # one plane less is seen, whichever it is
    less = compare(Finding.of(summary, own_masks(replace(case.analysis, labels=labels))), Finding.of(summary, masks))
    assert less.fields()["least_dice"] < 1.0


def test_measurements_of_each_image_are_compared(tmp_path: Path) -> None:
    summary = summary_of(two_images(tmp_path).analysis)
    other = json.loads(json.dumps(summary))
    [first, _] = [m for m in other["measurements"] if m["key"] == "share"]
    first["value"] *= 2
    found = compare(Finding.of(summary, {}), Finding.of(other, {}))
    assert (found.differences["image 1.share"], found.differences["image 2.share"]) == (0.5, 0.0)


@given(st.permutations(range(5)))
def test_masks_follow_their_images(order: list[int]) -> None:
    labels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1)[order]
    masks = masks_of_labels(labels, {3: "three", 4: "three", 9: "none"}, planes_of([f"u{n}" for n in order]))
    assert {uid for uid, _ in masks["three"]} == {"u3", "u4"} and masks["none"] == {}


def test_the_mask_of_a_multi_frame_series_is_an_input(tmp_path: Path) -> None:
    case = multi_frame(tmp_path)
    assert case.analysis.labels is not None
    made = encode_results(case.analysis, case.identity, MODEL, case.sources, station=STATION)
    path = tmp_path / "made.dcm"
    path.write_bytes(next(m.part10 for m in made if m.kind == "SEG"))
    label = case.analysis.segments[0].label
    source = Volume(
        np.zeros(case.analysis.labels.shape, np.int16),
        np.eye(4),
        (1.0, 1.0, 1.0),
        case.analysis.source_uids,
        source_frames=case.analysis.source_frames,
    )
    values = mask_volume(SegMask(path, label), source).values
    assert np.array_equal(values == 1, case.analysis.labels == case.analysis.segments[0].number) and values.any()
    assert label in masks_of_seg(path)
