"""Late images, rules and priorities, as they show in rows and at the PACS."""

from __future__ import annotations

import io
import json
import os
import signal

import pydicom
import pytest

from tests.e2e.harness import Node, make_series
from tests.peers import Orthanc, send_items


@pytest.mark.peers
def test_late_images_make_a_revision_that_names_its_predecessor(node: Node, pacs: Orthanc) -> None:
    series = make_series("pacs late")
    assert set(send_items(node.port, series.items[:28])) == {0x0000}
    first = node.wait_job(series.series_uid)
    assert first["reason"].startswith("association-released, contiguous geometry: 28 slices")
    node.wait_delivered(series.series_uid)
    assert set(send_items(node.port, series.items[28:])) == {0x0000}
    second = node.wait_job(series.series_uid, revision=2)
    rows = node.wait_delivered(series.series_uid, count=4)
    assert [(r["revision"], r["kind"]) for r in rows] == [(1, "SEG"), (1, "SR"), (2, "SEG"), (2, "SR")]
    assert [r["finished_at"] for r in rows] == sorted(r["finished_at"] for r in rows)
    assert len({r["SOPInstanceUID"] for r in rows}) == 4
    assert json.loads(first["summary"])["slices"] == 28
    assert json.loads(second["summary"])["slices"] == 32
    found = pacs.instances(series.study_uid)
    assert {m: len(ids) for m, ids in found.items()} == {"SEG": 2, "SR": 2}
    reports = {str(ds.SOPInstanceUID): ds for ds in (pydicom.dcmread(io.BytesIO(pacs.file(i))) for i in found["SR"])}
    earlier, later = reports[rows[1]["SOPInstanceUID"]], reports[rows[3]["SOPInstanceUID"]]
    assert "PredecessorDocumentsSequence" not in earlier
    named = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert named.ReferencedSOPInstanceUID == earlier.SOPInstanceUID


def test_an_association_that_was_cut_does_not_count_as_released(node: Node) -> None:
    """Its slices have no gap, and still the quiet period decides; the rest then joins the same job."""
    from tests.peers import Association, contexts_for

    series = make_series("local aborted")
    for half, end in ((series.items[:16], "abort"), (series.items[16:24], "drop")):
        assoc = Association(node.port, contexts=contexts_for(half))
        assert {assoc.store(item) for item in half} == {0x0000}
        getattr(assoc, end)()
    assert set(send_items(node.port, series.items[24:])) == {0x0000}
    job = node.wait_job(series.series_uid)
    assert job["reason"].startswith("quiet-period")
    assert "2 association(s) ended without release" in job["reason"]
    assert json.loads(job["summary"])["slices"] == 32
    assert len(node.jobs(series.series_uid)) == 1


@pytest.mark.peers
def test_two_rules_on_one_series_share_an_analysis(node: Node, pacs: Orthanc) -> None:
    """The most urgent priority and all destinations; a pinned version of the same model adds no second object."""
    series = make_series("double")
    assert set(send_items(node.port, series.items)) == {0x0000}

    def settled() -> bool:
        jobs = node.jobs(series.series_uid)
        return bool(jobs) and all(j["state"] in ("done", "failed", "refused") for j in jobs)

    node.wait(settled, 60, "all jobs of the series are settled")
    jobs = node.jobs(series.series_uid)
    shared = next(j for j in jobs if j["model"] == "ct-lung")
    assert json.loads(shared["rules"])[:2] == ["double-a", "double-b"]
    assert json.loads(shared["destinations"])[:2] == ["pacs", "second"]
    assert shared["priority"] == 0
    assert {j["state"] for j in jobs} == {"done"}
    node.wait(
        lambda: {d["state"] for d in node.deliveries(series.series_uid)} == {"stored"}, 30, "everything is delivered"
    )
    sent = {(d["destination"], d["kind"]) for d in node.deliveries(series.series_uid)}
    assert sent == {(to, kind) for to in ("pacs", "second") for kind in ("SEG", "SR")}
    assert {m: len(ids) for m, ids in pacs.instances(series.study_uid).items()} == {"SEG": 1, "SR": 1}


def test_stat_goes_before_batch(node: Node) -> None:
    """The worker is held while three batch series and then an urgent one arrive."""
    patient = [make_series("patient") for _ in range(3)]
    urgent = make_series("urgent")
    worker = node.pids()["worker"]
    os.kill(worker, signal.SIGSTOP)
    try:
        for series in (*patient, urgent):
            assert set(send_items(node.port, series.items)) == {0x0000}
    finally:
        os.kill(worker, signal.SIGCONT)
    first = node.wait_job(urgent.series_uid)
    others = [node.wait_job(series.series_uid) for series in patient]
    assert first["priority"] == 0
    assert {j["priority"] for j in others} == {2}
    assert sorted(j["started_at"] < first["started_at"] for j in others)[:2] == [False, False]


@pytest.mark.parametrize(
    ("description", "tags", "rule"),
    [
        ("rules", {"BodyPartExamined": "CHEST"}, "list"),
        ("rules", {"BodyPartExamined": "ABDOMEN"}, None),
        ("ranges", {"SliceThickness": "5.0"}, "range"),
        ("ranges", {"SliceThickness": "4.9"}, None),
        ("dates", {"StudyDate": "20260112"}, "dates"),
        ("dates", {"StudyDate": "20240112"}, None),
        ("columns", {"RotationDirection": "CW", "KVP": "120"}, "no-column"),
        ("columns", {"RotationDirection": "CC", "KVP": "120"}, None),
        ("nobody", {}, None),
    ],
)
def test_rules_match_lists_ranges_dates_and_any_keyword(
    node: Node, description: str, tags: dict[str, str], rule: str | None
) -> None:
    series = make_series(description, **tags)
    assert set(send_items(node.port, series.items)) == {0x0000}
    node.wait(
        lambda: node.rows(
            "SELECT 1 FROM series WHERE SeriesInstanceUID = ? AND selected_generation = generation",
            (series.series_uid,),
        ),
        20,
        "the series is selected",
    )
    assert [json.loads(j["rules"]) for j in node.jobs(series.series_uid)] == ([[rule]] if rule else [])
