"""Models from an S3 bucket, through obstore: against a small double always, against moto's server where it is there."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from dicomnode.errors import OperatorError, PeerAway
from dicomnode.index.trust import Trusted
from dicomnode.settings import Cloud
from dicomnode.sync import transfer
from dicomnode.sync.source import Again, Unfit, source_for
from dicomnode.sync.trust import BoundedFetcher, refresh
from tests.sync.cloud_fake import served
from tests.sync.index_case import FakeClock
from tests.sync.tuf_case import TufRepository

pytest.importorskip("obstore", reason="scripts/requirements/s3.txt is not installed")

MOTO = os.environ.get("DICOMNODE_MOTO_SERVER") or shutil.which("moto_server")
DATA = bytes(range(256)) * 4000
BUCKET = "models"


class Double:
    """GetObject of S3 as far as it matters: ranges, entity tags, If-Match, its errors; signatures are noted."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[dict[str, str]] = []
        self.cut: int | None = None
        self.may_list = True
        """Without s3:ListBucket S3 answers 403 for what is not there."""
        self.closed = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(dict(request.headers))
        data = self.objects.get(request.match_info["path"].removeprefix(f"{BUCKET}/"))
        if self.closed and self.closed in request.path:
            data = None
        if data is None and not (self.may_list and not self.closed):
            return web.Response(
                status=403, text="<Error><Code>AccessDenied</Code></Error>", content_type="application/xml"
            )
        if data is None:
            return web.Response(
                status=404, text="<Error><Code>NoSuchKey</Code></Error>", content_type="application/xml"
            )
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if request.headers.get("If-Match", etag) != etag:
            return web.Response(status=412)
        start = int(re.match(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))[1])  # type: ignore[index]
        headers = {"ETag": etag, "Last-Modified": "Sun, 29 Nov 2026 00:00:00 GMT"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.cut is None:
            return web.Response(body=data[start:], status=206 if start else 200, headers=headers)
        headers["Content-Length"] = str(len(data) - start)
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        await response.prepare(request)
        await response.write(data[start : start + self.cut])
        assert request.transport is not None
        request.transport.close()
        return response


def cloud_of(folder: Path, endpoint: str, **more: Any) -> Cloud:
    for name in ("access", "secret"):
        (folder / name).write_text(f"the-{name}-key")
    return Cloud.model_validate(
        {
            "timeout_seconds": 5,
            "repository": {
                "metadata_url": f"s3://{BUCKET}/metadata",
                "root_file": folder / "root.json",
                "s3_endpoint": endpoint,
                "s3_access_key_file": folder / "access",
                "s3_secret_key_file": folder / "secret",
            },
            **more,
        }
    )


@contextlib.asynccontextmanager
async def doubled(folder: Path) -> AsyncIterator[tuple[Double, Cloud]]:
    double = Double()
    async with served(double.handle, "/{path:.*}") as url:
        yield double, cloud_of(folder, url.removesuffix("/{path:.*}"))


async def fetched(
    cloud: Cloud, folder: Path, data: bytes = DATA, name: str = "a.zip", length: int | None = None
) -> Path:
    goal = transfer.Goal(hashlib.sha256(data).hexdigest(), length or len(data), 1 << 30)
    part = folder / "staging" / "a.part"
    url = f"s3://{BUCKET}/{name}"
    await transfer.fetch(source_for(url, cloud, FakeClock()), url, goal, part, check_room=lambda: None, timeout=5)
    return part


def test_an_object_is_fetched_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with doubled(tmp_path) as (double, cloud):
            double.objects["a.zip"] = DATA
            double.cut = 300_000
            for _ in range(2):
                with pytest.raises(Again):
                    await fetched(cloud, tmp_path)
            double.cut = None
            assert (await fetched(cloud, tmp_path)).read_bytes() == DATA
            starts = [a.get("Range", "") for a in double.asked]
            assert starts[0] == "" and len(set(starts)) == 3, "each attempt went on where the last one ended"
            etag = f'"{hashlib.md5(DATA).hexdigest()}"'
            assert [a.get("If-Match") for a in double.asked] == [None, etag, etag]
            assert all("the-access-key" in a["Authorization"] for a in double.asked)
            assert not any("the-secret-key" in str(a) for a in double.asked)

    asyncio.run(main())


def test_an_object_that_changes_meanwhile_is_loaded_anew(tmp_path: Path) -> None:
    async def main() -> None:
        async with doubled(tmp_path) as (double, cloud):
            double.objects["a.zip"], double.cut = DATA[::-1], 300_000
            with pytest.raises(Again):
                await fetched(cloud, tmp_path)
            double.objects["a.zip"], double.cut = DATA, None
            with pytest.raises(Unfit, match="changed"):
                await fetched(cloud, tmp_path)
            assert (await fetched(cloud, tmp_path)).read_bytes() == DATA

    asyncio.run(main())


def test_what_is_absent_longer_or_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with doubled(tmp_path) as (double, cloud):
            with pytest.raises(Again, match="does not have it") as caught:
                await fetched(cloud, tmp_path)
            assert caught.value.status == 404
            double.objects["a.zip"] = DATA + b"x"
            with pytest.raises(transfer.WrongDigest, match="announced"):
                await fetched(cloud, tmp_path)
            double.objects["a.zip"] = bytes(len(DATA))
            with pytest.raises(transfer.WrongDigest, match="SHA-256"):
                await fetched(cloud, tmp_path)
            assert list((tmp_path / "staging").iterdir()) == []

    asyncio.run(main())


def test_a_service_that_is_away_and_keys_that_are_none(tmp_path: Path) -> None:
    cloud = cloud_of(tmp_path, "http://127.0.0.1:1")
    with pytest.raises(Again, match="bucket answered"):
        asyncio.run(fetched(cloud, tmp_path))
    (tmp_path / "secret").write_text("")
    with pytest.raises(OperatorError):
        asyncio.run(fetched(cloud, tmp_path))


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(OperatorError, match=r"s3\.txt"):
        source_for("s3://b/x", cloud_of(tmp_path, ""), FakeClock())


def test_a_bucket_that_may_not_be_listed_is_followed(tmp_path: Path) -> None:
    """For what is not there it answers 403: the end of the chain of roots for python-tuf, an error elsewhere."""
    repository = TufRepository()
    repository.add("m/1.0.0.zip", DATA)
    repository.publish()
    repository.rotate("root")
    repository.publish()

    async def main() -> None:
        async with doubled(tmp_path) as (double, cloud):
            double.may_list = False
            double.objects = repository.files

            def look() -> Trusted:
                fetcher = BoundedFetcher(source_for("s3://", cloud, FakeClock()), 20)
                where, work = cloud.repository.metadata_url, tmp_path / "work"
                return refresh(repository.trusted_root, where, tmp_path / "cache", work, fetcher)

            trusted = await asyncio.to_thread(look)
            assert trusted.versions["root"] == 2 and [o.version for o in trusted.offers] == ["1.0.0"]
            double.closed = "timestamp.json"
            with pytest.raises(PeerAway, match=r"timestamp\.json: .*403.*s3:GetObject on models/\*.*s3:ListBucket"):
                await asyncio.to_thread(look)
            with pytest.raises(Again, match="s3:GetObject") as caught:
                await fetched(cloud, tmp_path, name="absent.zip")
            assert caught.value.status == 403

    asyncio.run(main())


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of moto's server, a process of its own."""
    if MOTO is None:
        pytest.skip("moto_server is not installed; DICOMNODE_MOTO_SERVER may name one of another environment")
    log = tmp_path_factory.mktemp("moto") / "log"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with log.open("wb") as out:
        process = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", "0"], stdout=out, stderr=out, env=environment)
    try:
        yield asyncio.run(_address(log, lambda: process.poll() is None))
    finally:
        process.kill()
        process.wait()


async def _address(log: Path, lives: Callable[[], bool]) -> str:
    async with asyncio.timeout(60):
        while not (match := re.search(r"http://127\.0\.0\.1:\d+", log.read_text(errors="replace"))):
            assert lives(), log.read_text(errors="replace")
            await asyncio.sleep(0.05)
    return match[0]


async def put(endpoint: str, files: dict[str, bytes]) -> None:
    async with ClientSession(endpoint) as client:
        async with client.put(f"/{BUCKET}") as answer:
            assert answer.status == 200
        for name, data in files.items():
            async with client.put(f"/{BUCKET}/{name}", data=data) as answer:
                assert answer.status == 200


def test_a_repository_in_a_bucket_of_moto(moto: str, tmp_path: Path) -> None:
    """Metadata and archive; nobody here wrote either end."""
    repository = TufRepository()
    repository.add("m/1.0.0.zip", DATA)
    repository.publish()
    asyncio.run(put(moto, repository.files))
    cloud = cloud_of(tmp_path, moto)
    fetcher = BoundedFetcher(source_for("s3://", cloud, FakeClock()), 20)
    trusted = refresh(
        repository.trusted_root, cloud.repository.metadata_url, tmp_path / "cache", tmp_path / "work", fetcher
    )
    [offer] = trusted.offers
    assert cloud.repository.archives_url == f"s3://{BUCKET}/targets"
    part = tmp_path / "staging" / "a.part"
    part.parent.mkdir()
    part.write_bytes(DATA[:300_000])
    asyncio.run(fetched(cloud, tmp_path, name=f"targets/{offer.target}"))
    assert part.read_bytes() == DATA
