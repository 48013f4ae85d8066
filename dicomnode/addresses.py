"""Where a peer may call from: addresses, names and networks. Pure, but for looking up a name."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Resolve = Callable[[str], frozenset[str]]
"""A host name to its addresses; empty when it has none."""

ANYWHERE = -1.0
EXACT = 2.0
"""Ranks of :func:`closeness`; a network lies between 0 (all addresses) and 1 (one address)."""

REMEMBERED_SECONDS = 30.0
_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")


def checked_host(value: str) -> str:
    """An address, a network in CIDR notation (RFC 4632) or a host name, as it is compared.

    Raises ValueError that says what would be right.
    """
    text = value.strip()
    if "/" in text:
        try:
            return str(ipaddress.ip_network(text))
        except ValueError:
            return _corrected_network(text)
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if re.fullmatch(r"[0-9.]+", text) or ":" in text:
        raise ValueError("is neither an IPv4 nor an IPv6 address; a port has a key of its own")
    if not _NAME.fullmatch(text):
        raise ValueError("give an address, a host name, or a network such as 10.1.2.0/24")
    return text


def _corrected_network(text: str) -> str:
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("is not a network; write it as 10.1.2.0/24 or fd00:1::/64") from None
    raise ValueError(f"has bits beyond its prefix; did you mean the network {meant}, or one address without '/'?")


def is_network(host: str) -> bool:
    return "/" in host


def is_address(host: str) -> bool:
    return _address(host) is not None


def is_loopback(address: str) -> bool:
    found = _address(address)
    return found is not None and found.is_loopback


def closeness(hosts: Iterable[str], address: str, resolve: Resolve) -> float | None:
    """How closely ``hosts`` name the caller at ``address``; None when they do not.

    Without hosts any address may call: :data:`ANYWHERE`. A narrower network ranks before a
    wider one, an address or a name (:data:`EXACT`) before every network.
    """
    wanted = list(hosts)
    if not wanted:
        return ANYWHERE
    actual = _address(address)
    ranks = [rank for host in wanted if (rank := _rank(host, address, actual, resolve)) is not None]
    return max(ranks, default=None)


def _rank(host: str, address: str, actual: IPv4Address | IPv6Address | None, resolve: Resolve) -> float | None:
    if is_network(host):
        network: IPv4Network | IPv6Network = ipaddress.ip_network(host)
        if actual is None or actual.version != network.version or actual not in network:
            return None
        return network.prefixlen / network.max_prefixlen
    wanted = _address(host)
    if wanted is not None:
        return EXACT if wanted == actual else None
    if actual is None:
        return EXACT if host == address else None
    return EXACT if any(_address(found) == actual for found in resolve(host)) else None


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Without the zone of a link-local address; an IPv4 address mapped into IPv6 as IPv4."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


class NameCache:
    """Answers of the name service, kept for a while; the last good one serves while it is away.

    Callers come in bursts, and an association waits for this look-up.
    """

    def __init__(
        self,
        look_up: Resolve | None = None,
        seconds: float = REMEMBERED_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look_up = look_up or _look_up
        self._seconds = seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, frozenset[str]]] = {}

    def __call__(self, name: str) -> frozenset[str]:
        with self._lock:
            asked, found = self._known.get(name, (float("-inf"), frozenset[str]()))
        if self._monotonic() - asked < self._seconds:
            return found
        found = self._look_up(name) or found
        with self._lock:
            self._known[name] = (self._monotonic(), found)
        return found


def _look_up(name: str) -> frozenset[str]:
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return frozenset()
    return frozenset(str(info[4][0]) for info in infos)


resolve = NameCache()
"""The name service of this box; names come from the configuration only, so there are few."""
