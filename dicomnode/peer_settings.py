"""Who the node speaks to, and how: the sections [tls] and [[peers]]."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dicomnode import addresses

Service = Literal["echo", "store", "find", "move", "get", "commit", "mpps"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def checked_ae_title(value: str) -> str:
    """PS3.5 6.2: AE is 1 to 16 characters of the default repertoire, no backslash or control."""
    stripped = value.strip(" ")
    if not re.fullmatch(r"[ -\[\]-~]{1,16}", stripped):
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash")
    return stripped


def _as_list(value: object) -> object:
    """One text stands for a list of one."""
    return (value,) if isinstance(value, str) else value


def _fingerprint(value: str) -> str:
    digits = value.rpartition("=")[2].replace(":", "").strip().lower()  # openssl prints "sha256 Fingerprint=AB:CD:..."
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError("is not a SHA-256 fingerprint; 'openssl x509 -noout -fingerprint -sha256 -in FILE' prints it")
    return digits


def _certificate_name(value: str) -> str:
    if not re.fullmatch(r"[!-~]([ -~]{0,253}[!-~])?", value):
        raise ValueError("a certificate's name has 1 to 255 printable ASCII characters")
    if "*" in value:
        raise ValueError("a certificate is bound by its whole name, without '*'")
    return value


AETitle = Annotated[str, Field(description="AE title, PS3.5 6.2")]
AETitles = Annotated[tuple[Annotated[str, AfterValidator(checked_ae_title)], ...], BeforeValidator(_as_list)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(addresses.checked_host)], ...], BeforeValidator(_as_list)]
Fingerprints = Annotated[tuple[Annotated[str, AfterValidator(_fingerprint)], ...], BeforeValidator(_as_list)]
CertificateNames = Annotated[tuple[Annotated[str, AfterValidator(_certificate_name)], ...], BeforeValidator(_as_list)]


class Tls(Section):
    """PS3.15 B.12. The plain port of [dimse] stays beside it; see ``required``."""

    host: str = Field("0.0.0.0", description="address to listen on for TLS")  # noqa: S104 as dimse.host
    port: int | None = Field(None, ge=0, le=65535, description="TCP port for TLS; left out: none; 0: system's choice")
    required: bool = Field(False, description="callers from other machines must come by TLS")
    certificate_file: Path | None = Field(None, description="PEM: this node's certificate, then intermediate ones")
    key_file: Path | None = Field(None, description="PEM: the private key of certificate_file, not encrypted")
    ca_file: Path | None = Field(None, description="PEM: authorities that issue the peers' certificates")
    crl_file: Path | None = Field(None, description="PEM: revocation lists of those authorities")
    client_certificates: Literal["required", "optional", "none"] = Field(
        "required", description="whether a caller must show a certificate"
    )
    minimum_version: Literal["1.2", "1.3"] = Field("1.2", description="oldest version of TLS that is spoken")
    handshake_seconds: float = Field(10.0, gt=0, description="absolute deadline for one handshake")

    @model_validator(mode="after")
    def _files(self) -> Self:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("give certificate_file and key_file, or neither")
        if self.port is not None and self.certificate_file is None:
            raise ValueError("port is given, so certificate_file and key_file of this node are needed")
        if self.port is not None and self.ca_file is None and self.client_certificates != "none":
            raise ValueError(
                'ca_file is needed to check the certificates of callers (client_certificates = "none" asks for none:'
                " then whoever knows a peer's AE title and has its address may speak for it)"
            )
        if self.crl_file is not None and self.ca_file is None:
            raise ValueError("crl_file needs the authorities that sign it: give ca_file")
        if self.required and self.port is None:
            raise ValueError("required = true without port: no other machine could call; give port, usually 2762")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is read from disk; a change is taken over without a restart."""
        named = (self.certificate_file, self.key_file, self.ca_file, self.crl_file)
        return tuple(path for path in named if path is not None)


class Peer(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="short name used in rules and logs")
    ae_title: AETitle = Field(description="the peer's AE title")
    host: str = Field("", description="address, name or network; where given, the caller's address must match")
    more_hosts: Hosts = Field((), description="further addresses, names or networks that it may call from")
    port: int = Field(0, ge=0, le=65535, description="the peer's DICOM port, for sending to it")
    tls: bool = Field(False, description="it must call by TLS, and is sent to by TLS")
    certificate_sha256: Fingerprints = Field(
        (), description="fingerprints of its certificates; no other one may speak for it"
    )
    certificate_name: CertificateNames = Field(
        (), description="subject CN, DNS name or URI in its certificate; no other one may speak for it"
    )
    called_ae: AETitles = Field((), description="AE titles of this node that it may call; empty: all of them")
    allow: tuple[Service, ...] = Field((), description="services that it may use here; commit: ask for commitment")
    commitment: bool = Field(False, description="ask it for storage commitment after delivery")

    _check = field_validator("ae_title")(checked_ae_title)

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return addresses.checked_host(value) if value.strip() else ""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.port and addresses.is_network(self.host):
            raise ValueError("port is for sending, which needs one address: put it into host, networks into more_hosts")
        return self

    @property
    def reachable(self) -> bool:
        """Whether it can be sent to."""
        return bool(self.host and self.port)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Where it may call from; empty: anywhere."""
        return (self.host, *self.more_hosts) if self.host else self.more_hosts

    @property
    def bound(self) -> bool:
        """Whether the configuration says which certificate is this peer's."""
        return bool(self.certificate_sha256 or self.certificate_name)


def check_peer(peer: Peer, tls: Tls, ae_titles: Collection[str]) -> None:
    """What one peer needs of the rest. Raises ValueError that says what to do."""
    for title in peer.called_ae:
        if title not in ae_titles:
            raise ValueError(
                f"peers '{peer.name}': called_ae names '{title}', which is neither node.ae_title"
                " nor in node.more_ae_titles"
            )
    if not peer.tls:
        return
    if peer.allow and tls.port is None:
        raise ValueError(f"peers '{peer.name}': it must call by TLS (tls = true), but tls.port is not given")
    if peer.reachable and tls.ca_file is None:
        raise ValueError(f"peers '{peer.name}': tls.ca_file is needed to check the certificate that it shows")
    if peer.allow and peer.bound and tls.client_certificates == "none":
        raise ValueError(
            f"peers '{peer.name}': it must show its certificate, but tls.client_certificates = \"none\" asks nobody for"
            ' one; say "optional" or "required"'
        )
    nameable = any(not addresses.is_network(host) for host in peer.hosts)
    if not peer.bound and not nameable and tls.client_certificates != "none":
        raise ValueError(
            f"peers '{peer.name}': with tls = true say which certificate is its own: give certificate_name"
            " or certificate_sha256 (or a host for which the certificate is issued)"
        )


def caller_matches(peer: Peer, address: str) -> bool:
    """Whether a connection from ``address`` may speak for ``peer``, as far as its hosts tell."""
    return addresses.closeness(peer.hosts, address, addresses.resolve) is not None
