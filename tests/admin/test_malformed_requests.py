"""Requests that no HTTP parser takes, over a raw socket: no byte of them comes back, or is logged."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest
from aiohttp import web

from dicomnode.admin.application import make_app
from dicomnode.admin.connection import Runner
from dicomnode.index.database import Database
from tests.admin.test_admin_http import node
from tests.sync.index_case import CANARY

NAME = CANARY.encode()
HOST = b"Host: localhost\r\n"

MALFORMED = {
    "method": b"G\xffT-" + NAME + b" / HTTP/1.1\r\n" + HOST + b"\r\n",
    "no HTTP": NAME + b"\r\n\r\n",
    "version": b"GET /?name=" + NAME + b" HTTP/9.9.9\r\n" + HOST + b"\r\n",
    "version in words": b"GET / " + NAME + b"\r\n" + HOST + b"\r\n",
    "URL": b"GET http://[" + NAME + b"/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "space in the URL": b"GET /?name=" + NAME + b" Anna HTTP/1.1\r\n" + HOST + b"\r\n",
    "header name": b"GET / HTTP/1.1\r\n" + HOST + b"X \x01" + NAME + b": 1\r\n\r\n",
    "header value": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + NAME + b"\x00\r\n\r\n",
    "header without colon": b"GET / HTTP/1.1\r\n" + HOST + NAME + b"\r\n\r\n",
    "long line": b"GET /" + NAME * 2000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "long header": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + NAME * 2000 + b"\r\n\r\n",
    "two hosts": b"GET /" + NAME + b" HTTP/1.1\r\n" + HOST + b"Host: " + NAME + b"\r\n\r\n",
    "length": b"POST /" + NAME + b" HTTP/1.1\r\n" + HOST + b"Content-Length: " + NAME + b"\r\n\r\n",
    "encoding": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: " + NAME + b"\r\n\r\n",
    "chunk": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + NAME + b"\r\n",
    "content encoding": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Encoding: " + NAME + b"\r\n\r\n",
    "expectation": b"GET / HTTP/1.1\r\n" + HOST + b"Expect: " + NAME + b"\r\n\r\n",
    "method nobody has": NAME + b" / HTTP/1.1\r\n" + HOST + b"\r\n",
    "host": b"GET / HTTP/1.1\r\nHost: " + NAME + b"\r\n\r\n",
    "not found": b"GET /" + NAME + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "query": b"GET /api/v1/jobs?state=" + NAME + b" HTTP/1.1\r\n" + HOST + b"\r\n",
}  # fmt: skip


async def answer(port: int, request: bytes) -> bytes:
    """One whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(10):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            return head + await reader.readexactly(int(length[1]) if length else 0)
    finally:
        writer.close()


def test_no_byte_of_a_malformed_request_is_answered_or_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    db = Database(tmp_path)
    echoed, plain = [], []

    async def main() -> None:
        runner = Runner(make_app(db, node(tmp_path)), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = int(runner.addresses[0][1])
        for what, request in MALFORMED.items():
            found = await answer(port, request)
            assert found.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4")), what
            assert b"X-Frame-Options: DENY" in found, what
            if NAME.lower() in found.lower():
                echoed.append(what)
            if found.endswith(b"\r\n\r\n400 Bad Request\n"):
                plain.append(what)
        assert (await answer(port, b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")).startswith(b"HTTP/1.1 200")
        await runner.cleanup()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    db.close()
    assert echoed == []
    assert "method" in plain and "URL" in plain
    written = capfd.readouterr()
    assert CANARY.casefold() not in (caplog.text + written.out + written.err).casefold()
