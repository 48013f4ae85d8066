"""Where a redirect may lead: what a server of models names is followed only as far as it can do no harm.

Stores redirect to signed addresses on other hosts, so other hosts are allowed: what the bytes have to be is
known beforehand (signed metadata, or ``sha256``). The danger is elsewhere: a server must not have the node ask
machines that only the node can reach (an internal service, the address 169.254.169.254 of a cloud's machine),
nor get a token that is not its own. So: https alone; a public address, or one of the kind that the source
itself has; no token beyond the source's own host; a bounded number.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Literal
from urllib.parse import urljoin, urlsplit

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult

from dicomnode.errors import PeerError
from dicomnode.sync.http import origin

MOST_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
Kind = Literal["public", "private", "loopback", "link-local", "other"]
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits


class Astray(PeerError):
    """A redirect that is not followed."""

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__("follow a redirect", cause, hint)


def kind_of(address: str) -> Kind:
    """Of an IP address, also of an IPv4 one inside an IPv6 one. Raises ValueError for what is none. Pure."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    if ip.is_loopback:
        return "loopback"
    if ip.is_link_local:
        return "link-local"
    if ip.is_multicast or ip.is_unspecified or ip.is_reserved:
        return "other"
    return "public" if ip.is_global else "private"


def next_address(current: str, location: str, source_kinds: frozenset[Kind]) -> str:
    """The address that a redirect of ``current`` names. Raises Astray for one that is not followed. Pure.

    A host name is looked at when it is resolved (:class:`Guarded`), a literal address here.
    """
    try:
        target = urljoin(current, location.strip())
        parts = urlsplit(target)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise Astray("it names no address") from None
    if not location or not host or parts.username is not None or parts.password is not None:
        raise Astray("it names no host, or a user")
    if not target.isascii() or not target.isprintable() or " " in target:
        raise Astray("it names no address")
    same = origin(target) == origin(current)
    near = parts.scheme == "http" and origin(current)[0] == "http" and _here(host) and _here(urlsplit(current).hostname)
    if parts.scheme != "https" and not (same or near):
        raise Astray("it leads away from https", "Have the store redirect to https, or name the last address itself")
    try:
        kind = kind_of(host)
    except ValueError:
        if ":" in host or host.replace(".", "").isdigit():  # 2130706433 and 127.1 are addresses to inet_aton
            raise Astray("it names no address") from None
        return target
    check(kind, source_kinds)
    return target


def check(kind: Kind, source_kinds: frozenset[Kind]) -> None:
    """Raises Astray for an address of a kind that the source itself has not."""
    if kind != "public" and kind not in source_kinds:
        cause = f"it leads to a {kind} address, and the source itself is none"
        raise Astray(cause, "Name that address itself in url, metadata_url or targets_url if it is meant")


def _here(host: str | None) -> bool:
    try:
        return host == "localhost" or kind_of(host or "") == "loopback"
    except ValueError:
        return False


def _bare(host: str | None) -> str:
    """Without dots at its end: aiohttp looks up ``name.`` for ``name..``, which has to count as the same name."""
    return (host or "").rstrip(".")


class Guarded(AbstractResolver):
    """Names to addresses for one chain of redirects: those of the source are noted, those of others are checked.

    What is checked is what is connected to, so a name that changes its address in between gains nothing. Through
    a proxy the proxy looks names up and decides what it may reach; its own name is not checked.
    """

    def __init__(self, source: str, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or ThreadedResolver()
        self._source = _bare(urlsplit(source).hostname)
        self._checked = ""
        self.astray: Astray | None = None
        """Why the last name was not connected to; what raises for it is an error of the connection."""
        try:
            self.kinds: frozenset[Kind] = frozenset({kind_of(self._source)})
        except ValueError:
            self.kinds = frozenset()

    def leads_to(self, url: str) -> None:
        """From now on the name of this address is checked, unless it is the source's."""
        host = _bare(urlsplit(url).hostname)
        self._checked = "" if host == self._source else host

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        kinds, host = {kind_of(one["host"]) for one in found}, _bare(host)
        if host == self._source:
            self.kinds = self.kinds | kinds
        elif host == self._checked:
            try:
                for kind in sorted(kinds):
                    check(kind, self.kinds)
            except Astray as error:
                self.astray = error
                raise OSError(error.cause) from None
        return found

    async def close(self) -> None:
        await self._inner.close()
