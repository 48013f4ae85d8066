"""The socket guard against what RELIABILITY.md lists: floods, lies about length, slowness."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.harness import Node, make_series
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, Association, Cut, associate_rq, command_set, pdu, wait_for

PER_ADDRESS, TOTAL = 8, 24
REQUEST_SECONDS, PDU_SECONDS = 2.0, 2.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    running = Node(
        tmp_path_factory.mktemp("attacks"),
        dimse={
            "workers": 1,
            "request_seconds": REQUEST_SECONDS,
            "pdu_seconds": PDU_SECONDS,
            "max_connections": TOTAL,
            "max_connections_per_address": PER_ADDRESS,
        },
    ).start("run", "receiver")
    yield running
    assert running.stop() == 0


def connect(node: Node, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", node.port), timeout=10, source_address=(source, 0))


def ended(sock: socket.socket) -> bool:
    """The other side closed or reset it; what it said before is read away."""
    with contextlib.suppress(TimeoutError):
        sock.settimeout(0.01)
        try:
            while sock.recv(4096):
                pass
        except ConnectionError:
            return True
        return True
    return False


def admitted(node: Node, source: str) -> bool:
    try:
        with Association(node.port, source=source) as assoc:
            return assoc.echo() == 0x0000
    except Cut:
        return False


def rss(node: Node) -> int:
    return psutil.Process(node.pids()["receiver-1"]).memory_info().rss


@pytest.mark.parametrize("said", [b"", b"\x01\x00\x00\x00\x01"], ids=["silent", "five bytes"])
def test_slow_loris_does_not_lock_out_a_listed_peer(node: Node, said: bytes) -> None:
    """Two more than one address may have: echo works at once, and the loris is cut after its deadline."""
    flood = [connect(node, "127.0.0.9") for _ in range(PER_ADDRESS + 2)]
    for sock in flood:
        with contextlib.suppress(OSError):
            sock.sendall(said)
    begin = time.monotonic()
    with Association(node.port) as assoc:
        assert assoc.echo() == 0x0000
    assert time.monotonic() - begin < REQUEST_SECONDS + 3
    wait_for(lambda: all(ended(s) for s in flood), REQUEST_SECONDS + 5, "the loris is cut")
    for sock in flood:
        sock.close()
    wait_for(lambda: admitted(node, "127.0.0.9"), 20, "its address may call again")


def test_connections_of_one_address_are_capped(node: Node) -> None:
    held = [connect(node, "127.0.0.8") for _ in range(PER_ADDRESS)]
    surplus = connect(node, "127.0.0.8")
    wait_for(lambda: ended(surplus), 20, "one too many is closed at once")
    with Association(node.port) as assoc:
        assert assoc.echo() == 0x0000
    for sock in (*held, surplus):
        sock.close()
    node.wait(lambda: any("too many connections" in e["text"] for e in node.events("limit")), 20, "the event is there")

    wait_for(lambda: admitted(node, "127.0.0.8"), 20, "closed connections no longer count")


@pytest.mark.parametrize("kind", range(1, 8), ids=lambda k: f"type {k}")
@pytest.mark.parametrize("established", [False, True], ids=["before", "after"])
def test_four_gigabytes_announced_are_refused_unread(node: Node, kind: int, established: bool) -> None:
    """Length 0xFFFFFFFF and then zeros as fast as the line takes them."""
    if established:
        assoc = Association(node.port)
        sock = assoc.sock
    else:
        sock = connect(node)
    before = rss(node)
    deadline = time.monotonic() + 3
    sock.settimeout(3)
    sent = 0
    with contextlib.suppress(OSError):
        sock.sendall(pdu(kind, b"", 0xFFFFFFFF))
        while time.monotonic() < deadline:
            sent += sock.send(bytes(1 << 20))
    assert time.monotonic() < deadline, f"{sent} bytes were taken"
    assert rss(node) - before < 20 << 20
    wait_for(lambda: ended(sock), 3, "the connection is closed")
    sock.close()


def test_a_pdu_fed_by_drops_ends_at_its_deadline(node: Node) -> None:
    """One byte at a time never lets a plain time-out expire."""
    request = associate_rq("DICOMNODE", "CT1", [(CT_IMAGE, [EXPLICIT_LITTLE])], 16384)
    sock = connect(node)
    begin = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in request:
            sock.sendall(bytes([byte]))
            if ended(sock):
                break
            time.sleep(0.05)
    took = time.monotonic() - begin
    sock.close()
    assert took < REQUEST_SECONDS + 3


@pytest.mark.parametrize("drip", [False, True], ids=["stalled", "drip"])
def test_p_data_that_stalls_is_aborted_at_its_deadline(node: Node, drip: bool) -> None:
    item = make_series("stall").items[0]
    assoc = Association(node.port)
    context = assoc.accepted[CT_IMAGE, EXPLICIT_LITTLE]
    assoc.send(b"".join(assoc.fragments(context, command_set(assoc.store_command(item)), command=True)))
    part = item.data[:5000]
    assoc.send(struct.pack(">BBLLBB", 0x04, 0, 10006, 10002, context, 0) + part)  # half of it
    begin = time.monotonic()
    with contextlib.suppress(Cut):
        while not ended(assoc.sock) and time.monotonic() - begin < PDU_SECONDS + 5:
            if drip:
                assoc.send(b"\0")
            time.sleep(0.1)
    took = time.monotonic() - begin
    assoc.sock.close()
    assert took < PDU_SECONDS + 3
    assert node.instance(item.sop_instance_uid) is None
    node.wait(lambda: any("deadline" in e["text"] for e in node.events("limit")), 20, "the event is there")


def test_an_associations_between_messages_may_be_idle(node: Node) -> None:
    """The deadline is one PDU's: a modality that thinks between two images is not cut."""
    series = make_series("idle")
    with Association(node.port) as assoc:
        assert assoc.store(series.items[0]) == 0x0000
        assert not ended_within(assoc.sock, PDU_SECONDS + 1)
        assoc.sock.settimeout(20)
        assert assoc.store(series.items[1]) == 0x0000


def ended_within(sock: socket.socket, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    sock.settimeout(seconds)
    try:
        return not sock.recv(1) or time.monotonic() < deadline
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_garbage_and_half_closed_connections_leave_nothing_behind(node: Node) -> None:
    before = psutil.Process(node.pids()["receiver-1"])
    threads, descriptors = before.num_threads(), before.num_fds()
    for number in range(60):
        sock = connect(node)
        with contextlib.suppress(OSError):
            sock.sendall((b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"", b"\x09\0\0\0\0\0")[number % 4])
        sock.close()
        if number % 3 == 0:
            with contextlib.suppress(Cut):
                Association(node.port).drop()
    node.wait(lambda: before.num_threads() <= threads + 2, 10, "threads end")
    node.wait(lambda: before.num_fds() <= descriptors + 6, 10, "descriptors are closed")
    with Association(node.port) as assoc:
        assert assoc.echo() == 0x0000
