"""What a review of the DIMSE core found beyond the lane; each failed before it was mended."""

from __future__ import annotations

import io
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pynetdicom import evt
from pynetdicom.dimse_messages import C_FIND_RQ
from pynetdicom.dimse_primitives import C_FIND

from dicomnode.dimse.association import MOST_CANCELS
from dicomnode.dimse.command import elements
from dicomnode.dimse.lane import message_parts, pdata_header
from dicomnode.dimse.store import send_store
from dicomnode.dimse.wire import Silence, Wire, abort_pdu
from dicomnode.receive.listener import _on_message
from tests.certificates import Authority
from tests.review.test_lane_review import ECHO, LIMITS, Line


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


# Small PDUs


@pytest.mark.parametrize("max_pdu", [8, 9, 60, 128, 250, 0])
def test_commands_are_fragmented_into_what_the_peer_takes(max_pdu: int) -> None:
    command, data_set = ECHO, b"x" * 301
    sent = b"".join(message_parts(3, command, data_set, max_pdu))
    at, found, ends = 0, {1: b"", 0: b""}, []
    while at < len(sent):
        kind, size, item, context, control = struct.unpack_from(">BxIIBB", sent, at)
        assert (kind, context, item) == (0x04, 3, size - 4)
        assert not max_pdu or size <= max_pdu
        found[control & 1] += sent[at + 12 : at + 6 + size]
        if control & 2:
            ends.append(control & 1)
        at += 6 + size
    assert (found[1], found[0], ends) == (command, data_set, [1, 0])


def test_a_request_of_ours_is_fragmented_too(line: Line) -> None:
    line.assoc.requestor.maximum_length = 32
    line.peer.sendall(abort_pdu(0))
    send_store(line.assoc, 1, message_id=1, sop_class_uid="1.2.3", sop_instance_uid="1.2.4", data=b"ab" * 40, seconds=5)
    line.assoc.wire.cut()
    sent = b""
    with suppress(ConnectionError):
        while part := line.peer.recv(4096):
            sent += part
    command, at = b"", 0
    while at < len(sent) and sent[at] == 0x04:
        (size,) = struct.unpack_from(">I", sent, at + 2)
        assert size <= 32
        if sent[at + 11] & 1:
            command += sent[at + 12 : at + 6 + size]
        at += 6 + size
    assert elements(command)[0x1000] == b"1.2.4\0"


# Messages that wait


def query(size: int) -> bytes:
    request = C_FIND()
    request.MessageID, request.AffectedSOPClassUID, request.Priority = 1, "1.2.840.10008.5.1.4.1.2.2.1", 2
    request.Identifier = io.BytesIO(bytes(size))
    message = C_FIND_RQ()
    message.primitive_to_message(request)
    out = b""
    for primitive in message.encode_msg(1, 16384):
        context, value = primitive.presentation_data_value_list[0]
        out += struct.pack(">BxIIB", 0x04, len(value) + 5, len(value) + 1, context) + value
    return out


def test_bytes_that_wait_are_capped_for_an_association(line: Line) -> None:
    line.wire.limits = replace(LIMITS, max_message=100_000)
    whole = query(40_000)
    sender = threading.Thread(target=lambda: line.peer.sendall(whole * 3), daemon=True)
    sender.start()
    while line.assoc.dimse.msg_queue.qsize() < 2:
        line.assoc.dul.pump(5.0)
    assert line.assoc.usable()
    while line.assoc.usable():
        line.assoc.dul.pump(5.0)
    assert "too many bytes" in line.wire.violation
    assert len([m for _, m in line.assoc.dimse.msg_queue.queue if m is not None]) == 2


def test_messages_that_were_served_no_longer_count(line: Line) -> None:
    line.wire.limits = replace(LIMITS, max_message=100_000)
    whole = query(60_000)
    for _ in range(4):
        sender = threading.Thread(target=line.peer.sendall, args=(whole,))
        sender.start()
        assert line.assoc.dimse.get_msg(block=True)[1] is not None
        sender.join()
    assert line.assoc.usable()


# Polling


@pytest.mark.parametrize("came", [b"", b"\x04", b"\x04\0\0\0\0\x20", pdata_header(1, 20, command=True, last=True)])
def test_part_of_a_pdu_is_not_waited_for(line: Line, came: bytes) -> None:
    line.peer.sendall(came)
    begin = time.monotonic()
    line.assoc.poll()
    line.assoc.poll()
    assert time.monotonic() - begin < LIMITS.pdu_seconds / 2
    assert line.assoc.usable()
    rest = (pdata_header(1, len(ECHO), command=True, last=True) + ECHO)[len(came) :]
    if came[:6] == b"" or len(came) == 1:
        line.peer.sendall(rest)
        line.assoc.poll()
        assert line.assoc.dimse.msg_queue.qsize() == 1


def test_the_end_and_a_breach_are_seen(line: Line) -> None:
    line.peer.sendall(b"\x04\0\xff\xff\xff\xff")
    line.assoc.poll()
    assert not line.assoc.usable() and "allowed" in line.wire.violation
    other = Line()
    other.peer.close()
    other.assoc.poll()
    assert not other.assoc.usable()
    other.close()


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[Wire, ssl.SSLSocket, socket.socket]]:
    """A wire of ours as TLS client, the server's side, and the server's bare socket."""
    authority = Authority(tmp_path)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(*authority.issue("peer").files)
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname = False
    asking.load_verify_locations(str(authority.ca_file))
    ours, theirs = socket.socketpair()
    made: list[ssl.SSLSocket] = []
    server = threading.Thread(target=lambda: made.append(served.wrap_socket(theirs, server_side=True)))
    server.start()
    client = asking.wrap_socket(ours)
    server.join()
    assert client.version() == "TLSv1.3"
    yield Wire(client, LIMITS), made[0], theirs
    client.close()
    made[0].close()


def test_records_without_data_are_no_reason_to_wait(secure: tuple[Wire, ssl.SSLSocket, socket.socket]) -> None:
    """The session tickets of TLS 1.3 lie unread behind the handshake."""
    wire, server, _ = secure
    assert wire.waiting(5.0)
    begin = time.monotonic()
    assert not wire.arrived()
    assert time.monotonic() - begin < 1
    with pytest.raises(Silence):
        wire.read(0.05)
    server.sendall(abort_pdu(0)[:4])
    assert not wire.arrived()
    server.sendall(abort_pdu(0)[4:])
    assert wire.waiting(5.0) and wire.arrived()
    found = wire.read(0.0)
    assert found is not None and bytes(found[1]) == abort_pdu(0)


# Empty PDUs


EMPTY: dict[str, Callable[[], bytes]] = {
    "no items": lambda: b"\x04\0\0\0\0\0",
    "command": lambda: pdata_header(1, 0, command=True, last=False),
    "single bytes": lambda: pdata_header(1, 1, command=True, last=False) + b"\0",
    "many": lambda: pdata_header(1, 0, command=True, last=False) * 50,
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("midway", [False, True])
def test_empty_p_data_does_not_keep_an_association_open(kind: str, midway: bool) -> None:
    line = Line()
    line.wire.limits = replace(LIMITS, pdu_seconds=0.4, idle_seconds=0.4)
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            if midway:
                line.peer.sendall(pdata_header(1, 8, command=True, last=False) + ECHO[:8])
            while not stop.is_set():
                line.peer.sendall(EMPTY[kind]())
                stop.wait(0.02)

    sender = threading.Thread(target=drip)
    sender.start()
    begin = time.monotonic()
    served = threading.Thread(target=line.assoc._run_reactor, daemon=True)
    served.start()
    served.join(10)
    assert not served.is_alive()
    assert time.monotonic() - begin < 5
    stopped = midway or kind == "single bytes"
    assert line.wire.violation == ("a message that stopped midway" if stopped else "an association without traffic")
    stop.set()
    sender.join()
    line.close()


def test_traffic_keeps_an_association_open() -> None:
    line = Line()
    line.wire.limits = replace(LIMITS, idle_seconds=1.0)
    served = threading.Thread(target=line.assoc._run_reactor, daemon=True)
    served.start()
    begin = time.monotonic()
    while time.monotonic() - begin < 1.5:
        line.send(ECHO)
        assert line.peer.recv(4096)[0] == 0x04
        threading.Event().wait(0.1)
    assert served.is_alive()
    line.peer.close()
    served.join(10)
    line.assoc.end()


# Cancels


def asks(line: Line, message_id: int) -> None:
    pdus = query(2)
    line.peer.sendall(
        pdus.replace(struct.pack("<HHIH", 0, 0x0110, 2, 1), struct.pack("<HHIH", 0, 0x0110, 2, message_id))
    )
    line.assoc.dul.pump(5.0)
    line.assoc.dul.pump(5.0)


def cancels(line: Line, message_id: int) -> None:
    line.send(
        struct.pack("<HHIH", 0, 0x0100, 2, 0x0FFF)
        + struct.pack("<HHIH", 0, 0x0120, 2, message_id)
        + struct.pack("<HHIH", 0, 0x0800, 2, 0x0101)
    )
    line.assoc.dul.pump(5.0)


def test_a_request_behind_a_cancel_does_not_undo_it(line: Line) -> None:
    """Peers send C-CANCEL and the next query at once; the cancel was thrown away with it."""
    line.assoc.bind(evt.EVT_DIMSE_RECV, _on_message)
    asks(line, 1)
    cancels(line, 1)
    asks(line, 2)
    assert list(line.assoc.dimse.cancel_req) == [1]
    cancels(line, 2)
    asks(line, 1)
    assert list(line.assoc.dimse.cancel_req) == [2], "a number that is used again is another request"
    assert line.assoc.dimse.msg_queue.qsize() == 3


def test_cancels_that_came_too_late_do_not_shut_out_later_ones(line: Line) -> None:
    for number in range(3 * MOST_CANCELS):
        cancels(line, number)
    assert len(line.assoc.dimse.cancel_req) == MOST_CANCELS
    assert 3 * MOST_CANCELS - 1 in line.assoc.dimse.cancel_req
