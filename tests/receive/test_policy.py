"""Who may associate, and which contexts are accepted."""

from __future__ import annotations

import hashlib
import ipaddress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from pynetdicom.presentation import build_context

from dicomnode.certificates import PeerCertificate
from dicomnode.receive.negotiation import accepted_contexts
from dicomnode.receive.policy import Rejection, decide_association
from dicomnode.settings import Peer, Settings

CT, VERIFICATION, FIND = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.2.1.1"
IMPLICIT, EXPLICIT, JPEG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.70"
NODE = Settings(
    node={"ae_title": "NODE"},
    peers=[
        {"name": "anywhere", "ae_title": "CT", "allow": ["echo"]},
        {"name": "room1", "ae_title": "CT", "host": "10.0.0.1", "allow": ["store"]},
        {"name": "room2", "ae_title": "MR", "host": "10.0.0.2"},
    ],
)


@pytest.mark.parametrize(
    ("calling", "called", "address", "answer"),
    [
        ("CT", "NODE", "10.0.0.1", "room1"),
        (" CT  ", "NODE    ", "10.0.0.1", "room1"),
        ("CT", "NODE", "10.9.9.9", "anywhere"),
        ("MR", "NODE", "10.0.0.2", "room2"),
        ("MR", "NODE", "::ffff:10.0.0.2", "room2"),
        ("MR", "NODE", "10.0.0.3", (1, 1, 3)),
        ("US", "NODE", "10.0.0.1", (1, 1, 3)),
        ("ct", "NODE", "10.0.0.1", (1, 1, 3)),
        ("", "NODE", "10.0.0.1", (1, 1, 3)),
        ("CT", "node", "10.0.0.1", (1, 1, 7)),
        ("CT", "ANY-SCP", "10.0.0.1", (1, 1, 7)),
        ("CT", "", "10.0.0.1", (1, 1, 7)),
    ],
)
def test_decision(calling: str, called: str, address: str, answer: object) -> None:
    found = decide_association(NODE, calling=calling, called=called, address=address)
    if isinstance(found, Peer):
        assert found.name == answer
    else:
        assert (found.result, found.source, found.reason) == answer
        assert found.cause and found.hint


def test_nobody_listed_means_nobody_may(tmp_path: object) -> None:
    assert isinstance(decide_association(Settings(), calling="A", called="DICOMNODE", address="::1"), Rejection)


@given(st.text(max_size=40))
def test_strangers_cannot_write_into_the_log(title: str) -> None:
    for found in (
        decide_association(NODE, calling=title, called="NODE", address="1.1.1.1"),
        decide_association(NODE, calling="X", called=title, address="1.1.1.1"),
    ):
        if isinstance(found, Rejection):
            assert found.cause.isascii() and found.cause.isprintable() and "<" not in found.cause
            assert len(found.cause) < 120


# TLS, certificates, called AE titles, networks


def certificate(name: str, *, dns: tuple[str, ...] = (), ips: tuple[str, ...] = ()) -> PeerCertificate:
    now = datetime.now(UTC)
    return PeerCertificate(fingerprint(name), name, dns, (), ips, now - timedelta(1), now + timedelta(1))


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


HOST_B, HOST_C = certificate("", ips=("10.0.0.2",)), certificate("", ips=("10.0.0.3",))


SECURE = Settings(
    node={"ae_title": "NODE", "more_ae_titles": ["NODE2", "QR"]},
    tls={"port": 2762, "certificate_file": "own.pem", "key_file": "own.key", "ca_file": "ca.pem"},
    peers=[
        {"name": "by-name", "ae_title": "A", "tls": True, "certificate_name": "a.hospital", "allow": ["store"]},
        {"name": "by-host", "ae_title": "B", "tls": True, "host": "10.0.0.2", "allow": ["store"]},
        {"name": "plain", "ae_title": "C", "host": "10.0.0.3", "allow": ["store"]},
        {"name": "moving", "ae_title": "D", "certificate_name": "d.hospital", "allow": ["store"]},
        {"name": "nets", "ae_title": "E", "more_hosts": ["10.1.0.0/16", "fd00::/8", "10.9.9.9"], "allow": ["echo"]},
        {"name": "narrow", "ae_title": "E", "host": "10.1.2.0/24", "allow": ["store"]},
        {"name": "single", "ae_title": "E", "host": "10.1.2.3", "allow": ["find"]},
        {"name": "store", "ae_title": "F", "called_ae": "NODE2", "allow": ["store"]},
        {"name": "query", "ae_title": "F", "called_ae": ["QR"], "allow": ["find", "move"]},
        {"name": "named", "ae_title": "G", "host": "ct.hospital", "allow": ["echo"]},
        {"name": "upgraded", "ae_title": "H", "tls": True, "certificate_name": "h", "allow": ["store", "find"]},
        {"name": "fallback", "ae_title": "H", "host": "10.0.0.8", "allow": ["echo"]},
        {"name": "both", "ae_title": "I", "tls": True, "certificate_name": "i", "certificate_sha256": fingerprint("j")},
    ],
)
NAMES = {"ct.hospital": frozenset({"10.0.0.7", "fd00::7"})}


def ask(settings: Settings = SECURE, **caller: Any) -> Peer | Rejection:
    given = {"called": "NODE", "address": "10.0.0.99", **caller}
    return decide_association(settings, resolve=lambda name: NAMES.get(name, frozenset()), **given)


@pytest.mark.parametrize(
    ("caller", "answer"),
    [
        # A certificate that is bound by name
        ({"calling": "A", "tls": True, "certificate": certificate("a.hospital")}, "by-name"),
        ({"calling": "A", "tls": True, "certificate": certificate("x", dns=("A.Hospital",))}, "by-name"),
        ({"calling": "A", "tls": True, "certificate": certificate("d.hospital")}, (1, 1, 3)),
        ({"calling": "A", "tls": True, "certificate": certificate("x", dns=("*.hospital",))}, (1, 1, 3)),
        ({"calling": "A", "tls": True}, (1, 1, 3)),
        ({"calling": "A"}, (1, 1, 3)),
        ({"calling": "A", "address": "127.0.0.1"}, (1, 1, 3)),
        # ... by the host that it is issued for
        ({"calling": "B", "tls": True, "address": "10.0.0.2", "certificate": HOST_B}, "by-host"),
        ({"calling": "B", "tls": True, "address": "10.0.0.2", "certificate": certificate("10.0.0.2")}, (1, 1, 3)),
        ({"calling": "B", "tls": True, "address": "10.0.0.4", "certificate": HOST_B}, (1, 1, 3)),
        ({"calling": "B", "tls": True, "address": "10.0.0.2", "certificate": certificate("a.hospital")}, (1, 1, 3)),
        # A peer without tls
        ({"calling": "C", "address": "10.0.0.3"}, "plain"),
        ({"calling": "C", "address": "10.0.0.3", "tls": True, "certificate": HOST_C}, "plain"),
        ({"calling": "C", "address": "10.0.0.3", "tls": True, "certificate": certificate("a.hospital")}, (1, 1, 3)),
        ({"calling": "D"}, "moving"),
        ({"calling": "D", "tls": True, "certificate": certificate("d.hospital")}, "moving"),
        ({"calling": "D", "tls": True, "certificate": certificate("a.hospital")}, (1, 1, 3)),
        # Networks, the closest first
        ({"calling": "E", "address": "10.1.7.7"}, "nets"),
        ({"calling": "E", "address": "::ffff:10.1.7.7"}, "nets"),
        ({"calling": "E", "address": "fd00::1"}, "nets"),
        ({"calling": "E", "address": "10.9.9.9"}, "nets"),
        ({"calling": "E", "address": "10.1.2.4"}, "narrow"),
        ({"calling": "E", "address": "10.1.2.3"}, "single"),
        ({"calling": "E", "address": "10.2.0.1"}, (1, 1, 3)),
        ({"calling": "E", "address": "not an address"}, (1, 1, 3)),
        # Called AE titles
        ({"calling": "F", "called": "NODE2"}, "store"),
        ({"calling": "F", "called": "QR "}, "query"),
        ({"calling": "F", "called": "NODE"}, (1, 1, 7)),
        ({"calling": "F", "called": "OTHER"}, (1, 1, 7)),
        ({"calling": "D", "called": "NODE2"}, "moving"),
        # Names
        ({"calling": "G", "address": "10.0.0.7"}, "named"),
        ({"calling": "G", "address": "fd00:0::7"}, "named"),
        ({"calling": "G", "address": "10.0.0.8"}, (1, 1, 3)),
        # One AE title with two entries: what it may do depends on how it comes
        ({"calling": "H", "address": "10.0.0.8"}, "fallback"),
        ({"calling": "H", "address": "10.0.0.8", "tls": True, "certificate": certificate("h")}, "upgraded"),
        ({"calling": "H", "address": "10.0.0.9"}, (1, 1, 3)),
        # Name and fingerprint: both have to fit
        ({"calling": "I", "tls": True, "certificate": certificate("j", dns=("i",))}, "both"),
        ({"calling": "I", "tls": True, "certificate": certificate("i")}, (1, 1, 3)),
        ({"calling": "I", "tls": True, "certificate": certificate("j")}, (1, 1, 3)),
        # Not DICOM
        ({"calling": "D", "application_context": "1.2.3"}, (1, 1, 2)),
    ],
)  # fmt: skip
def test_decision_by_everything(caller: dict[str, Any], answer: object) -> None:
    found = ask(**caller)
    if isinstance(found, Peer):
        assert found.name == answer
    else:
        assert (found.result, found.source, found.reason) == answer, found
        assert found.cause and found.hint


@pytest.mark.parametrize(
    ("caller", "words"),
    [
        ({"calling": "C"}, "more_hosts"),
        ({"calling": "A"}, "port 2762"),
        ({"calling": "A", "tls": True}, "client certificate"),
        ({"calling": "A", "tls": True, "certificate": certificate("d.hospital")}, "certificate_sha256"),
        ({"calling": "F"}, "called_ae of peer"),
        ({"calling": "H"}, "port 2762"),  # of two entries the one that came closest is told
        ({"calling": "Z"}, "[[peers]]"),
    ],
)
def test_administrator_is_told_what_to_do(caller: dict[str, Any], words: str) -> None:
    found = ask(**caller)
    assert isinstance(found, Rejection)
    assert words in found.hint


def test_hint_names_the_certificate_that_came() -> None:
    found = ask(calling="A", tls=True, certificate=certificate("<script>\n\x00ä"))
    assert isinstance(found, Rejection)
    assert "?script?" in found.cause and "<" not in found.cause
    assert found.cause.isascii() and found.cause.isprintable()
    found = ask(calling="A", tls=True, certificate=certificate("d.hospital"))
    assert isinstance(found, Rejection)
    assert f"d.hospital; sha256 {fingerprint('d.hospital')}" in found.cause


@pytest.mark.parametrize("how", ["required", "optional", "none"])
def test_certificates_that_are_not_asked_for(how: str) -> None:
    base = {"name": "x", "ae_title": "X", "tls": True, "host": "10.0.0.2", "allow": ["store"]}
    bound = {**base, "name": "y", "ae_title": "Y", "certificate_name": "y"}
    settings = Settings(
        node={"ae_title": "NODE"},
        tls={**SECURE.tls.model_dump(exclude_none=True), "client_certificates": how},
        peers=[base, *([bound] if how != "none" else [])],
    )
    found = ask(settings, calling="X", address="10.0.0.2", tls=True)
    assert isinstance(found, Rejection if how == "required" else Peer)
    assert isinstance(ask(settings, calling="X", address="10.0.0.2", tls=True, certificate=certificate("y")), Rejection)
    if how != "none":
        assert isinstance(ask(settings, calling="Y", address="10.0.0.2", tls=True), Rejection)


def test_tls_required_of_all_but_this_machine() -> None:
    tls = {**SECURE.tls.model_dump(exclude_none=True), "required": True}
    peer = {"name": "c", "ae_title": "C", "allow": ["store"], "certificate_name": "c"}
    settings = Settings(node={"ae_title": "NODE"}, tls=tls, peers=[peer])
    found = ask(settings, calling="C")
    assert isinstance(found, Rejection)
    assert (found.result, found.source, found.reason) == (1, 1, 1)
    stranger = ask(settings, calling="NOBODY", called="NOTHING")
    assert isinstance(stranger, Rejection)
    assert stranger.reason == found.reason
    for address in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"):
        assert isinstance(ask(settings, calling="C", address=address), Peer)
    assert isinstance(ask(settings, calling="C", tls=True, certificate=certificate("c")), Peer)


# Properties: the table against a second reading of it.

TITLES = ("A", "B", "C")
PLACES = ("10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1")
HOSTS = (*PLACES, "10.0.0.0/24", "10.0.0.0/16", "fd00::/64", "0.0.0.0/0")
OWNERS = ("one", "two", "three")
CALLED = ("NODE", "QR")


@st.composite
def tables(draw: st.DrawFn) -> Settings:
    peers: list[dict[str, Any]] = []
    for number in range(draw(st.integers(0, 6))):
        tls = draw(st.booleans())
        names = draw(st.lists(st.sampled_from(OWNERS), max_size=2, unique=True))
        prints = draw(st.lists(st.sampled_from(OWNERS), max_size=1))
        if tls and not names and not prints:
            names = ["one"]
        peers.append(
            {
                "name": f"p{number}",
                "ae_title": draw(st.sampled_from(TITLES)),
                "host": draw(st.sampled_from(("", *HOSTS))),
                "more_hosts": draw(st.lists(st.sampled_from(HOSTS), max_size=2)),
                "tls": tls,
                "certificate_name": names,
                "certificate_sha256": [fingerprint(p) for p in prints],
                "called_ae": draw(st.lists(st.sampled_from(CALLED), max_size=2, unique=True)),
                "allow": ["store"],
            }
        )
    tls_section = {**SECURE.tls.model_dump(exclude_none=True), "required": draw(st.booleans())}
    try:
        return Settings(node={"ae_title": "NODE", "more_ae_titles": ["QR"]}, tls=tls_section, peers=peers)
    except ValidationError:  # two of them are the same
        assume(False)
        raise


@st.composite
def callers(draw: st.DrawFn) -> dict[str, Any]:
    tls = draw(st.booleans())
    owner = draw(st.sampled_from((None, *OWNERS))) if tls else None
    shown = certificate(owner) if owner else None
    return {
        "calling": draw(st.sampled_from((*TITLES, "STRANGER"))),
        "called": draw(st.sampled_from((*CALLED, "OTHER"))),
        "address": draw(st.sampled_from((*PLACES, "127.0.0.1", "192.0.2.1"))),
        "tls": tls,
        "certificate": shown,
    }


def fits(settings: Settings, peer: Peer, caller: dict[str, Any]) -> bool:
    """What the documentation says, in other words than the code."""
    at = ipaddress.ip_address(caller["address"])
    nets = [ipaddress.ip_network(h) for h in peer.hosts]
    shown = caller["certificate"]
    if settings.tls.required and not caller["tls"] and not at.is_loopback:
        return False
    if peer.tls and not caller["tls"]:
        return False
    if caller["tls"]:
        if shown is None:
            return False
        if peer.certificate_sha256 and shown.sha256 not in peer.certificate_sha256:
            return False
        if peer.certificate_name and shown.common_name not in peer.certificate_name:
            return False
        if not peer.certificate_sha256 and not peer.certificate_name:
            return False  # these certificates are issued for no host
    return (
        peer.ae_title == caller["calling"]
        and (not nets or any(n.version == at.version and at in n for n in nets))
        and caller["called"] in (peer.called_ae or settings.node.ae_titles)
    )


@given(tables(), callers())
def test_only_who_fits_an_entry_is_let_in(table: Settings, caller: dict[str, Any]) -> None:
    found = ask(table, **caller)
    fitting = [p for p in table.peers if fits(table, p, caller)]
    if isinstance(found, Rejection):
        assert fitting == []
        assert (found.result, found.source) == (1, 1) and found.reason in (1, 3, 7)
        assert found.cause and found.hint
    else:
        assert found in fitting


@given(tables(), callers())
def test_a_certificate_of_one_peer_never_opens_another(settings: Settings, caller: dict[str, Any]) -> None:
    found = ask(settings, **caller)
    if isinstance(found, Peer) and caller["tls"]:
        assert caller["certificate"] is not None
        owners = {fingerprint(o): o for o in OWNERS}
        owner = owners[caller["certificate"].sha256]
        assert not found.certificate_name or owner in found.certificate_name
        assert not found.certificate_sha256 or fingerprint(owner) in found.certificate_sha256


@given(tables(), callers())
def test_who_asks_cannot_find_out_who_is_listed(settings: Settings, caller: dict[str, Any]) -> None:
    """Whatever is wrong with a listed caller, it hears what a stranger hears."""
    found = ask(settings, **caller)
    stranger = ask(settings, **{**caller, "calling": "STRANGER"})
    assert isinstance(stranger, Rejection)
    proven = any(
        fits(settings, p.model_copy(update={"called_ae": ()}), {**caller, "called": "NODE"}) for p in settings.peers
    )
    if isinstance(found, Rejection) and not proven:
        assert (found.result, found.source, found.reason) == (stranger.result, stranger.source, stranger.reason)


@given(tables(), callers(), st.data())
def test_further_entries_shut_nobody_out(settings: Settings, caller: dict[str, Any], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.sampled_from(settings.peers), unique=True)) if settings.peers else []
    fewer = settings.model_copy(update={"peers": tuple(p for p in settings.peers if p in kept)})
    if isinstance(ask(fewer, **caller), Peer):
        assert isinstance(ask(settings, **caller), Peer)


def allowing(*services: Any) -> Peer:
    return Peer(name="p", ae_title="P", allow=services)


def test_contexts_keep_the_order_of_the_requestor() -> None:
    proposed = [build_context(CT, [JPEG, EXPLICIT, "9.9.9"]), build_context(CT, [IMPLICIT, JPEG])]
    (context,) = accepted_contexts(proposed, allowing("store"))
    assert [str(t) for t in context.transfer_syntax] == [JPEG, EXPLICIT, IMPLICIT]


@pytest.mark.parametrize(
    ("allowed", "accepted"),
    [(set(), []), ({"echo"}, [VERIFICATION]), ({"store"}, [CT]), ({"echo", "store", "find"}, [VERIFICATION, CT])],
)
def test_contexts_follow_the_services_of_the_peer(allowed: set[str], accepted: list[str]) -> None:
    proposed = [build_context(c, [IMPLICIT]) for c in (VERIFICATION, CT, FIND, "1.2.3.99")]
    assert [str(c.abstract_syntax) for c in accepted_contexts(proposed, allowing(*allowed))] == accepted


def test_context_without_a_known_syntax_is_not_accepted() -> None:
    assert accepted_contexts([build_context(CT, ["9.9.9"])], allowing("store")) == []
