"""A structure that is looked for and not there: the report says so, whatever else is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dicomnode.critical import critical_hits
from dicomnode.identity import tracking_uids
from dicomnode.orders import Condition
from tests.encode.encode_case import read
from tests.encode.source_case import ct, save
from tests.proof.proof_case import analyse, marker, results

NOWHERE = 5000.0
"""A threshold that no voxel of the source reaches."""


def texts(item: object) -> list[str]:
    found = [str(item.TextValue)] if item.get("ValueType") == "TEXT" else []
    return found + [text for child in item.get("ContentSequence", []) for text in texts(child)]


def test_nothing_found_at_all_is_a_report_and_no_segmentation(tmp_path: Path) -> None:
    sources = save(ct(), tmp_path)
    parsed = marker()
    analysis = analyse(sources, parsed.model_copy(update={"outputs": no_maps(parsed)}), NOWHERE)
    assert analysis.labels is not None and not analysis.labels.any()
    assert [s.label for s in analysis.segments] == ["never", "bright"]
    (report,) = results(analysis, sources)
    assert report.kind == "SR"
    ds = read(report.part10)
    said = texts(ds)
    assert "No finding: the model marked no voxel in this series." in said
    assert [t for t in said if t.startswith("Not found")] == [
        f"Not found: the model marked no voxel as {label}." for label in ("never", "bright")
    ]
    summary = ds.ContentSequence[-1].ContentSequence[0].ConceptCodeSequence[0]
    assert (summary.CodeValue, summary.CodingSchemeDesignator) == ("111241", "DCM")


def no_maps(parsed: object) -> object:
    return parsed.outputs.model_copy(update={"probability_maps": ()})


def test_one_found_of_two(tmp_path: Path) -> None:
    sources = save(ct(), tmp_path)
    analysis = analyse(sources, marker())
    assert analysis.labels is not None and set(np.unique(analysis.labels)) == {0, 2}
    made = {o.kind: read(o.part10) for o in results(analysis, sources) if o.kind in ("SEG", "SR")}
    assert [(s.SegmentNumber, s.SegmentLabel) for s in made["SEG"].SegmentSequence] == [(1, "bright")]
    assert [t for t in texts(made["SR"]) if t.startswith("Not found")] == [
        "Not found: the model marked no voxel as never."
    ]
    (measurements,) = [
        c for c in made["SR"].ContentSequence if c.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurements"
    ]
    volumes = [
        float(item.MeasuredValueSequence[0].NumericValue)
        for group in measurements.ContentSequence
        for item in group.ContentSequence
        if item.ValueType == "NUM" and item.ConceptNameCodeSequence[0].CodeMeaning == "Volume"
    ]
    assert volumes == [0.0, pytest.approx(np.count_nonzero(analysis.labels) * 1.4 * 0.7 * 2.5 / 1000)]


def test_numbers_and_tracking_do_not_hang_on_what_was_found(tmp_path: Path) -> None:
    """A retry on another engine may find another segment: its identity is fixed before."""
    sources = save(ct(), tmp_path)
    some, none = analyse(sources, marker()), analyse(sources, marker(), NOWHERE)
    assert some.segments == none.segments


def test_identity_stored_by_an_earlier_version_gets_the_missing_uids() -> None:
    stored = {"sr_uid": "2.25.7", "tracking_uids": {"1": "2.25.1"}}
    completed = tracking_uids(stored, [1, 2])
    assert completed[1] == "2.25.1" and completed[2].startswith("2.25.") and len(completed) == 2
    assert tracking_uids(stored, [1, 2]) == completed


def test_least_volume_that_is_critical_is_met_by_a_structure_that_is_not_there(tmp_path: Path) -> None:
    sources = save(ct(), tmp_path)
    analysis = analyse(sources, marker())
    (hit,) = critical_hits(analysis, [Condition("volume_ml", maximum=0.5)])
    assert hit.text == "Volume of never: 0 ml"
    assert not critical_hits(analysis, [Condition("mean", maximum=-4000)])  # what is not there has no mean
