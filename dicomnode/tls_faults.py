"""What a failed handshake means, in words for the person who can mend it. Pure."""

from __future__ import annotations

import ssl

ISSUER = "Add the authority that issued it to tls.ca_file, with the intermediate ones that the peer does not send"
OURS = "The peer does not accept this node's certificate: give the peer the authority that issued it"

_VERIFY: dict[int, str] = {
    2: ISSUER,
    3: "tls.crl_file has no list of the authority that issued it",
    9: "Check the clocks of both sides",
    10: "Renew the peer's certificate, and check both clocks",
    11: "The list in tls.crl_file is not valid yet: check the clock",
    12: "The list in tls.crl_file is out of date: fetch a new one",
    18: "Add the peer's certificate itself to tls.ca_file",
    19: ISSUER,
    20: ISSUER,
    21: ISSUER,
    23: "It was revoked; give the peer a new one",
    26: "Issue it for this use: Extended Key Usage clientAuth for callers, serverAuth for those that are called",
    66: "Issue it for a key of 2048 bits (RSA) or 256 bits (ECDSA) at least",
    67: "Its authority has a key of less than 2048 bits (RSA)",
    68: "It, or one of its authorities, is signed with SHA-1 or MD5: issue it with SHA-256",
}
"""Numbers of OpenSSL's X509_V_ERR."""

_REASONS: dict[str, tuple[str, str]] = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "it showed no certificate",
        "Give the sender a certificate and switch client authentication on there",
    ),
    "WRONG_VERSION_NUMBER": (
        "it does not speak TLS",
        "Switch TLS on at the other side, or use the port without TLS",
    ),
    "HTTP_REQUEST": ("it speaks HTTP, not DICOM", "Check the port at the sender"),
    "HTTPS_PROXY_REQUEST": ("it speaks HTTP, not DICOM", "Check the port at the sender"),
    "UNSUPPORTED_PROTOCOL": ("it offers only versions of TLS below {0}", "Update the other side, or its TLS settings"),
    "VERSION_TOO_LOW": ("it offers only versions of TLS below {0}", "Update the other side, or its TLS settings"),
    "NO_SHARED_CIPHER": (
        "it offers no cipher suite of PS3.15 B.12",
        "Allow ECDHE with AES-GCM at the other side (BCP 195 profile)",
    ),
    "TLSV1_ALERT_PROTOCOL_VERSION": (
        "it speaks no version of TLS that this node speaks",
        "Allow TLS 1.2 or 1.3 at the other side",
    ),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": (
        "it refused the handshake",
        "It may want a certificate of this node, or other cipher suites (BCP 195 profile): see its log",
    ),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": (
        "it wants a certificate of this node",
        "Give tls.certificate_file and tls.key_file",
    ),
    "TLSV1_ALERT_UNKNOWN_CA": ("it does not trust this node's certificate", OURS),
    "SSLV3_ALERT_BAD_CERTIFICATE": ("it does not accept this node's certificate", OURS),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": ("it does not accept this node's certificate", OURS),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": (
        "it does not accept this node's certificate for this use",
        "Issue it with Extended Key Usage serverAuth and clientAuth",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": ("it finds this node's certificate expired", "Renew tls.certificate_file"),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("it finds this node's certificate revoked", "Install a new one"),
    "TLSV1_ALERT_DECRYPT_ERROR": ("it could not check this node's signature", OURS),
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": (
        "it serves other protocols than DICOM there",
        "Check its address and port",
    ),
}


def explain(error: BaseException) -> tuple[str, str]:
    """Cause and hint, in words of ours and OpenSSL's; nothing that the peer sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        cause = f"its certificate is not accepted: {error.verify_message}"
        return cause, _VERIFY.get(error.verify_code, "See 'dicomnode doctor' for this node's own files")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        reason = error.reason or ""
        if reason in _REASONS:
            cause, hint = _REASONS[reason]
            return cause.format("tls.minimum_version"), hint
        return f"the handshake failed: {reason.lower().replace('_', ' ') or 'no reason given'}", "See its log"
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return "it closed the connection during the handshake", "See its log: it may not accept our certificate"
    if isinstance(error, ValueError):
        return "its certificate cannot be read", "Issue it anew, with plain names"
    return f"the connection was lost ({type(error).__name__})", "Check the network"
