"""Archives beside each other: a slow one holds up nobody, and what nobody wants any more leaves the disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.index.database import Database
from dicomnode.index.operation import Events, Models
from dicomnode.ladder import Plan
from dicomnode.sync.pull import ModelPuller, Wanted
from tests.sync.cloud_fake import served
from tests.sync.index_case import FakeClock, make_settings
from tests.sync.test_archive import GOOD, tar_gz


class Store:
    """Archives by name; those in ``held`` send their beginning and then wait to be let go."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.data = {n: tar_gz(folder / f"{n}.tgz", {**GOOD, "note.txt": n.encode()}).read_bytes() for n in "abcd"}
        self.held: dict[str, asyncio.Event] = {}
        self.begun: list[str] = []
        self.now = 0
        self.most = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        data = self.data[name]
        self.begun.append(name)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            headers = {"Content-Length": str(len(data) - start)}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            response = web.StreamResponse(status=206 if start else 200, headers=headers)
            await response.prepare(request)
            half = max(start, len(data) // 2)
            await response.write(data[start:half])
            if name in self.held:
                await self.held[name].wait()
            await response.write(data[half:])
            await response.write_eof()
            return response
        finally:
            self.now -= 1

    def wanted(self, base: str, name: str, length: int | None = None, version: str = "1.0.0") -> Wanted:
        digest = hashlib.sha256(self.data[name]).hexdigest()
        return Wanted(f"model-{name}", version, f"{base}/{name}", digest, Plan(), length, signed=True)


class Case:
    def __init__(self, tmp_path: Path, db: Database, base: str, store: Store) -> None:
        self.offers: list[Wanted] = []
        self.base, self.store, self.db = base, store, db
        self.verifying = self.most_verifying = 0
        settings = make_settings(tmp_path / "data", cloud={"timeout_seconds": 30})
        self.puller = ModelPuller(settings, db, self._verify, self._offered)
        self.staging = tmp_path / "data" / "staging" / "models"

    def _offered(self, *, stale: bool = False) -> Sequence[Wanted]:
        return list(self.offers)

    def _verify(self, _: Path) -> None:
        self.verifying += 1
        self.most_verifying = max(self.most_verifying, self.verifying)
        self.verifying -= 1

    @property
    def active(self) -> set[str]:
        return set(Models(self.db).active())

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(30):
            while not what():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def cases(tmp_path: Path) -> Any:
    store = Store(tmp_path / "archives")
    async with served(store.handle, "/{name}") as url:
        db = Database(tmp_path / "data", FakeClock())
        yield Case(tmp_path, db, url.removesuffix("/{name}"), store)
        db.close()


def test_a_slow_archive_holds_up_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with cases(tmp_path) as case:
            store = case.store
            store.held["a"] = asyncio.Event()
            case.offers = [store.wanted(case.base, n, len(store.data[n])) for n in "ab"]
            run = asyncio.create_task(case.puller.run_once())
            await case.until(lambda: case.active == {"model-b"} and "a" in store.begun)
            case.offers.append(store.wanted(case.base, "c", len(store.data["c"])))
            case.puller.look_again()  # as the sidecar does when the repository has news
            await case.until(lambda: case.active == {"model-b", "model-c"})
            assert not run.done() and store.most == 2, "no more than two at a time"
            store.held["a"].set()
            assert await run == 3
            assert case.most_verifying == 1

    asyncio.run(main())


def test_the_shortest_go_first_and_two_versions_of_one_model_one_after_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with cases(tmp_path) as case:
            store = case.store
            store.data["d"] += bytes(5000)  # behind the end of the archive
            names = sorted("abcd", key=lambda n: len(store.data[n]))
            case.offers = [store.wanted(case.base, n, len(store.data[n])) for n in reversed(names)]
            second = store.wanted(case.base, "c", len(store.data["c"]), "2.0.0")
            case.offers = [o for o in case.offers if o.name != "model-c"]
            case.offers += [Wanted("model-a", "2.0.0", second.url, second.sha256, Plan(), second.length, signed=True)]
            store.held |= {"a": asyncio.Event(), "c": asyncio.Event()}
            run = asyncio.create_task(case.puller.run_once())
            await case.until(lambda: "d" in store.begun and ("a" in store.begun) != ("c" in store.begun))
            for event in store.held.values():
                event.set()
            await run
            assert store.begun.index("b") < store.begun.index("d") and set(store.begun) == set("abcd")

    asyncio.run(main())


def test_what_was_fetched_of_a_version_that_nobody_wants_any_more_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with cases(tmp_path) as case:
            store = case.store
            store.held["a"] = asyncio.Event()
            case.offers = [store.wanted(case.base, "a", len(store.data["a"]))]
            run = asyncio.create_task(case.puller.run_once())
            await case.until(lambda: [p for p in case.staging.glob("*.part") if p.stat().st_size])
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run
            [part] = case.staging.glob("*.part")
            Models(case.db).record_pull(
                {"sha256": part.stem, "name": "model-a", "version": "1.0.0", "state": "pending", "attempts": 1,
                 "next_at": 1e12, "source": "repository"}
            )  # fmt: skip
            await case.puller.run_once()
            assert part.exists(), "it is wanted still"
            case.offers = [store.wanted(case.base, "b", len(store.data["b"]))]
            await case.puller.run_once()
            assert list(case.staging.iterdir()) == [] and case.active == {"model-b"}
            assert [p["name"] for p in Models(case.db).pulls()] == ["model-b"]
            [event] = [e for e in Events(case.db).listing() if e["subject"] == "model-a@1.0.0"]
            assert "not wanted any more" in event["text"]

    asyncio.run(main())


def test_a_stop_ends_every_download(tmp_path: Path) -> None:
    async def main() -> None:
        async with cases(tmp_path) as case:
            store = case.store
            store.held |= {"a": asyncio.Event(), "b": asyncio.Event()}
            case.offers = [store.wanted(case.base, n, len(store.data[n])) for n in "ab"]
            run = asyncio.create_task(case.puller.run_once())
            await case.until(lambda: len([p for p in case.staging.glob("*.part") if p.stat().st_size]) == 2)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert [t for t in asyncio.all_tasks() if "ModelPuller" in repr(t.get_coro())] == []
            for event in store.held.values():
                event.set()
            assert await case.puller.run_once() == 2, "the next run goes on with both"

    asyncio.run(main())
