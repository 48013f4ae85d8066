"""Association requestor: connect, negotiate, and hand over an association of one thread."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pynetdicom import AE
from pynetdicom.association import MODE_REQUESTOR
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicomnode.dimse.association import NodeAssociation, quiet_pynetdicom
from dicomnode.dimse.lane import OpenSink
from dicomnode.dimse.wire import Limits, Wire
from dicomnode.errors import PeerAway, PeerRefused
from dicomnode.settings import Peer
from dicomnode.tls import Transport

MAX_CONTEXTS = 128
"""Presentation contexts of one association (PS3.8 9.3.2.2: odd IDs from 1 to 255)."""

MAX_PDU_BYTES = 131072
IMPLEMENTATION_CLASS_UID = "2.25.312116063226131209174612391098498137961"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for the TCP connection, and for each answer of the peer."""

    connect_seconds: float
    response_seconds: float


def associate(
    local: str,
    peer: Peer,
    contexts: Sequence[PresentationContext],
    patience: Patience,
    *,
    operation: str,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
    handlers: Sequence[Any] = (),
    open_sink: OpenSink | None = None,
    transport: Transport | None = None,
) -> NodeAssociation:
    """An established association; the caller ends it with ``release`` (or ``abort``) and ``end``.

    ``roles`` are (SCU, SCP) to propose by SOP class (PS3.7 D.3.3.4). Raises PeerRefused when
    the peer has no address, PeerAway else: also a rejection ends once the peer's list is mended.
    A peer with ``tls`` is called by ``transport`` and never without it.
    """
    if not peer.reachable:
        raise PeerRefused(operation, f"peer '{peer.name}' has no host and port", "Add them to [[peers]]")
    quiet_pynetdicom()
    sock = _connect(peer, patience, operation)
    if peer.tls:
        if transport is None:
            sock.close()
            raise PeerRefused(operation, f"peer '{peer.name}' has tls = true, and this command knows no TLS")
        sock = transport.wrap_client(sock, peer)
    limits = Limits(
        max_pdu=MAX_PDU_BYTES,
        max_object=2**40,
        pdu_seconds=patience.response_seconds,
        idle_seconds=patience.response_seconds,
    )
    wire = Wire(sock, limits)
    try:
        there, here = sock.getpeername(), sock.getsockname()
    except OSError:  # it was reset since
        wire.close()
        raise PeerAway(
            operation,
            f"peer '{peer.name}' at {peer.host}:{peer.port} ended the connection at once",
            "Check that a DICOM service listens there, and that it lists this node's address",
        ) from None
    ae = AE(ae_title=local)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = patience.response_seconds
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    assoc = NodeAssociation(ae, MODE_REQUESTOR, wire, sock, open_sink)
    assoc.acceptor.ae_title = peer.ae_title
    assoc.acceptor.address_info = AddressInformation.from_tuple(there)
    user = assoc.requestor
    user.address_info = AddressInformation.from_tuple(here)
    user.ae_title = local
    user.maximum_length = MAX_PDU_BYTES
    user.implementation_class_uid = ae.implementation_class_uid
    user.implementation_version_name = ae.implementation_version_name
    for sop_class, (as_scu, as_scp) in (roles or {}).items():
        item = SCP_SCU_RoleSelectionNegotiation()
        item.sop_class_uid, item.scu_role, item.scp_role = sop_class, as_scu, as_scp
        user.add_negotiation_item(item)
    numbered = deepcopy(list(contexts))
    for index, context in enumerate(numbered):
        context.context_id = 2 * index + 1
    user.requested_contexts = numbered
    for handler in handlers:
        assoc.bind(*handler)
    assoc.dul.event_queue.get_nowait()  # pynetdicom's sign of an incoming connection; this one goes out
    try:
        assoc.request()
    except BaseException:
        assoc.end()
        raise
    if assoc.is_established:
        return assoc
    cause = _why_not(assoc, peer, getattr(sock, "fault", None))
    assoc.end()
    raise PeerAway(operation, *cause)


def _connect(peer: Peer, patience: Patience, operation: str) -> socket.socket:
    try:
        return socket.create_connection((peer.host, peer.port), timeout=patience.connect_seconds)
    except OSError as error:
        raise PeerAway(
            operation,
            f"peer '{peer.name}' at {peer.host}:{peer.port} does not answer ({error.strerror or error})",
            "Check that it runs, its address and port, and the network",
        ) from None


def _why_not(assoc: NodeAssociation, peer: Peer, tls_fault: tuple[str, str] | None) -> tuple[str, str]:
    if tls_fault is not None:
        return f"peer '{peer.name}': {tls_fault[0]}", tls_fault[1]
    if assoc.is_rejected:
        answer = assoc.acceptor.primitive
        reason = f"{answer.result_str}, {answer.source_str}, {answer.reason_str}"
        return (
            f"peer '{peer.name}' rejected the association: {reason}",
            "Check that the peer lists this node's AE title and address",
        )
    if assoc.rejected_contexts:
        return (
            f"peer '{peer.name}' accepts none of the proposed presentation contexts",
            "Check which SOP classes the peer takes",
        )
    return (
        f"peer '{peer.name}' at {peer.host}:{peer.port} does not negotiate an association",
        "Check that a DICOM service listens there, and its log",
    )
