"""``sync.offline_mode``: what the whole sidecar asks of the cloud, and what it does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode import doctor_cloud, sidecar
from dicomnode.errors import NodeError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events, Processes
from dicomnode.index.urgency import Alerts, raise_alert
from dicomnode.offline import HELD, is_inside, longest_wait
from dicomnode.settings import Settings
from dicomnode.sync.schedule import Schedule
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import add_results, make_settings
from tests.sync.tuf_case import TufRepository

KINDS: dict[str, Callable[[str, str], bool]] = {
    "health": lambda method, path: path == "/health",
    "results": lambda method, path: path.startswith("/studies"),
    "records out": lambda method, path: (method, path) == ("POST", "/v1/records"),
    "records in": lambda method, path: (method, path) == ("GET", "/v1/records"),
    "heartbeat": lambda method, path: path == "/v1/heartbeat",
    "desired state": lambda method, path: path.endswith("/desired"),
    "metrics": lambda method, path: path == "/write",
    "model metadata": lambda method, path: path.startswith("/repo/metadata/"),
    "model archive": lambda method, path: path == "/m.tgz",
    "alert": lambda method, path: path == "/hook",
}


class Outside:
    """Everything that a node may talk to, on one address; who asked for what is noted."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.repository = TufRepository()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        body = await request.read()
        if request.path.startswith("/repo/"):
            data = self.repository.files.get(request.path.removeprefix("/repo/"))
            return web.Response(status=404) if data is None else web.Response(body=data)
        if KINDS["results"](*self.asked[-1]) and request.method == "POST":
            return FakeCloud().store(request, body)
        sent = json.loads(body).get("records", []) if KINDS["records out"](*self.asked[-1]) else []
        outcomes = [{"idempotency_key": r["idempotency_key"], "outcome": "stored", "version": 1} for r in sent]
        return web.json_response({"records": [], "next": 0, "newest": 0, "generation": 0, "outcomes": outcomes})

    @property
    def kinds(self) -> set[str]:
        found = {kind for kind, asks in KINDS.items() if any(asks(*one) for one in self.asked)}
        assert all(any(asks(*one) for asks in KINDS.values()) for one in self.asked), self.asked
        return found


def configured(tmp_path: Path, base: str, mode: str, place: str) -> Settings:
    (tmp_path / "secret").write_text("0123456789abcdef")
    entry = {"name": "m", "version": "1.0.0", "url": f"{base}/m.tgz", "sha256": "0" * 64}
    lanes = {f"{lane}_seconds": 0.2 for lane in ("urgent", "normal", "batch", "pull")}
    return make_settings(
        tmp_path / "data",
        node={"data_dir": tmp_path / "data", "reserve_mb": 1},
        cloud={
            "stow_url": f"{base}/studies",
            "records_url": f"{base}/v1",
            "health_url": f"{base}/health",
            "models": [entry],
            "repository": {"metadata_url": f"{base}/repo/metadata", "root_file": tmp_path / "root.json"},
        },
        sync={"offline_mode": mode, **lanes},
        fleet={"heartbeat_seconds": 0.2, "desired_seconds": 0.2},
        metrics={"remote_write_url": f"{base}/write", "interval_seconds": 1},
        alerts={"url": f"{base}/hook", "secret_file": tmp_path / "secret", "place": place},
    )


@pytest.mark.parametrize(
    ("mode", "place", "expected"),
    [
        ("auto", "auto", set(KINDS)),
        ("never", "auto", set(KINDS)),
        ("always", "auto", set()),
        ("always", "hospital", {"alert"}),
    ],
)
def test_what_is_asked(
    mode: str, place: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: dict[str, Callable[[], Awaitable[object]]] = {}

    class ByHand(Schedule):
        """Every task is run by the test, one after another: nothing is cut when it ends."""

        def every(self, name: str, seconds: float, action: Callable[[], Awaitable[object]]) -> None:
            tasks[name] = action

        def soon(self, name: str) -> None:
            assert name in tasks

        def start(self) -> None:
            return

    monkeypatch.setattr(sidecar, "Schedule", ByHand)

    async def main() -> None:
        outside = Outside()
        (tmp_path / "root.json").write_bytes(outside.repository.trusted_root)
        async with served(outside.handle, "/{path:.*}") as url:
            settings = configured(tmp_path, url.removesuffix("/{path:.*}"), mode, place)
            db = Database(tmp_path / "data")
            plan = settings.cloud_plan
            add_results(db, tmp_path / "data", cloud=plan)
            with db.transaction():
                job = db.row("SELECT id, study_id FROM deliveries") or db.row(
                    "SELECT j.id, se.study_id FROM jobs j JOIN series se ON se.id = j.series_id"
                )
                assert job is not None
                raise_alert(db, job_id=job["id"], study_id=job["study_id"], keys=["x"])
            stop = asyncio.Event()
            work = asyncio.create_task(sidecar.run_sidecar(settings, db, verify=lambda _: None, stop=stop))
            async with asyncio.timeout(60):
                while not any(p["state"] == "ready" for p in Processes(db).listing()):
                    assert not work.done(), work.exception()
                    await asyncio.sleep(0.01)
                for action in [*tasks.values(), *tasks.values()]:  # the endpoints answer to the second half
                    with contextlib.suppress(NodeError):
                        await action()
            stop.set()
            await work
            assert len(tasks) >= 15
            assert outside.kinds == expected
            assert Alerts(db).counts()["stored"] == ("alert" in expected)
            held = [e["text"] for e in Events(db).listing(kind="alert-held")]
            assert len(held) == (mode == "always" and place == "auto") and all(HELD in text for text in held)
            db.close()

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_doctor_does_not_ask_either(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cloud, "ANSWER_SECONDS", 0.1)
    (tmp_path / "root.json").write_bytes(TufRepository().trusted_root)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = configured(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}", mode, "auto")
        texts = [f.text for f in doctor_cloud.examine_cloud(settings)]
        listener.setblocking(False)
        callers = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                callers += 1
    assert (callers > 0, any(HELD in text for text in texts)) == ((True, False) if mode == "auto" else (False, True))


@pytest.mark.parametrize(
    ("place", "host", "addresses", "inside"),
    [
        ("auto", "hook.hospital.example", {"10.1.2.3"}, True),
        ("auto", "hook.hospital.example", {"10.1.2.3", "fd00::3"}, True),
        ("auto", "127.0.0.1", {"127.0.0.1"}, True),
        ("auto", "hook.example", {"93.184.216.34"}, False),
        ("auto", "hook.example", {"10.1.2.3", "93.184.216.34"}, False),
        ("auto", "hook.example", {"::ffff:93.184.216.34"}, False),
        ("auto", "hook.example", set(), False),
        ("auto", "cloud.example", {"10.1.2.3"}, False),
        ("hospital", "cloud.example", {"93.184.216.34"}, True),
        ("cloud", "hook.hospital.example", {"10.1.2.3"}, False),
    ],
)
def test_where_a_webhook_is(place: Any, host: str, addresses: set[str], inside: bool) -> None:
    assert is_inside(place, host, {"cloud.example"}, addresses) is inside


def test_the_longest_wait() -> None:
    assert [longest_wait(mode, 900.0) for mode in ("auto", "always", "never")] == [900.0, 900.0, 30.0]
    assert longest_wait("never", 5.0) == 5.0
