"""Who may open an association: deny by default (PS3.8 9.3.4 for the rejection codes). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dicomnode.settings import Peer, Settings, caller_matches

REJECTED_PERMANENT = 1
SOURCE_SERVICE_USER = 1
CALLING_AE_NOT_RECOGNIZED = 3
CALLED_AE_NOT_RECOGNIZED = 7


@dataclass(frozen=True, slots=True)
class Rejection:
    """A-ASSOCIATE-RJ fields, and what the log tells the administrator."""

    result: int
    source: int
    reason: int
    cause: str
    hint: str


def decide_association(settings: Settings, *, calling: str, called: str, address: str) -> Peer | Rejection:
    """The peer that may speak, or why not.

    AE titles are compared without leading and trailing spaces (PS3.5 6.2). They may hold
    anything a stranger sends, so a rejection shows them only when they are plain.
    """
    calling, called = calling.strip(), called.strip()
    if called != settings.node.ae_title:
        return Rejection(
            REJECTED_PERMANENT,
            SOURCE_SERVICE_USER,
            CALLED_AE_NOT_RECOGNIZED,
            f"called AE title '{_plain(called)}' is not this node's '{settings.node.ae_title}'",
            "Correct the AE title of this node at the sender, or node.ae_title here",
        )
    known = [peer for peer in settings.peers if peer.ae_title == calling]
    for peer in sorted(known, key=lambda p: not p.host):  # one with an address goes before one without
        if caller_matches(peer, address):
            return peer
    if known:
        cause = f"calling AE title '{_plain(calling)}' is listed with another address"
        hint = "Correct the peer's host in [[peers]], or the sender"
    else:
        cause = f"calling AE title '{_plain(calling)}' is not listed"
        hint = "Add the sender to [[peers]] if it may send here"
    return Rejection(REJECTED_PERMANENT, SOURCE_SERVICE_USER, CALLING_AE_NOT_RECOGNIZED, cause, hint)


def _plain(title: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() and c not in "<>&'\"" else "?" for c in title)[:16]
