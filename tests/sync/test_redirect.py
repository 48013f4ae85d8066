"""Redirects of stores: followed to where the bytes are, never inside, never with a token that is not for them."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, TCPConnector, web
from aiohttp.abc import AbstractResolver, ResolveResult

from dicomnode.errors import PeerAway
from dicomnode.settings import Cloud
from dicomnode.sync import redirect, transfer
from dicomnode.sync.redirect import Astray, Guarded, kind_of, next_address
from dicomnode.sync.source import HttpSource
from dicomnode.sync.trust import BoundedFetcher, refresh
from tests.certificates import SERVER_ONLY, Authority, Issued
from tests.sync.index_case import FakeClock
from tests.sync.tuf_case import TufRepository, ranged

DATA = bytes(range(256)) * 2000
SOURCE = "https://store.example/targets/a.zip"


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("93.184.216.34", "public"),
        ("2606:2800:220:1::1", "public"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("0.0.0.0", "other"),
        ("224.0.0.1", "other"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a00:1", "private"),
        ("2002:7f00:1::", "loopback"),
    ],
)
def test_kinds_of_addresses(address: str, kind: str) -> None:
    assert kind_of(address) == kind


@pytest.mark.parametrize(
    "location",
    [
        "https://bucket.example/a?sign=1",
        "/other/a.zip",
        "https://93.184.216.34/a.zip",
        "//cdn.example/a.zip",
        "https://[2606:2800:220:1::1]:8443/a",
        "https:///a",
    ],
)
def test_where_a_public_store_may_redirect_to(location: str) -> None:
    assert next_address(SOURCE, location, frozenset({"public"})).startswith("https://")


@pytest.mark.parametrize(
    "location",
    [
        "",
        "http://bucket.example/a",
        "http://127.0.0.1/a",
        "ftp://bucket.example/a",
        "file:///etc/passwd",
        "https://user:secret@bucket.example/a",
        "https://10.0.0.1/a",
        "https://127.0.0.1/a",
        "https://2130706433/a",
        "https://127.1/a",
        "https://[::1]/a",
        "https://[::ffff:127.0.0.1]/a",
        "https://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "https://0.0.0.0/a",
        "https://bucket.example:99999/a",
        "https://bücket.example/a",
        "https://bucket.example/a b",
        "https://[::1/a",
    ],
)
def test_where_it_may_not(location: str) -> None:
    with pytest.raises(Astray):
        next_address(SOURCE, location, frozenset({"public"}))


def test_a_private_store_may_redirect_to_its_like_and_to_public_ones() -> None:
    private = frozenset({"private"})
    assert next_address("https://10.0.0.5/a", "https://10.0.0.6/a", private)
    assert next_address("http://10.0.0.5/a", "/b", private) == "http://10.0.0.5/b"
    assert next_address("https://10.0.0.5/a", "https://93.184.216.34/a", private)
    for location in ("https://127.0.0.1/a", "https://169.254.169.254/a", "http://10.0.0.6/a"):
        with pytest.raises(Astray):
            next_address("https://10.0.0.5/a", location, private)


class Names(AbstractResolver):
    """Names of the test, all of this machine; what is asked for is noted."""

    def __init__(self, table: dict[str, str]) -> None:
        self.table, self.asked = table, list[str]()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        self.asked.append(host)
        address = self.table[host]
        return [ResolveResult(hostname=host, host=address, port=port, family=2, proto=6, flags=0)]

    async def close(self) -> None:
        return


@pytest.mark.parametrize("dots", ["", ".", "..", "..."])
def test_dots_behind_a_name_hide_no_address(dots: str) -> None:
    """aiohttp looks up ``inside.test.`` for ``inside.test..``."""

    async def body() -> None:
        guard = Guarded(SOURCE, Names({"inside.test": "127.0.0.1", "inside.test.": "127.0.0.1"}))
        guard.kinds = frozenset({"public"})
        url = f"https://inside.test{dots}:1/"
        guard.leads_to(url)
        connector = TCPConnector(resolver=guard, use_dns_cache=False)
        async with ClientSession(connector=connector) as session:
            with pytest.raises(ClientError):
                await session.get(url)
        assert guard.astray is not None and "loopback" in str(guard.astray)

    asyncio.run(body())


class Store:
    """Two servers with https: ``store.test`` sends elsewhere, ``files.test`` has the bytes."""

    def __init__(self) -> None:
        self.location = ""
        self.files: dict[str, bytes] = {"/a.zip": DATA}
        self.asked: dict[str, list[web.BaseRequest]] = {"store": [], "files": []}

    async def redirecting(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked["store"].append(request)
        return web.Response(status=302, headers={"Location": self.location.replace("PATH", request.path)})

    async def holding(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked["files"].append(request)
        data = self.files.get(request.path)
        if data is None:
            return web.Response(status=404)
        return ranged(request, data)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Issued]:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    return authority, authority.issue("server", dns=["store.test", "files.test"], usages=SERVER_ONLY)


@asynccontextmanager
async def serving(handler: Any, issued: Issued) -> AsyncIterator[int]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*issued.files)
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@asynccontextmanager
async def stores(
    issued: tuple[Authority, Issued], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Store, Names, Cloud, str, str]]:
    """``store.test`` has a token of its own; its address counts as a public one."""
    store, (authority, certificate) = Store(), issued
    names = Names({"store.test": "127.0.0.1", "files.test": "127.0.0.1"})
    kinds = {"127.0.0.1": "public"}
    known = redirect.kind_of
    monkeypatch.setattr(redirect, "kind_of", lambda address: kinds.get(address) or known(address))
    monkeypatch.setattr(redirect, "ThreadedResolver", lambda: names)
    (tmp_path / "token").write_text("secret-token")
    async with serving(store.redirecting, certificate) as first, serving(store.holding, certificate) as second:
        base = f"https://store.test:{first}"
        cloud = Cloud.model_validate(
            {
                "timeout_seconds": 5,
                "ca_file": authority.ca_file,
                "repository": {
                    "metadata_url": f"{base}/metadata",
                    "root_file": tmp_path / "root.json",
                    "token_file": tmp_path / "token",
                },
            }
        )
        yield store, names, cloud, base, f"https://files.test:{second}"


async def fetched(cloud: Cloud, url: str, folder: Path) -> bytes:
    part = folder / "staging" / "a.part"
    goal = transfer.Goal(hashlib.sha256(DATA).hexdigest(), len(DATA), 1 << 30)
    source = HttpSource(cloud, FakeClock())
    await transfer.fetch(source, url, goal, part, check_room=lambda: None, timeout=5)
    return part.read_bytes()


def test_a_signed_address_of_another_host_is_followed_without_the_token(
    issued: tuple[Authority, Issued], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with stores(issued, tmp_path, monkeypatch) as (store, _, cloud, base, files):
            store.location = f"{files}/a.zip?X-Signature=1"
            part = tmp_path / "staging" / "a.part"
            part.parent.mkdir()
            part.write_bytes(DATA[:100_000])
            assert await fetched(cloud, f"{base}/a.zip", tmp_path) == DATA
            asked = store.asked
            assert {r.headers.get("Authorization") for r in asked["store"]} == {"Bearer secret-token"}
            assert {r.headers.get("Authorization") for r in asked["files"]} == {None}
            assert [r.headers.get("Range") for r in asked["files"]] == ["bytes=100000-"], "it goes on there"
            store.location = f"{base}/a.zip"
            with pytest.raises(Astray, match="more than 5 times"):
                await fetched(cloud, f"{base}/b.zip", tmp_path / "other")

    asyncio.run(main())


def test_a_name_that_leads_inside_is_not_connected_to(
    issued: tuple[Authority, Issued], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with stores(issued, tmp_path, monkeypatch) as (store, names, cloud, base, files):
            names.table["inside.test"] = "10.0.0.1"
            store.location = files.replace("files.test", "inside.test") + "/a.zip"
            with pytest.raises(Astray, match="private address"):
                await fetched(cloud, f"{base}/a.zip", tmp_path)
            names.table["inside.test"] = "169.254.169.254"
            with pytest.raises(Astray, match="link-local address"):
                await fetched(cloud, f"{base}/a.zip", tmp_path)
            store.location = "http://files.test/a.zip"
            with pytest.raises(Astray, match="away from https"):
                await fetched(cloud, f"{base}/a.zip", tmp_path)
            assert store.asked["files"] == [] and "inside.test" in names.asked

    asyncio.run(main())


def test_metadata_is_bound_likewise(
    issued: tuple[Authority, Issued], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = TufRepository()
    repository.add("m/1.0.0.zip", DATA)
    repository.publish()

    async def main() -> None:
        async with stores(issued, tmp_path, monkeypatch) as (store, names, cloud, base, files):
            store.files = {f"/{name}": data for name, data in repository.files.items()}
            store.location = f"{files}PATH"

            def look() -> int:
                fetcher = BoundedFetcher(HttpSource(cloud, FakeClock()), 5)
                where, work = f"{base}/metadata", tmp_path / "work"
                return len(refresh(repository.trusted_root, where, tmp_path / "cache", work, fetcher).offers)

            assert await asyncio.to_thread(look) == 1
            names.table["files.test"] = "10.0.0.1"
            with pytest.raises(PeerAway, match="private address"):
                await asyncio.to_thread(look)

    asyncio.run(main())
