"""A proxy on loopback between node and cloud that breaks lines in every way of RELIABILITY.md.

It ends TLS itself, so that it can also answer in the cloud's place. What is wrong is chosen anew for
each connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CUTS = (200, 1_500, 6_000)


@dataclass
class FaultProxy:
    """``fault``: what the next connection meets; ``seen`` counts them."""

    target: tuple[str, int]
    tls: ssl.SSLContext | None = None
    fault: str = "pass"
    seen: dict[str, int] = field(default_factory=dict)
    port: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _cut: int = 0
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def end(self) -> None:
        self._over.set()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self.fault
        self.seen[fault] = self.seen.get(fault, 0) + 1
        self._open.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if fault == "tls":
                writer.write(b"\x15\x03\x01\x00\x02\x02\x28")
                await writer.drain()
                return
            if self.tls is not None:
                await writer.start_tls(self.tls, ssl_handshake_timeout=5)
            await getattr(self, f"_{fault.replace('-', '_')}")(reader, writer)
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError, EOFError):
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._bridge((reader, writer), up=_whole, down=_whole)

    async def _cut_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._cut = (self._cut + 1) % len(CUTS)
        await self._bridge((reader, writer), up=_limited(CUTS[self._cut]), down=_whole)

    async def _cut_reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The cloud stores, and nobody hears of it."""
        await self._bridge((reader, writer), up=_whole, down=_limited(0))

    async def _half_body(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The reply breaks off in the middle."""
        await self._bridge((reader, writer), up=_whole, down=_limited(120))

    async def _half_open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A middle box that has forgotten the connection: nothing is read, nothing is said."""
        await self._over.wait()

    async def _slow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._bridge((reader, writer), up=_dripping, down=_dripping)

    async def _http_500(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, b"500 Internal Server Error", b"")

    async def _http_503(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, b"503 Service Unavailable", b"")

    async def _http_400(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A proxy with a mistake in its configuration refuses whatever comes."""
        await _answer(reader, writer, b"400 Bad Request", b"")

    async def _http_413(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, b"413 Content Too Large", b"")

    async def _http_429(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, b"429 Too Many Requests", b"Retry-After: 1\r\n")

    async def _huge(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A reply without an end."""
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\n\r\n")
        while not (reader.at_eof() or reader.exception() or writer.transport.is_closing()):
            writer.write(b" " * (1 << 20))
            await writer.drain()
            await asyncio.sleep(0)  # drain() does not yield, nor raise at once, when the caller is gone

    async def _drip_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """It takes 20 KB a second."""
        await self._bridge((reader, writer), up=_drops(1024, 0.05), down=_whole)

    async def _drip_head(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The reply comes byte by byte, its head first, and does not come to an end."""
        await self._bridge((reader, writer), up=_whole, down=_drops(1, 0.05))

    async def _drip_body(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\n\r\n")
        await asyncio.gather(_lost(reader), _drops(1, 0.05)(_endless(), writer))

    async def _bridge(self, client: Streams, *, up: Pump, down: Pump) -> None:
        reader, writer = await asyncio.open_connection(*self.target)
        tasks = [asyncio.create_task(up(client[0], writer)), asyncio.create_task(down(reader, client[1]))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.transport.abort()


Pump = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


async def _whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(64 * 1024):
        writer.write(data)
        await writer.drain()


async def _dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(512):
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.002)


def _drops(size: int, seconds: float) -> Pump:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(size):
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(seconds)

    return pump


async def _lost(reader: asyncio.StreamReader) -> None:
    while await reader.read(64 * 1024):
        pass


def _endless() -> asyncio.StreamReader:
    made = asyncio.StreamReader()
    made.feed_data(b" " * 10_000)
    return made


def _limited(limit: int) -> Pump:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = limit
        while data := await reader.read(64 * 1024):
            writer.write(data[:left])
            await writer.drain()
            left -= len(data)
            if left <= 0:
                return

    return pump


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: bytes, more: bytes) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 " + status + b"\r\n" + more + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
    await writer.drain()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):  # what is still on its way: else the answer is lost in a reset
            while await reader.read(64 * 1024):
                pass


@contextlib.asynccontextmanager
async def fault_proxy(target: tuple[str, int], tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(target, tls)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()


@contextlib.contextmanager
def name_service(proxy: FaultProxy) -> Iterator[None]:
    """While the proxy's fault is ``dns`` no name is found."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def getaddrinfo(host: object, *arguments: object, **named: object) -> object:
        if proxy.fault == "dns":
            proxy.seen["dns"] = proxy.seen.get("dns", 0) + 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return await real(host, *arguments, **named)  # type: ignore[arg-type]

    loop.getaddrinfo = getaddrinfo  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        loop.getaddrinfo = real  # type: ignore[method-assign]


_RESOLVER = """
import os, socket

_real = socket.getaddrinfo

def getaddrinfo(host, *arguments, **named):
    if host == "localhost" and os.path.exists({gone!r}):
        with open({seen!r}, "ab") as file:
            file.write(b".")
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return _real(host, *arguments, **named)

socket.getaddrinfo = getaddrinfo
"""


class ResolverFault:
    """As :func:`name_service`, for Python processes that have ``folder`` on their PYTHONPATH."""

    def __init__(self, folder: Path) -> None:
        self._gone, self._seen = folder / "dns-gone", folder / "dns-seen"
        (folder / "sitecustomize.py").write_text(_RESOLVER.format(gone=str(self._gone), seen=str(self._seen)))

    def gone(self, gone: bool) -> None:
        if gone:
            self._gone.touch()
        else:
            self._gone.unlink(missing_ok=True)

    def seen(self) -> int:
        """How often a name was not found."""
        return self._seen.stat().st_size if self._seen.exists() else 0
