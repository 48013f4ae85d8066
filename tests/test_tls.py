"""Real handshakes over loopback: who gets in, who does not, and certificates that change meanwhile."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dicomnode.certificates import parse_certificate
from dicomnode.errors import NodeError, OperatorError, PeerAway, PeerError
from dicomnode.reloading import CHECK_SECONDS, Change
from dicomnode.settings import Peer, Tls
from dicomnode.tls import Transport
from dicomnode.tls_context import SecureSocket, build_contexts
from tests.certificates import SERVER_ONLY, Authority, Issued, make_key, self_signed, write_key
from tests.peers import APPLICATION_CONTEXT, associate_rq, program, run_program

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
PATIENCE = 10.0


@dataclass
class Site:
    """An authority, this node's certificate under it, and settings over both."""

    folder: Path
    authority: Authority
    own: Issued

    def tls(self, **keys: Any) -> Tls:
        base: dict[str, Any] = {
            "port": 0,
            "certificate_file": self.own.certificate_file,
            "key_file": self.own.key_file,
            "ca_file": self.authority.ca_file,
            "handshake_seconds": PATIENCE,
        }
        return Tls(**{**base, **keys})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    authority = Authority(tmp_path / "ca")
    return Site(tmp_path, authority, authority.issue("node", dns=["node.hospital"], ips=["127.0.0.1"]))


def context_of(
    identity: Issued | None,
    authority: Authority,
    *,
    version: str | None = None,
    ciphers: str = "",
    server: bool = False,
) -> ssl.SSLContext:
    """The other side, with Python's own settings."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if not server:
        context.check_hostname = False
    if ciphers:
        context.set_ciphers(ciphers)  # before the certificate: it carries the security level
    context.load_verify_locations(cafile=str(authority.ca_file))
    if identity is not None:
        context.load_cert_chain(*identity.files)
    if version:
        context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


@dataclass
class Met:
    """How a handshake went for both sides; ``read`` is what the client's first read gave."""

    server: SecureSocket | NodeError
    client: ssl.SSLSocket | Exception
    read: bytes | Exception = b""


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def connect() -> Iterator[Callable[[], Pair]]:
    """Both ends of a new connection over loopback."""
    opened: list[socket.socket] = []

    def make() -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            client = socket.create_connection(listening.getsockname(), timeout=PATIENCE)
            server, _ = listening.accept()
        opened.extend((client, server))
        return client, server

    yield make
    for sock in opened:
        sock.close()


@pytest.fixture
def meet(connect: Callable[[], Pair]) -> Iterator[Callable[..., Met]]:
    """Our server against a client of the test; the server then says 'hello'."""
    opened: list[socket.socket] = []

    def call(transport: Transport, context: ssl.SSLContext, **options: Any) -> Met:
        client, server = connect()

        def answer() -> SecureSocket | NodeError:
            try:
                secure = transport.wrap_server(server)
            except NodeError as error:
                return error
            secure.sendall(b"hello")
            return secure

        with ThreadPoolExecutor(1) as pool:
            ours = pool.submit(answer)
            met = Met(PeerError("", ""), ConnectionError())
            try:
                secure = context.wrap_socket(client, **options)
                met.client = secure
                opened.append(secure)
                secure.settimeout(PATIENCE)
                met.read = secure.recv(5)
            except OSError as error:
                if isinstance(met.client, ssl.SSLSocket):
                    met.read = error
                else:
                    met.client = error
                client.close()
            met.server = ours.result(PATIENCE + 5)
        if isinstance(met.server, SecureSocket):
            opened.append(met.server)
        return met

    yield call
    for sock in opened:
        sock.close()


def accepted(met: Met) -> SecureSocket:
    assert isinstance(met.server, SecureSocket), met
    assert met.read == b"hello"
    return met.server


def refused(met: Met, words: str) -> NodeError:
    """The server said no, and the client never got a byte."""
    assert isinstance(met.server, PeerError), met
    assert words in met.server.cause
    assert met.server.hint
    assert met.read != b"hello"
    return met.server


# What is spoken


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_mutual_handshake(site: Site, meet: Callable[..., Met], version: str, kind: str) -> None:
    ct1 = site.authority.issue("CT1", dns=["ct1.hospital"], uris=["urn:ct1"], ips=["10.0.0.5"], kind=kind)
    met = meet(Transport(site.tls()), context_of(ct1, site.authority, version=version))
    server = accepted(met)
    assert server.version() == f"TLSv{version}"
    assert server.certificate is not None
    assert server.certificate.names == ("CT1", "ct1.hospital", "urn:ct1", "10.0.0.5")
    assert server.certificate.sha256 == ct1.sha256
    assert isinstance(met.client, ssl.SSLSocket)
    shown = met.client.getpeercert(binary_form=True)
    assert shown is not None
    assert parse_certificate(shown).sha256 == site.own.sha256
    assert server.compression() is None


def test_newest_version_is_taken(site: Site, meet: Callable[..., Met]) -> None:
    ct1 = site.authority.issue("CT1")
    assert accepted(meet(Transport(site.tls()), context_of(ct1, site.authority))).version() == "TLSv1.3"


@pytest.mark.parametrize(("offered", "least"), [("TLSv1", "1.2"), ("TLSv1_1", "1.2"), ("TLSv1_2", "1.3")])
def test_old_versions_are_refused(site: Site, meet: Callable[..., Met], offered: str, least: str) -> None:
    ct1 = site.authority.issue("CT1")
    context = context_of(ct1, site.authority, ciphers="ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, which is the point
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion[offered]
    refused(meet(Transport(site.tls(minimum_version=least)), context), "versions of TLS below")


@pytest.mark.parametrize(
    "suite",
    ["AES128-GCM-SHA256", "AES256-SHA", "ECDHE-RSA-AES256-SHA384", "DHE-RSA-AES128-GCM-SHA256", "NULL-SHA256", "aNULL"],
)
def test_weak_suites_are_refused(site: Site, meet: Callable[..., Met], suite: str) -> None:
    """Static RSA, CBC, DHE, no encryption, no authentication (RFC 9325 4.1)."""
    site.own = site.authority.issue("node", kind="rsa")
    ct1 = site.authority.issue("CT1")
    context = context_of(ct1, site.authority, ciphers=f"{suite}:@SECLEVEL=0", version="1.2")
    refused(meet(Transport(site.tls()), context), "no cipher suite of PS3.15 B.12")


def test_only_suites_with_forward_secrecy_and_aead_are_offered(site: Site) -> None:
    contexts = build_contexts(site.tls())
    assert contexts.server is not None
    for context in (contexts.client, contexts.server):
        names = {str(c["name"]) for c in context.get_ciphers()}
        assert {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"} <= names
        assert {"ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"} <= names
        assert all(n.startswith(("TLS_", "ECDHE-")) and ("GCM" in n or "POLY1305" in n) for n in names)
        for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_TICKET):
            assert context.options & option


def test_application_protocol(site: Site, meet: Callable[..., Met]) -> None:
    context = context_of(site.authority.issue("CT1"), site.authority)
    context.set_alpn_protocols(["h2", "dicom"])
    assert accepted(meet(Transport(site.tls()), context)).selected_alpn_protocol() == "dicom"


@pytest.mark.parametrize("version", VERSIONS)
def test_renegotiation_and_tickets(site: Site, meet: Callable[..., Met], version: str) -> None:
    met = meet(Transport(site.tls()), context_of(site.authority.issue("CT1"), site.authority, version=version))
    accepted(met)
    assert isinstance(met.client, ssl.SSLSocket)
    assert met.client.session is None or not met.client.session.has_ticket


@pytest.mark.peers
def test_client_that_renegotiates_is_refused(site: Site, connect: Callable[[], Pair]) -> None:
    """openssl's 'R' asks for it; the server says no and goes on or ends, but makes no new handshake."""
    site.own = site.authority.issue("node", kind="rsa")
    transport = Transport(site.tls(client_certificates="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: transport.wrap_server(listening.accept()[0]))
        port = listening.getsockname()[1]
        import subprocess

        with subprocess.Popen(
            [program("openssl"), "s_client", "-tls1_2", "-connect", f"127.0.0.1:{port}", "-msg"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as client:
            assert client.stdin is not None
            secure = answer.result(PATIENCE)
            client.stdin.write(b"R\n")
            client.stdin.flush()
            secure.settimeout(PATIENCE)
            secure_end = threading.Thread(target=_read_to_end, args=(secure,))
            secure_end.start()
            said, _ = client.communicate(timeout=PATIENCE)
            secure_end.join(PATIENCE)
            secure.close()
    text = said.decode(errors="replace")
    assert "no_renegotiation" in text or "no renegotiation" in text
    assert text.count("ServerHello,") + text.count("ServerHello\n") <= 1


def _read_to_end(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except OSError:
        pass


# Who is let in


@pytest.mark.parametrize("version", VERSIONS)
def test_caller_without_certificate(site: Site, meet: Callable[..., Met], version: str) -> None:
    nobody = context_of(None, site.authority, version=version)
    refused(meet(Transport(site.tls()), nobody), "showed no certificate")
    for how in ("optional", "none"):
        server = accepted(meet(Transport(site.tls(client_certificates=how)), nobody))
        assert server.certificate is None


def test_optional_certificate_is_checked_when_shown(site: Site, meet: Callable[..., Met], tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "other", "Other CA").issue("CT1")
    refused(meet(Transport(site.tls(client_certificates="optional")), context_of(stranger, site.authority)), "issuer")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ("expired", "expired", "Renew"),
        ("early", "not yet valid", "clocks"),
        ("other authority", "issuer", "tls.ca_file"),
        ("self-signed", "self-signed", "tls.ca_file"),
        ("purpose", "purpose", "clientAuth"),
        ("short key", "key too weak", "2048"),
        ("revoked", "revoked", "revoked"),
    ],
)
def test_certificates_that_are_refused(
    site: Site, meet: Callable[..., Met], tmp_path: Path, version: str, fault: str, words: str, hint: str
) -> None:
    ours, keys = site.authority, dict[str, Any]()
    match fault:
        case "expired":
            caller = ours.issue("CT1", start_days=-10, days=-1)
        case "early":
            caller = ours.issue("CT1", start_days=1)
        case "other authority":
            caller = Authority(tmp_path / "other", "Other CA").issue("CT1")
        case "self-signed":
            caller = self_signed(tmp_path, "CT1")
        case "purpose":
            caller = ours.issue("CT1", usages=SERVER_ONLY)
        case "short key":
            caller = ours.issue("CT1", kind="rsa1024")
        case _:
            caller = ours.issue("CT1")
            keys["crl_file"] = ours.revocations(caller)
    context = context_of(caller, ours, version=version, ciphers="DEFAULT:@SECLEVEL=0")
    found = refused(meet(Transport(site.tls(**keys)), context), words)
    assert hint in found.hint


@pytest.mark.peers
def test_signature_with_sha1_is_refused(site: Site, meet: Callable[..., Met], tmp_path: Path) -> None:
    key = make_key("rsa")
    write_key(tmp_path / "old.key", key)
    done = run_program(
        "openssl", "req", "-x509", "-sha1", "-key", tmp_path / "old.key", "-out", tmp_path / "ca.crt", "-subj", "/CN=CA"
    )
    assert done.returncode == 0, done.stderr
    request, made = tmp_path / "old.csr", tmp_path / "old.crt"
    run_program("openssl", "req", "-new", "-key", tmp_path / "old.key", "-out", request, "-subj", "/CN=CT1")
    done = run_program(
        "openssl", "x509", "-req", "-sha1", "-in", request, "-CA", tmp_path / "ca.crt", "-CAkey", tmp_path / "old.key",
        "-set_serial", "7", "-out", made,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    context = context_of(None, site.authority, ciphers="DEFAULT:@SECLEVEL=0")
    context.load_cert_chain(made, tmp_path / "old.key")
    refused(meet(Transport(site.tls(ca_file=tmp_path / "ca.crt")), context), "too weak")


def test_revocation_list_lets_the_others_in(site: Site, meet: Callable[..., Met]) -> None:
    revoked, fine = site.authority.issue("CT1"), site.authority.issue("CT2")
    transport = Transport(site.tls(crl_file=site.authority.revocations(revoked)))
    accepted(meet(transport, context_of(fine, site.authority)))
    refused(meet(transport, context_of(revoked, site.authority)), "revoked")


def test_revocation_list_that_is_out_of_date_lets_nobody_in(site: Site, meet: Callable[..., Met]) -> None:
    transport = Transport(site.tls(crl_file=site.authority.revocations(days=-1)))
    found = refused(meet(transport, context_of(site.authority.issue("CT1"), site.authority)), "CRL has expired")
    assert "tls.crl_file" not in found.cause
    assert "out of date" in found.hint


@pytest.mark.parametrize("kind", ["self-signed", "issued elsewhere"])
def test_certificates_of_devices_may_be_trusted_one_by_one(
    site: Site, meet: Callable[..., Met], tmp_path: Path, kind: str
) -> None:
    """As Orthanc's documentation does it: the trust file is the devices' certificates, one after the other."""
    elsewhere = Authority(tmp_path / "other", "Other CA")
    known = self_signed(tmp_path, "CT1") if kind == "self-signed" else elsewhere.issue("CT1")
    transport = Transport(site.tls(ca_file=known.certificate_file))
    accepted(meet(transport, context_of(known, site.authority)))
    refused(meet(transport, context_of(elsewhere.issue("CT2"), site.authority)), "issuer")


def test_a_device_that_is_trusted_cannot_issue_for_others(site: Site, meet: Callable[..., Met], tmp_path: Path) -> None:
    """Its certificate is no authority's (basicConstraints), whatever it signs with its key."""
    device = self_signed(tmp_path, "CT1", ca=False)
    forger = Authority(tmp_path / "forger", "CT1")
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    forger._key = load_pem_private_key(device.key_file.read_bytes(), None)  # type: ignore[assignment]
    forged = forger.issue("PACS", file="forged")
    met = meet(Transport(site.tls(ca_file=device.certificate_file)), context_of(forged, site.authority))
    assert isinstance(met.server, PeerError)
    assert met.read != b"hello"


# Silence, drops and other tongues


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_handshake_that_stops_ends_at_its_deadline(site: Site, connect: Callable[[], Pair], said: bytes) -> None:
    client, server = connect()
    client.sendall(said)
    begin = time.monotonic()
    with pytest.raises(PeerError, match="within its deadline"):
        Transport(site.tls(handshake_seconds=0.3)).wrap_server(server)
    assert time.monotonic() - begin < 3
    client.settimeout(5)
    assert _closed(client)


def _closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_handshake_fed_by_drops_ends_at_its_deadline(site: Site, connect: Callable[[], Pair]) -> None:
    """The deadline is for all of it: a byte now and then does not prolong it."""
    client, server = connect()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    speaker = context_of(None, site.authority).wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        speaker.do_handshake()
    hello = outgoing.read()
    over = threading.Event()

    def drip() -> None:
        for byte in hello:
            if over.wait(0.02):
                return
            try:
                client.sendall(bytes([byte]))
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(PeerError, match="within its deadline"):
        Transport(site.tls()).wrap_server(server, begin + 0.5)
    took = time.monotonic() - begin
    over.set()
    thread.join()
    assert len(hello) * 0.02 > 3 > took


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (associate_rq("NODE", "CT1", [("1.2.840.10008.1.1", ["1.2.840.10008.1.2"])], 16384), "does not speak TLS"),
        (b"GET / HTTP/1.1\r\nHost: node\r\n\r\n", "speaks HTTP"),
        (bytes(64), "does not speak TLS"),
        (b"\xff" * 64, "handshake"),
    ],
)
def test_other_tongues(site: Site, connect: Callable[[], Pair], said: bytes, words: str) -> None:
    assert APPLICATION_CONTEXT
    client, server = connect()
    client.sendall(said)
    with pytest.raises(PeerError) as caught:
        Transport(site.tls()).wrap_server(server)
    assert words in caught.value.cause or "does not speak TLS" in caught.value.cause
    assert _closed(client)


def test_caller_that_hangs_up(site: Site, connect: Callable[[], Pair]) -> None:
    client, server = connect()
    client.close()
    with pytest.raises(PeerError, match="closed the connection"):
        Transport(site.tls()).wrap_server(server)


# This node as client


@pytest.fixture
def call(connect: Callable[[], Pair]) -> Iterator[Callable[..., SecureSocket]]:
    """Our client against a server of the test, which says 'hello'."""
    opened: list[socket.socket] = []

    def go(transport: Transport, context: ssl.SSLContext, peer: Peer) -> SecureSocket:
        client, server = connect()

        def answer() -> None:
            try:
                secure = context.wrap_socket(server, server_side=True)
                opened.append(secure)
                secure.sendall(b"hello")
            except OSError:
                server.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            ours = transport.wrap_client(client, peer)
            opened.append(ours)
            return ours
        finally:
            thread.join(PATIENCE)

    yield go
    for sock in opened:
        sock.close()


def pacs(**keys: Any) -> Peer:
    return Peer(**{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 2762, "tls": True, **keys})


@pytest.mark.parametrize("version", VERSIONS)
def test_sending_with_both_certificates(site: Site, call: Callable[..., SecureSocket], version: str) -> None:
    issued = site.authority.issue("PACS", ips=["127.0.0.1"])
    context = context_of(issued, site.authority, version=version, server=True)
    context.verify_mode = ssl.CERT_REQUIRED
    ours = call(Transport(site.tls()), context, pacs())
    assert ours.recv(5) == b"hello"
    assert ours.certificate is not None
    assert (ours.certificate.sha256, ours.version()) == (issued.sha256, f"TLSv{version}")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, ""),
        ({"host": "10.0.0.9"}, "not issued for a host"),
        ({"host": "pacs.hospital"}, ""),
        ({"host": "PACS.Hospital."}, ""),
        ({"host": "other.hospital"}, "not issued for a host"),
        ({"host": "any.wild.hospital"}, "not issued for a host"),
        ({"certificate_name": "PACS"}, ""),
        ({"certificate_name": "urn:pacs", "host": "10.0.0.9"}, ""),
        ({"certificate_name": ["OLD", "pacs.hospital"]}, ""),
        ({"certificate_name": "CT1"}, "none of the peer's certificate_name"),
        ({"certificate_sha256": "OWN", "host": "10.0.0.9"}, ""),
        ({"certificate_sha256": "00" * 32}, "none of the peer's certificate_sha256"),
        ({"certificate_sha256": "OWN", "certificate_name": "CT1"}, "none of the peer's certificate_name"),
        ({"certificate_sha256": "00" * 32, "certificate_name": "PACS"}, "none of the peer's certificate_sha256"),
    ],
)
def test_server_must_be_the_peer(
    site: Site, call: Callable[..., SecureSocket], keys: dict[str, Any], fault: str
) -> None:
    issued = site.authority.issue(
        "PACS", dns=["pacs.hospital", "*.wild.hospital"], uris=["urn:pacs"], ips=["127.0.0.1"]
    )
    if keys.get("certificate_sha256") == "OWN":
        keys = {**keys, "certificate_sha256": ["11" * 32, issued.sha256]}
    context = context_of(issued, site.authority, server=True)
    if not fault:
        assert call(Transport(site.tls()), context, pacs(**keys)).recv(5) == b"hello"
        return
    with pytest.raises(PeerAway) as caught:
        call(Transport(site.tls()), context, pacs(**keys))
    assert fault in caught.value.cause and "'pacs'" in caught.value.cause
    assert issued.sha256 in caught.value.hint
    assert caught.value.retryable


@pytest.mark.parametrize("fault", ["expired", "other authority", "purpose"])
def test_servers_that_are_refused(site: Site, call: Callable[..., SecureSocket], tmp_path: Path, fault: str) -> None:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    issuer = Authority(tmp_path / "other", "Other CA") if fault == "other authority" else site.authority
    days = -1.0 if fault == "expired" else 30.0
    usages = (ExtendedKeyUsageOID.CLIENT_AUTH,) if fault == "purpose" else SERVER_ONLY
    issued = issuer.issue("PACS", ips=["127.0.0.1"], start_days=-5, days=days, usages=usages)
    with pytest.raises(PeerAway, match="certificate is not accepted"):
        call(Transport(site.tls()), context_of(issued, site.authority, server=True), pacs())


def test_client_learns_that_its_own_certificate_is_refused(
    site: Site, call: Callable[..., SecureSocket], tmp_path: Path
) -> None:
    """In TLS 1.3 that comes with the first read."""
    other = Authority(tmp_path / "other", "Other CA")
    context = context_of(site.authority.issue("PACS", ips=["127.0.0.1"]), other, server=True, version="1.3")
    context.verify_mode = ssl.CERT_REQUIRED
    ours = call(Transport(site.tls()), context, pacs())
    with pytest.raises(ssl.SSLError):
        ours.recv(5)
    assert ours.fault is not None
    assert "does not trust this node's certificate" in ours.fault[0]


def test_client_without_certificate_where_one_is_wanted(site: Site, call: Callable[..., SecureSocket]) -> None:
    context = context_of(site.authority.issue("PACS", ips=["127.0.0.1"]), site.authority, server=True, version="1.3")
    context.verify_mode = ssl.CERT_REQUIRED
    ours = call(Transport(Tls(ca_file=site.authority.ca_file)), context, pacs())
    with pytest.raises(ssl.SSLError):
        ours.recv(5)
    assert ours.fault == ("it wants a certificate of this node", "Give tls.certificate_file and tls.key_file")


@pytest.mark.parametrize("said", [b"", b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"])
def test_server_that_does_not_speak_tls(site: Site, connect: Callable[[], Pair], said: bytes) -> None:
    client, server = connect()
    server.sendall(said)
    words = "does not speak TLS" if said else "within its deadline"
    with pytest.raises(PeerAway, match=words):
        Transport(site.tls(handshake_seconds=0.3)).wrap_client(client, pacs())
    assert _closed(server)


def test_nothing_plain_after_shutdown(site: Site, meet: Callable[..., Met]) -> None:
    """Python's own SSLSocket would hand what follows on the line to the reader, unprotected."""
    met = meet(Transport(site.tls()), context_of(site.authority.issue("CT1"), site.authority))
    server = accepted(met)
    assert isinstance(met.client, ssl.SSLSocket)
    attacker = socket.socket(fileno=met.client.detach())  # who has the line, but not the keys
    with attacker:
        server.shutdown(socket.SHUT_WR)
        attacker.sendall(associate_rq("NODE", "CT1", [], 16384))
        server.settimeout(PATIENCE)
        with pytest.raises(ssl.SSLError):
            server.recv(4096)
        with pytest.raises(OSError, match=r"."):
            server.sendall(b"not in plain")
        rest = b""
        attacker.settimeout(PATIENCE)
        while part := attacker.recv(4096):
            rest += part
        assert b"not in plain" not in rest


@pytest.mark.parametrize("version", VERSIONS)
def test_end_is_told_by_close_notify(site: Site, meet: Callable[..., Met], version: str) -> None:
    met = meet(Transport(site.tls()), context_of(site.authority.issue("CT1"), site.authority, version=version))
    server = accepted(met)
    assert isinstance(met.client, ssl.SSLSocket)
    met.client.suppress_ragged_eofs = False  # an end without close_notify is an error then
    server.shutdown(socket.SHUT_WR)
    assert met.client.recv(10) == b""
    met.client.sendall(b"bye")
    server.settimeout(PATIENCE)
    assert server.recv(10) == b"bye"


# Files that change


@dataclass
class Ticker:
    """Monotonic time that only the test moves."""

    seconds: float = 100.0
    changes: list[Change] = field(default_factory=list)

    def __call__(self) -> float:
        return self.seconds

    def pass_time(self, seconds: float = CHECK_SECONDS) -> None:
        self.seconds += seconds

    def transport(self, tls: Tls) -> Transport:
        return Transport(tls, self.changes.append, self)


def install(issued: Issued, site: Site) -> None:
    """In place, as a renewal by hand does it."""
    site.own.certificate_file.write_bytes(issued.certificate_file.read_bytes())
    site.own.key_file.write_bytes(issued.key_file.read_bytes())


def shown_by(met: Met) -> str:
    assert isinstance(met.client, ssl.SSLSocket), met
    der = met.client.getpeercert(binary_form=True)
    assert der is not None
    return parse_certificate(der).sha256


def test_new_certificate_while_connections_go_on(site: Site, meet: Callable[..., Met]) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    former = meet(transport, caller)
    old = shown_by(former)
    renewed = site.authority.issue("node", dns=["node.hospital"], file="renewed")
    install(renewed, site)
    assert shown_by(meet(transport, caller)) == old  # looked at most once a second
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) == renewed.sha256
    assert [c.own.sha256 for c in ticker.changes if c.own] == [renewed.sha256]
    assert transport.load() is not None
    server = accepted(former)
    assert isinstance(former.client, ssl.SSLSocket)
    former.client.sendall(b"still here")
    server.settimeout(PATIENCE)
    assert server.recv(100) == b"still here"


def test_new_certificate_with_the_time_and_size_of_the_old_one(site: Site, meet: Callable[..., Met]) -> None:
    """A restored or copied file may carry any time; only its content tells."""
    import os

    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    old = shown_by(meet(transport, caller))
    before = site.own.certificate_file.stat()
    install(site.authority.issue("node", dns=["node.hospital"], ips=["127.0.0.1"], file="twin"), site)
    for path in site.own.files:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) != old


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("garbage", "cannot be understood"),
        ("half", "cannot be understood"),
        ("empty", "cannot be understood"),
        ("gone", "No such file"),
        ("key of another", "is not the key"),
        ("encrypted key", "is encrypted"),
        ("short key", "1024 bits"),
        ("expired", "valid from"),
        ("authorities gone", "tls.ca_file"),
    ],
)
def test_broken_files_leave_the_former_ones(site: Site, meet: Callable[..., Met], fault: str, words: str) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    old = shown_by(meet(transport, caller))
    own, good = site.own, site.own.certificate_file.read_bytes()
    match fault:
        case "garbage":
            own.certificate_file.write_bytes(b"\0garbage\n")
        case "half":
            own.certificate_file.write_bytes(good[: len(good) // 2])
        case "empty":
            own.certificate_file.write_bytes(b"")
        case "gone":
            own.certificate_file.unlink()
        case "key of another":
            write_key(own.key_file, make_key())
        case "encrypted key":
            write_key(own.key_file, make_key(), b"secret")
        case "short key":
            install(site.authority.issue("node", kind="rsa1024", file="short"), site)
        case "expired":
            install(site.authority.issue("node", start_days=-9, days=-1, file="expired"), site)
        case _:
            site.authority.ca_file.write_bytes(b"")
    for _ in range(3):
        ticker.pass_time()
        assert shown_by(meet(transport, caller)) == old
    (told,) = ticker.changes
    assert told.fault is not None
    assert words in told.fault.cause
    own.certificate_file.write_bytes(good)  # and the mending is seen
    renewed = site.authority.issue("node", file="renewed")
    install(renewed, site)
    site.authority.ca_file.write_bytes(_pem(site.authority))
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) == renewed.sha256
    assert [c.fault for c in ticker.changes[1:]] == [None]


def _pem(authority: Authority) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return authority.certificate.public_bytes(Encoding.PEM)


def test_return_to_the_former_files_ends_the_failure(site: Site, meet: Callable[..., Met]) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    good = site.own.certificate_file.read_bytes()
    assert transport.load() is not None
    for content, told in ((b"x", 1), (good, 1), (b"x", 2)):
        site.own.certificate_file.write_bytes(content)
        ticker.pass_time()
        assert transport.load() is not None
        assert len(ticker.changes) == told


def test_authority_that_is_taken_off_the_list_lets_nobody_in(
    site: Site, meet: Callable[..., Met], tmp_path: Path
) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    accepted(meet(transport, caller))
    shutil.copy(Authority(tmp_path / "new", "New CA").ca_file, site.authority.ca_file)
    ticker.pass_time()
    refused(meet(transport, caller), "self-signed certificate in certificate chain")


def test_session_is_not_resumed_past_a_change(site: Site, meet: Callable[..., Met], tmp_path: Path) -> None:
    """RFC 9325 3.4: who was let in once has to be let in again."""
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority, version="1.2")
    met = meet(transport, caller)
    assert isinstance(met.client, ssl.SSLSocket)
    session = met.client.session
    accepted(met).shutdown(socket.SHUT_WR)
    met.client.unwrap()
    shutil.copy(Authority(tmp_path / "new", "New CA").ca_file, site.authority.ca_file)
    ticker.pass_time()
    refused(meet(transport, caller, session=session), "self-signed certificate in certificate chain")


def test_node_that_starts_with_broken_files_recovers(site: Site, meet: Callable[..., Met]) -> None:
    ticker = Ticker()
    good = site.own.certificate_file.read_bytes()
    site.own.certificate_file.write_bytes(b"broken")
    transport = ticker.transport(site.tls())
    with pytest.raises(OperatorError, match=r"tls\.certificate_file"):
        transport.load()
    caller = context_of(site.authority.issue("CT1"), site.authority)
    met = meet(transport, caller)
    assert isinstance(met.server, OperatorError)
    assert met.read != b"hello"
    site.own.certificate_file.write_bytes(good)
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) == site.own.sha256


def test_many_threads_while_files_change(site: Site, connect: Callable[[], Pair]) -> None:
    """Every handshake gets a whole set of files: the old one or the new one."""
    ticker = Ticker()
    transport = ticker.transport(site.tls(client_certificates="none"))
    assert transport.load() is not None
    known = {site.own.sha256}
    caller = context_of(None, site.authority)
    pairs = [connect() for _ in range(24)]

    def one(pair: Pair) -> str:
        ticker.pass_time()
        client, server = pair
        with ThreadPoolExecutor(1) as pool:
            ours = pool.submit(transport.wrap_server, server)
            with caller.wrap_socket(client) as secure:
                der = secure.getpeercert(binary_form=True)
            ours.result(PATIENCE).close()
        assert der is not None
        return parse_certificate(der).sha256

    with ThreadPoolExecutor(4) as pool:
        results = []
        for number, pair in enumerate(pairs):
            results.append(pool.submit(one, pair))
            if number % 4 == 0:
                renewed = site.authority.issue("node", file=f"renewed{number}")
                known.add(renewed.sha256)
                install(renewed, site)
        shown = {r.result(PATIENCE) for r in results}
    assert shown <= known


def test_encrypted_key_never_asks_the_terminal(site: Site) -> None:
    write_key(site.own.key_file, make_key(), b"secret")
    with pytest.raises(OperatorError, match="is encrypted") as caught:
        Transport(site.tls()).load()
    assert "openssl pkey" in caught.value.hint


def test_file_that_is_too_large_is_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.certificates.MOST_BYTES", 100)
    with pytest.raises(OperatorError, match="more than 100 bytes"):
        Transport(site.tls()).load()


def test_own_certificate_comes_first(site: Site) -> None:
    both = _pem(site.authority) + site.own.certificate_file.read_bytes()
    site.own.certificate_file.write_bytes(both)
    with pytest.raises(OperatorError, match="is not the key") as caught:
        Transport(site.tls()).load()
    assert "own certificate first" in caught.value.hint
