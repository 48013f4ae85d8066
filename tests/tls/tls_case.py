"""What tests of TLS share: a site with an authority, the other side of a handshake, how it went."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode.certificates import parse_certificate
from dicomnode.errors import NodeError, PeerError
from dicomnode.settings import Peer, Tls
from dicomnode.tls_context import SecureSocket
from tests.certificates import Authority, Issued

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


def closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def pacs(**keys: Any) -> Peer:
    return Peer(**{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 2762, "tls": True, **keys})


def shown_by(met: Met) -> str:
    assert isinstance(met.client, ssl.SSLSocket), met
    der = met.client.getpeercert(binary_form=True)
    assert der is not None
    return parse_certificate(der).sha256
