"""This node as client, and what stays secure after the end."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import PeerAway
from dicomnode.settings import Tls
from dicomnode.tls import Transport
from dicomnode.tls_context import SecureSocket
from tests.certificates import SERVER_ONLY, Authority
from tests.peers import associate_rq
from tests.tls.tls_case import (
    PATIENCE,
    VERSIONS,
    Met,
    Pair,
    Site,
    accepted,
    closed,
    context_of,
    pacs,
)


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
    assert closed(server)


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
