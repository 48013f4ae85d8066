"""An index with rows but without any stage, and a clock that only tests move."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from dicomnode.durable import sha256
from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Request, Result

_numbers = itertools.count(1)
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


@dataclass
class FakeClock:
    now: float = 1_000_000.0
    moment: datetime = field(default=START)

    def ticks(self) -> float:
        return self.now

    def wall(self) -> datetime:
        return self.moment

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.moment += timedelta(seconds=seconds)


def uid() -> str:
    return f"1.2.3.{next(_numbers)}"


def instance(
    series: str = "1.2.20", study: str = "1.2.10", sop: str | None = None, content: str = "a", **fields: Any
) -> NewInstance:
    """A stored object as the index sees it; ``content`` stands for its bytes."""
    sop = sop or uid()
    options = {k: fields.pop(k) for k in ("association_id", "origin", "transfer_syntax_uid") if k in fields}
    file = fields.pop("file", None) or f"ab/{sop}-{sha256(content.encode())[:8]}.dcm"
    return NewInstance(
        attributes={
            "SOPInstanceUID": sop,
            "SOPClassUID": CT_IMAGE,
            "SeriesInstanceUID": series,
            "StudyInstanceUID": study,
            "PatientID": "P1",
            "Modality": "CT",
            **fields,
        },
        file=file,
        size=10,
        sha256=sha256(("file" + content).encode()),
        dataset_sha256=sha256(content.encode()),
        **{"transfer_syntax_uid": EXPLICIT_LITTLE, **options},
    )


def request(model: str = "m", destinations: Sequence[str] = ("pacs",), priority: str = "routine") -> Request:
    return Request(model, ("rule",), tuple(destinations), priority)


def series_row(db: Database, series: str) -> dict[str, Any]:
    row = db.row("SELECT * FROM series WHERE SeriesInstanceUID = ?", (series,))
    assert row is not None
    return row


def select(db: Database, series: str = "1.2.20", *requests: Request) -> list[int]:
    row = series_row(db, series)
    return Jobs(db).select(row["id"], row["generation"], "because", requests or (request(),))


def job(db: Database, series: str | None = None, study: str = "1.2.10", **wanted: Any) -> int:
    """A fresh series with one instance and its job."""
    series = series or uid()
    Catalogue(db).commit([instance(series, study)])
    return select(db, series, request(**wanted))[0]


def outcome(study: str = "1.2.10", kinds: Sequence[str] = ("SEG", "SR")) -> Outcome:
    return Outcome([Result(kind, instance(uid(), study, origin="result")) for kind in kinds])


def finished_job(db: Database, study: str = "1.2.10", **wanted: Any) -> int:
    """A job whose two results wait in the outbox."""
    job_id = job(db, study=study, **wanted)
    leased = Jobs(db).lease("w", 60)
    assert leased is not None and leased["id"] == job_id
    Jobs(db).finish(job_id, "w", outcome(study))
    return job_id
