"""The whole way of a model: published, fetched by a sidecar that is killed meanwhile, verified by the real engine."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from dicomnode import durable
from dicomnode.cloud.publish import Bundle, Publisher
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from tests.infer.life_case import add_version
from tests.sync.test_archive import tree

SECONDS = 60.0


class Server:
    """The repository's folder over HTTP in a thread; an archive stops after ``allow`` bytes until it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.allow: int | None = None
        self.ranges: list[tuple[str | None, str | None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner: web.AppRunner | None = None
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = self.folder / request.match_info["path"]
        if not path.is_file():
            return web.Response(status=404)
        data, etag = path.read_bytes(), f'"{durable.sha256_file(path)[:20]}"'
        if "targets/" not in request.path:
            return web.Response(body=data)
        self.ranges.append((request.headers.get("Range"), request.headers.get("If-Range")))
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        headers = {"ETag": etag, "Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        await response.prepare(request)
        end = len(data) if self.allow is None else max(start, self.allow)
        try:
            await response.write(data[start:end])
            while end < len(data) and request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.02)  # an idle line, until the reader is gone
        except ConnectionError:
            pass
        return response

    def close(self) -> None:
        async def end() -> None:
            assert self._runner is not None
            await self._runner.cleanup()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder, self.data_dir = folder, folder / "data"
        self.publisher = Publisher(folder / "repository", folder / "keys")
        self.publisher.publish()
        self.server = Server(folder / "repository")
        base = f"http://127.0.0.1:{self.server.port}"
        self.config = folder / "node.toml"
        self.log = folder / "log"
        add_version(folder, "1.0.0")
        self.config.write_text(
            f'[node]\ndata_dir = "{self.data_dir}"\nreserve_mb = 1\n[http]\nport = 0\n[inference]\n'
            f'engine = "onnxruntime-cpu"\nmodels_dir = "{folder / "models"}"\nthreads = 1\n'
            f'[cloud.repository]\nmetadata_url = "{base}/metadata"\ntargets_url = "{base}/targets"\n'
            f'root_file = "{folder / "repository" / "root.json"}"\nrefresh_seconds = 1\n'
            '[[cloud.models]]\nname = "ct-lung"\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    def offer(self, version: str, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        made = add_version(self.folder / "made", version, change)
        self.publisher.publish([Bundle("ct-lung", version, made)])
        return made

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dicomnode", "run", "sidecar", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, number)
            process.wait(20)

    def until(self, what: Callable[[], object], told: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not what():
            assert time.monotonic() < deadline, f"{told}: {self.log.read_text()[-2000:]}"
            assert self._process is None or self._process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.02)

    def look(self, question: Callable[[Database], Any]) -> Any:
        db = Database(self.data_dir)
        try:
            return question(db)
        finally:
            db.close()

    def type(self, *verb: str) -> str:
        """A command as the operator types it."""
        command = [sys.executable, "-m", "dicomnode", *verb, "--config", str(self.config)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "400"}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def version(self, version: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.look(lambda db: Life(db).versions("ct-lung"))
        return next((r for r in rows if r["version"] == version), {})

    @property
    def active(self) -> str | None:
        found: dict[str, str] = self.look(lambda db: Models(db).active())
        return found.get("ct-lung")

    def pull(self, version: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.look(lambda db: Models(db).pulls())
        return next((r for r in rows if r["version"] == version), {})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("models-in"))
    yield made
    made.end(signal.SIGKILL)
    made.server.close()


@pytest.mark.slow
def test_a_sidecar_killed_while_it_downloads_goes_on_where_it_was(site: Site) -> None:
    """Then a version with a golden case that fails is offered, and the first one goes on serving."""
    bundle = site.offer("1.1.0")
    size = next((site.folder / "repository" / "targets" / "ct-lung").iterdir()).stat().st_size
    random.seed(11)
    seen = 0
    for moment in sorted(random.sample(range(1000, size - 1000), 4)):
        site.server.allow = moment
        site.start()
        staged = site.data_dir / "staging" / "models"
        site.until(lambda: sum(p.stat().st_size for p in staged.glob("*.part")) >= moment, f"{moment} bytes came")  # noqa: B023
        site.end(signal.SIGKILL)
        assert not (site.data_dir / "models" / "ct-lung").exists(), "no half bundle is visible"
        assert site.active is None
        assert site.server.ranges[-1][0] == (f"bytes={seen}-" if seen else None)
        assert bool(site.server.ranges[-1][1]) == bool(seen), "the rest of the same object is asked for"
        seen = moment
    site.server.allow = None
    site.start()
    site.until(lambda: site.active == "1.1.0", "it serves")
    assert site.server.ranges[-1][0] == f"bytes={seen}-"
    assert tree(site.data_dir / "models" / "ct-lung" / "1.1.0") == tree(bundle)

    def wrong(manifest: dict[str, Any]) -> None:
        name = manifest["golden"][0]["labels"]
        path = site.folder / "made" / "models" / "ct-lung" / "1.2.0" / name
        labels = np.load(path)
        labels[:] = 0
        np.save(path, labels)
        manifest["files"][name] = durable.sha256_file(path)

    site.offer("1.2.0", wrong)
    site.until(lambda: site.pull("1.2.0").get("state") == "rejected", "it is rejected")
    assert "GOLDEN_MISMATCH" in site.pull("1.2.0")["last_error"]
    assert site.active == "1.1.0"
    assert not (site.data_dir / "models" / "ct-lung" / "1.2.0").exists()
    assert site.look(lambda db: Life(db).state("ct-lung", "1.2.0")) is None
    site.offer("1.3.0")
    site.until(lambda: site.active == "1.3.0", "the next right one serves")
    assert site.look(lambda db: Models(db).previous("ct-lung")) == "1.1.0"
    assert (site.data_dir / "models" / "ct-lung" / "1.1.0").is_dir(), "the one before stays"
    kinds = {e["kind"] for e in site.look(lambda db: Events(db).listing())}
    assert {"model-repository", "model-rejected"} <= kinds
    site.end(signal.SIGTERM)
    site.config.write_text(site.config.read_text() + "canary_percent = 50.0\ncanary_studies = 1\napprove = true\n")
    site.offer("1.4.0")
    site.start()
    site.until(lambda: site.version("1.4.0").get("waits") == "approval", "it waits for an operator")
    assert (site.version("1.4.0")["state"], site.active) == ("staged", "1.3.0")
    site.type("models", "approve", "ct-lung@1.4.0")
    site.until(lambda: site.version("1.4.0")["state"] == "canary", "it is a canary after the approval")
    site.until(lambda: site.version("1.4.0")["waits"] == "studies", "it waits for studies")
    assert (site.version("1.4.0")["percent"], site.active) == (50.0, "1.3.0")
    shown = site.type("status")
    assert "model repository: current" in shown and "ct-lung 1.4.0 is canary and waits: 0 of 1 studies" in shown
    assert "ct-lung 1.2.0 is rejected" in shown
    site.end(signal.SIGTERM)
