"""Who may open an association: deny by default (PS3.8 9.3.4 for the rejection codes). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dicomnode import addresses
from dicomnode.certificates import PeerCertificate, binding_fault, plain
from dicomnode.settings import Peer, Settings

REJECTED_PERMANENT = 1
SOURCE_SERVICE_USER = 1
NO_REASON_GIVEN = 1
APPLICATION_CONTEXT_NAME_NOT_SUPPORTED = 2
CALLING_AE_NOT_RECOGNIZED = 3
CALLED_AE_NOT_RECOGNIZED = 7

REJECTED_TRANSIENT = 2
SOURCE_PRESENTATION = 3
TEMPORARY_CONGESTION = 1
LOCAL_LIMIT_EXCEEDED = 2

APPLICATION_CONTEXT_NAME = "1.2.840.10008.3.1.1.1"
"""PS3.7 A.2.1, the only one."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A-ASSOCIATE-RJ fields, and what the log tells the administrator."""

    result: int
    source: int
    reason: int
    cause: str
    hint: str


LOCAL_LIMIT = Rejection(
    REJECTED_TRANSIENT,
    SOURCE_PRESENTATION,
    LOCAL_LIMIT_EXCEEDED,
    "too many associations at a time",
    "Raise dimse.max_connections, or let the sender open fewer",
)


def decide_association(
    settings: Settings,
    *,
    calling: str,
    called: str,
    address: str,
    tls: bool = False,
    certificate: PeerCertificate | None = None,
    application_context: str = APPLICATION_CONTEXT_NAME,
    resolve: addresses.Resolve = addresses.resolve,
) -> Peer | Rejection:
    """The peer that may speak, or why not; its ``allow`` then decides about each service.

    A caller is a peer when its AE title, its address, how it comes (plain, or TLS with
    ``certificate``) and the AE title that it calls all fit one entry of the table; of several
    the closest one, see :func:`_closeness`. Whatever is wrong with the caller gets the answer
    that a stranger gets, so that nobody can find out by asking who is listed.

    AE titles are compared without leading and trailing spaces (PS3.5 6.2). They may hold
    anything a stranger sends, so a rejection shows them only when they are plain.
    """
    calling, called = calling.strip(), called.strip()
    if application_context != APPLICATION_CONTEXT_NAME:
        return _rejected(
            APPLICATION_CONTEXT_NAME_NOT_SUPPORTED,
            "the caller proposes another application context than DICOM's",
            "It is no DICOM application, or a broken one",
        )
    if settings.tls.required and not tls and not addresses.is_loopback(address):
        return _rejected(
            NO_REASON_GIVEN,
            f"calling AE title '{plain(calling)}' comes without TLS, which tls.required forbids",
            f"Switch TLS on at the sender and let it call port {settings.tls.port}",
        )
    if called not in settings.node.ae_titles:
        return _rejected(
            CALLED_AE_NOT_RECOGNIZED,
            f"called AE title '{plain(called)}' is not this node's '{settings.node.ae_title}'",
            "Correct the AE title of this node at the sender, or node.ae_title here",
        )
    known = [peer for peer in settings.peers if peer.ae_title == calling]
    if not known:
        return _rejected(
            CALLING_AE_NOT_RECOGNIZED,
            f"calling AE title '{plain(calling)}' is not listed",
            "Add the sender to [[peers]] if it may send here",
        )
    caller = _Caller(calling, called, address, tls, certificate)
    answers = [_judge(settings, peer, caller, resolve) for peer in known]
    fitting = [answer for answer in answers if isinstance(answer, _Fit)]
    if fitting:
        return max(fitting, key=lambda fit: fit.closeness).peer
    return max((a for a in answers if isinstance(a, _Misfit)), key=lambda misfit: misfit.step).rejection


@dataclass(frozen=True, slots=True)
class _Caller:
    calling: str
    called: str
    address: str
    tls: bool
    certificate: PeerCertificate | None


@dataclass(frozen=True, slots=True)
class _Fit:
    peer: Peer
    closeness: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Misfit:
    """``step`` counts what fitted before: of several entries the one that came closest is reported."""

    step: int
    rejection: Rejection


def _judge(settings: Settings, peer: Peer, caller: _Caller, resolve: addresses.Resolve) -> _Fit | _Misfit:
    title = f"calling AE title '{plain(caller.calling)}'"
    near = addresses.closeness(peer.hosts, caller.address, resolve)
    if near is None:
        cause = f"{title} is listed with another address"
        return _misfit(0, cause, "Correct the peer's host or more_hosts in [[peers]], or the sender")
    if peer.tls and not caller.tls:
        hint = f"Switch TLS on at the sender and let it call port {settings.tls.port}, or set tls = false"
        return _misfit(1, f"{title} comes without TLS, but peer '{peer.name}' has tls = true", hint)
    if caller.tls:
        required = settings.tls.client_certificates == "required"
        fault = binding_fault(peer, caller.certificate, required=required)
        if fault:
            shown = f": {caller.certificate.shown()}" if caller.certificate else ""
            hint = "If it is this peer's, put its name into certificate_name or its fingerprint into certificate_sha256"
            if caller.certificate is None:
                hint = "Switch the client certificate on at the sender, or set tls.client_certificates"
            return _misfit(2, f"{title} is refused as peer '{peer.name}': {fault}{shown}", hint)
    if peer.called_ae and caller.called not in peer.called_ae:
        cause = f"{title} may not call '{plain(caller.called)}'"
        return _misfit(3, cause, f"Add it to called_ae of peer '{peer.name}'", CALLED_AE_NOT_RECOGNIZED)
    return _Fit(peer, _closeness(peer, caller, near))


def _closeness(peer: Peer, caller: _Caller, near: float) -> tuple[float, ...]:
    """What makes one entry say more about a caller than another: certificate, address, called AE title, TLS."""
    proven = caller.tls and peer.bound
    return (float(proven), near, float(bool(peer.called_ae)), float(peer.tls))


def _misfit(step: int, cause: str, hint: str, reason: int = CALLING_AE_NOT_RECOGNIZED) -> _Misfit:
    return _Misfit(step, _rejected(reason, cause, hint))


def _rejected(reason: int, cause: str, hint: str) -> Rejection:
    return Rejection(REJECTED_PERMANENT, SOURCE_SERVICE_USER, reason, cause, hint)
