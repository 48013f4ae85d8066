"""Authorities and certificates for tests, made when they are needed: no key lies in the repository."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
SERVER_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,)


def make_key(kind: str = "ec") -> Key:
    """``ec`` is quick; DCMTK's profiles want ``rsa``."""
    if kind == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, {"rsa": 2048, "rsa1024": 1024}[kind])


def write_key(path: Path, key: Key, password: bytes | None = None) -> None:
    how: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
    path.chmod(0o600)


@dataclass(frozen=True)
class Issued:
    """Files of one identity. ``certificate_file`` holds its certificate alone."""

    certificate: x509.Certificate
    certificate_file: Path
    key_file: Path

    @property
    def sha256(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    @property
    def files(self) -> tuple[str, str]:
        return str(self.certificate_file), str(self.key_file)


class Authority:
    """A certificate authority, a root or one ``under`` another; ``ca_file`` is its certificate."""

    def __init__(
        self, folder: Path, name: str = "Test CA", *, kind: str = "ec", under: Authority | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = make_key(kind)
        now = datetime.now(UTC)
        public = self._key.public_key()
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name if under is None else under.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=400))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_authority_usage(), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key if under is None else under._key, hashes.SHA256())
        )
        self.ca_file = folder / f"{_slug(name)}.pem"
        self.ca_file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        dns: Iterable[str] = (),
        uris: Iterable[str] = (),
        ips: Iterable[str] = (),
        start_days: float = -1,
        days: float = 90,
        kind: str = "ec",
        key: Key | None = None,
        usages: Sequence[x509.ObjectIdentifier] = BOTH,
        algorithm: hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None = None,
        file: str | None = None,
    ) -> Issued:
        """A certificate with subject CN ``name``, valid from ``start_days`` from now for until ``days`` from now."""
        now = datetime.now(UTC)
        key = key or make_key(kind)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=start_days))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        names: list[x509.GeneralName] = [x509.DNSName(d) for d in dns]
        names += [x509.UniformResourceIdentifier(u) for u in uris]
        names += [x509.IPAddress(ipaddress.ip_address(i)) for i in ips]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(self._key, algorithm or hashes.SHA256())
        stem = file or _slug(name or "nameless")
        issued = Issued(certificate, self.folder / f"{stem}.crt", self.folder / f"{stem}.key")
        issued.certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        write_key(issued.key_file, key)
        return issued

    def revocations(self, *revoked: Issued | Authority, days: float = 30) -> Path:
        """A revocation list; its file is replaced when called again."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now - timedelta(days=60))
            .next_update(now + timedelta(days=days))
        )
        for issued in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(issued.certificate.serial_number)
                .revocation_date(now - timedelta(days=1))
                .build()
            )
        path = self.folder / f"{self.ca_file.stem}.crl"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return path


def self_signed(folder: Path, name: str, *, ca: bool = False) -> Issued:
    """As 'openssl req -x509' makes it for one device; with ``ca`` it could sign others."""
    key = make_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    issued = Issued(certificate, folder / f"{_slug(name)}.crt", folder / f"{_slug(name)}.key")
    issued.certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    write_key(issued.key_file, key)
    return issued


def _authority_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
