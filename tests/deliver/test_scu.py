"""C-STORE SCU and courier against a pynetdicom acceptor on loopback."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from dicomnode.deliver import courier as courier_module
from dicomnode.deliver.courier import Courier
from dicomnode.deliver.files import find_files, send_files
from dicomnode.deliver.scu import Outgoing, SendOutcome, Sent, classify_store_status, echo, send_batch
from dicomnode.durable import ObjectStore, sha256_file
from dicomnode.errors import OperatorError, PeerAway, PeerRefused
from dicomnode.index.database import Database
from dicomnode.index.outbox import Outbox
from dicomnode.settings import Delivery, Peer, Settings
from tests.index.rows import FakeClock, finished_job

DELIVERY = Delivery(connect_seconds=5, response_seconds=5)


@dataclass
class Pacs:
    """An acceptor that answers ``answer(number, event)``; ``None`` from it cuts the association."""

    answer: Callable[[int], int | None] = lambda number: 0x0000
    stored: list[str] = field(default_factory=list)
    associations: int = 0

    def __post_init__(self) -> None:
        self.ae = AE(ae_title="PACS")
        self.ae.add_supported_context(CTImageStorage, ExplicitVRLittleEndian)
        self.ae.add_supported_context(Verification)
        self.lock = threading.Lock()
        self.server: Any = None
        self.start(0)
        self.port = self.server.socket.getsockname()[1]

    def start(self, port: int) -> None:
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_ESTABLISHED, self._established)]
        self.server = self.ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)

    def _established(self, _: Any) -> None:
        self.associations += 1

    def _store(self, event: Any) -> int:
        with self.lock:
            number = len(self.stored)
            self.stored.append(str(event.request.AffectedSOPInstanceUID))
            status = self.answer(number)
        if status is None:
            event.assoc.abort()
            return 0x0000
        return status

    def stop(self) -> None:
        self.server.shutdown()
        for assoc in self.server.active_associations:
            assoc.join(5)

    def peer(self, name: str = "pacs") -> Peer:
        return Peer(name=name, ae_title="PACS", host="127.0.0.1", port=self.port)


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    made = Pacs()
    yield made
    made.stop()


def write(path: Path, sop: str, syntax: str = ExplicitVRLittleEndian) -> Path:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = CTImageStorage, sop, "P1"
    ds.StudyInstanceUID = ds.SeriesInstanceUID = "1.2"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def outgoing(folder: Path, count: int) -> list[Outgoing]:
    return [
        Outgoing(n, write(folder / f"{n}.dcm", f"1.5.{n}"), CTImageStorage, ExplicitVRLittleEndian, f"1.5.{n}")
        for n in range(count)
    ]


def deliver(pacs: Pacs, objects: list[Outgoing]) -> list[SendOutcome]:
    outcomes: list[SendOutcome] = []
    send_batch("NODE", pacs.peer(), DELIVERY, objects, outcomes.append)
    return outcomes


def test_every_status_has_its_meaning() -> None:
    """PS3.4 table B.2-1, PS3.7 annex C: each of 65536 statuses means exactly one thing."""
    stored = {0x0000, 0x0001, 0x0107, 0x0111, 0x0116, *range(0xB000, 0xC000)}
    retry = {*range(0xA700, 0xA800), 0x0110, 0x0124, 0x0210, 0x0213}
    for status in range(0x10000):
        expected = Sent.stored if status in stored else Sent.retry if status in retry else Sent.rejected
        sent, cause = classify_store_status(status)
        assert sent is expected, f"0x{status:04X}"
        assert (f"0x{status:04X}" in cause) is (status != 0)
    assert classify_store_status(None)[0] is Sent.retry


def test_batch_is_stored_in_order_on_one_association(pacs: Pacs, tmp_path: Path) -> None:
    outcomes = deliver(pacs, outgoing(tmp_path, 5))
    assert [(o.key, o.sent) for o in outcomes] == [(n, Sent.stored) for n in range(5)]
    assert pacs.stored == [f"1.5.{n}" for n in range(5)] and pacs.associations == 1


def test_refused_object_does_not_stop_the_rest(pacs: Pacs, tmp_path: Path) -> None:
    pacs.answer = lambda number: 0xC000 if number == 1 else 0xB000 if number == 2 else 0
    outcomes = deliver(pacs, outgoing(tmp_path, 4))
    assert [o.sent for o in outcomes] == [Sent.stored, Sent.rejected, Sent.stored, Sent.stored]
    assert "0xC000" in outcomes[1].cause and "0xB000" in outcomes[2].cause


@pytest.mark.parametrize("answer", [0xA700, None], ids=["busy", "cut"])
def test_rest_of_the_batch_waits_behind_one_that_waits(pacs: Pacs, tmp_path: Path, answer: int | None) -> None:
    pacs.answer = lambda number: answer if number == 2 else 0
    outcomes = deliver(pacs, outgoing(tmp_path, 5))
    assert [o.key for o in outcomes] == list(range(5))
    assert [o.sent for o in outcomes] == [Sent.stored] * 2 + [Sent.retry] * 3
    assert pacs.stored == ["1.5.0", "1.5.1", "1.5.2"], "order is kept"


def test_syntax_that_the_peer_lacks_is_rejected_in_words(pacs: Pacs, tmp_path: Path) -> None:
    good = outgoing(tmp_path, 1)
    path = write(tmp_path / "x.dcm", "1.6", ImplicitVRLittleEndian)
    outcomes = deliver(pacs, [Outgoing(7, path, CTImageStorage, ImplicitVRLittleEndian, "1.5.7"), *good])
    assert [o.sent for o in outcomes] == [Sent.rejected, Sent.stored]
    assert "neither this SOP class nor its transfer syntax" in outcomes[0].cause


def test_missing_file_is_rejected(pacs: Pacs, tmp_path: Path) -> None:
    (outcome,) = deliver(pacs, [Outgoing(1, tmp_path / "no.dcm", CTImageStorage, ExplicitVRLittleEndian, "1.5.1")])
    assert outcome.sent is Sent.rejected and "not in the store" in outcome.cause


def test_peer_away_and_rejecting(pacs: Pacs, tmp_path: Path) -> None:
    objects = outgoing(tmp_path, 1)
    pacs.ae.require_called_aet = True
    with pytest.raises(PeerAway, match="rejected the association"):
        send_batch("NODE", pacs.peer().model_copy(update={"ae_title": "OTHER"}), DELIVERY, objects, lambda _: None)
    pacs.stop()
    reported: list[SendOutcome] = []
    with pytest.raises(PeerAway, match="does not answer") as caught:
        send_batch("NODE", pacs.peer(), DELIVERY, objects, reported.append)
    assert caught.value.retryable and reported == []
    with pytest.raises(PeerRefused, match="no host and port"):
        send_batch("NODE", Peer(name="x", ae_title="X"), DELIVERY, objects, reported.append)
    pacs.start(0)


def test_echo(pacs: Pacs) -> None:
    echo("NODE", pacs.peer(), DELIVERY)
    pacs.stop()
    pacs.ae.remove_supported_context(Verification)
    pacs.start(pacs.port)
    with pytest.raises((PeerRefused, PeerAway)):
        echo("NODE", pacs.peer(), DELIVERY)


def test_find_files(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.dcm", "1.2")
    write(tmp_path / "a" / "1", "1.1", ImplicitVRLittleEndian)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(bytes(128) + b"DICM")
    found, skipped = find_files([tmp_path])
    assert [(o.key, o.path.name, o.transfer_syntax_uid) for o in found] == [
        (0, "1", ImplicitVRLittleEndian),
        (1, "2.dcm", ExplicitVRLittleEndian),
    ]
    assert {p.name for p in skipped} == {"notes.txt", "empty", "cut"}
    with pytest.raises(OperatorError, match="does not exist"):
        find_files([tmp_path / "no"])
    with pytest.raises(OperatorError, match="no DICOM file"):
        find_files([tmp_path / "notes.txt"])


def test_send_files_reports_in_order(pacs: Pacs, tmp_path: Path) -> None:
    outgoing(tmp_path, 3)
    seen: list[SendOutcome] = []
    outcomes = send_files("NODE", pacs.peer(), DELIVERY, find_files([tmp_path])[0], seen.append)
    assert [o.key for o in outcomes] == [0, 1, 2] and len(seen) == 3


# Courier


@dataclass
class Desk:
    """A courier with one finished job, an SR and a SEG, in its outbox."""

    db: Database
    clock: FakeClock
    pacs: Pacs
    folder: Path

    def __post_init__(self) -> None:
        delivery = {"backoff_seconds": 2, "backoff_max_seconds": 900, "connect_seconds": 5, "response_seconds": 5}
        self.settings = Settings(
            node={"data_dir": self.folder}, peers=[self.pacs.peer().model_dump()], delivery=delivery
        )
        self.courier = Courier(self.settings, self.db, "courier")
        self.outbox = Outbox(self.db, "deliveries")

    def work(self, study: str = "1.2.10", **wanted: Any) -> list[str]:
        job_id = finished_job(self.db, study, **wanted)
        store = ObjectStore(self.folder)
        rows = self.db.rows("SELECT file, SOPInstanceUID FROM results WHERE job_id = ? ORDER BY id", (job_id,))
        for row in rows:
            path = write(store.path(row["file"]), row["SOPInstanceUID"])
            with self.db.transaction():
                self.db.execute("UPDATE results SET sha256 = ? WHERE file = ?", (sha256_file(path), row["file"]))
        return [str(r["SOPInstanceUID"]) for r in rows]

    def states(self) -> list[str]:
        return [r["state"] for r in self.db.rows("SELECT state FROM deliveries ORDER BY id")]


@pytest.fixture
def desk(db: Database, clock: FakeClock, pacs: Pacs, tmp_path: Path) -> Desk:
    return Desk(db, clock, pacs, tmp_path / "data")


def test_a_damaged_result_is_parked_and_the_next_one_goes(desk: Desk) -> None:
    uids = desk.work()
    first = ObjectStore(desk.folder).path(str(desk.db.value("SELECT file FROM results ORDER BY id LIMIT 1")))
    first.write_bytes(first.read_bytes()[:-2] + b"\0\0")
    desk.courier.run_once()
    assert desk.states() == ["rejected", "stored"] and desk.pacs.stored == uids[1:]
    assert "SHA-256" in str(desk.db.value("SELECT last_error FROM deliveries ORDER BY id LIMIT 1"))


def test_courier_delivers_once(desk: Desk) -> None:
    uids = desk.work()
    desk.courier.run_once()
    desk.courier.run_once()
    assert desk.states() == ["stored", "stored"] and desk.pacs.stored == uids


def test_peer_away_for_a_week(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    uids = desk.work()
    desk.work("1.2.11")
    real = courier_module.send_batch
    tries: list[float] = []

    def away(*_: Any) -> None:
        tries.append(desk.clock.now)
        raise PeerAway("C-STORE", "peer 'pacs' does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(courier_module, "send_batch", away)
        begin = desk.clock.now
        while desk.clock.now < begin + 7 * 86400:
            desk.courier.run_once()
            due = desk.outbox.next_due_in()
            assert due is not None and 0 < due <= 900, "at most fifteen minutes"
            desk.clock.move(due)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps[0] == 2.0 and max(gaps) == 900.0 and gaps == sorted(gaps)
    assert courier_module.send_batch is real
    desk.courier.run_once()
    assert desk.states() == ["stored"] * 4
    assert desk.pacs.stored[:2] == uids, "order kept per study"


def test_lost_reply_sends_the_same_uid_again(desk: Desk) -> None:
    uids = desk.work()
    desk.pacs.answer = lambda number: None if number == 0 else 0
    desk.courier.run_once()
    assert desk.states() == ["pending", "pending"]
    desk.clock.move(3)
    desk.courier.run_once()
    assert desk.states() == ["stored", "stored"]
    assert Counter(desk.pacs.stored) == {uids[0]: 2, uids[1]: 1}, "no second object"


def test_rejection_is_parked_and_told(desk: Desk) -> None:
    desk.work()
    desk.pacs.answer = lambda number: 0xC123 if number == 0 else 0
    desk.courier.run_once()
    assert desk.states() == ["rejected", "stored"]
    (event,) = desk.db.rows("SELECT * FROM events WHERE kind = 'delivery-rejected'")
    assert "0xC123" in event["text"] and event["subject"] == "pacs"
    desk.outbox.requeue(1)
    desk.courier.run_once()
    assert desk.states() == ["stored", "stored"]


def test_unknown_destination_waits_for_the_operator(desk: Desk) -> None:
    desk.work(destinations=("gone",))
    desk.courier.run_once()
    (first, _) = desk.db.rows("SELECT state, last_error FROM deliveries ORDER BY id")
    assert first["state"] == "pending" and "'gone' is not in [[peers]]" in first["last_error"]


def test_new_life_takes_back_what_the_former_one_held(desk: Desk) -> None:
    desk.work()
    desk.outbox.lease("pacs", "courier", 3600, 10)
    desk.courier.run_once()
    assert desk.states() == ["sending", "sending"]
    desk.courier.start()
    desk.courier.run_once()
    assert desk.states() == ["stored", "stored"]


def test_a_full_peer_holds_back_one_study_and_not_the_others(pacs: Pacs, tmp_path: Path) -> None:
    objects = [replace(o, group="ab"[n % 2]) for n, o in enumerate(outgoing(tmp_path, 4))]
    pacs.answer = lambda number: 0xA700 if number == 0 else 0x0000
    outcomes: list[SendOutcome] = []
    send_batch("NODE", pacs.peer(), DELIVERY, objects, outcomes.append)
    assert [o.sent for o in outcomes] == [Sent.retry, Sent.stored, Sent.retry, Sent.stored]
    assert pacs.stored == ["1.5.0", "1.5.1", "1.5.3"]
