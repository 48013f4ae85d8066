"""Service class user: C-ECHO and C-STORE to a peer, from files, without decoding.

One association per batch; presentation contexts are proposed with the transfer syntax that
the file holds. TCP_NODELAY is set: pynetdicom leaves Nagle's algorithm on, which costs
40 ms for each object (PERFORMANCE.md).
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pynetdicom import AE, evt
from pynetdicom import _config as pynetdicom_config
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from dicomnode.errors import PeerAway, PeerRefused
from dicomnode.reactor import park
from dicomnode.settings import Delivery, Peer

MAX_CONTEXTS = 127
SLOWEST_BYTES_PER_SECOND = 125_000
"""A line of 1 Mbit/s; the wait for a response begins before the object's last byte is sent."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A Part 10 file to send; ``key`` comes back with its outcome.

    Order is kept within a ``group`` (a study).
    """

    key: int
    path: Path
    sop_class_uid: str
    transfer_syntax_uid: str
    group: str = ""


class Sent(StrEnum):
    stored = "stored"
    retry = "retry"
    rejected = "rejected"


@dataclass(frozen=True, slots=True)
class SendOutcome:
    key: int
    sent: Sent
    cause: str = ""


def classify_store_status(status: int | None) -> tuple[Sent, str]:
    """What a C-STORE-RSP status means for the sender (PS3.4 B.2.3, PS3.7 C). Pure.

    Out of resources passes; a warning means stored; the rest is a refusal that the same
    bytes will meet again.
    """
    if status is None:
        return Sent.retry, "the peer did not answer"
    name = f"status 0x{status:04X}"
    if status in (0x0000, 0x0001, 0x0107, 0x0116) or 0xB000 <= status <= 0xBFFF:
        return Sent.stored, "" if status == 0 else f"stored with warning, {name}"
    if status == 0x0111:  # duplicate SOP instance: it is there
        return Sent.stored, f"was there already, {name}"
    if 0xA700 <= status <= 0xA7FF or status in (0x0110, 0x0213, 0x0210):
        return Sent.retry, f"the peer cannot take it now, {name}"
    if status == 0x0124:
        return Sent.retry, f"the peer does not authorise this node to store, {name}"
    return Sent.rejected, f"the peer refused the object, {name}"


def _ae(local: str, delivery: Delivery) -> AE:
    pynetdicom_config.LOG_HANDLER_LEVEL = "none"
    pynetdicom_config.STORE_SEND_CHUNKED_DATASET = True
    ae = AE(ae_title=local)
    ae.connection_timeout = delivery.connect_seconds
    ae.acse_timeout = delivery.response_seconds
    ae.dimse_timeout = delivery.response_seconds
    ae.network_timeout = delivery.response_seconds
    ae.maximum_pdu_size = 131072
    return ae


def _no_delay(event: Any) -> None:
    sock = event.assoc.dul.socket.socket
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _associate(ae: AE, peer: Peer, operation: str) -> Any:
    """Established association. Raises PeerAway: also a rejection ends once the peer's list is mended."""
    if not peer.reachable:
        raise PeerRefused(operation, f"peer '{peer.name}' has no host and port", "Add them to [[peers]]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assoc = ae.associate(
            peer.host, peer.port, ae_title=peer.ae_title, evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay)]
        )
    if assoc.is_established:
        return assoc
    if assoc.is_rejected:
        primitive = assoc.acceptor.primitive
        reason = f"{primitive.result_str}, {primitive.source_str}, {primitive.reason_str}"
        raise PeerAway(
            operation,
            f"peer '{peer.name}' rejected the association: {reason}",
            "Check that the peer lists this node's AE title and address",
        )
    raise PeerAway(
        operation,
        f"peer '{peer.name}' at {peer.host}:{peer.port} does not answer",
        "Check that it runs, its address and port, and the network",
    )


def echo(local: str, peer: Peer, delivery: Delivery) -> None:
    """C-ECHO. Raises PeerAway or PeerRefused with what to check."""
    ae = _ae(local, delivery)
    ae.add_requested_context(Verification)
    assoc = _associate(ae, peer, "C-ECHO")
    try:
        if not assoc.accepted_contexts:
            raise PeerRefused("C-ECHO", f"peer '{peer.name}' does not accept the Verification SOP class")
        park(assoc)
        status = assoc.send_c_echo()
        if "Status" not in status or status.Status != 0x0000:
            raise PeerAway("C-ECHO", f"peer '{peer.name}' did not answer with success")
    finally:
        assoc.release()


def send_batch(
    local: str,
    peer: Peer,
    delivery: Delivery,
    objects: Sequence[Outgoing],
    on_outcome: Callable[[SendOutcome], None],
) -> None:
    """C-STORE each object in order on one association; report each as soon as it is known.

    After an object that has to be retried the rest of its group is reported as ``retry``, so
    that order is kept; when the association is gone, everything that is left is. Raises
    PeerAway when no association came about (nothing reported).
    """
    ae = _ae(local, delivery)
    for sop_class, syntax in _contexts(objects):
        ae.requested_contexts = [*ae.requested_contexts, build_context(sop_class, syntax)]
    assoc = _associate(ae, peer, "C-STORE")
    try:
        accepted = {(str(c.abstract_syntax), str(c.transfer_syntax[0])) for c in assoc.accepted_contexts}
        held: set[str] = set()
        for outgoing in objects:
            if outgoing.group in held:
                on_outcome(SendOutcome(outgoing.key, Sent.retry, "an earlier object of its study has to go first"))
                continue
            outcome = _send(assoc, outgoing, accepted, delivery.response_seconds)
            if outcome.sent is Sent.retry:
                held.add(outgoing.group)
            on_outcome(outcome)
    finally:
        if assoc.is_established:
            assoc.release()


def _contexts(objects: Iterable[Outgoing]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((o.sop_class_uid, o.transfer_syntax_uid) for o in objects))[:MAX_CONTEXTS]


def _send(assoc: Any, outgoing: Outgoing, accepted: set[tuple[str, str]], response_seconds: float) -> SendOutcome:
    if (outgoing.sop_class_uid, outgoing.transfer_syntax_uid) not in accepted:
        return SendOutcome(
            outgoing.key, Sent.rejected, "the peer accepts neither this SOP class nor its transfer syntax"
        )
    if not assoc.is_established:
        return SendOutcome(outgoing.key, Sent.retry, "the association was cut")
    try:
        size = outgoing.path.stat().st_size
        # pynetdicom starts this clock when the object is queued, not when it is sent.
        assoc.dimse_timeout = response_seconds + size / SLOWEST_BYTES_PER_SECOND
        park(assoc)
        status = assoc.send_c_store(outgoing.path)
    except FileNotFoundError:
        return SendOutcome(outgoing.key, Sent.rejected, "the object is not in the store")
    except (ValueError, RuntimeError, OSError) as error:
        return SendOutcome(outgoing.key, Sent.retry, f"the association was cut ({type(error).__name__})")
    except Exception as error:  # noqa: BLE001 a damaged file must not keep the courier from the others
        return SendOutcome(outgoing.key, Sent.rejected, f"the object cannot be read ({type(error).__name__})")
    sent, cause = classify_store_status(status.Status if "Status" in status else None)
    return SendOutcome(outgoing.key, sent, cause)
