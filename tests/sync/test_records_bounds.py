"""One record, or a cloud that sends without end, must not hold up the feed, fill the disk or learn a Patient ID."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode import durable
from dicomnode.errors import OperatorError, PeerError
from dicomnode.index import records as records_module
from dicomnode.index.cloud_rows import put_record
from dicomnode.index.records import Taken
from dicomnode.strict_json import MOST_VALUES
from dicomnode.sync import pull_records
from dicomnode.sync.departure import Departures
from dicomnode.sync.feed_page import checked, fault, page_of
from tests.cloud import endpoint as served
from tests.sync.index_case import CANARY_ID, add_results
from tests.sync.test_records import LIMIT, PREF, Cloud, Node, run


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
    rows, [unkept] = checked([row(1), row(2) | HOSTILE[name], row(3)])
    assert rows == [row(1), row(3)] and unkept.why


def test_what_just_fits_is_kept() -> None:
    for more in ({"version": 2**53 - 1}, {"data": {"n": nested(31)}}, {"data": {"n": "x" * ((256 << 10) - 9)}}):
        assert fault(row(1, **more)) == ""
    assert fault(row(1, data={"n": nested(32)})) and fault(row(1, data={"n": "x" * ((256 << 10) - 8)}))
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
                return found if isinstance(found, web.StreamResponse) else web.json_response(found)
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


def test_a_page_that_is_longer_than_asked_for_does_not_hold_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores wait for the index while a transaction goes on: what a cloud sends must not decide for how long."""
    good = [row(n, type="patient", id=f"x{n}") for n in range(1, 502)]
    page = {"records": [*good, *({} for _ in range(5000))], "next": 600, "newest": 600}
    feed(monkeypatch, lambda request: page if "after=0&" in request.path_qs else {"records": [], "next": 600})

    async def body(cloud: Cloud, node: Node) -> None:
        kept, keep = list[tuple[int, int, int]](), node.puller.records.keep

        def spied(url: str, rows: Any, after: int, refused: Any = ()) -> int:
            kept.append((len(rows), after, len(refused)))
            return keep(url, rows, after, refused)

        monkeypatch.setattr(node.puller.records, "keep", spied)
        assert await node.pull() == {Taken.unknown: 501}
        assert kept == [(200, 0, 0), (200, 0, 0), (101, 600, 200)]
        [event] = node.db.rows("SELECT text FROM events WHERE kind = 'record-refused'")
        assert event["text"].startswith("5000 records")
        assert await node.pull() == {}

    run(tmp_path, body)


def text_of(seq: int, data: bytes = b'{"n": 1}', version: bytes = b"1", more: bytes = b"") -> bytes:
    """A record as a cloud may send it that keeps texts as they came."""
    return (
        b'{"type": "limits", "id": "x%d", "version": %s, "key": "key%d", "node": "", "data": %s,'
        b' "changed_time": "2026-01-01T00:00:00Z", "settled": [], "seq": %d%s}' % (seq, version, seq, data, seq, more)
    )


UNREADABLE: dict[str, tuple[dict[str, bytes], str]] = {
    "deep": ({"data": b'{"n": ' + b"[" * 1200 + b"]" * 1200 + b"}"}, "nested too deeply"),
    "deep, and open": ({"data": b'{"n": ' + b"[" * 100_000 + b"}"}, "nested too deeply"),
    "just too deep": ({"data": b'{"n": ' + b"[" * 32 + b"]" * 32 + b"}"}, "nested more than 32 deep"),
    "a long number": ({"data": b'{"n": -' + b"9" * 5000 + b"}"}, "300 digits"),
    "a long version": ({"version": b"9" * 5000}, "above"),
    "no number": ({"data": b'{"n": NaN}'}, "no Unicode, or a number is none"),
    "infinite": ({"data": b'{"n": [-Infinity]}'}, "no Unicode, or a number is none"),
    "beyond doubles": ({"data": b'{"n": 1e999}'}, "no Unicode, or a number is none"),
    "a name twice": ({"data": b'{"n": {"a": 1, "a": 2}}'}, "a name twice"),
    "a field twice": ({"more": b', "node": "b"'}, "there twice"),
    "a surrogate": ({"data": b'{"n": "\\ud800"}'}, "no Unicode"),
    "no UTF-8": ({"data": b'{"n": "\xff\xfe"}'}, "no Unicode"),
    "no JSON": ({"data": b'{"n": }'}, "no JSON"),
    "another next": ({"data": b'{"n": }, "next": 900, "newest": 900}'}, "no JSON"),
    "many values": ({"data": b'{"n": [' + b"[]," * MOST_VALUES + b"0]}"}, f"more than {MOST_VALUES} values"),
    "no record": ({"version": b'"1"'}, "another type"),
}


def raw_feed(monkeypatch: pytest.MonkeyPatch, records: dict[int, bytes]) -> list[str]:
    """As the reference endpoint answers, but that its records are texts."""

    def page(request: web.Request) -> web.Response:
        after, limit = int(request.query["after"]), int(request.query["limit"])
        seqs = [n for n in sorted(records) if n > after][:limit]
        end = b'], "next": %d, "newest": %d}' % (seqs[-1] if seqs else after, max(records))
        return web.Response(
            body=b'{"records": [' + b", ".join(records[n] for n in seqs) + end, content_type="application/json"
        )

    return feed(monkeypatch, page)


def test_records_that_cannot_be_read_are_left_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {n: changed for n, changed in zip(range(30, 999, 15), UNREADABLE.values(), strict=False)}
    last = 3 * (max(bad) // 3 + 20)
    asked = raw_feed(monkeypatch, {n: text_of(n, **(bad[n][0] if n in bad else {})) for n in range(3, last + 1, 3)})

    async def body(cloud: Cloud, node: Node) -> None:
        node.set(*PREF, language="zh")
        await node.push()
        assert cloud.holds(*PREF) == {"language": "zh"}, "what goes out does not wait for what comes in"
        for _ in range(4):  # a run has an end, and goes on in the next one
            await node.pull()
        held = {r["cloud_id"] for r in node.db.rows("SELECT cloud_id FROM cloud_records")}
        assert held == {f"x{n}" for n in range(3, last + 1, 3) if n not in bad}, "all others, each once"
        left = {r["seq"]: r["why"] for r in node.reviews.refused() if "warnings" not in r["why"]}
        assert left.keys() == bad.keys()
        assert [n for n, (_, why) in bad.items() if why not in left[n]] == [], left
        assert node.puller.records.after(f"{cloud.url}/v1") == last and len(asked) < 25 * 4
        told = node.db.rows("SELECT text FROM events WHERE kind = 'record-refused' AND text LIKE '%first one%'")
        assert len(told) < len(bad) + 1 and all("records refused" in one["text"] for one in told)
        before = len(node.db.rows("SELECT id FROM events"))
        asked.clear()
        for _ in range(3):
            await node.pull()
        assert len(node.db.rows("SELECT id FROM events")) == before and len(asked) == 3, "told once, and no spinning"

    run(tmp_path, body)


def test_the_newest_record_alone_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is behind it, and it is changed at the cloud later."""
    records = {5: text_of(5, data=b'{"n": }')}
    raw_feed(monkeypatch, records)

    async def body(cloud: Cloud, node: Node) -> None:
        await node.pull()
        assert [r["seq"] for r in node.reviews.refused()] == [5]
        del records[5]
        records[7] = json.dumps(row(7, data={"language": "zh"})).encode()
        assert await node.pull() == {Taken.applied: 1}

    run(tmp_path, body)


def test_a_record_longer_than_a_page_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_records, "MAX_PAGE_BYTES", 1 << 18)
    long = text_of(2, data=b'{"n": "' + b"x" * (1 << 20) + b'"}')
    records = {1: text_of(1), 2: long, 3: json.dumps(row(3, data={"language": "zh"})).encode()}
    asked = raw_feed(monkeypatch, records)

    async def body(cloud: Cloud, node: Node) -> None:
        await node.pull()
        assert node.holds(*PREF) == {"language": "zh"} and len(asked) < 10
        assert [r["why"] for r in node.reviews.refused() if r["seq"] == 2] == [
            "the reply is not JSON as it has to be: it is longer than 0 MiB"
        ]
        monkeypatch.setattr(pull_records, "MOST_SKIPPED_BYTES", 1 << 19)
        records[4] = text_of(4, data=b'{"n": "' + b"x" * (1 << 20) + b'"}')
        with pytest.raises(PeerError, match="longer"):
            await node.pull()

    run(tmp_path, body)


@pytest.mark.parametrize("page", [b"<html>", b'{"records": [{"a": }]}', b'{"records": [{"a": }], "next": 0}', b"[}"])
def test_a_feed_that_says_nothing_of_where_it_ends_is_told_once(
    page: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [True]
    asked = feed(monkeypatch, lambda request: web.Response(body=page) if broken else None)

    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="zh")
        for _ in range(3):
            asked.clear()
            with pytest.raises(PeerError, match="not JSON"):
                await node.pull()
            assert len(asked) < 8, "the next look is that of the schedule"
        [event] = node.db.rows("SELECT * FROM events WHERE kind = 'record-feed'")
        assert event["severity"] == "error" and "cloud-api.yaml" in event["text"]
        assert node.puller.records.after(f"{cloud.url}/v1") == 0
        broken.clear()
        assert await node.pull() == {Taken.applied: 1}
        assert node.db.rows("SELECT severity FROM events WHERE kind = 'record-feed'")[-1]["severity"] == "info"

    run(tmp_path, body)


def test_a_damage_of_the_line_skips_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read once may be right the next time: only what is the same twice is left out."""
    texts = iter([b"1", b"2", b"3", b"4", b"5"])

    def page(request: web.Request) -> web.Response | None:
        text = next(texts, None)
        found = b'{"records": [{"a": %s }}], "next": 9, "newest": 9}' % (text or b"")
        return web.Response(body=found) if text else None

    feed(monkeypatch, page)

    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="zh")
        with pytest.raises(PeerError, match="not JSON"):
            await node.pull()
        assert await node.pull() == {Taken.applied: 1}
        assert node.reviews.refused() == []

    run(tmp_path, body)


def test_a_missing_record_that_cannot_be_read_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(request: web.Request) -> Any:
        if not request.path.endswith("dashboard"):
            return {"records": [], "next": 0}
        asked.append(request.path)
        return web.Response(body=b"[" * 1200 + b"]" * 1200)

    feed(monkeypatch, answer)

    async def body(cloud: Cloud, node: Node) -> None:
        node.set(*PREF, language="zh")
        with node.db.transaction():
            node.db.execute("UPDATE sync_items SET state = 'done', outcome = 'conflict'")
        for _ in range(3):
            await node.pull()
        assert len(asked) == 1
        assert [r["cloud_id"] for r in node.reviews.refused()] == ["dashboard"]

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


def test_what_is_refused_leaves_its_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MOST_KEPT", 3)

    async def body(cloud: Cloud, node: Node) -> None:
        records = node.puller.records
        records.keep("feed", [row(n, id=f"x{n}", data={"a": "b" * 9999}, settled=["k"]) for n in range(1, 9)], 8)
        assert records.take_all() == {Taken.refused: 8}
        held = node.db.rows("SELECT cloud_id, data, settled FROM cloud_records ORDER BY seq")
        assert [r["cloud_id"] for r in held] == ["x6", "x7", "x8"], "the newest"
        assert {(r["data"], r["settled"]) for r in held} == {("{}", "[]")}

    run(tmp_path, body)


def test_conflicts_that_no_person_decided_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MOST_KEPT", 2)

    async def body(cloud: Cloud, node: Node) -> None:
        blank: dict[str, Any] = dict.fromkeys(
            ("type", "record_id", "strategy", "outcome", "why", "fields", "keys", "edge_time", "edge_data",
             "cloud_time", "cloud_data", "cloud_node", "created_time"), "",
        )  # fmt: skip
        blank |= {"edge_version": 1, "cloud_version": 1, "common_version": 1, "created_at": 0.0}
        for who in ("cli:anna", "policy", None, "the cloud", "policy", "policy"):
            state = "decided" if who else "open"
            node.db.insert("record_conflicts", blank | {"state": state, "decided_by": who, "decided_as": "cloud"})
        node.puller.records.keep("feed", [row(1)], 1)
        node.puller.records.take_all()
        held = [r["id"] for r in node.db.rows("SELECT id FROM record_conflicts ORDER BY id")]
        assert held == [1, 3, 5, 6], "those of people and the open ones, and the newest two of others"

    run(tmp_path, body)


def test_a_page_is_decided_on_before_the_next_one_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []

    def pages(request: web.Request) -> Any:
        [node] = found
        waiting.append(int(node.db.value("SELECT count(*) FROM cloud_records WHERE state = 'new'") or 0))
        after = int(request.query["after"])
        rows = [row(after + n, id=f"x{after + n}") for n in (1, 2)] if after < 6 else []
        return {"records": rows, "next": after + len(rows)}

    asked, found = feed(monkeypatch, pages), list[Node]()

    async def body(cloud: Cloud, node: Node) -> None:
        found.append(node)
        assert await node.pull() == {Taken.refused: 6}
        assert waiting == [0, 0, 0, 0] and len(asked) == 4

    run(tmp_path, body)


def test_nothing_is_pulled_when_space_is_at_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = feed(monkeypatch, lambda request: None)

    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="zh")
        free = durable.free_bytes
        monkeypatch.setattr(durable, "free_bytes", lambda path: node.settings.node.reserve_mb << 20)
        assert await node.pull() == {} and asked == []
        monkeypatch.setattr(durable, "free_bytes", free)
        assert await node.pull() == {Taken.applied: 1}

    run(tmp_path, body)


def test_no_missing_record_starves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cloud may never have the first ones: the next call goes on behind them, and begins anew at the end."""
    monkeypatch.setattr(records_module, "MOST_MISSING", 2)

    async def body(cloud: Cloud, node: Node) -> None:
        for n in range(5):
            with node.db.transaction():
                put_record(node.db, node.settings.cloud_plan, "settings", f"s{n}", {"n": n})
        with node.db.transaction():
            node.db.execute("UPDATE sync_items SET state = 'done', outcome = 'conflict'")
        calls = [len(node.puller.records.missing()) for _ in range(4)]
        assert calls == [2, 2, 1, 2]
        assert len({one for _ in range(3) for one in node.puller.records.missing()}) == 5

    run(tmp_path, body)


@pytest.mark.parametrize("strategy", ["cloud", "merge", "review", "review there"])
def test_more_conflicting_versions_than_one_change_settles(tmp_path: Path, strategy: str) -> None:
    """Offline, one record was changed 120 times, and once at the cloud; a change names 100 keys at most."""

    async def body(cloud: Cloud, node: Node) -> None:
        node.clock.now -= 100.0
        node.set(*LIMIT, disk_free_mb=0)
        await node.exchange()
        await cloud.change(*LIMIT, disk_free_mb=2)
        for n in range(120):
            node.set(*LIMIT, open_reviews=n)
        await node.push()
        assert len(cloud.storage.conflicts("open", 999)) == 120
        for _ in range(3):
            await node.exchange()
        if strategy == "review there":
            for one in reversed(cloud.storage.conflicts("open", 999)):
                url = f"/v1/conflicts/{one['id']}/decide"
                async with cloud.client.post(url, json={"take": "edge"}) as answer:
                    assert answer.status == 200
            for _ in range(3):
                await node.exchange()
        if strategy == "review":
            [one] = node.reviews.listing(state="open")
            assert len(cloud.storage.conflicts("open", 999)) == 120
            node.reviews.decide(one["id"], "edge", who="EVE")
            for _ in range(3):
                await node.exchange()
        assert cloud.storage.conflicts("open", 999) == []
        assert node.holds(*LIMIT) == cloud.holds(*LIMIT)
        if strategy != "cloud":
            assert node.holds(*LIMIT)["open_reviews"] == 119
        assert len(node.reviews.listing()) == 1, "one conflict, not 120"
        arrived = len(cloud.storage.arrivals(9999))
        await node.exchange()
        assert len(cloud.storage.arrivals(9999)) == arrived, "and then there is nothing more to say"

    run(tmp_path, body, conflicts={"settings": strategy.partition(" ")[0]})
