"""The socket guard on a socket pair: lengths, deadlines, counts."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.receive.guard import A_ABORT_INVALID_PDU, ConnectionCounter, GuardedSocket, Limits

LIMITS = Limits(
    max_pdu=1000,
    max_object=2500,
    pdu_seconds=0.2,
    request_seconds=0.1,
    max_connections=5,
    max_connections_per_address=3,
)


class Pair:
    """A guard and the socket of its peer, over loopback TCP."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.peer = socket.create_connection(server.getsockname())
            ours, _ = server.accept()
        self.assoc = SimpleNamespace(is_established=True, dul=SimpleNamespace(event_queue=queue.SimpleQueue()))
        self.guard: Any = GuardedSocket(self.assoc, ours, LIMITS)
        self.ours = ours

    def close(self) -> None:
        self.peer.close()
        self.ours.close()

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


def test_reads_a_pdu_in_pieces(pair: Pair) -> None:
    pair.peer.sendall(header(4, 6) + b"abc")
    assert pair.guard.recv(6) == header(4, 6)
    pair.peer.sendall(b"def")
    assert pair.guard.recv(6) == b"abcdef", "a body of six bytes is no header"
    pair.peer.sendall(header(4, 0) + header(5, 4) + b"1234")
    assert pair.guard.recv(6) == header(4, 0)
    assert pair.guard.recv(6) == header(5, 4)
    assert pair.guard.recv(4) == b"1234"


@pytest.mark.parametrize(
    ("kind", "length"),
    [(4, 1001), (4, 0xFFFFFFFF), (1, 128 * 1024 + 1), (1, 0xFFFFFFFF), (2, 1 << 20), (3, 5), (5, 5), (6, 5), (7, 5)]
    + [(kind, 1) for kind in (0, 8, 0x44, 0xFF)],
)
def test_length_beyond_the_limit_aborts_before_reading(pair: Pair, kind: int, length: int) -> None:
    pair.peer.sendall(header(kind, length))
    with pytest.raises(OSError, match=f"PDU type 0x{kind:02X} of {length} bytes"):
        pair.guard.recv(6)
    assert pair.answer() == A_ABORT_INVALID_PDU
    assert pair.guard.violation


@pytest.mark.parametrize(("established", "seconds"), [(True, 0.2), (False, 0.1)])
@pytest.mark.parametrize("drip", [True, False])
def test_pdu_has_one_deadline_however_it_drips(pair: Pair, established: bool, seconds: float, drip: bool) -> None:
    pair.assoc.is_established = established
    stop = threading.Event()

    def drips() -> None:
        data = iter(header(4, 900) + bytes(900))
        while not stop.wait(0.01):
            try:
                pair.peer.send(bytes([next(data)]))
            except OSError:
                return

    pair.peer.sendall(header(4, 900)[:1]) if not drip else None
    thread = threading.Thread(target=drips)
    if drip:
        thread.start()
    begin = time.monotonic()
    with pytest.raises(OSError, match="deadline"):
        pair.guard.recv(6)
        pair.guard.recv(900)
    assert seconds * 0.9 < time.monotonic() - begin < seconds + 3
    stop.set()
    if drip:
        thread.join()
    assert "deadline" in pair.guard.violation


def test_endless_fragments_of_one_message(pair: Pair) -> None:
    pair.peer.sendall(2 * (header(4, 1000) + bytes(1000)) + header(4, 600))
    for _ in range(2):
        pair.guard.recv(6)
        pair.guard.recv(1000)
    with pytest.raises(OSError, match="more than 2500 bytes"):
        pair.guard.recv(6)


def test_next_message_counts_from_zero(pair: Pair) -> None:
    for _ in range(5):
        pair.peer.sendall(header(4, 1000) + bytes(1000))
        pair.guard.recv(6)
        pair.guard.recv(1000)
        pair.guard.message_done()
    assert pair.guard.violation == ""


def test_end_of_stream_is_short_data(pair: Pair) -> None:
    pair.peer.sendall(b"abc")
    pair.peer.close()
    assert pair.guard.recv(6) == b"abc"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60))
def test_connections_are_counted(events: list[tuple[bool, str]]) -> None:
    counter = ConnectionCounter(LIMITS)
    model = dict.fromkeys("abc", 0)
    for arrives, address in events:
        if arrives:
            allowed = sum(model.values()) < 5 and model[address] < 3
            assert counter.admit(address) is allowed
            model[address] += allowed
        elif model[address]:
            counter.leave(address)
            model[address] -= 1
        assert counter.total() == sum(model.values())
