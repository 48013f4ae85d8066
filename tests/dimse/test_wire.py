"""The wire on a socket pair: lengths, deadlines, whole PDUs from any pieces."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.dimse.wire import Limits, Silence, Violation, Wire, abort_pdu

LIMITS = Limits(max_pdu=1000, max_object=2500, pdu_seconds=0.2, idle_seconds=0.1)


class Pair:
    """A wire and the socket of its peer, over loopback TCP."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.peer = socket.create_connection(server.getsockname())
            ours, _ = server.accept()
        self.wire = Wire(ours, limits)

    def close(self) -> None:
        self.peer.close()
        self.wire.close()

    def answer(self) -> bytes:
        self.peer.settimeout(5)
        data = b""
        while chunk := self.peer.recv(100):
            data += chunk
        return data


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def header(kind: int, length: int) -> bytes:
    return struct.pack(">BxL", kind, length)


def read(wire: Wire, seconds: float = 5.0) -> tuple[int, bytes] | None:
    found = wire.read(seconds)
    return None if found is None else (found[0], bytes(found[1]))


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
)
def test_pdus_come_whole_however_the_stream_is_cut(sizes: list[int], cuts: list[int]) -> None:
    pdus = [header(4, size) + bytes([n % 256]) * size for n, size in enumerate(sizes)]
    stream = b"".join(pdus)
    pair = Pair(Limits(max_pdu=1000, max_object=1, pdu_seconds=30, idle_seconds=30))

    def send() -> None:
        position, turn = 0, 0
        while position < len(stream):
            size = cuts[turn % len(cuts)]
            pair.peer.sendall(stream[position : position + size])
            position, turn = position + size, turn + 1
        pair.peer.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert [read(pair.wire, 30) for _ in pdus] == [(4, pdu) for pdu in pdus]
        assert read(pair.wire, 30) is None
    finally:
        thread.join()
        pair.close()


@pytest.mark.parametrize(
    ("kind", "length"),
    [(4, 1001), (4, 0xFFFFFFFF), (1, 128 * 1024 + 1), (1, 0xFFFFFFFF), (2, 1 << 20), (3, 5), (5, 5), (6, 5), (7, 5)],
)
def test_length_beyond_the_limit_aborts_before_reading(pair: Pair, kind: int, length: int) -> None:
    pair.peer.sendall(header(kind, length))
    with pytest.raises(Violation, match=f"PDU type 0x{kind:02X} of {length} bytes"):
        pair.wire.read(5)
    assert pair.answer() == abort_pdu(6)
    assert pair.wire.violation


@pytest.mark.parametrize("kind", [0, 8, 0x44, 0xFF])
def test_unknown_type_is_an_unrecognized_pdu(pair: Pair, kind: int) -> None:
    pair.peer.sendall(header(kind, 1))
    with pytest.raises(Violation, match="unknown type"):
        pair.wire.read(5)
    assert pair.answer() == abort_pdu(1)


@pytest.mark.parametrize("drip", [True, False])
def test_pdu_has_one_deadline_however_it_drips(pair: Pair, drip: bool) -> None:
    stop = threading.Event()

    def drips() -> None:
        data = iter(header(4, 900) + bytes(900))
        while not stop.wait(0.01):
            try:
                pair.peer.send(bytes([next(data)]))
            except OSError:
                return

    thread = threading.Thread(target=drips)
    if drip:
        thread.start()
    else:
        pair.peer.sendall(header(4, 900)[:1])
    begin = time.monotonic()
    with pytest.raises(Violation, match="deadline"):
        pair.wire.read(5)
    assert 0.18 < time.monotonic() - begin < 3.2
    stop.set()
    if drip:
        thread.join()
    assert "deadline" in pair.wire.violation


def test_silence_is_no_violation(pair: Pair) -> None:
    with pytest.raises(Silence):
        pair.wire.read(0.05)
    assert not pair.wire.violation
    assert not pair.wire.waiting()
    pair.peer.sendall(header(5, 4) + b"1234")
    assert pair.wire.waiting(5)
    assert read(pair.wire) == (5, header(5, 4) + b"1234")


def test_end_of_stream_inside_a_pdu(pair: Pair) -> None:
    pair.peer.sendall(header(4, 100) + b"abc")
    pair.peer.close()
    assert pair.wire.read(5) is None


def test_send_gives_up_on_a_peer_that_does_not_read() -> None:
    pair = Pair(Limits(max_pdu=1000, max_object=1, pdu_seconds=0.2, idle_seconds=1))
    try:
        with pytest.raises(OSError):
            pair.wire.send([bytes(64 * 1024 * 1024)])
    finally:
        pair.close()


def test_many_parts_are_sent_in_order(pair: Pair) -> None:
    parts = [bytes([n % 256]) * (n % 7) for n in range(2000)]
    thread = threading.Thread(target=lambda: (pair.wire.send(parts), pair.wire.cut()))
    thread.start()
    assert pair.answer() == b"".join(parts)
    thread.join()


def test_cut_from_another_thread_ends_the_reading(pair: Pair) -> None:
    timer = threading.Timer(0.05, pair.wire.abort)
    timer.start()
    assert pair.wire.read(10) is None
    assert pair.answer() == abort_pdu(0)
    timer.join()
