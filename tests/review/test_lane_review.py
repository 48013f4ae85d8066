"""What a sceptical reader of the lane and the intake journal found; each failed before it was mended."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
from pynetdicom import AE
from pynetdicom.association import MODE_ACCEPTOR
from pynetdicom.dimse_primitives import C_ECHO
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from dicomnode import durable
from dicomnode.dimse import lane as lane_module
from dicomnode.dimse import requestor
from dicomnode.dimse.association import MOST_WAITING, NodeAssociation
from dicomnode.dimse.command import C_STORE_RSP, NO_DATA_SET, encode_query_reply, encode_store_reply
from dicomnode.dimse.lane import Lane, pdata_header
from dicomnode.dimse.requestor import Patience, associate
from dicomnode.dimse.wire import Limits, Violation, Wire
from dicomnode.errors import PeerAway, StorageError
from dicomnode.header import Wanted
from dicomnode.index.database import Database
from dicomnode.receive import recovery
from dicomnode.receive.apply import Applier
from dicomnode.receive.journal import BLOCK, Journal
from dicomnode.receive.listener import Listener
from dicomnode.receive.record import Described, Fields
from dicomnode.settings import Peer, Settings
from tests.receive.test_ingest import data_set, store_request
from tests.receive.test_journal import Node

LIMITS = Limits(max_pdu=16384, max_object=10**6, pdu_seconds=5.0, idle_seconds=5.0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    if made.retirer._thread.is_alive():
        made.retirer.close()
    made.close()


@pytest.fixture
def died(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    errors: list[BaseException] = []
    monkeypatch.setattr(durable, "die", errors.append)
    return errors


# Acknowledged objects


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape"])
def test_text_that_sqlite_cannot_hold_stops_no_receiver(node: Node, charset: str) -> None:
    """Python's codecs by name: pydicom takes them, and they make lone surrogates."""
    plain = data_set(PatientName="+2AA-\\ud800".ljust(20).replace("\\", "/"))
    data = plain.replace(b"+2AA-/ud800", b"+2AA-\\ud800")
    name = charset.encode().ljust(len(charset) + len(charset) % 2)
    sent = store_request(struct.pack("<HHI", 8, 5, len(name)) + name + data)
    assert node.acknowledge(sent) == 0
    assert node.served() == {"1.2.3.4": sent.data}
    after = node.power_cut()
    assert (after.recovered, after.served()) == (1, {"1.2.3.4": sent.data})
    after.close()


def test_one_object_that_cannot_be_recovered_does_not_stop_the_start(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [store_request(sop=f"1.2.{n}") for n in range(3)]
    assert [node.acknowledge(s) for s in sent] == [0] * 3
    real = recovery.describe

    def fussy(fields: Fields, data: bytes, wanted: Wanted) -> Described:
        if data == sent[1].data:
            raise UnicodeEncodeError("utf-8", "", 0, 1, "surrogates not allowed")
        return real(fields, data, wanted)

    monkeypatch.setattr(recovery, "describe", fussy)
    after = node.power_cut()
    assert set(after.served()) == {"1.2.0", "1.2.2"}
    (aside,) = (after.folder / "strays").iterdir()
    assert aside.read_bytes().endswith(sent[1].data)
    after.close()


def test_a_record_that_was_not_written_gives_its_place_back(node: Node) -> None:
    node.retirer.start(node.journal.next_number)
    long = store_request()
    long = long._replace(request=long.request._replace(association_id="x" * 2 * BLOCK))
    assert node.acknowledge(long) == 0xA700
    assert node.acknowledge(store_request(sop="1.2.9")) == 0
    node.applier.close()
    node.retirer.close()
    assert node.journal.used() == 0.0


def test_an_object_that_takes_the_long_way_does_not_overtake_one_in_the_journal(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same UID, other bytes: the newest serves, also when the older one has no row yet."""
    older, newer = store_request(), store_request(data_set(PatientComments="newer"))
    begun, go_on = threading.Event(), threading.Event()
    apply = Applier._apply

    def slowly(self: Applier, batch: Any) -> None:
        begun.set()
        assert go_on.wait(20)
        apply(self, batch)

    monkeypatch.setattr(Applier, "_apply", slowly)
    assert node.receive(older) == 0
    node.applier.start()
    node.applies = True
    assert begun.wait(20)
    monkeypatch.setattr(node.journal, "reserve", lambda size: None)
    real = node.applier.catch_up

    def catch_up() -> None:
        go_on.set()
        real()

    monkeypatch.setattr(node.applier, "catch_up", catch_up)
    assert node.acknowledge(newer) == 0
    go_on.set()
    node.applier.close()
    assert node.served() == {"1.2.3.4": newer.data}


def test_an_applier_that_fails_outside_a_batch_ends_the_process(node: Node, died: list[BaseException]) -> None:
    """Else everyone who waits for it would wait for ever."""

    def fails() -> None:
        raise OSError("no descriptor")

    applier = Applier(node.journal, node.store, node.catalogue, node.retirer, node.progress, node.wanted, fails)
    node.ingest.safe = SimpleNamespace(journal=node.journal, applier=applier)  # type: ignore[assignment]
    assert node.receive(store_request()) == 0
    applier._thread.run()  # in this thread, so that its end shows
    assert [str(e) for e in died] == ["no descriptor"]


def test_a_retirer_outlives_an_error_that_nobody_thought_of(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed, retired = node.retirer._journals.retire, threading.Event(), threading.Event()

    def retire(mark: str, number: int) -> None:
        if not failed.is_set():
            failed.set()
            raise apsw.CantOpenError("too many open files")
        real(mark, number)
        retired.set()

    monkeypatch.setattr(node.retirer._journals, "retire", retire)
    monkeypatch.setattr("dicomnode.receive.retire.OLDEST_SECONDS", 0.0)
    monkeypatch.setattr("dicomnode.receive.retire.RETRY_SECONDS", 0.0)
    node.retirer.start(node.journal.next_number)
    assert node.acknowledge(store_request()) == 0
    assert retired.wait(20)
    node.retirer.close()
    assert node.journal.used() == 0.0


def test_a_receiver_waits_while_another_one_looks_into_its_journal(tmp_path: Path) -> None:
    other = Journal(tmp_path / "r.journal", 8 * BLOCK)
    opened: list[Journal] = []
    opener = threading.Thread(
        target=lambda: opened.append(Journal(tmp_path / "r.journal", 8 * BLOCK, wait_seconds=20.0))
    )
    opener.start()
    with pytest.raises(StorageError, match="another process"):
        Journal(tmp_path / "r.journal", 8 * BLOCK)
    other.close()
    opener.join(20)
    assert opened[0].mark == other.mark
    opened[0].close()


# Peers


class Line:
    """An established association of ours as acceptor, and the socket of its peer."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.settimeout(5)
        self.wire = Wire(ours, LIMITS)
        ae = AE()
        self.assoc = NodeAssociation(ae, MODE_ACCEPTOR, self.wire, ours)
        self.assoc.requestor.maximum_length = 16384
        context = build_context(Verification)
        context.context_id, context._as_scp = 1, True
        self.assoc._accepted_cx = {1: context}
        self.assoc.dul.event_queue.get_nowait()
        self.assoc.dul.state_machine.current_state = "Sta6"
        self.assoc.is_established = True

    def send(self, command: bytes) -> None:
        self.peer.sendall(pdata_header(1, len(command), command=True, last=True) + command)

    def close(self) -> None:
        self.peer.close()
        self.assoc.end()


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


ECHO = encode_query_reply(
    command_field=0x0030, message_id=7, sop_class_uid=Verification, status=0, has_data_set=False
).replace(struct.pack("<HHI", 0, 0x0120, 2), struct.pack("<HHI", 0, 0x0110, 2))


def test_requests_of_ours_do_not_wait_for_ever_after_one_of_the_peer(line: Line) -> None:
    """pynetdicom spins until its reactor rests; it forgot that ours always does."""
    request = C_ECHO()
    request.MessageID, request.AffectedSOPClassUID = 7, Verification
    line.assoc._serve_request(request, 1)
    assert line.assoc._is_paused


def test_answers_that_nobody_asked_for_do_not_fill_the_memory(line: Line) -> None:
    reply = encode_store_reply(message_id=1, sop_class_uid="1.2", sop_instance_uid="1.2", status=0)
    assert struct.pack("<H", C_STORE_RSP) in reply and struct.pack("<H", NO_DATA_SET) in reply
    lane = Lane(line.assoc, line.wire, None)
    pdu = memoryview(pdata_header(1, len(reply), command=True, last=True) + reply)
    with pytest.raises(Violation, match="not made"):
        for _ in range(1000):
            lane.receive(pdu)
    assert len(lane.replies) <= lane_module.MOST_REPLIES


def test_requests_that_pile_up_end_the_association(line: Line) -> None:
    for _ in range(MOST_WAITING + 1):
        line.send(ECHO)
    for _ in range(MOST_WAITING):
        line.assoc.dul.pump(5.0)
    assert line.assoc.usable() and line.assoc.dimse.msg_queue.qsize() == MOST_WAITING
    line.assoc.dul.pump(5.0)
    assert not line.assoc.usable() and line.wire.violation


def test_a_command_that_pynetdicom_cannot_decode_is_answered_with_abort(line: Line) -> None:
    line.send(struct.pack("<HHIH", 0, 0x0100, 2, 0x7777))
    line.assoc.dul.pump(5.0)
    assert not line.assoc.usable()
    assert line.peer.recv(100)[0] == 0x07


def test_a_peer_that_resets_at_once_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        ours = socket.create_connection((host, port))
        theirs, _ = server.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
    with pytest.raises(ConnectionResetError):
        ours.recv(1)
    monkeypatch.setattr(requestor, "_connect", lambda *_: ours)
    peer = Peer(name="pacs", ae_title="PACS", host=host, port=port)
    with pytest.raises(PeerAway, match="at once"):
        associate("NODE", peer, [build_context(Verification)], Patience(1.0, 1.0), operation="C-ECHO")
    assert ours.fileno() == -1


def test_a_complaint_that_cannot_be_recorded_does_not_stop_the_acceptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = Database(tmp_path / "data")
    listener = Listener(Settings(node={"data_dir": tmp_path / "data"}), db, [], "receiver-1")

    def full(*_: object) -> None:
        raise apsw.CantOpenError("too many open files")

    monkeypatch.setattr(listener.events, "add", full)
    try:
        listener._too_many("192.0.2.1")
    finally:
        listener.close()
        db.close()
