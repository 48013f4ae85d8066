"""TLS with programs of others both ways, and certificates that change without a restart."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pydicom
import pytest

from tests.certificates import Issued, make_key, write_key
from tests.e2e.harness import SEG, make_series, rule
from tests.e2e.tls_node import (
    PEERS,
    SecureNode,
    Site,
    call,
    files_of,
    make_receiver,
    make_site,
    orthanc_as,
    wrap,
)
from tests.peers import (
    Association,
    Orthanc,
    StoreScp,
    run_program,
    send_items,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[SecureNode]:
    running = make_receiver(tmp_path_factory.mktemp("receiver"), site)
    yield running
    assert running.stop() == 0


# Certificates that change


def shown_by_all(port: int, caller: Issued) -> set[str]:
    """SHA-256 of each certificate that the node shows to eight connections at once.

    Connections that are open at the same time are shared between the receivers, and a receiver
    looks at its files when a connection comes.
    """
    import hashlib

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(caller.certificate_file, caller.key_file)
    with ExitStack() as open_together:
        shown = set()
        for _ in range(8):
            sock = open_together.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            secure = open_together.enter_context(context.wrap_socket(sock))
            der = secure.getpeercert(binary_form=True)
            assert der is not None
            shown.add(hashlib.sha256(der).hexdigest())
    return shown


def told(node: SecureNode, words: str) -> set[str]:
    """The processes that said so of the TLS files: each reads them at its own moment."""
    return {event["subject"] for event in node.events("tls-files") if words in event["text"]}


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
    pids, both = node.pids(), {"receiver-1", "receiver-2"}
    items = make_series("reload").items[:2]

    def look() -> set[str]:
        return shown_by_all(node.tls_port, site.ct)

    assert look() == {own.sha256}
    with call(node, site, site.ct, calling="CT") as assoc:
        assert assoc.store(items[0]) == 0x0000
        renewed = site.authority.issue("node", ips=["127.0.0.1"], file="renewed")
        own.certificate_file.write_bytes(renewed.certificate_file.read_bytes())
        own.key_file.write_bytes(renewed.key_file.read_bytes())
        node.wait(lambda: [look(), told(node, "read again")][1] == both, 20, "both read the new one")
        assert look() == {renewed.sha256}
        assert assoc.store(items[1]) == 0x0000  # the association of before goes on
    write_key(own.key_file, make_key())  # a key that does not fit
    node.wait(lambda: [look(), told(node, "is not the key of")][1] == both, 20, "the fault is told")
    assert look() == {renewed.sha256}
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
    orthanc = orthanc_as(tmp_path / "orthanc", site, site.ct, "CT", receiver, "DICOMNODE").start()
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
def test_query_over_tls(receiver: SecureNode, site: Site) -> None:
    series = make_series("tls query")
    assert set(send_items(receiver.tls_port, series.items[:2], calling="CT", secure=wrap(site, site.ct))) == {0x0000}
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={series.study_uid}"]
    where = ["-aet", "WS", "-aec", "QR", "127.0.0.1", receiver.tls_port]
    done = run_program("findscu", "-v", "-S", *files_of(site.mr, site), *keys, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert series.study_uid in done.stdout + done.stderr


@pytest.mark.peers
def test_move_over_tls(site: Site, tmp_path: Path) -> None:
    """Orthanc asks by TLS for objects that the node then sends by TLS to a listed peer."""
    scp = StoreScp(tmp_path / "moved", *files_of(site.pacs, site))
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": scp.port, "tls": True}
    node = SecureNode(
        tmp_path / "node", site, peers=[*PEERS, {**pacs, "certificate_name": "PACS"}], dimse={"workers": 1}
    ).start("run", "receiver")
    workstation = orthanc_as(tmp_path / "orthanc", site, site.mr, "WS", node, "QR").start()
    try:
        series = make_series("tls move")
        assert set(send_items(node.tls_port, series.items, calling="CT", secure=wrap(site, site.ct))) == {0x0000}
        wanted = {"Level": "Study", "Resources": [{"StudyInstanceUID": series.study_uid}], "TargetAet": "PACS"}
        workstation.post("/modalities/node/move", wanted)
        assert len(scp.files()) == len(series.items)
        assert node.stop() == 0
    finally:
        workstation.stop()
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
