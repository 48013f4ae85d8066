"""One record, or a cloud that sends without end, must not hold up the feed, fill the disk or learn a Patient ID."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.errors import OperatorError, PeerError
from dicomnode.index.records import Taken
from dicomnode.sync.departure import Departures
from dicomnode.sync.pull_records import checked, fits, page_of
from tests.cloud import endpoint as served
from tests.sync.index_case import CANARY_ID, add_results
from tests.sync.test_records import PREF, Cloud, Node, run


def test_a_patient_id_is_no_name_of_a_record(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        for name in (CANARY_ID, "2.25.1"):
            with pytest.raises(OperatorError, match="pseudonym") as told:
                node.set("patient", name, PatientSex="M")
            assert name not in str(told.value)
        known = str(node.db.value("SELECT pseudonym FROM pseudonyms WHERE kind = 'patient'"))
        assert node.set("patient", known, PatientSex="M") == 1
        item: dict[str, Any] = dict.fromkeys(
            ("idempotency_key", "version", "base_version", "base_key", "settles", "changed_time", "study_id")
        )
        item |= {"type": "patient", "data": '{"PatientSex": "M"}', "identified": 0}
        leaving = Departures(node.settings, node.db)
        assert leaving.record(item | {"record_id": known})["id"] == known
        left = leaving.record(item | {"record_id": CANARY_ID})
        assert CANARY_ID not in json.dumps(left) and left["id"] == leaving.record(item | {"record_id": CANARY_ID})["id"]

    run(tmp_path, body)


def row(seq: int, **more: Any) -> dict[str, Any]:
    found = {
        "type": "preferences", "id": "dashboard", "version": 1, "key": f"key{seq}", "node": "", "data": {},
        "changed_time": "2026-01-01T00:00:00Z", "settled": [], "seq": seq,
    }  # fmt: skip
    return found | more


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


HOSTILE: dict[str, dict[str, Any]] = {
    "surrogate in data": {"data": {"language": "\ud800"}},
    "surrogate in a key": {"data": {"\udfff": 1}},
    "surrogate in the id": {"id": "\ud800"},
    "surrogate in settled": {"settled": ["\ud800"]},
    "version": {"version": 2**63},
    "seq": {"seq": 2**53},
    "long": {"data": {"language": "x" * (256 << 10)}},
    "long id": {"id": "x" * (4 << 10)},
    "long settled": {"settled": ["x" * 1024] * 256},
    "deep": {"data": {"notes": nested(600)}},
    "no number": {"data": {"refresh_seconds": float("nan")}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_kept_is_left_out_alone(name: str) -> None:
    assert checked([row(1), row(2) | HOSTILE[name], row(3)]) == [row(1), row(3)]


def test_what_just_fits_is_kept() -> None:
    for more in ({"version": 2**53 - 1}, {"data": {"n": nested(31)}}, {"data": {"n": "x" * ((256 << 10) - 9)}}):
        assert fits(row(1, **more))
    assert not fits(row(1, data={"n": nested(32)})) and not fits(row(1, data={"n": "x" * ((256 << 10) - 8)}))
    with pytest.raises(PeerError):
        page_of({"records": [], "next": 2**63})


def feed(monkeypatch: pytest.MonkeyPatch, answer: Callable[[web.Request], Any]) -> list[str]:
    """The endpoint gives these pages, or None for its own; the paths that were asked for."""
    asked: list[str] = []
    make_app = served.make_app

    @web.middleware
    async def hostile(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method == "GET" and request.path.startswith("/v1/records"):
            asked.append(request.path_qs)
            found = answer(request)
            if found is not None:
                return web.json_response(found)
        return await handler(request)  # type: ignore[no-any-return]

    def app(*arguments: Any) -> web.Application:
        made = make_app(*arguments)
        made.middlewares.append(hostile)
        return made

    monkeypatch.setattr(served, "make_app", app)
    return asked


def test_hostile_records_do_not_hold_up_the_feed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [row(n, id=f"x{n}") | more for n, more in enumerate(HOSTILE.values(), 1)]
    page = {"records": [*bad, row(90, data={"language": "zh"})], "next": 90, "newest": 90}
    feed(monkeypatch, lambda request: page if "after=0&" in request.path_qs else {"records": [], "next": 90})

    async def body(cloud: Cloud, node: Node) -> None:
        assert await node.pull() == {Taken.applied: 1}
        assert node.holds(*PREF) == {"language": "zh"}
        [event] = node.db.rows("SELECT text FROM events WHERE kind = 'record-refused'")
        assert event["text"].startswith(f"{len(HOSTILE)} records")
        assert await node.pull() == {} and len(node.db.rows("SELECT * FROM events")) == 1

    run(tmp_path, body)


def test_a_record_that_cannot_be_decided_is_refused_alone(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        deep: Any = {"x": nested(900)}
        records = node.puller.records
        records.keep("feed", [row(1, type="limits", id="warnings", data=deep)], 1)
        with node.db.transaction():  # as rows that an earlier version kept
            node.db.execute("UPDATE cloud_records SET data = ?", ("[" * 100_000 + "]" * 100_000,))
        records.keep("feed", [row(2, data={"language": "zh"})], 2)
        assert records.take_all() == {Taken.refused: 1, Taken.applied: 1}
        assert records.take_all() == {} and node.holds(*PREF) == {"language": "zh"}

    run(tmp_path, body)


def test_a_missing_record_that_cannot_be_kept_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = row(1, data={"language": "\ud800"})
    asked = feed(monkeypatch, lambda request: bad if request.path.endswith("dashboard") else {"records": [], "next": 0})

    async def body(cloud: Cloud, node: Node) -> None:
        node.set(*PREF, language="zh")
        with node.db.transaction():
            node.db.execute("UPDATE sync_items SET state = 'done', outcome = 'conflict'")
        for _ in range(3):
            await node.pull()
        assert len([a for a in asked if a.endswith("dashboard")]) == 1

    run(tmp_path, body)
