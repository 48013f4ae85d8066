"""A node with a TLS port, and the identities of the hospital around it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.certificates import Authority, Issued
from tests.e2e.harness import Node
from tests.peers import (
    CT_IMAGE,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    VERIFICATION,
    Association,
    Cut,
    Orthanc,
    free_port,
)

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


class SecureNode(Node):
    """``tls_port`` beside ``port``."""

    def __init__(self, folder: Path, site: Site, *, tls: dict[str, Any] | None = None, **keys: Any) -> None:
        section = site.tls(**(tls or {}))
        self.tls_port = int(section["port"])
        super().__init__(folder, tls=section, node={"more_ae_titles": ["QR"]}, **keys)


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


def make_site(folder: Path) -> Site:
    authority = Authority(folder / "ca")
    return Site(
        folder,
        authority,
        authority.issue("node", dns=["localhost"], ips=["127.0.0.1"], kind=RSA),
        authority.issue("CT of room 1", dns=["ct.hospital"], kind=RSA),
        authority.issue("MR of room 2", dns=["mr.hospital"], kind=RSA),
        authority.issue("PACS", dns=["pacs.hospital"], kind=RSA),
    )


def make_receiver(folder: Path, site: Site) -> SecureNode:
    """One receiver process with short deadlines and few connections."""
    limits = {
        "workers": 1,
        "request_seconds": REQUEST_SECONDS,
        "pdu_seconds": 2.0,
        "max_connections": TOTAL,
        "max_connections_per_address": PER_ADDRESS,
    }
    node = SecureNode(folder, site, peers=PEERS, dimse=limits)
    node.start("run", "receiver")
    return node


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


def orthanc_as(folder: Path, site: Site, identity: Issued, aet: str, node: SecureNode, called: str) -> Orthanc:
    """Orthanc with TLS both ways; it knows the node as 'node'."""
    modality = {"AET": called, "Host": "127.0.0.1", "Port": node.tls_port, "UseDicomTls": True}
    return Orthanc(
        folder,
        aet=aet,
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(identity.certificate_file),
        DicomTlsPrivateKey=str(identity.key_file),
        DicomTlsTrustedCertificates=str(site.authority.ca_file),
        DicomModalities={"node": modality},
    )
