"""Which presentation contexts and roles an association gets (PS3.7 D.3.3.4, PS3.8 9.3.3). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import Verification

from dicomnode.receive.classes import STORAGE_CLASSES
from dicomnode.settings import Peer

UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
"""Explicit and implicit VR little endian."""


class Services(Protocol):
    """One service beside C-ECHO and C-STORE; the composition root passes them in.

    ``classes`` are its SOP classes; ``roles`` says which roles a peer may take in one of them,
    as (SCU, SCP). ``serve`` answers one request of any kind and runs in the association's own
    thread, where ``assoc.send_*`` can be used too, after the response. ``negotiate`` answers
    SOP Class Extended Negotiation of its own classes.
    """

    @property
    def classes(self) -> frozenset[str]: ...

    def roles(self, sop_class: str, peer: Peer) -> tuple[bool, bool]: ...

    def negotiate(self, assoc: Any, proposed: Mapping[str, bytes]) -> dict[str, bytes]: ...

    def serve(self, assoc: Any, request: Any, context: Any) -> None: ...

    def close(self) -> None: ...


def accepted_contexts(
    proposed: Sequence[Any],
    peer: Peer,
    services: Mapping[str, Services] | None = None,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
) -> list[PresentationContext]:
    """Contexts to support for one request, in the requestor's own order of transfer syntaxes.

    pynetdicom picks the first match in the acceptor's order, so this makes the sender's
    preference the policy: objects come as the sender holds them and are stored as received.
    ``services`` maps SOP classes to who serves them. ``roles`` are the (SCU, SCP) roles that
    the requestor proposes by SOP class (PS3.7 D.3.3.4); a storage class whose SCP it alone
    is, for C-GET, gets an uncompressed syntax where it offers one, because every object can
    be sent in that.
    """
    syntaxes: dict[str, list[str]] = {}
    played: dict[str, tuple[bool, bool]] = {}
    for context in proposed:
        abstract = str(context.abstract_syntax)
        may = _may_play(abstract, peer, services or {})
        as_scu, as_scp = (roles or {}).get(abstract, (True, False))
        play = (as_scu and may[0], as_scp and may[1])
        if not any(play):
            continue
        played[abstract] = play
        usable = [str(t) for t in context.transfer_syntax if str(t) in ALL_TRANSFER_SYNTAXES]
        only_scp = play == (False, True) and any(t in UNCOMPRESSED for t in usable)
        if only_scp or abstract not in STORAGE_CLASSES | {Verification}:
            usable = [t for t in usable if t in UNCOMPRESSED]
        known = syntaxes.setdefault(abstract, [])
        known.extend(t for t in dict.fromkeys(usable) if t not in known)
    supported = []
    for abstract, known in syntaxes.items():
        if not known:
            continue
        built = build_context(abstract, known)
        if abstract in (roles or {}):
            built.scu_role, built.scp_role = played[abstract]
        supported.append(built)
    return supported


def _may_play(abstract: str, peer: Peer, services: Mapping[str, Services]) -> tuple[bool, bool]:
    if abstract in STORAGE_CLASSES:
        return "store" in peer.allow, "get" in peer.allow
    if abstract == Verification:
        return "echo" in peer.allow, False
    service = services.get(abstract)
    return service.roles(abstract, peer) if service is not None else (False, False)


def proposed_roles(request: Any) -> dict[str, tuple[bool, bool]]:
    """SOP class -> (SCU, SCP) that the requestor wants to be."""
    return {
        str(item.sop_class_uid): (bool(item.scu_role), bool(item.scp_role))
        for item in request.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
