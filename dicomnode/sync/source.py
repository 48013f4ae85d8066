"""Where bytes of models come from: HTTPS, or an S3 bucket. Opening at an offset, with absolute deadlines.

An answer's ``etag`` belongs to what is read; given back with a later ``start`` it makes the source
begin anew when the object has changed since (If-Range of RFC 9110 13.1.5; If-Match for S3).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import aiohttp

from dicomnode.clock import Clock
from dicomnode.errors import PeerAway
from dicomnode.settings import Cloud
from dicomnode.sync.http import confidential, open_session, origin, read_token
from dicomnode.sync.redirect import MOST_REDIRECTS, REDIRECTS, Astray, Guarded, next_address
from dicomnode.sync.reply import retry_after_seconds

CHUNK_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", re.ASCII)


class Again(PeerAway):
    """Passing, with the wait that the server asked for. ``status``: of HTTP; 0 where there is none."""

    def __init__(self, cause: str, wait: float | None = None, status: int = 0) -> None:
        self.wait, self.status = wait, status
        super().__init__("pull model", cause)


class Unfit(Again):
    """What was loaded before does not go together with what is there now."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes from ``start`` on; ``total`` of the whole object, None when it is not told."""

    start: int
    total: int | None
    etag: str
    chunks: AsyncIterator[bytes]


class Source(Protocol):
    def open(self, url: str, start: int = 0, etag: str = "") -> AbstractAsyncContextManager[Answer]:
        """Raises Again where it does not answer with bytes, Unfit when the rest cannot be had."""
        ...


class HttpSource:
    def __init__(self, cloud: Cloud, clock: Clock) -> None:
        self._cloud, self._clock = cloud, clock

    @asynccontextmanager
    async def open(self, url: str, start: int = 0, etag: str = "") -> AsyncIterator[Answer]:
        """Redirects are followed within the bounds of :mod:`dicomnode.sync.redirect`; raises Astray beyond them."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and etag:
            headers["If-Range"] = etag
        guard = Guarded(url)
        async with open_session(self._cloud, url, guard) as session, AsyncExitStack() as stack:
            try:
                response = await self._follow(session, stack, url, headers, guard)
            except aiohttp.ClientError:
                if guard.astray is not None:
                    raise guard.astray from None
                raise
            yield self._judge(response, start)

    async def _follow(
        self, session: aiohttp.ClientSession, stack: AsyncExitStack, url: str, headers: dict[str, str], guard: Guarded
    ) -> aiohttp.ClientResponse:
        timeout = self._cloud.timeout_seconds
        limits = aiohttp.ClientTimeout(total=None, sock_connect=min(30.0, timeout), sock_read=timeout)
        token = read_token(token_file(self._cloud, url))
        here = url
        for _ in range(MOST_REDIRECTS + 1):
            own = {"Authorization": f"Bearer {token}"} if token and origin(here) == origin(url) else {}
            response = await stack.enter_async_context(
                session.get(here, headers=headers | own, allow_redirects=False, timeout=limits)
            )
            if response.status not in REDIRECTS:
                return response
            response.close()
            here = next_address(here, response.headers.get("Location", ""), guard.kinds)
            guard.leads_to(here)
        raise Astray(f"it was redirected more than {MOST_REDIRECTS} times")

    def _judge(self, response: aiohttp.ClientResponse, start: int) -> Answer:
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise Unfit("what was loaded before does not fit; it is loaded anew", 0.0, response.status)
        if response.status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
            wait = retry_after_seconds(response.headers.get("Retry-After"), self._clock.wall())
            raise Again(f"the server answered HTTP {response.status}", wait, response.status)
        etag = strong(response.headers.get("ETag", ""))
        chunks = response.content.iter_chunked(CHUNK_BYTES)
        if response.status == HTTPStatus.OK:
            return Answer(0, response.content_length, etag, chunks)
        first, total = content_range(response.headers.get("Content-Range", ""))
        if first != start:
            raise Unfit("the server sent another range than asked; it is loaded anew", 0.0, response.status)
        return Answer(start, total, etag, chunks)


def token_file(cloud: Cloud, url: str) -> Path | None:
    """Whose token may go to ``url``: that of the repository to its two hosts, else that of stow_url to its own."""
    if not confidential(url):
        return None
    repository = cloud.repository
    own = {origin(repository.metadata_url), origin(repository.archives_url)} if repository.metadata_url else set()
    if repository.token_file and origin(url) in own:
        return repository.token_file
    return cloud.token_file if cloud.stow_url and origin(url) == origin(cloud.stow_url) else None


def strong(etag: str) -> str:
    """A strong entity tag, or empty: a weak one says nothing of bytes (RFC 9110 8.8.1, 13.1.5)."""
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag) else ""


def content_range(header: str) -> tuple[int, int | None]:
    """First byte and total of Content-Range; -1 as first when it makes no sense. Pure."""
    match = _RANGE.fullmatch(header.strip())
    if match is None:
        return -1, None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < first or (total is not None and last >= total):
        return -1, None
    return first, total


def source_for(url: str, cloud: Cloud, clock: Clock) -> Source:
    """Raises OperatorError when ``url`` is of S3 and the library for it is not installed."""
    if url.startswith("s3://"):
        from dicomnode.sync.s3 import S3Source

        return S3Source(cloud)
    return HttpSource(cloud, clock)
