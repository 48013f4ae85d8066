"""How the node speaks to the outside: TLS, token, bounded reading. Shared by STOW-RS and model pull."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
import time
from collections.abc import Coroutine, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver

from dicomnode import __version__
from dicomnode.errors import OperatorError, PeerError
from dicomnode.settings import Cloud

T = TypeVar("T")
MAX_TOKEN_BYTES = 64 * 1024


def read_token(path: Path | None) -> str | None:
    """The bearer token, read anew each time so that it can be rotated. Never logged.

    Raises OperatorError when the file cannot be read or holds no token.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES)
    except OSError as error:
        raise OperatorError("read cloud.token_file", error.strerror or "unreadable", "Check the file") from None
    token = data.decode("ascii", errors="replace").strip()
    if not token or not token.isprintable() or "\ufffd" in token or " " in token:
        raise OperatorError("read cloud.token_file", "it does not hold one token", "Put the bare token in the file")
    return token


def origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def confidential(url: str) -> bool:
    """Whether patient data and tokens may go there: https, or http that stays on this machine."""
    scheme, host, _ = origin(url)
    if scheme == "https":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authorities(ca_file: Path | None) -> ssl.SSLContext:
    """What a caller trusts, read again when its files have changed. Raises OSError and ssl.SSLError.

    Reading the system's takes 30 ms of processor time, in which the event loop answers nobody; every look
    at an endpoint would take them.
    """
    paths = [ca_file] if ca_file else [Path(p) for p in ssl.get_default_verify_paths()[:2] if p]
    found = [path.stat() for path in paths]
    return _authorities(str(ca_file or ""), tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in found))


@lru_cache(maxsize=8)
def _authorities(ca_file: str, stamps: tuple[tuple[int, int, int], ...]) -> ssl.SSLContext:
    del stamps
    return ssl.create_default_context(cafile=ca_file or None)


def open_session(cloud: Cloud, url: str, resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    """A session for one address. Raises OperatorError when ``cloud.ca_file`` is unusable.

    ``resolver`` looks up its names, where there is one.

    Replies are not decompressed, so that a small reply cannot become a large one; a proxy
    from the environment is used for https only.
    """
    try:
        context = authorities(cloud.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise OperatorError("read cloud.ca_file", type(error).__name__, "Give a PEM file with certificates") from None
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=2, resolver=resolver, use_dns_cache=resolver is None),
        timeout=aiohttp.ClientTimeout(total=cloud.timeout_seconds, connect=min(30.0, cloud.timeout_seconds)),
        headers={"User-Agent": f"dicomnode/{__version__}", "Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=url.startswith("https:"),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


REPLY_SECONDS = 25.0
"""Time for the first byte of a reply once all was sent; with the look of the schedule below 30 seconds."""

DRIP_BYTES_PER_SECOND = 62_500
"""Half a Mbit/s: where less moves, either way, time is lost; what moves faster makes up for it."""

LOST_SECONDS = 25.0
"""Time that a request may lose, the wait for its reply among it: one that drips is over in less than 30 seconds too."""


class Progress:
    """When something last moved in a request, and whether enough did; for :func:`watched`.

    ``longest``: seconds of the whole request. What the node waits for its own cap counts neither
    for them nor as lost nor as a stall: the endpoint cannot help it.
    """

    def __init__(self, longest: float = float("inf")) -> None:
        self.at = time.monotonic()
        self.replying = False
        self._until = self.at + longest
        self._lost_at = self.at + LOST_SECONDS
        self._held_since: float | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While the node itself waits."""
        self._held_since = time.monotonic()
        try:
            yield
        finally:
            self.touch()
            self._until += self.at - self._held_since
            self._lost_at += self.at - self._held_since
            self._held_since = None

    def touch(self, size: int = 0) -> None:
        """``size``: bytes that moved."""
        self.at = time.monotonic()
        self._lost_at = min(self._lost_at + size / DRIP_BYTES_PER_SECOND, self.at + LOST_SECONDS)

    def waiting_for_reply(self) -> None:
        self.touch()
        self.replying = True

    def stalled(self, stall_seconds: float) -> bool:
        if self._held_since is not None:
            return False
        now = time.monotonic()
        limit = max(stall_seconds, REPLY_SECONDS) if self.replying else stall_seconds
        return now - self.at > limit or now > min(self._until, self._lost_at)


async def watched(request: Coroutine[Any, Any, T], progress: Progress, stall_seconds: float) -> T:
    """The result of ``request``; a line that is half open or drips, which could go on for ever, raises TimeoutError."""
    task = asyncio.ensure_future(request)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=min(1.0, stall_seconds / 4))
            if not task.done() and progress.stalled(stall_seconds):
                raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


READ_AT_ONCE_BYTES = 1 << 20
READ_BYTES_PER_SECOND = 8 << 20
"""Of a reply beyond its first part, about 60 Mbit/s: the line of a hospital has no more, and a server that is near
and does not come to an end gets no whole core of the box for it. Models and metadata of them are read otherwise."""


class _Pace:
    """Waits while more came than :data:`READ_BYTES_PER_SECOND` since the reply began."""

    def __init__(self) -> None:
        self._begin, self._size = time.monotonic(), 0

    async def __call__(self, size: int) -> None:
        self._size += size
        due = self._begin + (self._size - READ_AT_ONCE_BYTES) / READ_BYTES_PER_SECOND
        wait = due - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)


async def read_bounded(response: aiohttp.ClientResponse, limit: int, progress: Progress | None = None) -> bytes:
    """The whole body. Raises PeerError when it is longer than ``limit`` bytes."""
    parts: list[bytes] = []
    size, pace = 0, _Pace()
    async for chunk in response.content.iter_chunked(64 * 1024):
        size += len(chunk)
        if progress is not None:
            progress.touch(len(chunk))
        if size > limit:
            raise PeerError("read reply", f"it is longer than {limit} bytes", "", retryable=True)
        parts.append(chunk)
        await pace(len(chunk))
    return b"".join(parts)


async def read_ends(
    response: aiohttp.ClientResponse, limit: int, end: int, most: int, progress: Progress
) -> tuple[bytes, bytes]:
    """The body up to a byte beyond ``limit``, and its last ``end`` bytes; no more than ``most`` is read for them.

    Both are the same for the same body, however the line cuts it.
    """
    begin, tail, size, pace = bytearray(), b"", 0, _Pace()
    async for chunk in response.content.iter_chunked(64 * 1024):
        progress.touch(len(chunk))
        size += len(chunk)
        if len(begin) <= limit:
            begin += chunk
        tail = (tail + chunk)[-end:]
        if size > most:
            break
        await pace(len(chunk))
    del begin[limit + 1 :]
    return bytes(begin), tail
