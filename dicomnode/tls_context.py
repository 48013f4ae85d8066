"""What TLS of this node allows: PS3.15 B.12 (BCP 195: RFC 8996 and RFC 9325).

TLS 1.2 and 1.3, ECDHE with AEAD suites only, keys of 2048 bits (RSA) or 256 bits (ECDSA) and
SHA-256 at least, no compression, no renegotiation. No tickets: another connection is another
handshake, in which the certificate is checked anew. B.13 (Modified BCP 195) is not claimed:
its servers must offer CCM suites too, which Python's ssl cannot switch on for TLS 1.3.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from dicomnode.certificates import (
    PeerCertificate,
    load_authorities,
    load_identity,
    load_revocations,
    revocations_cover,
)
from dicomnode.errors import OperatorError
from dicomnode.settings import Tls
from dicomnode.tls_faults import explain

SUITES = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
"""RFC 9325 4.2 for TLS 1.2; TLS 1.3 has AEAD suites only. Level 2: 112 bits, so no SHA-1, no RSA below 2048."""

PROTOCOL = "dicom"
"""ALPN (RFC 7301); RFC 9325 3.8 wants it so that no other protocol's client is taken for ours."""

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class SecureSocket(ssl.SSLSocket):
    """An SSLSocket that never falls back to plain bytes.

    The standard one drops its TLS state in ``shutdown``, and what is read or written after it
    goes over the line unprotected. One thread may read and write; ``shutdown(SHUT_RDWR)`` is safe
    from any.
    """

    certificate: PeerCertificate | None = None
    """What the other side showed, checked."""
    fault: tuple[str, str] | None = None
    """Cause and hint of the TLS error that ended it. In TLS 1.3 a client learns from its first read
    only that its own certificate was refused: its handshake ends before the server has seen it."""
    _sslobj: Any

    def read(self, *arguments: Any) -> Any:
        try:
            return super().read(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.fault = explain(error)
            raise

    def shutdown(self, how: int) -> None:
        """``SHUT_WR`` also says close_notify (RFC 8446 6.1), as far as that needs no waiting."""
        if how == socket.SHUT_WR:
            self._say_goodbye()
        socket.socket.shutdown(self, how)

    def _say_goodbye(self) -> None:
        state = self._sslobj
        waits = self.gettimeout()
        try:
            self.settimeout(0.0)
            with contextlib.suppress(OSError, ValueError):
                self.unwrap()
        finally:
            self._sslobj = state
            self.settimeout(waits)


@dataclass(frozen=True, slots=True)
class Contexts:
    """What one reading of the files gives; ``own`` is this node's certificate."""

    client: ssl.SSLContext
    server: ssl.SSLContext | None
    own: PeerCertificate | None


def build_contexts(tls: Tls) -> Contexts:
    """Read and check all files. Raises OperatorError that says which is wrong and what to do."""
    own = None
    if tls.certificate_file is not None and tls.key_file is not None:
        own = load_identity(tls.certificate_file, tls.key_file).facts
    if tls.ca_file is not None:
        load_authorities(tls.ca_file)
    if tls.crl_file is not None:
        load_revocations(tls.crl_file)
    try:
        client = _context(tls, ssl.PROTOCOL_TLS_CLIENT)
        client.verify_mode = ssl.CERT_REQUIRED
        return Contexts(client, _server(tls) if own is not None else None, own)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise OperatorError("read TLS files", f"they do not work together: {cause}", "See 'dicomnode doctor'") from None


def _server(tls: Tls) -> ssl.SSLContext:
    context = _context(tls, ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = {
        "required": ssl.CERT_REQUIRED,
        "optional": ssl.CERT_OPTIONAL,
        "none": ssl.CERT_NONE,
    }[tls.client_certificates]
    context.num_tickets = 0
    return context


def _context(tls: Tls, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.check_hostname = False  # binding_fault compares more strictly, and before a byte of DICOM
    context.minimum_version = _VERSIONS[tls.minimum_version]
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_ciphers(SUITES)
    context.set_alpn_protocols([PROTOCOL])
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    # Sites without an authority of their own list the devices' certificates themselves.
    context.verify_flags |= ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    context.sslsocket_class = SecureSocket
    if tls.ca_file is not None:
        context.load_verify_locations(cafile=str(tls.ca_file))
    if tls.crl_file is not None:
        context.load_verify_locations(cafile=str(tls.crl_file))
        covered = (
            revocations_cover(load_authorities(tls.ca_file), load_revocations(tls.crl_file)) if tls.ca_file else False
        )
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN if covered else ssl.VERIFY_CRL_CHECK_LEAF
    if tls.certificate_file is not None and tls.key_file is not None:
        # Without a password here OpenSSL would ask for one on the terminal.
        context.load_cert_chain(str(tls.certificate_file), str(tls.key_file), password="")
    return context
