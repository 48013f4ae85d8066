"""Where callers come from: addresses, networks, names, and a name service that goes away."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dicomnode.addresses import ANYWHERE, EXACT, NameCache, checked_host, closeness, is_loopback


def nowhere(name: str) -> frozenset[str]:
    raise AssertionError(f"{name} was looked up")


@pytest.mark.parametrize(
    ("hosts", "address", "rank"),
    [
        ((), "10.0.0.1", ANYWHERE),
        (("10.0.0.1",), "10.0.0.1", EXACT),
        (("10.0.0.1",), "10.0.0.2", None),
        (("10.0.0.0/24",), "10.0.0.2", 0.75),
        (("10.0.0.0/8", "10.0.0.0/24"), "10.0.0.2", 0.75),
        (("0.0.0.0/0",), "192.0.2.1", 0.0),
        (("0.0.0.0/0",), "fd00::1", None),
        (("fd00::/64",), "fd00::1", 0.5),
        (("fd00::/64",), "fd00:0:0:1::1", None),
        (("fe80::1",), "fe80::1%eth0", EXACT),
        (("10.0.0.1",), "::ffff:10.0.0.1", EXACT),
        (("10.0.0.0/24",), "::ffff:10.0.0.1", 0.75),
        (("10.0.0.1",), "garbage", None),
        (("10.0.0.0/24",), "", None),
    ],
)
def test_closeness(hosts: tuple[str, ...], address: str, rank: float | None) -> None:
    assert closeness(hosts, address, nowhere) == rank


@given(st.ip_addresses(), st.integers(0, 128))
def test_an_address_is_in_its_networks(address: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int) -> None:
    assume(getattr(address, "ipv4_mapped", None) is None)  # those are looked up as the IPv4 address they are
    network = ipaddress.ip_network(f"{address}/{min(bits, address.max_prefixlen)}", strict=False)
    rank = closeness((checked_host(str(network)),), str(address), nowhere)
    assert rank is not None and ANYWHERE < rank < EXACT
    assert closeness((str(address),), str(address), nowhere) == EXACT


@given(st.text(max_size=30))
def test_hosts_are_understood_or_explained(text: str) -> None:
    try:
        found = checked_host(text)
    except ValueError as error:
        assert str(error)
    else:
        assert checked_host(found) == found
        assert found.isascii() and not set(found) & set(" \n\t@?#\\")


@pytest.mark.parametrize(
    "text", ["10.0.0.5/24", "300.1.1.1", "10.0.0.5:104", "a b", "-", "a..b", "x" * 64 + ".org", "[::1]", "ä.org", ""]
)
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        checked_host(text)


@pytest.mark.parametrize(
    "text", ["ct1", "ct_1.hospital.example", "localhost", "a-b.c.", "xn--mller-kva.de", "fe80::1%eth0"]
)
def test_hosts_that_are(text: str) -> None:
    assert checked_host(f" {text} ") == text


@pytest.mark.parametrize(
    ("address", "answer"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.9", True), ("10.0.0.1", False), ("", False)],
)
def test_loopback(address: str, answer: bool) -> None:
    assert is_loopback(address) is answer


class Service:
    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.answer = frozenset({"10.0.0.1"})

    def __call__(self, name: str) -> frozenset[str]:
        self.asked += 1
        return self.answer


def test_names_are_remembered_for_a_while() -> None:
    service = Service()
    cache = NameCache(service, 30, lambda: service.now)
    for _ in range(5):
        assert closeness(("ct1",), "10.0.0.1", cache) == EXACT
    assert service.asked == 1
    service.now, service.answer = 31.0, frozenset({"10.0.0.2"})
    assert closeness(("ct1",), "10.0.0.1", cache) is None
    assert closeness(("ct1",), "10.0.0.2", cache) == EXACT


def test_last_answer_serves_while_the_name_service_is_away() -> None:
    service = Service()
    cache = NameCache(service, 30, lambda: service.now)
    assert cache("ct1") == {"10.0.0.1"}
    service.answer = frozenset()
    for service.now in (31.0, 62.0, 1000.0):
        assert closeness(("ct1",), "10.0.0.1", cache) == EXACT
    assert service.asked == 4


def test_unknown_names_are_not_asked_for_at_each_call() -> None:
    service = Service()
    service.answer = frozenset()
    cache = NameCache(service, 30, lambda: service.now)
    for _ in range(5):
        assert closeness(("ct1",), "10.0.0.1", cache) is None
    assert service.asked == 1


def test_real_name_service() -> None:
    assert NameCache()("localhost") & {"127.0.0.1", "::1"}
    assert NameCache()("does-not-exist.invalid") == frozenset()
