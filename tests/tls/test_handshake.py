"""Callers: what is spoken, who gets in and who does not, over loopback."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dicomnode.certificates import parse_certificate
from dicomnode.errors import PeerError
from dicomnode.tls import Transport
from dicomnode.tls_context import build_contexts
from tests.certificates import SERVER_ONLY, Authority, make_key, self_signed, write_key
from tests.peers import APPLICATION_CONTEXT, associate_rq, program, run_program
from tests.tls.tls_case import (
    PATIENCE,
    VERSIONS,
    Met,
    Pair,
    Site,
    accepted,
    closed,
    context_of,
    refused,
)

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


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("lists", ["all", "of the issuer alone"])
@pytest.mark.parametrize("revoked", [False, True])
def test_an_intermediate_authority_is_looked_up_where_every_list_is_given(
    site: Site, meet: Callable[..., Met], lists: str, revoked: bool, version: str
) -> None:
    between = Authority(site.folder / "between", "Between", under=site.authority)
    caller = between.issue("CT1")
    with caller.certificate_file.open("ab") as file:
        file.write(between.ca_file.read_bytes())
    crl = site.folder / "lists.pem"
    crl.write_bytes(between.revocations().read_bytes())
    if lists == "all":
        with crl.open("ab") as file:
            file.write(site.authority.revocations(*([between] if revoked else [])).read_bytes())
    met = meet(Transport(site.tls(crl_file=crl)), context_of(caller, site.authority, version=version))
    if revoked and lists == "all":
        refused(met, "revoked")
    else:
        accepted(met)


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
    assert closed(client)


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
    assert closed(client)


def test_caller_that_hangs_up(site: Site, connect: Callable[[], Pair]) -> None:
    client, server = connect()
    client.close()
    with pytest.raises(PeerError, match="closed the connection"):
        Transport(site.tls()).wrap_server(server)
