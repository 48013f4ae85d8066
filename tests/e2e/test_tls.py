"""A node that speaks TLS beside plain DICOM: peers of others, attacks, certificates that change."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pydicom
import pytest

from tests.certificates import Authority, Issued, make_key, write_key
from tests.e2e.harness import SEG, Node, make_series, rule
from tests.peers import (
    CT_IMAGE,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    VERIFICATION,
    Association,
    Cut,
    Orthanc,
    Rejected,
    StoreScp,
    free_port,
    pdu,
    run_program,
    send_items,
    wait_for,
)

pytest.skip("TLS is not wired yet", allow_module_level=True)

HANDSHAKE_SECONDS, REQUEST_SECONDS = 2.0, 2.0
PER_ADDRESS, TOTAL = 8, 24
RSA = "rsa"


@dataclass
class Site:
    """An authority of the hospital and what it issued."""

    folder: Path
    authority: Authority
    node: Issued
    ct: Issued
    mr: Issued
    pacs: Issued

    def tls(self, **keys: Any) -> dict[str, Any]:
        return {
            "host": "127.0.0.1",
            "port": free_port(),
            "certificate_file": self.node.certificate_file,
            "key_file": self.node.key_file,
            "ca_file": self.authority.ca_file,
            "handshake_seconds": HANDSHAKE_SECONDS,
            **keys,
        }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    authority = Authority(folder / "ca")
    return Site(
        folder,
        authority,
        authority.issue("node", dns=["localhost"], ips=["127.0.0.1"], kind=RSA),
        authority.issue("CT of room 1", dns=["ct.hospital"], kind=RSA),
        authority.issue("MR of room 2", dns=["mr.hospital"], kind=RSA),
        authority.issue("PACS", dns=["pacs.hospital"], kind=RSA),
    )


class SecureNode(Node):
    """``tls_port`` beside ``port``."""

    def __init__(self, folder: Path, site: Site, *, tls: dict[str, Any] | None = None, **keys: Any) -> None:
        section = site.tls(**(tls or {}))
        self.tls_port = int(section["port"])
        super().__init__(folder, tls=section, **keys)


PEERS: list[dict[str, Any]] = [
    {"name": "ct", "ae_title": "CT", "tls": True, "certificate_name": "ct.hospital", "allow": ["echo", "store"]},
    {"name": "mr", "ae_title": "MR", "tls": True, "certificate_name": "MR of room 2", "allow": ["echo", "store"]},
    {
        "name": "workstation",
        "ae_title": "WS",
        "tls": True,
        "certificate_name": "mr.hospital",
        "called_ae": ["QR"],
        "allow": ["echo", "find", "move", "get"],
    },
]


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[SecureNode]:
    running = SecureNode(
        tmp_path_factory.mktemp("receiver"),
        site,
        peers=PEERS,
        node={"more_ae_titles": ["QR"]},
        dimse={
            "workers": 1,
            "request_seconds": REQUEST_SECONDS,
            "pdu_seconds": 2.0,
            "max_connections": TOTAL,
            "max_connections_per_address": PER_ADDRESS,
        },
    )
    running.start("run", "receiver")
    yield running
    assert running.stop() == 0


def wrap(site: Site, identity: Issued | None, *, version: str = "") -> Callable[[socket.socket], socket.socket]:
    """A caller's TLS, with Python's own settings."""
    context = ssl.create_default_context(cafile=str(site.authority.ca_file))
    if identity is not None:
        context.load_cert_chain(*identity.files)
    if version:
        context.maximum_version = context.minimum_version = ssl.TLSVersion[version]

    def secure(sock: socket.socket) -> socket.socket:
        try:
            return context.wrap_socket(sock, server_hostname="127.0.0.1")
        except OSError as error:
            raise Cut(f"handshake: {error}") from error

    return secure


def call(node: SecureNode, site: Site, identity: Issued | None, **keys: Any) -> Association:
    keys.setdefault("contexts", ((VERIFICATION, [IMPLICIT_LITTLE]), (CT_IMAGE, [EXPLICIT_LITTLE])))
    return Association(node.tls_port, secure=wrap(site, identity), **keys)


def files_of(identity: Issued, site: Site) -> list[str]:
    """DCMTK's options: key before certificate."""
    return ["+tls", str(identity.key_file), str(identity.certificate_file), "+cf", str(site.authority.ca_file)]


def event_texts(node: Node, kind: str) -> list[str]:
    return [e["text"] for e in node.events(kind)]


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

    receiver.wait(told, 5, "the event names the certificate")


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
    receiver.wait(lambda: event_texts(receiver, "tls-refused"), 5, "the event is there")


def test_plain_dicom_at_the_tls_port_is_cut_at_once(receiver: SecureNode) -> None:
    begin = time.monotonic()
    with pytest.raises(Cut):
        Association(receiver.tls_port, calling="CT1")
    assert time.monotonic() - begin < HANDSHAKE_SECONDS
    receiver.wait(lambda: "does not speak TLS" in str(event_texts(receiver, "tls-refused")), 5, "the event is there")


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


# Certificates that change


def shown_at(port: int) -> str:
    """SHA-256 of the certificate that the node shows; the caller then leaves."""
    import hashlib

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock, context.wrap_socket(sock) as secure:
        der = secure.getpeercert(binary_form=True)
    assert der is not None
    return hashlib.sha256(der).hexdigest()


def test_certificates_change_without_a_restart(tmp_path: Path, site: Site) -> None:
    own = site.authority.issue("node", ips=["127.0.0.1"], file="changing")
    good = own.certificate_file.read_bytes()
    node = SecureNode(
        tmp_path / "node",
        site,
        tls={"certificate_file": own.certificate_file, "key_file": own.key_file},
        peers=PEERS,
        dimse={"workers": 2},
    ).start("run", "receiver")
    pids = node.pids()
    items = make_series("reload").items[:2]
    with call(node, site, site.ct, calling="CT") as assoc:
        assert assoc.store(items[0]) == 0x0000
        renewed = site.authority.issue("node", ips=["127.0.0.1"], file="renewed")
        own.certificate_file.write_bytes(renewed.certificate_file.read_bytes())
        own.key_file.write_bytes(renewed.key_file.read_bytes())
        node.wait(lambda: {shown_at(node.tls_port) for _ in range(8)} == {renewed.sha256}, 20, "all show the new one")
        assert assoc.store(items[1]) == 0x0000  # the association of before goes on
    write_key(own.key_file, make_key())  # a key that does not fit
    node.wait(lambda: [shown_at(node.tls_port), event_texts(node, "tls-files")][1], 20, "the fault is told")
    assert shown_at(node.tls_port) == renewed.sha256
    with call(node, site, site.ct, calling="CT") as assoc:
        assert assoc.echo() == 0x0000
    assert good != own.certificate_file.read_bytes()
    assert node.pids() == pids
    assert node.stop() == 0


# The node calls others


@pytest.mark.peers
def test_results_go_to_orthanc_over_tls(tmp_path: Path, site: Site) -> None:
    """The whole way: modality to node, node to PACS, every connection by TLS and with both certificates."""
    orthanc = Orthanc(
        tmp_path / "orthanc",
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(site.pacs.certificate_file),
        DicomTlsPrivateKey=str(site.pacs.key_file),
        DicomTlsTrustedCertificates=str(site.authority.ca_file),
    ).start()
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": orthanc.dicom_port, "tls": True}
    node = SecureNode(
        tmp_path / "node",
        site,
        peers=[*PEERS, {**pacs, "certificate_name": "pacs.hospital"}],
        rules=[rule("all", {"Modality": "CT"}, to=["pacs"])],
    )
    try:
        node.start()
        assert "answered" in node.cli("echo", "pacs")
        series = make_series("tls journey")
        assert set(send_items(node.tls_port, series.items, calling="CT", secure=wrap(site, site.ct))) == {0x0000}
        node.wait_job(series.series_uid)
        node.wait_delivered(series.series_uid)
        found = orthanc.instances(series.study_uid)
        assert {k: len(v) for k, v in found.items()} == {"SEG": 1, "SR": 1}
        seg = pydicom.dcmread(_file(tmp_path, orthanc.file(found["SEG"][0])))
        assert seg.SOPClassUID == SEG
        assert node.stop() == 0
    finally:
        orthanc.stop()


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "result.dcm"
    path.write_bytes(data)
    return path


@pytest.mark.peers
def test_orthanc_sends_to_the_node_over_tls(tmp_path: Path, site: Site, receiver: SecureNode) -> None:
    orthanc = Orthanc(
        tmp_path / "orthanc",
        aet="CT",
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(site.ct.certificate_file),
        DicomTlsPrivateKey=str(site.ct.key_file),
        DicomTlsTrustedCertificates=str(site.authority.ca_file),
        DicomModalities={
            "node": {"AET": "DICOMNODE", "Host": "127.0.0.1", "Port": receiver.tls_port, "UseDicomTls": True}
        },
    ).start()
    try:
        item = make_series("tls orthanc").items[0]
        with Association(orthanc.dicom_port, called="CT", calling="X", secure=_as(site)) as assoc:
            assert assoc.store(item) == 0x0000
        (instance,) = orthanc.get("/instances")
        orthanc.post("/modalities/node/echo", {})
        orthanc.post("/modalities/node/store", [instance])
        assert receiver.instance(item.sop_instance_uid) is not None
    finally:
        orthanc.stop()


def _as(site: Site) -> Callable[[socket.socket], socket.socket]:
    context = ssl.create_default_context(cafile=str(site.authority.ca_file))
    context.check_hostname = False
    context.load_cert_chain(*site.mr.files)
    return context.wrap_socket


@pytest.mark.peers
def test_delivery_waits_for_the_right_certificate(tmp_path: Path, site: Site) -> None:
    """A PACS that shows the certificate of another gets nothing; with its own one it gets everything."""
    wrong = StoreScp(tmp_path / "wrong", *files_of(site.mr, site))
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": wrong.port, "tls": True}
    node = SecureNode(
        tmp_path / "node",
        site,
        peers=[*PEERS, {**pacs, "certificate_sha256": site.pacs.sha256}],
        rules=[rule("all", {"Modality": "CT"}, to=["pacs"])],
    ).start()
    series = make_series("tls wrong pacs")
    assert set(send_items(node.tls_port, series.items, calling="CT", secure=wrap(site, site.ct))) == {0x0000}
    node.wait_job(series.series_uid)
    node.wait(
        lambda: any("certificate" in (d["last_error"] or "") for d in node.deliveries(series.series_uid)),
        30,
        "the delivery tells why it waits",
    )
    assert wrong.files() == []
    wrong.stop()
    right = StoreScp(tmp_path / "right", *files_of(site.pacs, site), port=wrong.port)
    try:
        node.wait_delivered(series.series_uid)
        assert len(right.files()) == 2
        assert node.stop() == 0
    finally:
        right.stop()


@pytest.mark.peers
def test_move_over_tls(receiver: SecureNode, site: Site, tmp_path: Path) -> None:
    """movescu asks by TLS for objects that the node then sends by TLS to a listed peer."""
    scp = StoreScp(tmp_path / "moved", *files_of(site.pacs, site))
    node = SecureNode(
        tmp_path / "node",
        site,
        node={"more_ae_titles": ["QR"]},
        peers=[
            *PEERS,
            {
                "name": "pacs",
                "ae_title": "PACS",
                "host": "127.0.0.1",
                "port": scp.port,
                "tls": True,
                "certificate_name": "PACS",
            },
        ],
        dimse={"workers": 1},
    ).start("run", "receiver")
    try:
        series = make_series("tls move")
        assert set(send_items(node.tls_port, series.items, calling="CT", secure=wrap(site, site.ct))) == {0x0000}
        done = run_program(
            "movescu", "-S", *files_of(site.mr, site), "-aet", "WS", "-aec", "QR", "-aem", "PACS",
            "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={series.study_uid}",
            "127.0.0.1", node.tls_port,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(scp.files()) == len(series.items)
        assert node.stop() == 0
    finally:
        scp.stop()


@pytest.mark.peers
def test_verbs_speak_tls(tmp_path: Path, site: Site) -> None:
    scp = StoreScp(tmp_path / "in", *files_of(site.pacs, site))
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": scp.port, "tls": True}
    try:
        right = SecureNode(tmp_path / "right", site, peers=[{**pacs, "certificate_name": "PACS"}])
        assert "answered" in right.cli("echo", "pacs")
        paths = make_series("tls verbs").write(tmp_path / "series")[:2]
        right.cli("send", "pacs", *map(str, paths))
        assert len(scp.files()) == 2
        wrong = SecureNode(tmp_path / "wrong", site, peers=[{**pacs, "certificate_name": "OTHER"}])
        said = wrong.cli("echo", "pacs", code=1)
        assert site.pacs.sha256 in said and "certificate_name" in said
    finally:
        scp.stop()
