"""A node that speaks TLS beside plain DICOM: who gets in, and attacks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.certificates import Authority
from tests.e2e.harness import Node, make_series
from tests.e2e.tls_node import (
    HANDSHAKE_SECONDS,
    PER_ADDRESS,
    REQUEST_SECONDS,
    SecureNode,
    Site,
    call,
    event_texts,
    files_of,
    make_receiver,
    make_site,
    wrap,
)
from tests.peers import (
    Association,
    Cut,
    Rejected,
    pdu,
    run_program,
    send_items,
    wait_for,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[SecureNode]:
    running = make_receiver(tmp_path_factory.mktemp("receiver"), site)
    yield running
    assert running.stop() == 0


# Who gets in


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_store_over_tls_beside_plain(receiver: SecureNode, site: Site, version: str) -> None:
    items = make_series("tls").items[:4]
    secure = wrap(site, site.ct, version=version)
    assert set(send_items(receiver.tls_port, items[:3], calling="CT", secure=secure)) == {0x0000}
    assert send_items(receiver.port, items[3:], calling="CT1") == [0x0000]
    for item in items:
        row = receiver.instance(item.sop_instance_uid)
        assert row is not None
        assert receiver.stored_part10(row).endswith(item.data)


@pytest.mark.peers
def test_dcmtk_stores_over_tls(receiver: SecureNode, site: Site, tmp_path: Path) -> None:
    series = make_series("tls dcmtk")
    paths = series.write(tmp_path / "series")
    where = ["-aet", "CT", "-aec", "DICOMNODE", "127.0.0.1", receiver.tls_port]
    assert run_program("echoscu", *files_of(site.ct, site), *where).returncode == 0
    done = run_program("storescu", *files_of(site.ct, site), *where, *paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(receiver.instance(i.sop_instance_uid) for i in series.items)


@pytest.mark.peers
@pytest.mark.parametrize("who", ["plain", "anonymous", "retired profile"])
def test_dcmtk_is_refused(receiver: SecureNode, site: Site, who: str) -> None:
    options = {"plain": [], "anonymous": ["+tla", "-ic"], "retired profile": [*files_of(site.ct, site), "+pa"]}[who]
    where = ["-aet", "CT", "-aec", "DICOMNODE", "127.0.0.1", receiver.tls_port]
    done = run_program("echoscu", "-to", "5", "-ta", "5", *options, *where)
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("identity", "titles", "answer"),
    [
        ("ct", {"calling": "CT"}, None),
        ("mr", {"calling": "MR"}, None),
        ("mr", {"calling": "CT"}, (1, 1, 3)),
        ("ct", {"calling": "MR"}, (1, 1, 3)),
        ("ct", {"calling": "NOBODY"}, (1, 1, 3)),
        ("ct", {"calling": "CT1"}, (1, 1, 3)),
        ("ct", {"calling": "CT", "called": "OTHER"}, (1, 1, 7)),
        ("mr", {"calling": "WS", "called": "QR"}, None),
        ("mr", {"calling": "WS"}, (1, 1, 7)),
    ],
)
def test_certificate_and_ae_title_belong_together(
    receiver: SecureNode, site: Site, identity: str, titles: dict[str, str], answer: tuple[int, int, int] | None
) -> None:
    if answer is None:
        with call(receiver, site, getattr(site, identity), **titles) as assoc:
            assert assoc.echo() == 0x0000
        return
    with pytest.raises(Rejected) as caught:
        call(receiver, site, getattr(site, identity), **titles)
    assert caught.value.fields == answer


def test_rejection_tells_the_administrator_the_certificate(receiver: SecureNode, site: Site) -> None:
    with contextlib.suppress(Rejected):
        call(receiver, site, site.mr, calling="CT")

    def told() -> bool:
        texts = event_texts(receiver, "association-rejected")
        return any(site.mr.sha256 in text and "peer 'ct'" in text for text in texts)

    receiver.wait(told, 20, "the event names the certificate")


def test_peer_with_tls_may_not_call_plain(receiver: SecureNode) -> None:
    with pytest.raises(Rejected) as caught:
        Association(receiver.port, calling="CT")
    assert caught.value.fields == (1, 1, 3)


@pytest.mark.parametrize("fault", ["none", "expired", "other authority"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_handshakes_that_are_refused(
    receiver: SecureNode, site: Site, tmp_path: Path, fault: str, version: str
) -> None:
    other = Authority(tmp_path, "Other CA")
    identity = {
        "none": None,
        "expired": site.authority.issue("CT", dns=["ct.hospital"], days=-1, start_days=-5, file="expired"),
        "other authority": other.issue("CT", dns=["ct.hospital"]),
    }[fault]
    with pytest.raises(Cut):
        Association(receiver.tls_port, calling="CT", secure=wrap(site, identity, version=version))
    receiver.wait(lambda: event_texts(receiver, "tls-refused"), 20, "the event is there")


def test_plain_dicom_at_the_tls_port_is_cut_at_once(receiver: SecureNode) -> None:
    begin = time.monotonic()
    with pytest.raises(Cut):
        Association(receiver.tls_port, calling="CT1")
    assert time.monotonic() - begin < HANDSHAKE_SECONDS
    receiver.wait(lambda: "does not speak TLS" in str(event_texts(receiver, "tls-refused")), 20, "the event is there")


def test_the_end_of_a_peers_certificate_is_known_from_its_call(receiver: SecureNode, site: Site) -> None:
    with call(receiver, site, site.ct, calling="CT") as assoc:
        assert assoc.echo() == 0x0000

    def seen() -> dict[str, Any]:
        peers = json.loads(receiver.cli("status", "--json"))["tls"]["peers"]
        return {p["peer"]: p for p in peers}

    found = receiver.wait(lambda: seen().get("ct"), 20, "a heartbeat brings it")
    assert found["not_after"] == site.ct.certificate.not_valid_after_utc.isoformat(timespec="seconds")
    assert (found["state"], found["days_left"]) == ("valid", 89)
    assert receiver.stop() == 0
    receiver.start("run", "receiver")
    assert seen().get("ct") == found, "its next life knows it before the peer calls again"


# Attacks


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))


def ended(sock: socket.socket) -> bool:
    with contextlib.suppress(TimeoutError):
        sock.settimeout(0.01)
        try:
            while sock.recv(4096):
                pass
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            return True
        return True
    return False


def rss(node: Node) -> int:
    return int(psutil.Process(node.pids()["receiver-1"]).memory_info().rss)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half a hello"])
def test_handshakes_that_stop_lock_nobody_out(receiver: SecureNode, site: Site, said: bytes) -> None:
    """Two more than one address may have: others get in at once by both ports, and the loris is cut."""
    flood = [connect(receiver.tls_port, "127.0.0.9") for _ in range(PER_ADDRESS + 2)]
    for sock in flood:
        with contextlib.suppress(OSError):
            sock.sendall(said)
    begin = time.monotonic()
    with call(receiver, site, site.ct, calling="CT") as assoc:
        assert assoc.echo() == 0x0000
    with Association(receiver.port, calling="CT1") as plain:
        assert plain.echo() == 0x0000
    assert time.monotonic() - begin < HANDSHAKE_SECONDS + 3
    wait_for(lambda: all(ended(s) for s in flood), HANDSHAKE_SECONDS + 5, "the loris is cut")
    for sock in flood:
        sock.close()


def test_handshake_by_drops_ends_at_its_deadline(receiver: SecureNode, site: Site) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    speaker = ssl.create_default_context(cafile=str(site.authority.ca_file)).wrap_bio(
        incoming, outgoing, server_hostname="localhost"
    )
    with pytest.raises(ssl.SSLWantReadError):
        speaker.do_handshake()
    sock = connect(receiver.tls_port)
    begin = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in outgoing.read():
            sock.sendall(bytes([byte]))
            if ended(sock):
                break
            time.sleep(0.05)
    took = time.monotonic() - begin
    sock.close()
    assert took < HANDSHAKE_SECONDS + 3


def test_silence_after_the_handshake_is_cut(receiver: SecureNode, site: Site) -> None:
    sock = wrap(site, site.ct)(connect(receiver.tls_port))
    wait_for(lambda: ended(sock), REQUEST_SECONDS + HANDSHAKE_SECONDS + 3, "it is cut")
    sock.close()


@pytest.mark.parametrize("kind", range(1, 8), ids=lambda k: f"type {k}")
@pytest.mark.parametrize("established", [False, True], ids=["before", "after"])
def test_four_gigabytes_over_tls_are_refused_unread(
    receiver: SecureNode, site: Site, kind: int, established: bool
) -> None:
    if established:
        sock = call(receiver, site, site.ct, calling="CT").sock
    else:
        sock = wrap(site, site.ct)(connect(receiver.tls_port))
    before = rss(receiver)
    deadline = time.monotonic() + 3
    sock.settimeout(3)
    sent = 0
    with contextlib.suppress(OSError):
        sock.sendall(pdu(kind, b"", 0xFFFFFFFF))
        while time.monotonic() < deadline:
            sent += sock.send(bytes(1 << 20))
    assert time.monotonic() < deadline, f"{sent} bytes were taken"
    assert rss(receiver) - before < 20 << 20
    wait_for(lambda: ended(sock), 3, "the connection is closed")
    sock.close()


def test_garbage_at_the_tls_port_leaves_nothing_behind(receiver: SecureNode, site: Site) -> None:
    before = psutil.Process(receiver.pids()["receiver-1"])
    threads, descriptors = before.num_threads(), before.num_fds()
    for number in range(60):
        sock = connect(receiver.tls_port)
        with contextlib.suppress(OSError):
            sock.sendall((b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"", os.urandom(300))[number % 4])
        sock.close()
        if number % 6 == 0:
            with contextlib.suppress(Cut):
                call(receiver, site, site.ct, calling="CT").drop()
    receiver.wait(lambda: before.num_threads() <= threads + 2, 10, "threads end")
    receiver.wait(lambda: before.num_fds() <= descriptors + 6, 10, "descriptors are closed")
    with call(receiver, site, site.ct, calling="CT") as assoc:
        assert assoc.echo() == 0x0000
