"""The fetcher of earlier studies against a PACS that refuses, lies, breaks off or has nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from dicomnode.deliver.prior_scu import MOST_ANSWERS, series_query, study_query, texts
from dicomnode.deliver.priors import PriorFetcher
from dicomnode.index import prior
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.priors import Wish
from dicomnode.settings import Settings
from tests.index.rows import FakeClock, instance, select
from tests.index.test_prior import NEW, OLD, asks, close, shown


def ds(**attributes: Any) -> Dataset:
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


STUDY = {
    "QueryRetrieveLevel": "STUDY",
    "PatientID": "P1",
    "PatientBirthDate": "19600101",
    "StudyInstanceUID": "1.2.1",
    "StudyDate": "20250101",
}
SERIES = {
    "QueryRetrieveLevel": "SERIES",
    "StudyInstanceUID": "1.2.1",
    "SeriesInstanceUID": "1.2.2",
    "Modality": "CT",
    "NumberOfSeriesRelatedInstances": 2,
}


@dataclass
class Pacs:
    """What it answers by level, and the status of a C-MOVE; ``moved`` are the series that it was asked for."""

    find: dict[str, list[Dataset]] = field(default_factory=dict)
    find_status: int = 0x0000
    move_status: int = 0x0000
    abort: bool = False
    arrives: Callable[[], None] = lambda: None
    moved: list[tuple[str, str, str]] = field(default_factory=list)
    asked: list[Dataset] = field(default_factory=list)
    port: int = 0

    def on_find(self, event: Any) -> Iterator[Any]:
        self.asked.append(event.identifier)
        if self.abort:
            event.assoc.abort(block=False)
            return
        for answer in self.find.get(event.identifier.QueryRetrieveLevel, ()):
            yield 0xFF00, answer
        yield self.find_status, None

    def on_move(self, event: Any) -> Iterator[Any]:
        i = event.identifier
        self.moved.append((event.move_destination, i.StudyInstanceUID, i.SeriesInstanceUID))
        self.arrives()
        if self.move_status == 0xA801:
            yield None, None
            return
        yield "127.0.0.1", 1
        yield 0


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    made = Pacs()
    ae = AE(ae_title="PACS")
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelMove)
    server = ae.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_C_FIND, made.on_find), (evt.EVT_C_MOVE, made.on_move)],
    )
    made.port = server.socket.getsockname()[1]
    made.server = server  # type: ignore[attr-defined]
    yield made
    with contextlib.suppress(ValueError):  # a test has shut it down
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetcher(db: Database, pacs: Pacs, tmp_path: Path) -> PriorFetcher:
    settings = Settings(
        node={"data_dir": tmp_path},
        peers=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port, "allow": ["store"]}],
        delivery={"connect_seconds": 5, "backoff_seconds": 1},
    )
    return PriorFetcher(settings, db, "courier")


def wish(db: Database) -> int:
    Catalogue(db).commit([instance("1.2.20", **NEW)])
    return select(db, "1.2.20", asks("index", "pacs", compare=False))[0]


def test_only_the_patient_is_asked_for_and_the_series_is_marked_before_it_comes(
    db: Database, pacs: Pacs, fetcher: PriorFetcher
) -> None:
    wish(db)
    other = {**STUDY, "StudyInstanceUID": "1.2.9", "PatientBirthDate": "19610101"}
    later = {**STUDY, "StudyInstanceUID": "1.2.8", "StudyDate": "20270101"}
    pacs.find = {"STUDY": [ds(**other), ds(**later), ds(**STUDY)], "SERIES": [ds(**SERIES)]}
    marked: list[bool] = []
    pacs.arrives = lambda: marked.append(prior.fetched(db, "1.2.2"))
    fetcher.run_once()
    assert marked == [True] and pacs.moved == [("DICOMNODE", "1.2.1", "1.2.2")]
    assert [q.QueryRetrieveLevel for q in pacs.asked] == ["STUDY", "SERIES"], "no series of other people"
    assert pacs.asked[1].StudyInstanceUID == "1.2.1"
    assert (pacs.asked[0].PatientID, pacs.asked[0].StudyDate) == ("P1", "-20260101")


def test_what_is_here_already_is_not_moved_again(db: Database, pacs: Pacs, fetcher: PriorFetcher) -> None:
    """A courier that died behind the C-MOVE asks again."""
    job_id = wish(db)
    Catalogue(db).commit([instance("1.2.2", **{**OLD, "PatientID": "P1"}) for _ in range(2)])
    pacs.find = {"STUDY": [ds(**STUDY)], "SERIES": [ds(**SERIES)]}
    with db.transaction():
        db.execute("UPDATE priors SET place = 1, next_at = 0")
    fetcher.run_once()
    assert pacs.moved == [] and shown(db, job_id)["prior"]["state"] == "arriving"
    close(db, "1.2.2")
    fetcher.run_once()
    assert shown(db, job_id)["state"] == "pending"


@pytest.mark.parametrize("level", ["STUDY", "SERIES"])
def test_has_none(db: Database, pacs: Pacs, fetcher: PriorFetcher, level: str) -> None:
    job_id = wish(db)
    pacs.find = {"STUDY": [ds(**STUDY)]} if level == "SERIES" else {}
    fetcher.run_once()
    job = shown(db, job_id)
    assert (job["state"], job["prior"]["last_error"]) == ("pending", "peer 'pacs' has none that fits")


def test_does_not_know_this_node(db: Database, pacs: Pacs, fetcher: PriorFetcher) -> None:
    job_id = wish(db)
    pacs.find = {"STUDY": [ds(**STUDY)], "SERIES": [ds(**SERIES)]}
    pacs.move_status = 0xA801
    fetcher.run_once()
    found = shown(db, job_id)["prior"]
    assert (found["state"], found["last_error"]) == (
        "pending",
        "peer 'pacs' does not know the move destination 'DICOMNODE'",
    )
    (event,) = [e for e in Events(db).listing(10) if e["kind"] == "prior-refused"]
    assert "List this node's AE title" in event["text"]


@pytest.mark.parametrize("how", ["abort", "status", "away"])
def test_broken_off(db: Database, clock: FakeClock, pacs: Pacs, fetcher: PriorFetcher, how: str) -> None:
    """Asked again later, longer each time, until the time of the rule is over."""
    job_id = wish(db)
    pacs.abort, pacs.find_status = how == "abort", 0xA700 if how == "status" else 0x0000
    if how == "away":
        pacs.server.shutdown()  # type: ignore[attr-defined]
        pacs.server.server_close()  # type: ignore[attr-defined]
    fetcher.run_once()
    found = shown(db, job_id)["prior"]
    assert found["state"] == "pending" and found["attempts"] == 1 and "peer 'pacs'" in found["last_error"]
    clock.move(61)
    fetcher.run_once()
    job = shown(db, job_id)
    assert (job["state"], job["prior"]["state"]) == ("pending", "none")


def test_answers_without_end_are_cut(db: Database, pacs: Pacs, fetcher: PriorFetcher) -> None:
    job_id = wish(db)
    odd = ds(PatientID="P1", StudyDate="20250101", StudyInstanceUID="1.2.1")
    pacs.find = {"STUDY": [odd] * (MOST_ANSWERS + 50)}
    fetcher.run_once()
    assert shown(db, job_id)["prior"]["state"] == "none"


def test_values_that_cannot_be_read_say_nothing() -> None:
    answer = ds(ModalitiesInStudy=["CT", "SR"], StudyDescription=None)
    broken = RawDataElement(Tag("NumberOfSeriesRelatedInstances"), "IS", 2, b"x!", 0, False, True)
    answer._dict[broken.tag] = broken
    assert texts(answer) == {"ModalitiesInStudy": "CT\\SR"}


def test_keys_of_the_queries() -> None:
    query = study_query({"PatientID": "Jürgen", "StudyDate": "20260101"}, Wish(max_age_days=1))
    assert (query.SpecificCharacterSet, query.StudyDate) == ("ISO_IR 192", "20251231-20260101")
    series = series_query("1.2.3", Wish({"SliceThickness": {"max": 2, "min": None}, "StudyDescription": "x"}))
    assert "SliceThickness" in series and "StudyDescription" not in series and series.StudyInstanceUID == "1.2.3"
