"""The cloud outbox against an endpoint that misbehaves, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode import durable
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.sync.sender import CloudSender
from dicomnode.sync.stow import MAX_REPLY_BYTES
from tests.sync.cloud_fake import FakeCloud, reply, served
from tests.sync.index_case import FakeClock, add_results, as_they_are, make_settings, sender_of, states

Body = Callable[[CloudSender, FakeCloud], Awaitable[None]]


def drive(db: Database, tmp_path: Path, body: Body, script: list[Any] | None = None, **cloud: Any) -> FakeCloud:
    """With identity, so that what arrives can be compared with what is stored; see test_departure.py."""
    fake = FakeCloud(list(script or []))
    as_they_are(db)

    async def main() -> None:
        async with served(fake.handle) as url:
            settings = make_settings(tmp_path, cloud={"stow_url": url, "timeout_seconds": 5, **cloud})
            sender = sender_of(settings, db)
            sender.start()
            await body(sender, fake)

    asyncio.run(main())
    return fake


def answer(status: int, **headers: str) -> Callable[..., web.Response]:
    return lambda *_: web.Response(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def event_texts(db: Database) -> list[str]:
    return [e["text"] for e in Events(db).listing()]


def test_objects_arrive_as_they_are(db: Database, tmp_path: Path) -> None:
    uids = add_results(db, tmp_path, 3)
    token = tmp_path / "token"
    token.write_text("secret-token\n")

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        assert await sender.flush() == 3

    fake = drive(db, tmp_path, body, token_file=token)
    assert sorted(fake.stored) == sorted(uids)
    files = {r["SOPInstanceUID"]: r["file"] for r in db.rows("SELECT * FROM results")}
    for uid in uids:
        assert fake.stored[uid] == durable.ObjectStore(tmp_path).path(files[uid]).read_bytes()
    assert states(db) == ["stored"] * 3
    assert len(fake.requests) == 1
    assert fake.requests[0]["Authorization"] == "Bearer secret-token"
    assert "Transfer-Encoding" not in fake.requests[0]


def test_off_without_an_address(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path)
    assert asyncio.run(sender_of(make_settings(tmp_path), db).flush()) == 0
    assert states(db) == ["pending"]


def cut(fake: FakeCloud, request: web.Request, body: bytes) -> None:
    """Store, then let the reply be lost."""
    fake.store(request, body)
    assert request.transport is not None
    request.transport.abort()


async def half(fake: FakeCloud, request: web.Request, body: bytes) -> web.StreamResponse:
    full = fake.store(request, body)
    assert isinstance(full.body, bytes)
    response = web.StreamResponse(
        headers={"Content-Type": "application/dicom+json", "Content-Length": str(len(full.body))}
    )
    await response.prepare(request)
    await response.write(full.body[:20])
    assert request.transport is not None
    request.transport.close()
    return response


async def huge(_: FakeCloud, request: web.Request, __: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/dicom+json"})
    await response.prepare(request)
    block = b" " * (1 << 20)
    try:
        for _n in range((MAX_REPLY_BYTES >> 20) + 64):
            await response.write(block)
    except OSError:
        pass
    return response


@pytest.mark.parametrize(
    "fault",
    [
        answer(500),
        answer(503),
        answer(429),
        answer(408),
        answer(200),
        answer(401),
        answer(403),
        answer(404),
        answer(302, Location="http://127.0.0.1:9/"),
        cut,
        half,
        huge,
    ],
    ids=["500", "503", "429", "408", "empty", "401", "403", "404", "redirect", "cut", "half", "huge"],
)
def test_passing_faults_are_retried_until_stored_once_in_effect(
    db: Database, tmp_path: Path, clock: FakeClock, fault: Any
) -> None:
    [uid] = add_results(db, tmp_path)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        assert await sender.flush() == 0
        assert states(db) == ["pending"]
        assert await sender.flush() == 0, "the endpoint is left alone until the back-off is over"
        assert len(fake.requests) == 1
        clock.now += 3600
        assert await sender.flush() == 1

    fake = drive(db, tmp_path, body, [fault])
    assert list(fake.stored) == [uid]
    assert states(db) == ["stored"]
    assert len(fake.requests) == 2


def test_a_week_of_failure_does_not_give_up(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    add_results(db, tmp_path)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        for _ in range(40):
            await sender.flush()
            clock.now += 15 * 60 + 1
        assert states(db) == ["stored"]

    fake = drive(db, tmp_path, body, [answer(503)] * 30)
    assert len(fake.requests) == 31
    kinds = [(e["severity"], e["kind"]) for e in Events(db).listing()]
    assert kinds == [("info", "cloud"), ("warning", "cloud")], "one event when it goes, one when it is back"


def test_retry_after_is_honoured(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    add_results(db, tmp_path)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        await sender.flush()
        clock.now += 599
        assert await sender.flush() == 0
        assert len(fake.requests) == 1
        clock.now += 2
        assert await sender.flush() == 1

    drive(db, tmp_path, body, [answer(429, Retry_After="600")])


def test_nothing_listens(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    add_results(db, tmp_path)

    async def main() -> None:
        async with served(FakeCloud().handle) as url:
            pass  # the port is free again
        sender = sender_of(make_settings(tmp_path, cloud={"stow_url": url}), db)
        assert await sender.flush() == 0

    asyncio.run(main())
    assert states(db) == ["pending"]
    assert "cannot be reached" in db.value("SELECT last_error FROM sync_items")


def test_failed_instances_are_parked_and_the_others_stored(db: Database, tmp_path: Path) -> None:
    uids = add_results(db, tmp_path, 3)

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        assert await sender.flush() == 3

    drive(db, tmp_path, body, [lambda f, r, b: f.store(r, b, {uids[1]: 0xA900})])
    assert states(db) == ["stored", "rejected", "stored"]
    assert "0xA900" in db.value("SELECT last_error FROM sync_items WHERE state = 'rejected'")


def test_out_of_resources_of_one_is_retried(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    uids = add_results(db, tmp_path, 2)

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        assert await sender.flush() == 1
        clock.now += 3600
        assert await sender.flush() == 1

    drive(db, tmp_path, body, [lambda f, r, b: f.store(r, b, {uids[0]: 0xA700})])
    assert states(db) == ["stored", "stored"]


def test_one_poisonous_object_does_not_stop_the_others(db: Database, tmp_path: Path) -> None:
    uids = add_results(db, tmp_path, 3)

    def picky(fake: FakeCloud, request: web.Request, body: bytes) -> web.Response | None:
        return web.Response(status=400) if uids[1] in fake.parts(request, body) else None

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        assert await sender.flush() == 3

    drive(db, tmp_path, body, [picky] * 4)
    assert states(db) == ["stored", "rejected", "stored"]


def test_a_reply_about_other_instances_stores_nothing(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path)

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        assert await sender.flush() == 0

    drive(db, tmp_path, body, [lambda *_: reply(["9.9.9"], {})])
    assert states(db) == ["pending"]


def test_a_damaged_file_is_never_sent(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path)
    path = durable.ObjectStore(tmp_path).path(db.value("SELECT file FROM results"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        await sender.flush()
        assert not fake.requests

    drive(db, tmp_path, body)
    assert states(db) == ["rejected"]


@pytest.mark.parametrize("content", [None, "", "two words", "line\nline"])
def test_a_bad_token_file_waits_for_the_operator(
    db: Database, tmp_path: Path, clock: FakeClock, content: str | None
) -> None:
    add_results(db, tmp_path)
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        assert await sender.flush() == 0
        assert not fake.requests
        token.write_text("good")
        clock.now += 3600
        assert await sender.flush() == 1

    drive(db, tmp_path, body, token_file=token)
    assert any("token" in text for text in event_texts(db))
    assert not any("good" in text for text in event_texts(db))


def test_identity_never_leaves_over_plain_http(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path)
    sender = sender_of(make_settings(tmp_path, cloud={"stow_url": "http://192.0.2.1/studies"}), db)
    assert asyncio.run(sender.flush()) == 0
    assert any("not https" in text for text in event_texts(db))


def test_what_a_dead_process_had_in_hand_is_sent(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path)

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        assert sender.outbox.lease_lane(1, sender.owner, 1e9, 10, 1 << 20)
        assert await sender.flush() == 0
        sender.start()
        assert await sender.flush() == 1

    drive(db, tmp_path, body)
    assert states(db) == ["stored"]


def test_an_object_that_cannot_be_stored_now_does_not_discredit_the_endpoint(
    db: Database, tmp_path: Path, clock: FakeClock
) -> None:
    """It alone waits; what comes meanwhile goes at once."""
    [bad] = add_results(db, tmp_path)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        assert await sender.flush() == 0
        [good] = add_results(db, tmp_path)
        as_they_are(db)
        assert await sender.flush() == 1 and list(fake.stored) == [good]
        assert sender.endpoints.link == "online"
        clock.now += 3600
        assert await sender.flush() == 1 and set(fake.stored) == {good, bad}

    drive(db, tmp_path, body, [lambda f, r, b: f.store(r, b, {bad: 0x0110})])


def test_a_fault_of_ours_leaves_nothing_in_hand(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_results(db, tmp_path, 2)

    async def body(sender: CloudSender, _: FakeCloud) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sender, "_parts", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await sender.flush()
        assert states(db) == ["pending"] * 2
        assert await sender.flush() == 2

    drive(db, tmp_path, body)
