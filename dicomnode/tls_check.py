"""Whether TLS is set up as it should be: files, dates, names, and how each peer is known.

Reads files and nothing else; for ``doctor`` and ``check-config``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from dicomnode import addresses
from dicomnode.certificates import (
    CLIENT_AUTH,
    SERVER_AUTH,
    Identity,
    facts_of,
    is_authority,
    load_authorities,
    load_identity,
    load_revocations,
    now,
    plain,
    revocations_cover,
)
from dicomnode.errors import OperatorError
from dicomnode.findings import Finding, Level
from dicomnode.settings import Peer, Settings
from dicomnode.tls_context import build_contexts

SOON = timedelta(days=30)
CHECK = "TLS"


def tls_findings(settings: Settings, moment: datetime | None = None) -> Iterator[Finding]:
    """Findings about [tls] and about the peers that use it, or should."""
    moment = moment or now()
    tls = settings.tls
    if not tls.files and tls.port is None:
        if any(not _loopback_only(peer) for peer in settings.peers):
            hint = "Fine on a network of its own; else set up [tls]"
            yield Finding(Level.note, CHECK, "not set up: what peers send and get can be read on the network", hint)
        return
    found = list(_files(settings, moment))
    yield from found
    if not any(f.level is Level.fault for f in found):
        yield from _together(settings)
    yield from _listening(settings)
    for peer in settings.peers:
        yield from _peer(settings, peer)


def _files(settings: Settings, moment: datetime) -> Iterator[Finding]:
    tls = settings.tls
    if tls.certificate_file is not None and tls.key_file is not None:
        yield from _own(settings, tls.certificate_file, tls.key_file, moment)
    if tls.ca_file is not None:
        yield from _authorities(settings, tls.ca_file, moment)
    if tls.crl_file is not None:
        yield from _revocations(tls.crl_file, tls.ca_file, moment)


def _own(settings: Settings, certificate_file: Path, key_file: Path, moment: datetime) -> Iterator[Finding]:
    try:
        identity = load_identity(certificate_file, key_file)
    except OperatorError as error:
        yield _fault(error)
        return
    facts = identity.facts
    yield _dated("this node's certificate", facts.shown(), facts.not_before, facts.not_after, moment)
    mode = stat.S_IMODE(key_file.stat().st_mode)
    if mode & 0o027:
        text = f"others on this box may get at {key_file} (mode {mode:o})"
        yield Finding(Level.warn, CHECK, text, f"chmod 600 {key_file}, or 640 with the node's group")
    yield from _purposes(settings, identity)
    if not (facts.dns_names or facts.addresses):
        hint = "Some peers check it against the address that they call: issue it with subjectAltName"
        yield Finding(Level.note, CHECK, "this node's certificate has no DNS name and no address", hint)


def _purposes(settings: Settings, identity: Identity) -> Iterator[Finding]:
    if settings.tls.port is not None and not identity.may(SERVER_AUTH):
        hint = "Issue it with Extended Key Usage serverAuth and clientAuth"
        yield Finding(Level.warn, CHECK, "this node's certificate is not for servers: callers will refuse it", hint)
    if not identity.may(CLIENT_AUTH) and any(peer.tls and peer.reachable for peer in settings.peers):
        hint = "Issue it with Extended Key Usage serverAuth and clientAuth"
        yield Finding(Level.warn, CHECK, "this node's certificate is not for clients: peers may refuse it", hint)


def _authorities(settings: Settings, path: Path, moment: datetime) -> Iterator[Finding]:
    try:
        found = [(certificate, facts_of(certificate)) for certificate in load_authorities(path)]
    except OperatorError as error:
        yield _fault(error)
        return
    except ValueError as error:
        yield Finding(Level.fault, CHECK, f"tls.ca_file {path}: {error}", "Take that certificate out")
        return
    yield Finding(Level.ok, CHECK, f"{len(found)} trusted certificates in {path}")
    for _, facts in found:
        if not facts.valid_at(moment) or facts.not_after - moment < SOON:
            name = ", ".join(plain(n, 64) for n in facts.names[:1]) or facts.sha256
            yield _dated(f"trusted certificate '{name}'", "", facts.not_before, facts.not_after, moment, Level.warn)
    bound = {digest for peer in settings.peers for digest in peer.certificate_sha256}
    loose = [peer.name for peer in settings.peers if peer.tls and not peer.certificate_sha256]
    if loose and any(facts.sha256 in bound and is_authority(certificate) for certificate, facts in found):
        text = f"a peer's own certificate in {path} may sign others; it could speak for {', '.join(loose)}"
        hint = "Bind every peer by certificate_sha256, or take an authority that is no peer"
        yield Finding(Level.warn, CHECK, text, hint)


def _readable(ca_file: Path) -> tuple[x509.Certificate, ...]:
    """Its certificates; none when it is faulty, which is told elsewhere."""
    try:
        return load_authorities(ca_file)
    except OperatorError:
        return ()


def _revocations(path: Path, ca_file: Path | None, moment: datetime) -> Iterator[Finding]:
    try:
        lists = load_revocations(path)
    except OperatorError as error:
        yield _fault(error)
        return
    due = [entry.next_update_utc for entry in lists if entry.next_update_utc is not None]
    first = min(due, default=None)
    if first is not None and first < moment:
        text = f"a revocation list in {path} is out of date since {first:%Y-%m-%d %H:%M} UTC: its peers are refused"
        yield Finding(Level.fault, CHECK, text, "Fetch a new one, and let a timer do it from now on")
    else:
        until = f", good until {first:%Y-%m-%d %H:%M} UTC" if first else ""
        yield Finding(Level.ok, CHECK, f"{len(lists)} revocation lists in {path}{until}")
    if ca_file is not None and not revocations_cover(_readable(ca_file), lists):
        text = (
            "intermediate authorities are not looked up in revocation lists: not every authority of tls.ca_file has one"
        )
        yield Finding(Level.note, CHECK, text, "Put the list of each of them into tls.crl_file")


def _dated(
    what: str, who: str, begin: datetime, end: datetime, moment: datetime, worst: Level = Level.fault
) -> Finding:
    text = f"{what}{': ' if who else ''}{who}"
    if moment < begin:
        return Finding(worst, CHECK, f"{text} is not valid before {begin:%Y-%m-%d}", "Check the clock")
    if end < moment:
        return Finding(worst, CHECK, f"{text} ran out on {end:%Y-%m-%d}", "Renew it; no restart is needed")
    if end - moment < SOON:
        days = (end - moment).days
        hint = "Renew it; no restart is needed"
        return Finding(Level.warn, CHECK, f"{text} runs out in {days} days, on {end:%Y-%m-%d}", hint)
    return Finding(Level.ok, CHECK, f"{text}, valid until {end:%Y-%m-%d}")


def _together(settings: Settings) -> Iterable[Finding]:
    """What OpenSSL says to files that are sound one by one."""
    try:
        build_contexts(settings.tls)
    except OperatorError as error:
        yield _fault(error)


def _listening(settings: Settings) -> Iterator[Finding]:
    tls = settings.tls
    if tls.port is None:
        yield Finding(Level.note, CHECK, "no tls.port: TLS is used for sending only")
        return
    if tls.client_certificates != "required":
        text = f'client_certificates = "{tls.client_certificates}": a caller may come without a certificate'
        yield Finding(Level.warn, CHECK, text, 'Set "required" once every sender has a certificate')
    if tls.required and not addresses.is_loopback(settings.dimse.host):
        hint = 'To close it altogether set dimse.host = "127.0.0.1"'
        text = f"the plain port {settings.dimse.port} stays open and rejects callers from other machines"
        yield Finding(Level.note, CHECK, text, hint)


def _peer(settings: Settings, peer: Peer) -> Iterator[Finding]:
    tls = settings.tls
    if peer.tls:
        yield Finding(Level.ok, CHECK, f"peer {peer.name} uses TLS, known by {_known_by(peer)}")
        return
    if peer.bound:
        hint = "Set tls = true once it uses TLS"
        text = f"peer {peer.name} has a certificate bound to it, but may also call without TLS"
        yield Finding(Level.warn, CHECK, text, hint)
    if _loopback_only(peer):
        return
    if peer.reachable:
        level = Level.warn if tls.required else Level.note
        yield Finding(level, CHECK, f"peer {peer.name} is sent to without TLS", "Set tls = true once it takes TLS")
    elif peer.allow and not tls.required:
        yield Finding(Level.note, CHECK, f"peer {peer.name} may call without TLS", "Set tls = true once it uses TLS")


def _known_by(peer: Peer) -> str:
    ways = []
    if peer.certificate_sha256:
        ways.append("fingerprint")
    if peer.certificate_name:
        ways.append(f"the name {' or '.join(peer.certificate_name)}")
    hosts = [host for host in peer.hosts if not addresses.is_network(host)]
    return " and ".join(ways) or (f"a certificate for {' or '.join(hosts)}" if hosts else "nothing but its AE title")


def _loopback_only(peer: Peer) -> bool:
    return bool(peer.hosts) and all(addresses.is_loopback(host) for host in peer.hosts)


def _fault(error: OperatorError) -> Finding:
    hint = error.hint
    if os.geteuid() != 0 and "Permission denied" in error.cause:
        hint = "Run this as the node's user (sudo -u dicomnode), and let that user read the file"
    return Finding(Level.fault, CHECK, error.cause, hint)
