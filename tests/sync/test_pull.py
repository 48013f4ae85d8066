"""Model pull against a server that misbehaves: nothing unverified ever serves."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.errors import BundleError, EngineError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events, Models
from dicomnode.sync import pull
from dicomnode.sync.pull import ModelPuller
from tests.sync.cloud_fake import served
from tests.sync.index_case import FakeClock, make_settings
from tests.sync.test_archive import GOOD, tar_gz, tree, zipped

NAME, VERSION = "ct-lung", "2.0.0"


@dataclass
class FakeStore:
    """Serves ``data`` with ranges; ``script`` is used up one entry per request."""

    data: bytes
    script: list[Callable[[web.Request], Any] | None] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    partial: bool = True

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.ranges.append(request.headers.get("Range"))
        self.tokens.append(request.headers.get("Authorization"))
        action = self.script.pop(0) if self.script else None
        if action is not None:
            answer = action(request)
            return await answer if asyncio.iscoroutine(answer) else answer
        start = int((self.ranges[-1] or "bytes=0-").removeprefix("bytes=").rstrip("-")) if self.partial else 0
        if start >= len(self.data):
            return web.Response(status=416)
        headers = {"Content-Range": f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"} if start else {}
        return web.Response(body=self.data[start:], status=206 if start else 200, headers=headers)

    def cut_after(self, count: int, folder: Path) -> Callable[[web.Request], Any]:
        async def cut(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(len(self.data))})
            await response.prepare(request)
            await response.write(self.data[:count])
            async with asyncio.timeout(10):
                while sum(p.stat().st_size for p in folder.rglob("*.part")) < count:
                    await asyncio.sleep(0.001)  # until the reader has it: what a cut leaves behind is then known
            assert request.transport is not None
            request.transport.close()
            return response

        return cut


@dataclass
class Case:
    db: Database
    clock: FakeClock
    tmp_path: Path
    verified: list[Path] = field(default_factory=list)
    verdict: Exception | None = None

    def verify(self, path: Path) -> None:
        self.verified.append(path)
        assert (path.parent.name, path.name) == (NAME, VERSION), "the folder has its final names"
        assert not self.final.exists(), "nothing unverified stands where the worker looks"
        assert tree(path) == GOOD
        if self.verdict is not None:
            raise self.verdict

    @property
    def final(self) -> Path:
        return self.tmp_path / "models" / NAME / VERSION

    @property
    def row(self) -> dict[str, Any]:
        [row] = Models(self.db).pulls()
        return row

    def run(self, store: FakeStore, *, digest: str = "", times: int = 1, wait: float = 0.0, **cloud: Any) -> list[int]:
        async def main() -> list[int]:
            async with served(store.handle, "/m.tgz") as url:
                entry = {
                    "name": NAME,
                    "version": VERSION,
                    "url": url,
                    "sha256": digest or hashlib.sha256(store.data).hexdigest(),
                }
                extra = {k: (v(url) if callable(v) else v) for k, v in cloud.items()}
                settings = make_settings(self.tmp_path, cloud={"models": [entry], "timeout_seconds": 5, **extra})
                puller = ModelPuller(settings, self.db, self.verify)
                puller.start()
                done = []
                for _ in range(times):
                    done.append(await puller.run_once())
                    self.clock.now += wait
                return done

        return asyncio.run(main())

    def untouched(self, active: dict[str, str]) -> None:
        assert Models(self.db).active() == active
        assert not self.final.exists()
        assert [p for p in (self.tmp_path / "staging").rglob("*") if p.name == "manifest.json"] == []


@pytest.fixture
def case(tmp_path: Path) -> Any:
    clock = FakeClock()
    db = Database(tmp_path, clock)
    Models(db).activate(NAME, "1.0.0")
    yield Case(db, clock, tmp_path)
    db.close()


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    (tmp_path / "source").mkdir()
    return tar_gz(tmp_path / "source" / "a.tgz", GOOD, prefix=f"{VERSION}/").read_bytes()


OLD = {NAME: "1.0.0"}


@pytest.mark.parametrize("make", [tar_gz, zipped])
def test_pulled_verified_activated(case: Case, tmp_path: Path, make: Callable[..., Path]) -> None:
    (tmp_path / "source").mkdir()
    store = FakeStore(make(tmp_path / "source" / "a", GOOD).read_bytes())
    assert case.run(store, times=3, wait=9999) == [1, 0, 0]
    assert Models(case.db).active() == {NAME: VERSION}
    assert Models(case.db).previous(NAME) == "1.0.0"
    assert tree(case.final) == GOOD
    assert case.row["state"] == "activated"
    assert len(store.ranges) == 1
    assert list((tmp_path / "staging" / "models").iterdir()) == []


def test_what_the_operator_rolled_back_stays_so(case: Case, archive: bytes) -> None:
    case.run(FakeStore(archive))
    Models(case.db).activate(NAME, "1.0.0")
    assert case.run(FakeStore(archive), times=3, wait=9999, digest=hashlib.sha256(archive).hexdigest()) == [0, 0, 0]
    assert Models(case.db).active() == OLD


def test_wrong_digest_is_final_until_the_settings_change(case: Case, archive: bytes) -> None:
    store = FakeStore(archive + b"!")
    right = hashlib.sha256(archive).hexdigest()
    case.run(store, digest=right, times=1)
    assert case.row["state"] == "rejected"
    assert case.verified == []
    case.untouched(OLD)
    [event] = Events(case.db).listing(kind="model-rejected")
    assert "SHA-256" in event["text"]
    # The test's server has another port each time, so the URL changes: it is tried again.
    assert case.run(FakeStore(archive), digest=right) == [1]


def test_a_rejected_pull_is_not_tried_again(case: Case, archive: bytes) -> None:
    store = FakeStore(archive)
    case.verdict = BundleError("golden", "case 1 differs")
    assert case.run(store, times=4, wait=99999) == [0, 0, 0, 0]
    assert len(store.ranges) == 1
    assert case.row["state"] == "rejected"
    assert "case 1 differs" in case.row["last_error"]
    case.untouched(OLD)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (BundleError("golden", "no"), "rejected"),
        (EngineError("golden", "GOLDEN_MISMATCH", "dice 0.1"), "rejected"),
        (EngineError("engine", "LIB_MISSING", "no CUDA here"), "pending"),
        (MemoryError(), "pending"),
        (RuntimeError("boom"), "pending"),
        (OSError("disk"), "pending"),
    ],
)
def test_failed_verification_never_touches_what_serves(
    case: Case, archive: bytes, error: Exception, state: str
) -> None:
    case.verdict = error
    assert case.run(FakeStore(archive)) == [0]
    assert case.row["state"] == state
    case.untouched(OLD)


def test_resume_after_a_cut(case: Case, archive: bytes) -> None:
    store = FakeStore(archive)
    store.script = [store.cut_after(100, case.tmp_path)]
    assert case.run(store, times=2, wait=60) == [0, 1]
    assert store.ranges == [None, "bytes=100-"]
    assert tree(case.final) == GOOD


def test_resume_at_a_server_without_ranges(case: Case, archive: bytes) -> None:
    store = FakeStore(archive, partial=False)
    store.script = [store.cut_after(100, case.tmp_path)]
    assert case.run(store, times=2, wait=60) == [0, 1]
    assert tree(case.final) == GOOD


def test_an_archive_that_changed_between_attempts_is_loaded_anew(case: Case, archive: bytes) -> None:
    store = FakeStore(archive)
    other = FakeStore(os.urandom(len(archive)))
    store.script = [other.cut_after(100, case.tmp_path)]
    assert case.run(store, times=3, wait=60) == [0, 0, 1]
    assert store.ranges == [None, "bytes=100-", None]


def test_a_part_longer_than_the_archive(case: Case, archive: bytes) -> None:
    store = FakeStore(archive)
    longer = FakeStore(os.urandom(len(archive) + 50))
    store.script = [longer.cut_after(len(archive) + 20, case.tmp_path)]
    assert case.run(store, times=3, wait=60) == [0, 0, 1]


def test_another_range_than_asked(case: Case, archive: bytes) -> None:
    store = FakeStore(archive)
    wrong = {"Content-Range": f"bytes 0-{len(archive) - 1}/{len(archive)}"}
    store.script = [
        store.cut_after(100, case.tmp_path),
        lambda _: web.Response(body=archive, status=206, headers=wrong),
    ]
    assert case.run(store, times=3, wait=60) == [0, 0, 1]


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_server_that_errs_is_asked_again(case: Case, archive: bytes, status: int) -> None:
    store = FakeStore(archive)
    store.script = [lambda _: web.Response(status=status)] * 3
    assert case.run(store, times=5, wait=9999) == [0, 0, 0, 1, 0]


def test_back_off_and_retry_after(case: Case, archive: bytes) -> None:
    store = FakeStore(archive)
    store.script = [lambda _: web.Response(status=503, headers={"Retry-After": "500"})]
    assert case.run(store, times=6, wait=110) == [0, 0, 0, 0, 0, 1]
    assert len(store.ranges) == 2


@pytest.mark.parametrize("told", [True, False])
def test_larger_than_the_cap(case: Case, told: bool) -> None:
    store = FakeStore(os.urandom(2 << 20))

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(1 << 40)} if told else {})
        await response.prepare(request)
        try:
            for _ in range(100):
                await response.write(store.data)
        except OSError:
            pass
        return response

    store.script = [endless]
    assert case.run(store, max_bundle_mb=1) == [0]
    assert case.row["state"] == "rejected"
    assert "max_bundle_mb" in case.row["last_error"]
    case.untouched(OLD)


def test_a_full_disk_is_waited_out(case: Case, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.durable.free_bytes", lambda _: 1 << 20)
    assert case.run(FakeStore(archive)) == [0]
    assert case.row["state"] == "pending"
    case.untouched(OLD)
    monkeypatch.undo()
    case.clock.now += 9999
    assert case.run(FakeStore(archive)) == [1]


def test_an_unsafe_archive_is_rejected(case: Case, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    store = FakeStore(tar_gz(tmp_path / "source" / "a.tgz", {**GOOD, "../../../evil": b"!"}).read_bytes())
    assert case.run(store) == [0]
    assert case.row["state"] == "rejected"
    assert case.verified == []
    assert not list(tmp_path.rglob("evil"))
    case.untouched(OLD)


@pytest.mark.parametrize("step", ["activate", "record_pull"])
def test_killed_after_placing(case: Case, archive: bytes, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(Models, step, die)
    with pytest.raises(Killed):
        case.run(FakeStore(archive))
    monkeypatch.undo()
    assert tree(case.final) == GOOD
    case.verify = case.verified.append  # type: ignore[method-assign]
    assert case.run(FakeStore(archive)) == [1]
    assert Models(case.db).active() == {NAME: VERSION}


def test_another_bundle_of_that_version_is_not_overwritten(case: Case, archive: bytes) -> None:
    case.final.mkdir(parents=True)
    (case.final / "manifest.json").write_bytes(b"mine")
    case.verify = lambda path: None  # type: ignore[method-assign]
    assert case.run(FakeStore(archive)) == [0]
    assert case.row["state"] == "rejected"
    assert (case.final / "manifest.json").read_bytes() == b"mine"


@pytest.mark.parametrize(("same", "sent"), [(True, "Bearer secret"), (False, None)])
def test_the_token_goes_to_the_cloud_only(case: Case, archive: bytes, same: bool, sent: str | None) -> None:
    token = case.tmp_path / "token"
    token.write_text("secret")
    store = FakeStore(archive)

    def stow_url(url: str) -> str:
        return url.rpartition("/")[0] + "/studies" if same else "https://cloud.invalid/studies"

    case.run(store, token_file=token, stow_url=stow_url)
    assert store.tokens == [sent]


def test_leftovers_of_removed_entries_go(case: Case) -> None:
    staging = case.tmp_path / "staging" / "models"
    (staging / ("a" * 64)).mkdir(parents=True)
    (staging / ("b" * 64 + ".part")).write_bytes(b"x")
    ModelPuller(make_settings(case.tmp_path), case.db, case.verify).start()
    assert list(staging.iterdir()) == []


def test_is_due() -> None:
    assert pull.is_due(None, "m", 5.0)
    assert not pull.is_due({"state": "activated"}, "m", 5.0)
    assert not pull.is_due({"state": "rejected", "last_error": "why [m]"}, "m", 5.0)
    assert pull.is_due({"state": "rejected", "last_error": "why [other]"}, "m", 5.0)
    assert not pull.is_due({"state": "pending", "next_at": 6.0}, "m", 5.0)
    assert pull.is_due({"state": "pending", "next_at": 5.0}, "m", 5.0)
