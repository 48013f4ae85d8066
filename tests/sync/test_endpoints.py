"""Endpoints at work: how soon one that is back is taken again, and what is said of one that is not there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from dicomnode.index.database import Database
from dicomnode.sync.endpoints import AWAY_SECONDS, PROBE_SECONDS, Endpoints
from dicomnode.sync.faults import reason
from tests.sync.index_case import FakeClock, make_settings


class Health:
    """A cloud of which only the health is asked."""

    def __init__(self) -> None:
        self.status, self.asked = 503, 0

    async def handle(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.Response(status=self.status)


@contextlib.asynccontextmanager
async def cloud(folder: Path, clock: FakeClock):
    health, db = Health(), Database(folder, clock)
    server = web.Server(health.handle)
    runner = web.ServerRunner(server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    settings = make_settings(folder, cloud={"stow_url": f"{url}/studies", "health_url": f"{url}/health"})
    try:
        yield health, Endpoints(settings, db)
    finally:
        await runner.cleanup()
        db.close()


async def away(health: Health, endpoints: Endpoints, clock: FakeClock) -> None:
    """For so long that its back-off is the longest."""
    for _ in range(12):
        clock.now += 1000.0
        await endpoints.probe()
    assert health.asked == 12 and not endpoints.health[0].usable(clock.now + 800.0)
    health.status = 200


def test_one_that_is_back_after_a_long_time_is_soon_taken_again(tmp_path: Path) -> None:
    clock = FakeClock()

    async def main() -> None:
        async with cloud(tmp_path, clock) as (health, endpoints):
            await away(health, endpoints, clock)
            clock.now += AWAY_SECONDS - 1
            await endpoints.probe()
            assert health.asked == 12, "twice a minute is enough"
            clock.now += 1
            await endpoints.probe()
            assert endpoints.current() == 0 and endpoints.link == "degraded", "it answered once"
            clock.now += PROBE_SECONDS
            await endpoints.probe()
            assert endpoints.health[0].well and endpoints.link == "online"

    asyncio.run(main())


def test_one_that_named_a_time_is_left_alone_until_then(tmp_path: Path) -> None:
    clock = FakeClock()

    async def main() -> None:
        async with cloud(tmp_path, clock) as (health, endpoints):
            await away(health, endpoints, clock)
            endpoints.leave_alone(0, 300.0)
            clock.now += AWAY_SECONDS * 2
            await endpoints.probe()
            assert health.asked == 12

    asyncio.run(main())


def test_that_it_answers_is_no_news_of_one_that_refuses_the_token(tmp_path: Path) -> None:
    """Its health is fine; were that enough, it would be well and mended in turns, with an event each time."""
    clock = FakeClock()

    async def main() -> None:
        async with cloud(tmp_path, clock) as (health, endpoints):
            health.status = 200
            await endpoints.probe()
            for _ in range(12):
                clock.now += 1000.0
                endpoints.failed(0, "HTTP 401", mendable=True)
            clock.now += AWAY_SECONDS * 2
            await endpoints.probe()
            assert health.asked == 1 and endpoints.current() is None
            endpoints.try_again()
            assert endpoints.current() == 0, "an operator who has mended it need not wait"
            assert endpoints.report()["endpoints"][0]["error"] == "HTTP 401", "until it is known"

    asyncio.run(main())


async def _no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    writer.close()


async def _closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def _half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    writer.close()


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


@pytest.mark.parametrize(
    ("behaves", "scheme", "said"),
    [
        (_closes, "http", "the line was cut"),
        (_half, "http", "the reply broke off"),
        (_silent, "http", "no answer in time"),
        (_no_tls, "https", "TLS failed"),
        (None, "http", "connection refused"),
    ],
)
def test_why_a_request_failed_is_said_in_words(behaves: Callable | None, scheme: str, said: str) -> None:
    async def main() -> str:
        gone = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await (behaves or _silent)(reader, writer)
                await writer.wait_closed()
            gone.set()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            if behaves is None:
                server.close()
                gone.set()
            timeout = aiohttp.ClientTimeout(total=0.3 if behaves is _silent else 20)
            try:
                async with (
                    aiohttp.ClientSession(timeout=timeout) as session,
                    session.get(f"{scheme}://127.0.0.1:{port}/secret") as answer,
                ):
                    await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return reason(error)
            finally:
                await gone.wait()
        raise AssertionError("it answered")

    assert asyncio.run(main()) == said


def test_certificates_and_names_are_told_apart() -> None:
    untrusted = ssl.SSLCertVerificationError(1, "certificate verify failed")
    untrusted.verify_message = "self-signed certificate"
    assert reason(untrusted) == "its certificate is not trusted: self-signed certificate"
    assert reason(socket.gaierror(-2, "Name or service not known")) == "its name is not known to DNS"
    assert reason(aiohttp.InvalidURL(URL("http://x/secret"))) == "InvalidURL"
    assert reason(OSError(113, "anything: /secret")) == "no route to host"
