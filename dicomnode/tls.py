"""TLS for DICOM connections, both sides: handshakes with a deadline, and who the other side is.

:mod:`dicomnode.tls_context` has what is allowed (PS3.15 B.12), :mod:`dicomnode.reloading` how
new certificates come in without a restart.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from dicomnode import addresses, metrics
from dicomnode.certificates import PeerCertificate, binding_fault, certificate_of, now
from dicomnode.errors import OperatorError, PeerAway, PeerError
from dicomnode.reloading import Change, Reloading, log_change
from dicomnode.settings import Peer, Tls
from dicomnode.tls_context import SecureSocket, build_contexts
from dicomnode.tls_faults import explain

_OPERATION = "TLS handshake"


class Transport:
    """TLS of one process, both sides. Safe for use from several threads."""

    def __init__(
        self,
        tls: Tls,
        on_change: Callable[[Change], None] = log_change,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tls = tls
        self._reloading = Reloading(lambda: build_contexts(tls), tls.files, on_change, monotonic)

    def load(self) -> PeerCertificate | None:
        """Read the files; this node's certificate. Raises OperatorError when they are wrong."""
        return self._reloading.current().own

    def wrap_server(self, sock: socket.socket, deadline: float | None = None) -> SecureSocket:
        """Answer the handshake of a connection that was accepted; ``deadline`` is absolute, on time.monotonic().

        The result carries the caller's ``certificate``, which still has to be compared with the
        peer that it claims to be. Raises PeerError, and OperatorError without usable files; the
        connection is closed then.
        """
        try:
            context = self._reloading.current().server
        except OperatorError:
            sock.close()
            raise
        if context is None:
            sock.close()
            raise OperatorError(_OPERATION, "this node has no certificate", "Give tls.certificate_file")
        return self._shake(context, sock, deadline, {"server_side": True})

    def wrap_client(self, sock: socket.socket, peer: Peer, deadline: float | None = None) -> SecureSocket:
        """Begin TLS on a connection to ``peer``, and check that the certificate is its own.

        Raises PeerAway: whatever is wrong can be mended while the object waits. The connection
        is closed then.
        """
        name = None if addresses.is_address(peer.host) else peer.host.rstrip(".")
        try:
            context = self._reloading.current().client
            secure = self._shake(context, sock, deadline, {"server_hostname": name})
        except OperatorError as error:
            sock.close()
            raise PeerAway(_OPERATION, error.cause, error.hint) from None
        except PeerError as error:
            raise PeerAway(_OPERATION, f"peer '{peer.name}': {error.cause}", error.hint) from None
        fault = binding_fault(peer, secure.certificate, required=True)
        if fault:
            secure.close()
            shown = secure.certificate.shown() if secure.certificate else "none"
            hint = f"If this is its certificate, put it into certificate_name or certificate_sha256: {shown}"
            raise PeerAway(_OPERATION, f"peer '{peer.name}': {fault}", hint)
        if secure.certificate is not None:
            metrics.peer_certificate(peer.name, secure.certificate.not_after.timestamp())
        return secure

    def _shake(
        self, context: ssl.SSLContext, sock: socket.socket, deadline: float | None, side: dict[str, Any]
    ) -> SecureSocket:
        """A finished handshake. Raises PeerError and closes the connection."""
        until = time.monotonic() + self._tls.handshake_seconds if deadline is None else deadline
        secure: socket.socket = sock
        cause, hint = "its certificate is not valid now", "Renew it, and check the clocks of both sides"
        try:
            sock.settimeout(max(until - time.monotonic(), 0.001))
            secure = context.wrap_socket(sock, do_handshake_on_connect=False, **side)
            assert isinstance(secure, SecureSocket)
            secure.do_handshake()  # the time-out is for all of it, not for each read
            secure.certificate = certificate_of(secure)
            # A session that is resumed (TLS 1.2 with an id) is not verified again by OpenSSL.
            if secure.certificate is None or secure.certificate.valid_at(now()):
                return secure
        except TimeoutError:
            cause, hint = "the handshake was not complete within its deadline", "Does it speak TLS?"
        except (OSError, ValueError) as error:
            cause, hint = explain(error)
        secure.close()
        raise PeerError(_OPERATION, cause, hint)
