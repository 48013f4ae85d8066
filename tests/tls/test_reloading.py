"""Certificates, keys and authorities that change while connections go on."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dicomnode.certificates import parse_certificate
from dicomnode.errors import OperatorError
from dicomnode.reloading import CHECK_SECONDS, Change
from dicomnode.settings import Tls
from dicomnode.tls import Transport
from tests.certificates import Authority, Issued, make_key, write_key
from tests.tls.tls_case import (
    PATIENCE,
    Met,
    Pair,
    Site,
    accepted,
    context_of,
    refused,
    shown_by,
)


@dataclass
class Ticker:
    """Monotonic time that only the test moves."""

    seconds: float = 100.0
    changes: list[Change] = field(default_factory=list)

    def __call__(self) -> float:
        return self.seconds

    def pass_time(self, seconds: float = CHECK_SECONDS) -> None:
        self.seconds += seconds

    def transport(self, tls: Tls) -> Transport:
        return Transport(tls, self.changes.append, self)


def install(issued: Issued, site: Site) -> None:
    """In place, as a renewal by hand does it."""
    site.own.certificate_file.write_bytes(issued.certificate_file.read_bytes())
    site.own.key_file.write_bytes(issued.key_file.read_bytes())


def test_new_certificate_while_connections_go_on(site: Site, meet: Callable[..., Met]) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    former = meet(transport, caller)
    old = shown_by(former)
    renewed = site.authority.issue("node", dns=["node.hospital"], file="renewed")
    install(renewed, site)
    assert shown_by(meet(transport, caller)) == old  # looked at most once a second
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) == renewed.sha256
    assert [c.own.sha256 for c in ticker.changes if c.own] == [renewed.sha256]
    assert transport.load() is not None
    server = accepted(former)
    assert isinstance(former.client, ssl.SSLSocket)
    former.client.sendall(b"still here")
    server.settimeout(PATIENCE)
    assert server.recv(100) == b"still here"


def test_new_certificate_with_the_time_and_size_of_the_old_one(site: Site, meet: Callable[..., Met]) -> None:
    """A restored or copied file may carry any time; only its content tells."""
    import os

    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    old = shown_by(meet(transport, caller))
    before = site.own.certificate_file.stat()
    install(site.authority.issue("node", dns=["node.hospital"], ips=["127.0.0.1"], file="twin"), site)
    for path in site.own.files:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) != old


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("garbage", "cannot be understood"),
        ("half", "cannot be understood"),
        ("empty", "cannot be understood"),
        ("gone", "No such file"),
        ("key of another", "is not the key"),
        ("encrypted key", "is encrypted"),
        ("short key", "1024 bits"),
        ("expired", "valid from"),
        ("authorities gone", "tls.ca_file"),
    ],
)
def test_broken_files_leave_the_former_ones(site: Site, meet: Callable[..., Met], fault: str, words: str) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    old = shown_by(meet(transport, caller))
    own, good = site.own, site.own.certificate_file.read_bytes()
    match fault:
        case "garbage":
            own.certificate_file.write_bytes(b"\0garbage\n")
        case "half":
            own.certificate_file.write_bytes(good[: len(good) // 2])
        case "empty":
            own.certificate_file.write_bytes(b"")
        case "gone":
            own.certificate_file.unlink()
        case "key of another":
            write_key(own.key_file, make_key())
        case "encrypted key":
            write_key(own.key_file, make_key(), b"secret")
        case "short key":
            install(site.authority.issue("node", kind="rsa1024", file="short"), site)
        case "expired":
            install(site.authority.issue("node", start_days=-9, days=-1, file="expired"), site)
        case _:
            site.authority.ca_file.write_bytes(b"")
    for _ in range(3):
        ticker.pass_time()
        assert shown_by(meet(transport, caller)) == old
    (told,) = ticker.changes
    assert told.fault is not None
    assert words in told.fault.cause
    own.certificate_file.write_bytes(good)  # and the mending is seen
    renewed = site.authority.issue("node", file="renewed")
    install(renewed, site)
    site.authority.ca_file.write_bytes(_pem(site.authority))
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) == renewed.sha256
    assert [c.fault for c in ticker.changes[1:]] == [None]


def _pem(authority: Authority) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return authority.certificate.public_bytes(Encoding.PEM)


def test_return_to_the_former_files_ends_the_failure(site: Site, meet: Callable[..., Met]) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    good = site.own.certificate_file.read_bytes()
    assert transport.load() is not None
    for content, told in ((b"x", 1), (good, 1), (b"x", 2)):
        site.own.certificate_file.write_bytes(content)
        ticker.pass_time()
        assert transport.load() is not None
        assert len(ticker.changes) == told


def test_authority_that_is_taken_off_the_list_lets_nobody_in(
    site: Site, meet: Callable[..., Met], tmp_path: Path
) -> None:
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority)
    accepted(meet(transport, caller))
    shutil.copy(Authority(tmp_path / "new", "New CA").ca_file, site.authority.ca_file)
    ticker.pass_time()
    refused(meet(transport, caller), "self-signed certificate in certificate chain")


def test_session_is_not_resumed_past_a_change(site: Site, meet: Callable[..., Met], tmp_path: Path) -> None:
    """RFC 9325 3.4: who was let in once has to be let in again."""
    ticker = Ticker()
    transport = ticker.transport(site.tls())
    caller = context_of(site.authority.issue("CT1"), site.authority, version="1.2")
    met = meet(transport, caller)
    assert isinstance(met.client, ssl.SSLSocket)
    session = met.client.session
    accepted(met).shutdown(socket.SHUT_WR)
    met.client.unwrap()
    shutil.copy(Authority(tmp_path / "new", "New CA").ca_file, site.authority.ca_file)
    ticker.pass_time()
    refused(meet(transport, caller, session=session), "self-signed certificate in certificate chain")


def test_node_that_starts_with_broken_files_recovers(site: Site, meet: Callable[..., Met]) -> None:
    ticker = Ticker()
    good = site.own.certificate_file.read_bytes()
    site.own.certificate_file.write_bytes(b"broken")
    transport = ticker.transport(site.tls())
    with pytest.raises(OperatorError, match=r"tls\.certificate_file"):
        transport.load()
    caller = context_of(site.authority.issue("CT1"), site.authority)
    met = meet(transport, caller)
    assert isinstance(met.server, OperatorError)
    assert met.read != b"hello"
    site.own.certificate_file.write_bytes(good)
    ticker.pass_time()
    assert shown_by(meet(transport, caller)) == site.own.sha256


def test_many_threads_while_files_change(site: Site, connect: Callable[[], Pair]) -> None:
    """Every handshake gets a whole set of files: the old one or the new one."""
    ticker = Ticker()
    transport = ticker.transport(site.tls(client_certificates="none"))
    assert transport.load() is not None
    known = {site.own.sha256}
    caller = context_of(None, site.authority)
    pairs = [connect() for _ in range(24)]

    def one(pair: Pair) -> str:
        ticker.pass_time()
        client, server = pair
        with ThreadPoolExecutor(1) as pool:
            ours = pool.submit(transport.wrap_server, server)
            with caller.wrap_socket(client) as secure:
                der = secure.getpeercert(binary_form=True)
            ours.result(PATIENCE).close()
        assert der is not None
        return parse_certificate(der).sha256

    with ThreadPoolExecutor(4) as pool:
        results = []
        for number, pair in enumerate(pairs):
            results.append(pool.submit(one, pair))
            if number % 4 == 0:
                renewed = site.authority.issue("node", file=f"renewed{number}")
                known.add(renewed.sha256)
                install(renewed, site)
        shown = {r.result(PATIENCE) for r in results}
    assert shown <= known


def test_encrypted_key_never_asks_the_terminal(site: Site) -> None:
    write_key(site.own.key_file, make_key(), b"secret")
    with pytest.raises(OperatorError, match="is encrypted") as caught:
        Transport(site.tls()).load()
    assert "openssl pkey" in caught.value.hint


def test_file_that_is_too_large_is_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.certificates.MOST_BYTES", 100)
    with pytest.raises(OperatorError, match="more than 100 bytes"):
        Transport(site.tls()).load()


def test_own_certificate_comes_first(site: Site) -> None:
    both = _pem(site.authority) + site.own.certificate_file.read_bytes()
    site.own.certificate_file.write_bytes(both)
    with pytest.raises(OperatorError, match="is not the key") as caught:
        Transport(site.tls()).load()
    assert "own certificate first" in caught.value.hint
