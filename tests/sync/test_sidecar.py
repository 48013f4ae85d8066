"""The whole sidecar: port, heartbeat, cloud, model pull, quick end."""

from __future__ import annotations

import asyncio
import hashlib
import time
import urllib.request
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from typer.testing import CliRunner

from dicomnode import doorbell
from dicomnode.admin.server import AdminServer
from dicomnode.cli import app
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database
from dicomnode.index.operation import Models, Processes
from dicomnode.sidecar import run_sidecar
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import add_results, as_they_are, make_settings, states
from tests.sync.test_archive import GOOD, tar_gz


async def until(what: object, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def test_the_sidecar_does_its_work_and_ends_at_once(tmp_path: Path) -> None:
    archive = tar_gz(tmp_path / "a.tgz", GOOD).read_bytes()
    verified: list[Path] = []

    async def bundle(_: web.Request) -> web.Response:
        return web.Response(body=archive)

    async def main() -> None:
        data = tmp_path / "data"
        db = Database(data)
        cloud = FakeCloud()
        async with served(cloud.handle) as stow_url, served(bundle, "/m.tgz") as url:
            entry = {"name": "m", "version": "1.0.0", "url": url, "sha256": hashlib.sha256(archive).hexdigest()}
            settings = make_settings(data, cloud={"stow_url": stow_url, "models": [entry]})
            stop = asyncio.Event()
            task = asyncio.create_task(run_sidecar(settings, db, verify=verified.append, stop=stop))

            def row() -> dict[str, object] | None:
                return next((r for r in Processes(db).listing() if r["name"] == "sidecar" and r["alive"]), None)

            await until(lambda: task.done() or row())
            found = row()
            assert found is not None
            port = found["detail"]["port"]  # type: ignore[index]
            assert port
            await until(lambda: Models(db).active() == {"m": "1.0.0"})
            assert len(verified) == 1
            add_results(db, data)
            doorbell.ring(data, "sidecar")
            await until(lambda: states(db) == ["stored"])
            pulled = 'dicomnode_scheduled_runs_total{outcome="ok",process="sidecar",task="model-pull"}'
            async with ClientSession() as client:
                async with client.get(f"http://127.0.0.1:{port}/health") as answer:
                    assert await answer.json() == {"alive": True}
                async with asyncio.timeout(20):  # the model serves before the run that fetched it has ended
                    while pulled not in await (await client.get(f"http://127.0.0.1:{port}/metrics")).text():
                        await asyncio.sleep(0.05)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"NONSENSE\r\n\r\n")
            refusal = await reader.read()
            assert refusal.endswith(b"\r\n\r\n400 Bad Request\n") and b"aiohttp" not in refusal
            writer.close()
            await writer.wait_closed()
            begin = time.monotonic()
            stop.set()
            await task
            assert time.monotonic() - begin < 5
            [last] = [r for r in Processes(db).listing() if r["name"] == "sidecar"]
            assert last["state"] == "stopping"
        db.close()

    asyncio.run(main())


def test_the_api_answers_while_the_cloud_has_all_of_the_other_loop(tmp_path: Path) -> None:
    async def main() -> None:
        db, stop = Database(tmp_path), asyncio.Event()
        settings = make_settings(tmp_path)
        task = asyncio.create_task(run_sidecar(settings, db, verify=lambda _: None, stop=stop))

        def port() -> int:
            return next((int(r["detail"]["port"]) for r in Processes(db).listing() if r["alive"]), 0)

        await until(lambda: task.done() or port())
        with urllib.request.urlopen(f"http://127.0.0.1:{port()}/health", timeout=20) as answer:  # holds this loop
            assert answer.status == 200
        stop.set()
        await task
        db.close()

    asyncio.run(main())


def test_without_its_api_the_process_ends_and_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AdminServer] = []
    start = AdminServer.start

    async def started(self: AdminServer) -> int:
        made.append(self)
        return await start(self)

    monkeypatch.setattr(AdminServer, "start", started)

    async def main() -> None:
        db = Database(tmp_path)
        work = run_sidecar(make_settings(tmp_path), db, verify=lambda _: None, stop=asyncio.Event())
        task = asyncio.create_task(work)
        await until(lambda: task.done() or [r for r in Processes(db).listing() if r["alive"]])
        [server] = made
        await server.answers()
        assert server._loop is not None
        server._loop.call_soon_threadsafe(server._loop.stop)
        async with asyncio.timeout(20):
            with pytest.raises(RuntimeError, match="stopped"):
                await task
        db.close()

    asyncio.run(main())


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(FakeCloud().handle) as url:
            port = int(url.split(":")[2].partition("/")[0])
            db = Database(tmp_path)
            settings = make_settings(tmp_path, http={"port": port})
            with pytest.raises(OperatorError, match=str(port)):
                await run_sidecar(settings, db, verify=lambda _: None, stop=asyncio.Event())
            db.close()

    asyncio.run(main())


def test_a_retry_by_hand_waits_for_no_back_off(tmp_path: Path) -> None:
    """The token was wrong for a night; who has mended it does not wait for a quarter of an hour."""

    async def main() -> None:
        db = Database(tmp_path)
        cloud = FakeCloud(script=[lambda *_: web.Response(status=401)])
        add_results(db, tmp_path)
        as_they_are(db)
        async with served(cloud.handle) as stow_url:
            settings = make_settings(
                tmp_path,
                cloud={"stow_url": stow_url},
                delivery={"backoff_seconds": 500.0, "backoff_max_seconds": 500.0},
            )
            stop = asyncio.Event()
            task = asyncio.create_task(run_sidecar(settings, db, verify=lambda _: None, stop=stop))
            await until(lambda: task.done() or db.value("SELECT last_error FROM sync_items"))
            config = tmp_path / "node.toml"
            config.write_text(f'[node]\ndata_dir = "{tmp_path}"\n')
            run = await asyncio.to_thread(CliRunner().invoke, app, ["sync", "retry", "1", "--config", str(config)])
            assert run.exit_code == 0, run.output
            await until(lambda: task.done() or states(db) == ["stored"])
            stop.set()
            await task
        db.close()

    asyncio.run(main())
