"""Service class user: C-ECHO and C-STORE to a peer, from files, without decoding.

One association per batch; presentation contexts are proposed with the transfer syntax that
the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.requestor import MAX_CONTEXTS, Patience, associate
from dicomnode.dimse.store import NextFile, NotPart10, send_store
from dicomnode.errors import PeerAway
from dicomnode.settings import Delivery, Peer
from dicomnode.tls import Transport


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A Part 10 file to send; ``key`` comes back with its outcome.

    Order is kept within a ``group`` (a study). ``fallback``: another object stands ready should
    the peer refuse this one for good; what follows in its group waits for that.
    """

    key: int
    path: Path
    sop_class_uid: str
    transfer_syntax_uid: str
    sop_instance_uid: str
    group: str = ""
    fallback: bool = False


class Sent(StrEnum):
    stored = "stored"
    retry = "retry"
    fallback = "fallback"  # refused, and another object stands ready
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


def patience(delivery: Delivery) -> Patience:
    return Patience(delivery.connect_seconds, delivery.response_seconds)


def echo(local: str, peer: Peer, delivery: Delivery, transport: Transport | None = None) -> None:
    """C-ECHO. Raises PeerAway or PeerRefused with what to check."""
    contexts = [build_context(Verification)]
    assoc = associate(local, peer, contexts, patience(delivery), operation="C-ECHO", transport=transport)
    try:
        status = assoc.send_c_echo()
        if "Status" not in status or status.Status != 0x0000:
            raise PeerAway("C-ECHO", f"peer '{peer.name}' did not answer with success")
        assoc.release()
    finally:
        assoc.end()


def send_batch(
    local: str,
    peer: Peer,
    delivery: Delivery,
    objects: Sequence[Outgoing],
    on_outcome: Callable[[SendOutcome], None],
    transport: Transport | None = None,
) -> None:
    """C-STORE each object in order on one association; report each as soon as it is known.

    After an object that has to be retried the rest of its group is reported as ``retry``, so
    that order is kept; when the association is gone, everything that is left is. Raises
    PeerAway when no association came about (nothing reported).
    """
    contexts = [build_context(sop_class, syntax) for sop_class, syntax in _contexts(objects)]
    assoc = associate(local, peer, contexts, patience(delivery), operation="C-STORE", transport=transport)
    ahead = NextFile()
    try:
        accepted = {(str(c.abstract_syntax), str(c.transfer_syntax[0])): c.context_id for c in assoc.accepted_contexts}
        held: set[str] = set()
        for number, outgoing in enumerate(objects, start=1):
            if outgoing.group in held:
                on_outcome(SendOutcome(outgoing.key, Sent.retry, "an earlier object of its study has to go first"))
                continue
            following = objects[number] if number < len(objects) else None
            outcome = _send(assoc, number % 65535 + 1, outgoing, following, ahead, accepted, delivery.response_seconds)
            if outcome.sent is Sent.rejected and outgoing.fallback:
                outcome = SendOutcome(outcome.key, Sent.fallback, outcome.cause)
            if outcome.sent in (Sent.retry, Sent.fallback):
                held.add(outgoing.group)
            on_outcome(outcome)
        if assoc.usable():
            assoc.release()
    finally:
        ahead.close()
        assoc.end()


def _contexts(objects: Iterable[Outgoing]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((o.sop_class_uid, o.transfer_syntax_uid) for o in objects))[:MAX_CONTEXTS]


def _send(
    assoc: NodeAssociation,
    message_id: int,
    outgoing: Outgoing,
    following: Outgoing | None,
    ahead: NextFile,
    accepted: Mapping[tuple[str, str], int],
    response_seconds: float,
) -> SendOutcome:
    context_id = accepted.get((outgoing.sop_class_uid, outgoing.transfer_syntax_uid))
    if context_id is None:
        return SendOutcome(
            outgoing.key, Sent.rejected, "the peer accepts neither this SOP class nor its transfer syntax"
        )
    if not assoc.usable():
        return SendOutcome(outgoing.key, Sent.retry, "the association was cut")
    try:
        status = send_store(
            assoc,
            context_id,
            message_id=message_id,
            sop_class_uid=outgoing.sop_class_uid,
            sop_instance_uid=outgoing.sop_instance_uid,
            data=ahead.take(outgoing.path),
            seconds=response_seconds,
            meanwhile=None if following is None else partial(ahead.prepare, following.path),
        )
    except FileNotFoundError:
        return SendOutcome(outgoing.key, Sent.rejected, "the object is not in the store")
    except NotPart10:
        return SendOutcome(outgoing.key, Sent.rejected, "the object is no Part 10 file")
    except OSError as error:
        return SendOutcome(outgoing.key, Sent.retry, f"the object could not be read ({type(error).__name__})")
    sent, cause = classify_store_status(status)
    return SendOutcome(outgoing.key, sent, cause)
