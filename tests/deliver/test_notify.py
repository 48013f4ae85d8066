"""Instance Availability Notification against a pynetdicom acceptor on loopback, and its outbox."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import InstanceAvailabilityNotification, Verification

from dicomnode.deliver.notify import Notifier, classify_status, notification
from dicomnode.deliver.scu import Sent
from dicomnode.errors import IllegalTransition, OperatorError
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.notices import NoticeEvent, Notices, NoticeState, make_notices, next_notice_state
from dicomnode.index.operation import Figures
from dicomnode.index.outbox import Outbox
from dicomnode.settings import Settings
from tests.index.rows import FakeClock, instance, job, outcome, select
from tests.index.rows import request as wish

RESULT_CLASS = "1.2.840.10008.5.1.4.1.1.2"


class Ris:
    """Takes notifications; ``answer(number)`` is the status, None cuts the association after it was taken."""

    def __init__(self, answer: Callable[[int], int | None] = lambda number: 0x0000, *, takes: bool = True) -> None:
        self.answer = answer
        self.taken: list[tuple[str, Dataset]] = []
        self.associations = 0
        self._lock = threading.Lock()
        ae = AE(ae_title="RIS")
        ae.add_supported_context(Verification)
        if takes:
            ae.add_supported_context(InstanceAvailabilityNotification, ImplicitVRLittleEndian)
        handlers = [(evt.EVT_N_CREATE, self._create), (evt.EVT_ESTABLISHED, self._established)]
        self.server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = self.server.socket.getsockname()[1]

    def _established(self, _: Any) -> None:
        self.associations += 1

    def _create(self, event: Any) -> tuple[int, None]:
        with self._lock:
            number = len(self.taken)
            self.taken.append((str(event.request.AffectedSOPInstanceUID), event.attribute_list))
        status = self.answer(number)
        if status is None:
            event.assoc.abort()
            return 0x0000, None
        return status, None

    def stop(self) -> None:
        self.server.shutdown()
        for assoc in self.server.active_associations:
            assoc.join(5)


@pytest.fixture
def ris() -> Iterator[Callable[..., Ris]]:
    made: list[Ris] = []

    def make(*arguments: Any, **options: Any) -> Ris:
        made.append(Ris(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def settings(port: int) -> Settings:
    here = {"host": "127.0.0.1"}
    return Settings(
        peers=[
            {"name": "ris", "ae_title": "RIS", "port": port, **here},
            {"name": "pacs", "ae_title": "PACS1", "port": 4, **here},
            {"name": "archive", "ae_title": "ARCHIVE", "port": 5, **here},
        ],
        delivery={"connect_seconds": 5, "response_seconds": 5, "backoff_seconds": 2, "backoff_max_seconds": 8},
    )


def finished(db: Database, *destinations: str, notify: tuple[str, ...] = ("ris",), study: str = "1.2.10") -> int:
    """A job whose results are committed."""
    job_id = job(db, study=study, destinations=destinations)
    db.execute("UPDATE jobs SET notify = ? WHERE id = ?", (json.dumps(notify), job_id))
    leased = Jobs(db).lease("w", 60)
    assert leased is not None and leased["id"] == job_id
    Jobs(db).finish(job_id, "w", outcome(study))
    return job_id


def deliver(db: Database, destination: str) -> None:
    box = Outbox(db, "deliveries")
    for item in box.lease(destination, "c", 60, 100):
        box.stored(item["id"], "c")


def said(ds: Dataset) -> set[tuple[str, str, str]]:
    return {
        (str(item.ReferencedSOPInstanceUID), str(item.RetrieveAETitle), str(item.InstanceAvailability))
        for series in ds.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }


def results(db: Database, job_id: int) -> set[str]:
    return {r["SOPInstanceUID"] for r in db.rows("SELECT SOPInstanceUID FROM results WHERE job_id = ?", (job_id,))}


def test_a_peer_is_told_once_the_destination_has_everything(db: Database, ris: Callable[..., Ris]) -> None:
    peer = ris()
    job_id = finished(db, "pacs", "archive")
    notifier = Notifier(settings(peer.port), db, "courier")
    box = Outbox(db, "deliveries")
    first, second = box.lease("pacs", "c", 60, 100)
    box.stored(first["id"], "c")
    notifier.run_once()
    assert peer.taken == []
    box.stored(second["id"], "c")
    notifier.run_once()
    ((uid, ds),) = peer.taken
    assert said(ds) == {(r, "PACS1", "ONLINE") for r in results(db, job_id)}
    assert (ds.StudyInstanceUID, list(ds.ReferencedPerformedProcedureStepSequence)) == ("1.2.10", [])
    assert {e.keyword for e in ds} == {
        "ReferencedPerformedProcedureStepSequence",
        "StudyInstanceUID",
        "ReferencedSeriesSequence",
    }  # PS3.4 R.3.2.1.2: no other attribute is allowed
    assert Notices(db).counts() == {"waiting": 1, "pending": 0, "sending": 0, "stored": 1, "rejected": 0}
    deliver(db, "archive")
    notifier.run_once()
    notifier.run_once()
    assert [said(d) for _, d in peer.taken[1:]] == [{(r, "ARCHIVE", "ONLINE") for r in results(db, job_id)}]
    assert peer.taken[1][0] != uid


def test_results_that_go_nowhere_are_here(db: Database, ris: Callable[..., Ris]) -> None:
    peer = ris()
    job_id = finished(db)
    Notifier(settings(peer.port), db, "courier").run_once()
    assert [said(ds) for _, ds in peer.taken] == [{(r, "DICOMNODE", "ONLINE") for r in results(db, job_id)}]


def test_nobody_is_told_unless_a_rule_asks_for_it(db: Database) -> None:
    finished(db, "pacs", notify=())
    assert Notices(db).listing() == []


def test_one_association_for_all_that_is_due(db: Database, ris: Callable[..., Ris]) -> None:
    peer = ris()
    for number in range(3):
        finished(db, study=f"1.2.{number}")
    Notifier(settings(peer.port), db, "courier").run_once()
    assert (len(peer.taken), peer.associations) == (3, 1)
    assert [str(ds.StudyInstanceUID) for _, ds in peer.taken] == ["1.2.0", "1.2.1", "1.2.2"]


@pytest.mark.parametrize("first", [0x0110, 0x0213, 0x0124, None])
def test_what_can_pass_is_tried_again_with_the_same_uid(
    db: Database, clock: FakeClock, ris: Callable[..., Ris], first: int | None
) -> None:
    peer = ris(lambda number: first if number == 0 else 0x0111)
    finished(db)
    notifier = Notifier(settings(peer.port), db, "courier")
    notifier.run_once()
    (row,) = Notices(db).listing()
    assert row["state"] == "pending" and row["last_error"] and row["next_at"] == clock.now + 2
    notifier.run_once()
    assert len(peer.taken) == 1  # not before its time
    clock.move(2)
    notifier.run_once()
    (row,) = Notices(db).listing()
    assert row["state"] == "stored" and row["attempts"] == 2
    assert [uid for uid, _ in peer.taken] == [row["SOPInstanceUID"]] * 2


def test_peer_away_for_a_week(db: Database, clock: FakeClock, ris: Callable[..., Ris]) -> None:
    peer = ris()
    finished(db)
    away = Notifier(settings(1), db, "courier")  # nothing listens on port 1
    for _ in range(20):
        away.run_once()
        clock.move(8)
    (row,) = Notices(db).listing()
    assert row["state"] == "pending" and row["attempts"] >= 18 and "does not answer" in row["last_error"]
    clock.move(7 * 86400)
    Notifier(settings(peer.port), db, "courier").run_once()
    assert len(peer.taken) == 1


def test_peer_without_the_sop_class(db: Database, ris: Callable[..., Ris]) -> None:
    finished(db)
    Notifier(settings(ris(takes=False).port), db, "courier").run_once()
    (row,) = Notices(db).listing()
    assert row["state"] == "pending" and "accepts none" in row["last_error"]


def test_refused_for_good_is_parked_until_requeued(db: Database, ris: Callable[..., Ris]) -> None:
    peer = ris(lambda number: 0x0106 if number == 0 else 0x0000)
    finished(db)
    notifier = Notifier(settings(peer.port), db, "courier")
    notifier.run_once()
    notifier.run_once()
    (row,) = Notices(db).listing(state="rejected")
    assert "0x0106" in row["last_error"] and len(peer.taken) == 1
    (event,) = db.rows("SELECT * FROM events")
    assert event["kind"] == "notification-rejected" and "1.2." not in event["text"]
    assert Figures(db).waiting("notifications")[0]["state"] == "rejected"
    assert Notices(db).requeue(row["id"]) == "waiting"
    notifier.run_once()
    assert Notices(db).counts()["stored"] == 1
    with pytest.raises(IllegalTransition):
        Notices(db).requeue(row["id"])
    with pytest.raises(OperatorError, match="there is no notification 99"):
        Notices(db).requeue(99)


def test_rejected_delivery_keeps_its_notice_waiting(db: Database, ris: Callable[..., Ris]) -> None:
    peer = ris()
    finished(db, "pacs")
    box = Outbox(db, "deliveries")
    one, other = box.lease("pacs", "c", 60, 100)
    box.stored(one["id"], "c")
    box.reject(other["id"], "c", "no")
    notifier = Notifier(settings(peer.port), db, "courier")
    notifier.run_once()
    assert peer.taken == [] and Notices(db).counts()["waiting"] == 1
    box.requeue(other["id"])
    deliver(db, "pacs")
    notifier.run_once()
    assert len(peer.taken) == 1


def test_what_a_former_life_held_is_sent(db: Database, clock: FakeClock, ris: Callable[..., Ris]) -> None:
    peer = ris()
    finished(db)
    notices = Notices(db)
    notices.release()
    assert len(notices.lease("ris", "courier", 60, 10)) == 1
    notifier = Notifier(settings(peer.port), db, "courier")
    notifier.run_once()
    assert peer.taken == []
    notifier.start()
    notifier.run_once()
    assert len(peer.taken) == 1
    finished(db, study="1.2.11")
    notices.release()
    (held,) = notices.lease("ris", "another", 60, 10)
    clock.move(61)
    notifier.run_once()
    notices.reject(held["id"], "another", "too late")  # its lease is over
    assert len(peer.taken) == 2 and notices.counts()["rejected"] == 0


def test_same_work_again_makes_no_second_notice(db: Database) -> None:
    job_id = finished(db)
    (uid,) = [n["SOPInstanceUID"] for n in Notices(db).listing()]
    row = db.row("SELECT series_id FROM jobs WHERE id = ?", (job_id,))
    assert row is not None and uid.startswith("2.25.")
    with db.transaction():
        made = {r["id"]: r["SOPInstanceUID"] for r in db.rows("SELECT id, SOPInstanceUID FROM results")}
        make_notices(db, job_id=job_id, study_id=1, results=made, notify=("ris",), destinations=())
    assert [n["SOPInstanceUID"] for n in Notices(db).listing()] == [uid]


def test_no_notice_without_committed_results(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = job(db, destinations=())
    db.execute("UPDATE jobs SET notify = '[\"ris\"]' WHERE id = ?", (job_id,))
    jobs = Jobs(db)
    assert jobs.lease("w", 60) is not None
    monkeypatch.setattr(jobs, "_leave", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jobs.finish(job_id, "w", outcome())
    assert Notices(db).listing() == [] and db.rows("SELECT * FROM results") == []


def test_the_wish_of_a_rule_reaches_the_row(db: Database) -> None:
    Catalogue(db).commit([instance()])
    (job_id,) = select(db, "1.2.20", replace(wish(), notify=("ris",)))
    shown = Jobs(db).show(job_id)
    assert shown is not None and shown["notify"] == ["ris"]


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        (0x0000, Sent.stored),
        (0x0111, Sent.stored),
        (0x0107, Sent.stored),
        (0x0110, Sent.retry),
        (None, Sent.retry),
        (0x0106, Sent.rejected),
        (0x0120, Sent.rejected),
        (0x0122, Sent.rejected),
    ],
)
def test_statuses(status: int | None, sent: Sent) -> None:
    assert classify_status(status)[0] is sent


def test_any_study_uid_is_sent_as_it_is() -> None:
    one = {"SeriesInstanceUID": "1.2", "SOPClassUID": RESULT_CLASS, "SOPInstanceUID": "1.3"}
    assert notification("1.02.x", [one], "PACS").StudyInstanceUID == "1.02.x"


# Written out by hand, so that a change of the table has to be made twice.
TABLE = {
    "waiting": {"release": "pending", "withdraw": "rejected"},
    "pending": {"lease": "sending", "withdraw": "rejected"},
    "sending": {
        "store": "stored",
        "retry": "pending",
        "reject": "rejected",
        "lose": "pending",
        "withdraw": "rejected",
    },
    "rejected": {"requeue": "waiting"},
    "stored": {},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(NoticeState, NoticeEvent)))
def test_transition(state: NoticeState, event: NoticeEvent) -> None:
    wanted = TABLE[state].get(event)
    if wanted:
        assert next_notice_state(state, event) == wanted
    else:
        with pytest.raises(IllegalTransition):
            next_notice_state(state, event)
