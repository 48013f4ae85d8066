"""Further series as inputs of one job: waited for until complete, chosen by geometry's frame, given up in time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode.chains import Needs
from dicomnode.errors import NodeError, UnsuitableSeries
from dicomnode.index import chain, companions
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Request
from dicomnode.infer.job_files import JobFiles
from tests.index.rows import FakeClock, instance, select, series_row

T1, FLAIR = "1.2.20", "1.2.21"
NEEDS = Needs(inputs={"flair": {"SeriesDescription": "*flair*"}}, inputs_seconds=60.0)
WANTS = Request("m", ("r",), ("pacs",), "routine", names=("r/s",), step="r/s", needs=NEEDS)


def arrive(db: Database, series: str, description: str, count: int = 2, frame: str = "1.9", **fields: Any) -> None:
    Catalogue(db).commit(
        [instance(series, SeriesDescription=description, FrameOfReferenceUID=frame, **fields) for _ in range(count)]
    )


def close(db: Database, series: str) -> None:
    row = series_row(db, series)
    Jobs(db).select(row["id"], row["generation"], "r", [])


def state(db: Database, job_id: int) -> tuple[str, str | None]:
    job = Jobs(db).show(job_id)
    assert job is not None
    return job["state"], job["last_error"]


def test_waits_until_the_other_series_is_complete(db: Database) -> None:
    arrive(db, T1, "T1")
    (job_id,) = select(db, T1, WANTS)
    assert state(db, job_id) == ("waiting", None)
    arrive(db, FLAIR, "Ax FLAIR")
    assert state(db, job_id) == ("waiting", None)
    close(db, FLAIR)
    assert state(db, job_id) == ("pending", None)
    bound = companions.bound(db, job_id)
    assert [(name, len(rows)) for name, rows in bound.items()] == [("flair", 2)]
    assert len(Jobs(db).inputs(job_id)) == 2 and companions.digest(db, job_id)
    assert Jobs(db).lease("w", 60) is not None, "the time that it might have waited does not hold it up"


def test_is_there_already(db: Database) -> None:
    arrive(db, FLAIR, "Ax FLAIR")
    close(db, FLAIR)
    arrive(db, T1, "T1")
    (job_id,) = select(db, T1, WANTS)
    assert state(db, job_id) == ("pending", None)


def test_does_not_come(db: Database, clock: FakeClock) -> None:
    arrive(db, T1, "T1")
    arrive(db, FLAIR, "FLAIR", study="1.2.99")
    close(db, FLAIR)
    (job_id,) = select(db, T1, WANTS)
    clock.move(59)
    assert not chain.tend(db) and state(db, job_id)[0] == "waiting"
    clock.move(2)
    assert chain.tend(db)
    assert state(db, job_id) == ("not-run", "no complete series for input flair within 60 s")


def test_same_frame_of_reference_then_most_images(db: Database) -> None:
    for series, frame, count in (("1.2.31", "1.8", 9), ("1.2.32", "1.9", 2), ("1.2.33", "1.9", 3)):
        arrive(db, series, "FLAIR", count, frame)
        close(db, series)
    arrive(db, T1, "T1")
    (job_id,) = select(db, T1, WANTS)
    assert {r["SeriesInstanceUID"] for r in companions.bound(db, job_id)["flair"]} == {"1.2.33"}


def test_one_series_is_not_taken_for_two_inputs(db: Database) -> None:
    needs = Needs(inputs={"a": {"Modality": "CT"}, "b": {"Modality": "CT"}}, inputs_seconds=60.0)
    arrive(db, FLAIR, "FLAIR")
    close(db, FLAIR)
    arrive(db, T1, "T1")
    (job_id,) = select(db, T1, Request("m", ("r",), (), "routine", step="r/s", needs=needs))
    assert state(db, job_id)[0] == "waiting"


@pytest.fixture
def files(db: Database, tmp_path: Path) -> Iterator[JobFiles]:
    yield JobFiles(Jobs(db), tmp_path)


@pytest.mark.parametrize("frame", ["1.8", ""])
def test_another_frame_of_reference_is_refused(db: Database, files: JobFiles, frame: str) -> None:
    arrive(db, FLAIR, "FLAIR", frame=frame)
    close(db, FLAIR)
    arrive(db, T1, "T1")
    (job_id,) = select(db, T1, WANTS)
    job = Jobs(db).lease("w", 60)
    assert job is not None and job["id"] == job_id
    with pytest.raises(UnsuitableSeries, match="lies in another frame of reference") as error:
        files.companions(job)
    assert error.value.code == "OTHER_FRAME_OF_REFERENCE"


def test_image_that_was_replaced_is_noticed(db: Database, files: JobFiles) -> None:
    arrive(db, FLAIR, "FLAIR", sop="1.2.21.1", count=1)
    close(db, FLAIR)
    arrive(db, T1, "T1")
    select(db, T1, WANTS)
    job = Jobs(db).lease("w", 60)
    assert job is not None
    Catalogue(db).commit([instance(FLAIR, sop="1.2.21.1", content="b", SeriesDescription="FLAIR")])
    with pytest.raises(NodeError, match="was replaced"):
        files.companions(job)
