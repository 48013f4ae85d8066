"""Our TLS against programs of others: DCMTK, Orthanc and openssl, as callers and as called."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, evt

from dicomnode.certificates import binding_fault
from dicomnode.errors import NodeError, PeerAway
from dicomnode.settings import Peer, Tls
from dicomnode.tls import Transport
from dicomnode.tls_context import SecureSocket, build_contexts
from tests.certificates import Authority, Issued
from tests.peers import VERIFICATION, Association, Cut, Orthanc, StoreScp, run_program

pytestmark = pytest.mark.peers
RSA = "rsa"
"""DCMTK's default profile has no suites for ECDSA certificates."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Issued:
    return authority.issue("node", dns=["localhost"], ips=["127.0.0.1"], kind=RSA)


@pytest.fixture(scope="module")
def modality(authority: Authority) -> Issued:
    return authority.issue("CT1", ips=["127.0.0.1"], kind=RSA)


@pytest.fixture(scope="module")
def tls(authority: Authority, own: Issued) -> Tls:
    return Tls(port=0, certificate_file=own.certificate_file, key_file=own.key_file, ca_file=authority.ca_file)


class Acceptor:
    """pynetdicom's acceptor over our server context; ``certificates`` are those of who got in."""

    def __init__(self, tls: Tls) -> None:
        self.certificates: list[str] = []
        self.versions: list[str] = []
        self.stored = 0
        ae = AE(ae_title="NODE")
        ae.add_supported_context(VERIFICATION)
        ae.add_supported_context("1.2.840.10008.5.1.4.1.1.2", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"])
        handlers = [(evt.EVT_CONN_OPEN, self._opened), (evt.EVT_C_STORE, self._store)]
        context = build_contexts(tls).server
        self._server = ae.start_server(("127.0.0.1", 0), block=False, ssl_context=context, evt_handlers=handlers)
        self.port = int(self._server.socket.getsockname()[1])

    def _opened(self, event: Any) -> None:
        from dicomnode.certificates import certificate_of

        sock = event.assoc.dul.socket.socket
        shown = certificate_of(sock)
        self.certificates.append(shown.sha256 if shown else "")
        self.versions.append(sock.version())

    def _store(self, event: Any) -> int:
        self.stored += 1
        return 0x0000

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def acceptor(tls: Tls) -> Iterator[Acceptor]:
    running = Acceptor(tls)
    yield running
    running.stop()


def secured(identity: Issued, authority: Authority, *more: str) -> list[str]:
    """DCMTK's options: key before certificate."""
    return ["+tls", str(identity.key_file), str(identity.certificate_file), "+cf", str(authority.ca_file), *more]


@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"], ids=["non-downgrading", "BCP 195", "extended"])
def test_dcmtk_calls(acceptor: Acceptor, authority: Authority, modality: Issued, profile: str) -> None:
    done = run_program("echoscu", "-v", *secured(modality, authority, profile), "127.0.0.1", acceptor.port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert acceptor.certificates[-1] == modality.sha256


def test_dcmtk_stores(acceptor: Acceptor, authority: Authority, modality: Issued, tmp_path: Path) -> None:
    from tests.e2e.harness import make_series

    paths = make_series("tls", slices=32).write(tmp_path / "series")[:5]
    before = acceptor.stored
    done = run_program("storescu", *secured(modality, authority), "127.0.0.1", acceptor.port, *paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert acceptor.stored - before == 5


@pytest.mark.parametrize("who", ["plain", "anonymous", "stranger", "expired", "retired profile"])
def test_dcmtk_is_refused(acceptor: Acceptor, authority: Authority, modality: Issued, tmp_path: Path, who: str) -> None:
    stranger = Authority(tmp_path, "Other CA").issue("CT1", kind=RSA)
    options = {
        "plain": [],
        "anonymous": ["+tla", "-ic"],
        "stranger": secured(stranger, authority),
        "expired": secured(authority.issue("CT1", days=-1, start_days=-9, kind=RSA, file="expired"), authority),
        "retired profile": secured(modality, authority, "+pa"),  # AES with CBC and SHA-1
    }[who]
    admitted = len(acceptor.certificates)
    done = run_program("echoscu", "-to", "5", "-ta", "5", *options, "127.0.0.1", acceptor.port)
    assert done.returncode != 0
    assert len(acceptor.certificates) == admitted


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["-tls1_1"], "alert protocol version"),
        (["-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"], "alert handshake failure"),
        (["-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256"], "alert handshake failure"),
        (["-tls1_2"], "TLSv1.2, Cipher is ECDHE-RSA-AES256-GCM-SHA384"),
        (["-tls1_3"], "TLSv1.3, Cipher is TLS_AES_256_GCM_SHA384"),
        (["-tls1_3", "-groups", "P-256"], "TLSv1.3, Cipher is"),
        (["-alpn", "dicom"], "ALPN protocol: dicom"),
    ],
)
def test_openssl_negotiates(
    acceptor: Acceptor, authority: Authority, modality: Issued, options: list[str], answer: str
) -> None:
    if "-tls1_1" in options:
        options = [*options, "-cipher", "ALL:@SECLEVEL=0"]
    where = f"127.0.0.1:{acceptor.port}"
    files = ["-cert", modality.certificate_file, "-key", modality.key_file, "-CAfile", authority.ca_file]
    done = run_program("openssl", "s_client", "-connect", where, *files, *options)
    said = done.stdout + done.stderr
    assert answer in said, said
    if "alert" not in answer:
        assert "Verify return code: 0 (ok)" in said
        assert "Compression: NONE" in said
        assert "Secure Renegotiation IS supported" in said or "TLSv1.3" in said
        assert "session ticket" not in said.lower()


# We call


def secure_with(transport: Transport, peer: Peer) -> Any:
    return lambda sock: transport.wrap_client(sock, peer)


def pacs(port: int, **keys: Any) -> Peer:
    return Peer(**{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port, "tls": True, **keys})


@pytest.fixture(scope="module")
def storescp(authority: Authority, modality: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreScp]:
    running = StoreScp(tmp_path_factory.mktemp("scp") / "in", *secured(modality, authority))
    yield running
    running.stop()


def test_we_store_to_dcmtk(tls: Tls, storescp: StoreScp) -> None:
    from tests.e2e.harness import make_series

    item = make_series("tls out").items[0]
    secure = secure_with(Transport(tls), pacs(storescp.port))
    with Association(storescp.port, called="PACS", calling="NODE", secure=secure) as assoc:
        assert isinstance(assoc.sock, SecureSocket)
        assert assoc.echo() == assoc.store(item) == 0x0000
    assert len(storescp.files()) == 1


def test_dcmtk_wants_our_certificate(authority: Authority, storescp: StoreScp) -> None:
    """TLS 1.2 tells it in the handshake, TLS 1.3 at the first read."""
    transport = Transport(Tls(ca_file=authority.ca_file))
    with pytest.raises((PeerAway, Cut), match=r"(?i)certificate|refused|closed|EOF"):
        Association(storescp.port, secure=secure_with(transport, pacs(storescp.port)))


def test_dcmtk_with_the_certificate_of_another(tls: Tls, storescp: StoreScp, modality: Issued) -> None:
    with pytest.raises(PeerAway) as caught:
        Association(storescp.port, secure=secure_with(Transport(tls), pacs(storescp.port, certificate_name="PACS")))
    assert modality.sha256 in caught.value.hint


def test_orthanc_both_ways(tls: Tls, acceptor: Acceptor, authority: Authority, tmp_path: Path) -> None:
    issued = authority.issue("PACS", ips=["127.0.0.1"], kind=RSA)
    orthanc = Orthanc(
        tmp_path / "orthanc",
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(issued.certificate_file),
        DicomTlsPrivateKey=str(issued.key_file),
        DicomTlsTrustedCertificates=str(authority.ca_file),
        DicomModalities={"node": {"AET": "NODE", "Host": "127.0.0.1", "Port": acceptor.port, "UseDicomTls": True}},
    ).start()
    try:
        from tests.e2e.harness import make_series

        item = make_series("tls orthanc").items[0]
        peer = pacs(orthanc.dicom_port, certificate_name="PACS")
        with Association(
            orthanc.dicom_port, called="PACS", calling="NODE", secure=secure_with(Transport(tls), peer)
        ) as assoc:
            assert isinstance(assoc.sock, SecureSocket)
            assert binding_fault(peer, assoc.sock.certificate, required=True) == ""
            assert assoc.echo() == assoc.store(item) == 0x0000
        (instance,) = orthanc.get("/instances")
        before = acceptor.stored
        orthanc.post("/modalities/node/store", [instance])
        assert acceptor.stored == before + 1
        assert acceptor.certificates[-1] == issued.sha256
    finally:
        orthanc.stop()


def test_silent_caller_of_ours(tls: Tls) -> None:
    """A listener that never answers, as a firewall that swallows everything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sock = socket.create_connection(listening.getsockname(), timeout=5)
        with pytest.raises(NodeError, match="within its deadline"):
            Transport(tls.model_copy(update={"handshake_seconds": 0.2})).wrap_client(sock, pacs(1))
