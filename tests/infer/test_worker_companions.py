"""A step whose model takes two series of a study, from their rows to SEG and SR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from dicomnode.chains import Needs
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Request
from dicomnode.index.operation import Models
from dicomnode.infer.comparing import inputs_digest
from tests.e2e.harness import make_series
from tests.infer.life_case import add_series, settings_of, worker_on
from tests.infer.stages.test_inputs import OUTSIDE, bundle, masked

NEEDS = Needs(inputs={"flair": {"SeriesDescription": "second"}}, inputs_seconds=60.0)
WANTS = Request("staged", ("r",), ("pacs",), "routine", names=("r/both",), step="r/both", needs=NEEDS)
TAGS = {"StudyInstanceUID": "2.25.77", "FrameOfReferenceUID": "2.25.78", "PatientID": "TWO"}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    bundle(tmp_path / "models", separate=False)
    made = Database(tmp_path / "data")
    worker_on(settings_of(tmp_path), made)
    Models(made).activate("staged", "1.0.0")
    yield made
    made.close()


def darker(ds: Any, _: int) -> None:
    ds.RescaleIntercept = -3000


def of_work(db: Database, job_id: int) -> str:
    row = db.row("SELECT * FROM jobs WHERE id = ?", (job_id,))
    assert row is not None
    return inputs_digest(db, row)


def test_both_series_are_read_and_named(db: Database, tmp_path: Path) -> None:
    first = make_series("first", slices=20, **TAGS)
    second = make_series("second", slices=20, change=darker, **TAGS)
    job_id = add_series(db, first, requests=[WANTS])
    worker = worker_on(settings_of(tmp_path), db)
    assert not worker.run_once(), "it waits for the second series"
    add_series(db, second, requests=[Request("other", ("r",), (), "batch")])
    assert worker.run_once()
    job = Jobs(db).show(job_id)
    assert job is not None and job["state"] == "done", job and job["last_error"]
    assert job["summary"]["segments"] == ["lesion"], "the first series is brighter everywhere"
    assert any(second.series_uid in note for note in job["notes"])
    assert of_work(db, job_id) != job["inputs_sha256"], "another second series is other work, with other UIDs"
    files = {r["kind"]: pydicom.dcmread(tmp_path / "data" / "objects" / r["file"]) for r in job["results"]}
    listed = {
        series.SeriesInstanceUID: len(series.ReferencedSOPSequence)
        for key in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence")
        for study in files["SR"].get(key, ())
        for series in study.ReferencedSeriesSequence
    }
    assert (listed[first.series_uid], listed[second.series_uid]) == (20, 20)


def test_other_frame_of_reference_is_refused_in_words(db: Database, tmp_path: Path) -> None:
    second = make_series("second", slices=20, **{**TAGS, "FrameOfReferenceUID": "2.25.79"})
    add_series(db, second, requests=[Request("other", ("r",), (), "batch")])
    job_id = add_series(db, make_series("first", slices=20, **TAGS), requests=[WANTS])
    assert worker_on(settings_of(tmp_path), db).run_once()
    job = Jobs(db).show(job_id)
    assert job is not None and job["state"] == "refused"
    assert job["last_error"].startswith("OTHER_FRAME_OF_REFERENCE: the series for input 'flair' lies in another frame")


def test_mask_of_one_step_bounds_the_next(tmp_path: Path) -> None:
    """Both threshold at 0 HU; the second sees -1000 HU outside what the first found in half of the slices."""
    for name, more in (("first", []), ("second", OUTSIDE)):
        masked(tmp_path / "models", name, more)
    db = Database(tmp_path / "data")
    settings = settings_of(tmp_path)
    worker = worker_on(settings, db)
    for name in ("first", "second"):
        Models(db).activate(name, "1.0.0")
    needs = Needs(masks={"lung": "r/a:lesion"})
    chain = [
        Request("first", ("r",), ("pacs",), "routine", names=("r/a",)),
        Request("second", ("r",), ("pacs",), "routine", names=("r/b",), step="r/b", needs=needs),
    ]
    job_id = add_series(db, make_series("x", slices=20, **TAGS), requests=chain)
    while worker.run_once():
        pass
    first, second = Jobs(db).show(job_id), Jobs(db).show(job_id + 1)
    assert first is not None and second is not None
    assert (first["state"], second["state"]) == ("done", "done"), second["last_error"]
    volumes = [
        next(m["value"] for m in job["summary"]["measurements"] if m["key"] == "volume_ml") for job in (first, second)
    ]
    assert 0 < volumes[1] <= volumes[0] and volumes[1] == pytest.approx(volumes[0], rel=0.01)
    assert of_work(db, job_id) == first["inputs_sha256"]
    assert of_work(db, job_id + 1) != second["inputs_sha256"], "another mask is other work"
    empty = Request("second", ("r",), (), "routine", step="r/c", needs=Needs(masks={"lung": "r/a:no such label"}))
    other = add_series(db, make_series("y", slices=20, **TAGS), requests=[chain[0], empty])
    while worker.run_once():
        pass
    last = Jobs(db).show(other + 1)
    assert last is not None and last["state"] == "done" and last["summary"]["segments"] == []
    db.close()
