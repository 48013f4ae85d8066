"""X.509 certificates: the facts that decide who a peer is, and whether our own files fit together.

Trust (chain, validity, revocation) is OpenSSL's work during the handshake. Here a certificate
that was found valid is compared with the one peer for which it may speak: a valid certificate
of peer A proves nothing about peer B.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dicomnode import addresses
from dicomnode.errors import OperatorError
from dicomnode.settings import Peer

MOST_BYTES = 4 << 20
LEAST_RSA_BITS = 2048
LEAST_CURVE_BITS = 256
"""RFC 9325 4.5 asks for 2048 and 224; PS3.15 B.13 for 2048 and 256."""

SERVER_AUTH, CLIENT_AUTH = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_OPERATION = "read TLS files"
_Found = TypeVar("_Found")


def plain(text: str, most: int = 16) -> str:
    """A stranger's text as it may stand in a log or on a page."""
    return "".join(c if c.isascii() and c.isprintable() and c not in "<>&'\"" else "?" for c in text)[:most]


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """``sha256`` of the DER form, lower-case hex; names as they stand in the certificate."""

    sha256: str
    common_name: str
    dns_names: tuple[str, ...]
    uris: tuple[str, ...]
    addresses: tuple[str, ...]
    not_before: datetime
    not_after: datetime

    @property
    def names(self) -> tuple[str, ...]:
        found = (self.common_name, *self.dns_names, *self.uris, *self.addresses)
        return tuple(dict.fromkeys(name for name in found if name))

    def valid_at(self, moment: datetime) -> bool:
        return self.not_before <= moment <= self.not_after

    def shown(self) -> str:
        """For logs and hints: what an administrator copies into [[peers]]."""
        names = ", ".join(plain(name, 64) for name in self.names[:4]) or "no name"
        return f"{names}; sha256 {self.sha256}"


def parse_certificate(der: bytes) -> PeerCertificate:
    """Facts of one certificate. Raises ValueError when it is not one."""
    return facts_of(x509.load_der_x509_certificate(der))


def facts_of(certificate: x509.Certificate) -> PeerCertificate:
    """Raises ValueError when its names cannot be read."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns_names = tuple(found.get_values_for_type(x509.DNSName))
        uris = tuple(found.get_values_for_type(x509.UniformResourceIdentifier))
        numbers = tuple(str(address) for address in found.get_values_for_type(x509.IPAddress))
    except x509.ExtensionNotFound:
        dns_names = uris = numbers = ()
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(f"its extensions cannot be read: {type(error).__name__}") from None
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return PeerCertificate(
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        common_name=str(common[0].value) if len(common) == 1 else "",
        dns_names=dns_names,
        uris=uris,
        addresses=numbers,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def binding_fault(peer: Peer, certificate: PeerCertificate | None, *, required: bool) -> str:
    """Why ``certificate`` may not speak for ``peer``; empty when it may. Pure.

    ``certificate_sha256`` and ``certificate_name`` of the peer decide, both where both are
    given. Without them the certificate must be issued for a host of the peer (a DNS name or
    address in subjectAltName, RFC 9525 6), by its whole name: wildcards stand for many peers
    and so prove none. ``required`` tells whether a peer that is not bound needs a certificate.
    """
    if certificate is None:
        return "it came without a certificate" if required or peer.bound else ""
    if peer.certificate_sha256 and certificate.sha256 not in peer.certificate_sha256:
        return "its certificate is none of the peer's certificate_sha256"
    if peer.certificate_name and not any(_is_named(certificate, name) for name in peer.certificate_name):
        return "its certificate has none of the peer's certificate_name"
    if not peer.bound and not any(_issued_for(certificate, host) for host in peer.hosts):
        return "its certificate is not issued for a host of the peer"
    return ""


def _is_named(certificate: PeerCertificate, name: str) -> bool:
    return (
        name in (certificate.common_name, *certificate.uris)
        or any(_same_name(name, dns) for dns in certificate.dns_names)
        or name in certificate.addresses
    )


def _issued_for(certificate: PeerCertificate, host: str) -> bool:
    if addresses.is_network(host):
        return False
    if addresses.is_address(host):
        return host in certificate.addresses
    return any(_same_name(host, dns) for dns in certificate.dns_names)


def _same_name(one: str, other: str) -> bool:
    return one.rstrip(".").lower() == other.rstrip(".").lower()


# Our own files


@dataclass(frozen=True, slots=True)
class Identity:
    """This node's certificate, which is ``chain[0]``, and those that lead to its authority."""

    chain: tuple[x509.Certificate, ...]
    facts: PeerCertificate

    def may(self, purpose: x509.ObjectIdentifier) -> bool:
        """Extended Key Usage (RFC 5280 4.2.1.12); a certificate without it may do everything."""
        try:
            usage = self.chain[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return True
        return purpose in usage or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usage


def load_identity(certificate_file: Path, key_file: Path) -> Identity:
    """Raises OperatorError that names the file, what is wrong with it and what to do."""
    chain = load_authorities(certificate_file, "tls.certificate_file")
    key = _private_key(key_file)
    if _public(key.public_key()) != _public(chain[0].public_key()):
        if any(_public(key.public_key()) == _public(c.public_key()) for c in chain[1:]):
            hint = "Put the node's own certificate first, then the intermediate ones"
        else:
            hint = "Install the key and the certificate that was issued for it together"
        cause = f"tls.key_file {key_file} is not the key of {certificate_file}"
        raise OperatorError(_OPERATION, cause, hint)
    public = chain[0].public_key()
    if (isinstance(public, rsa.RSAPublicKey) and public.key_size < LEAST_RSA_BITS) or (
        isinstance(public, ec.EllipticCurvePublicKey) and public.key_size < LEAST_CURVE_BITS
    ):
        cause = f"tls.key_file {key_file} has only {public.key_size} bits"
        hint = f"Make a key of {LEAST_RSA_BITS} bits (RSA) or {LEAST_CURVE_BITS} bits (ECDSA) at least, RFC 9325 4.5"
        raise OperatorError(_OPERATION, cause, hint)
    try:
        return Identity(chain, facts_of(chain[0]))
    except ValueError as error:
        raise OperatorError(_OPERATION, f"tls.certificate_file {certificate_file}: {error}") from None


def _private_key(path: Path) -> PrivateKeyTypes:
    data = _read(path, "tls.key_file")
    try:
        return load_pem_private_key(data, password=None)
    except TypeError:
        hint = "Store it without a pass phrase in a file that only the node may read: openssl pkey -in OLD -out NEW"
        raise OperatorError(_OPERATION, f"tls.key_file {path} is encrypted", hint) from None
    except (ValueError, UnsupportedAlgorithm):
        hint = "Give the private key in PEM form, '-----BEGIN PRIVATE KEY-----'"
        raise OperatorError(_OPERATION, f"tls.key_file {path} holds no private key", hint) from None


def load_authorities(path: Path, key: str = "tls.ca_file") -> tuple[x509.Certificate, ...]:
    """Every certificate of a PEM file, at least one."""
    hint = "Give certificates in PEM form, '-----BEGIN CERTIFICATE-----'"
    return _parse(path, key, x509.load_pem_x509_certificates, hint)


def is_authority(certificate: x509.Certificate) -> bool:
    """basicConstraints (RFC 5280 4.2.1.9); OpenSSL takes a self-signed one of version 1 for an authority, too."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return certificate.version is x509.Version.v1


def revocations_cover(authorities: Sequence[x509.Certificate], lists: Sequence[x509.CertificateRevocationList]) -> bool:
    """Whether every authority that is trusted has a list, so that OpenSSL can look up the whole chain.

    It then refuses a chain for which any list is missing; with lists of the issuing authorities
    alone, which is what many sites have, it would refuse everybody.
    """
    told = {entry.issuer for entry in lists}
    return all(one.subject in told for one in authorities if is_authority(one))


def load_revocations(path: Path) -> tuple[x509.CertificateRevocationList, ...]:
    """Every revocation list of a PEM file, at least one."""

    def parse(data: bytes) -> Sequence[x509.CertificateRevocationList]:
        blocks = re.findall(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", data, re.S)
        return [x509.load_pem_x509_crl(block) for block in blocks]

    hint = "Give the lists in PEM form: openssl crl -inform DER -in LIST.crl"
    return _parse(path, "tls.crl_file", parse, hint)


def _parse(path: Path, key: str, parse: Callable[[bytes], Sequence[_Found]], hint: str) -> tuple[_Found, ...]:
    try:
        found = tuple(parse(_read(path, key)))
    except ValueError:
        found = ()
    if not found:
        raise OperatorError(_OPERATION, f"{key} {path} cannot be understood", hint)
    return found


def _read(path: Path, key: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        hint = "Check the path, and that the node's user may read it"
        raise OperatorError(_OPERATION, f"{key} {path}: {error.strerror}", hint) from None
    if len(data) > MOST_BYTES:
        raise OperatorError(_OPERATION, f"{key} {path} has more than {MOST_BYTES} bytes", "Is it the right file?")
    return data


def _public(key: object) -> bytes:
    assert hasattr(key, "public_bytes")
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def certificate_of(sock: ssl.SSLSocket) -> PeerCertificate | None:
    """What the other side of a finished handshake showed; None without a certificate.

    Raises ValueError when its names cannot be read.
    """
    der = sock.getpeercert(binary_form=True)
    return parse_certificate(der) if der else None


def now() -> datetime:
    return datetime.now(UTC)
