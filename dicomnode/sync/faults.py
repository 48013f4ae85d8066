"""What went wrong with a request, in words for who has to mend the line. Pure."""

from __future__ import annotations

import os
import socket
import ssl

import aiohttp


def reason(error: BaseException) -> str:
    """Why ``error`` came about: refused, no such name, certificate, silence; its type where it says no more.

    Never the text of the error itself, which may quote an address with its path.
    """
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name is not known to DNS"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _certificate(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return reason(error.os_error) if error.os_error is not None else type(error).__name__
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError | BrokenPipeError):
        return "the line was cut"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the reply broke off"
    if isinstance(error, socket.gaierror):
        return "its name is not known to DNS"
    if isinstance(error, ssl.SSLError):
        return _certificate(error) if isinstance(error, ssl.SSLCertVerificationError) else "TLS failed"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return type(error).__name__


def _certificate(error: BaseException) -> str:
    said = getattr(error, "verify_message", "")
    return f"its certificate is not trusted: {said}" if said else "its certificate is not trusted"
