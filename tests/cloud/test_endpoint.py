"""The reference cloud endpoint over real HTTP."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
from aiohttp import ClientSession

from dicomnode import durable
from dicomnode.cloud import shapes
from dicomnode.cloud.application import make_app
from dicomnode.cloud.run import run_cloud
from dicomnode.cloud.storage import Storage
from dicomnode.errors import OperatorError
from tests.cloud.endpoint import endpoint, multipart, record
from tests.sync.index_case import secondary_capture

Body = Callable[[ClientSession, Storage], Awaitable[None]]


def drive(folder: Path, body: Body, token: str | None = None) -> None:
    async def main() -> None:
        async with endpoint(folder, token) as (url, storage), ClientSession(url) as client:
            await body(client, storage)

    asyncio.run(main())


async def stow(client: ClientSession, parts: list[bytes], path: str = "/studies", **how: Any) -> tuple[int, Any]:
    data, headers = multipart(parts, **how)
    async with client.post(path, data=data, headers=headers) as answer:
        return answer.status, json.loads(await answer.text())


def named(reply: dict[str, Any], tag: str) -> dict[str, int]:
    items = reply.get(tag, {}).get("Value", [])
    return {i["00081155"]["Value"][0]: i.get("00081197", {}).get("Value", [0])[0] for i in items if "00081155" in i}


def test_objects_are_durable_once_and_named(tmp_path: Path) -> None:
    (one, first), (two, second) = secondary_capture(), secondary_capture(400)

    async def body(client: ClientSession, storage: Storage) -> None:
        status, reply = await stow(client, [first, second])
        assert (status, set(named(reply, "00081199"))) == (200, {one.SOPInstanceUID, two.SOPInstanceUID})
        status, reply = await stow(client, [second])
        assert (status, set(named(reply, "00081199"))) == (200, {two.SOPInstanceUID})
        assert storage.counts()["objects"] == 2 and storage.counts()["repeated"] == 1
        for ds, data in ((one, first), (two, second)):
            path = storage.object_file(ds.SOPInstanceUID)
            assert path is not None and path.read_bytes() == data
            async with client.get(f"/v1/objects/{ds.SOPInstanceUID}") as answer:
                assert await answer.read() == data
        assert [a["name"] for a in storage.arrivals()] == [one.SOPInstanceUID, two.SOPInstanceUID]
        assert not list(storage.objects.root.rglob(f"*{durable.TEMPORARY_SUFFIX}"))

    drive(tmp_path, body)


def test_the_outcome_is_of_each_instance(tmp_path: Path) -> None:
    (one, first), (two, second), (three, third) = secondary_capture(), secondary_capture(), secondary_capture()

    async def body(client: ClientSession, storage: Storage) -> None:
        await stow(client, [first])
        changed = first[:-1] + b"\1"
        status, reply = await stow(client, [changed, second, b"this is not DICOM"])
        assert status == 202
        assert named(reply, "00081198") == {one.SOPInstanceUID: 0x0111}
        assert set(named(reply, "00081199")) == {two.SOPInstanceUID}
        assert len(reply["0008119A"]["Value"]) == 1
        kept = storage.object_file(one.SOPInstanceUID)
        assert kept is not None and kept.read_bytes() == first, "the first stays"
        status, reply = await stow(client, [third], f"/studies/{one.StudyInstanceUID}")
        assert (status, named(reply, "00081198")) == (409, {three.SOPInstanceUID: 0xA900})
        assert (await stow(client, [third], kind="text/plain"))[0] == 409

    drive(tmp_path, body)


def test_a_body_that_breaks_off_keeps_what_was_whole(tmp_path: Path) -> None:
    (one, first), (_, second) = secondary_capture(), secondary_capture(64)
    data, headers = multipart([first, second])

    async def body(client: ClientSession, storage: Storage) -> None:
        assert client._base_url is not None
        _, writer = await asyncio.open_connection(client._base_url.host, client._base_url.port)
        head = f"POST /studies HTTP/1.1\r\nHost: localhost\r\nContent-Type: {headers['Content-Type']}\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(first) + 300])
        async with asyncio.timeout(30):
            for at in range(len(first) + 300, len(data) - 500, 100):
                writer.write(data[at : at + 100])
                await asyncio.sleep(0.01)
                if len(list(storage.objects.root.rglob(f"*{durable.TEMPORARY_SUFFIX}"))) == 2:
                    break
            writer.close()
            while storage.counts()["objects"] == 0:
                await asyncio.sleep(0.01)
        assert [a["name"] for a in storage.arrivals()] == [one.SOPInstanceUID]
        assert not list(storage.objects.root.rglob(f"*{durable.TEMPORARY_SUFFIX}"))

    drive(tmp_path, body)


def test_bad_bodies_are_refused(tmp_path: Path) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        for data, kind, status in (
            (b"{}", "application/json", 415),
            (b"nonsense", "multipart/related", 400),
            (b"nonsense", "multipart/related; boundary=x", 400),
            (b"--x--\r\n", "multipart/related; boundary=x", 400),
        ):
            async with client.post("/studies", data=data, headers={"Content-Type": kind}) as answer:
                assert answer.status == status
                assert (await answer.json())["error"]["cause"]

    drive(tmp_path, body)


def test_a_full_disk_is_told_and_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = secondary_capture()

    async def body(client: ClientSession, storage: Storage) -> None:
        monkeypatch.setattr(storage, "reserve_bytes", 1 << 60)
        assert (await stow(client, [data]))[0] == 507
        assert storage.counts()["objects"] == 0

    drive(tmp_path, body)


async def send(client: ClientSession, *records: dict[str, Any], status: int = 200) -> list[str]:
    async with client.post("/v1/records", json={"node": "n1", "records": list(records)}) as answer:
        assert answer.status == status, await answer.text()
        found = await answer.json()
    return [o["outcome"] for o in found["outcomes"]] if status == 200 else [found["error"]["cause"]]


def test_a_record_has_its_effect_once(tmp_path: Path) -> None:
    async def body(client: ClientSession, storage: Storage) -> None:
        second = record(2, version=2, base_version=1, data={"volume_ml": 2})
        assert await send(client, record(), second) == ["stored", "stored"]
        assert await send(client, record(), second) == ["duplicate", "duplicate"]
        assert await send(client, record(data={"volume_ml": 9})) == ["rejected"], "a used key"
        async with client.get("/v1/records/ai-result/r1") as answer:
            row = await answer.json()
            assert (row["version"], row["data"], answer.headers["ETag"]) == (2, {"volume_ml": 2}, '"2"')
        assert [a["name"] for a in storage.arrivals()] == ["ai-result/r1/1", "ai-result/r1/2"]

    drive(tmp_path, body)


def test_a_change_of_both_sides_is_a_conflict_that_is_decided(tmp_path: Path) -> None:
    async def body(client: ClientSession, storage: Storage) -> None:
        await send(client, record())
        async with client.put(
            "/v1/records/ai-result/r1", json={"data": {"volume_ml": 7}}, headers={"If-Match": '"1"'}
        ) as answer:
            assert (await answer.json())["version"] == 2
        async with client.put("/v1/records/ai-result/r1", json={"data": {}}, headers={"If-Match": '"1"'}) as answer:
            assert answer.status == 412
        edge = record(3, version=2, base_version=1, data={"volume_ml": 8})
        assert await send(client, edge) == ["conflict"]
        assert await send(client, edge) == ["duplicate"]
        async with client.get("/v1/conflicts?state=open") as answer:
            [conflict] = (await answer.json())["conflicts"]
        assert (conflict["cloud_data"], conflict["edge_data"]) == ({"volume_ml": 7}, {"volume_ml": 8})
        assert storage.record("ai-result", "r1")["data"] == {"volume_ml": 7}, "the cloud's serves"  # type: ignore[index]
        async with client.post(f"/v1/conflicts/{conflict['id']}/decide", json={"take": "edge"}) as answer:
            decided = await answer.json()
        assert (decided["version"], decided["data"], decided["node"]) == (3, {"volume_ml": 8}, "")
        async with client.post(f"/v1/conflicts/{conflict['id']}/decide", json={"take": "edge"}) as answer:
            assert answer.status == 404
        async with client.get("/v1/records?after=1&type=ai-result") as answer:
            page = await answer.json()
        assert [r["version"] for r in page["records"]] == [3] and page["next"] == 3

    drive(tmp_path, body)


def test_two_branches_with_the_same_numbers_are_told_apart(tmp_path: Path) -> None:
    """Versions alone would let the second change of a node through, on a version that another end made."""

    async def body(client: ClientSession, storage: Storage) -> None:
        first = record(1)
        assert await send(client, first) == ["stored"]
        async with client.put(
            "/v1/records/ai-result/r1", json={"data": {"at": "cloud"}}, headers={"If-Match": '"1"'}
        ) as answer:
            theirs = await answer.json()
        assert theirs["version"] == 2 and theirs["key"] != first["idempotency_key"]
        second = record(2, version=2, base_version=1, base_key=first["idempotency_key"], data={"at": "edge"})
        third = record(3, version=3, base_version=2, base_key=second["idempotency_key"], data={"at": "edge 2"})
        fourth = record(4, version=4, base_version=3, base_key=third["idempotency_key"], data={"at": "edge 3"})
        assert await send(client, second, third, fourth) == ["conflict"] * 3
        assert storage.record("ai-result", "r1")["data"] == {"at": "cloud"}  # type: ignore[index]
        assert storage.counts()["conflicts"] == 3
        keys = [r["idempotency_key"] for r in (second, third, fourth)]
        decided = record(5, version=5, base_version=2, base_key=theirs["key"], settles=keys, data={"at": "edge 3"})
        assert await send(client, decided, decided) == ["stored", "duplicate"]
        row = storage.record("ai-result", "r1")
        assert row is not None and (row["version"], row["key"]) == (5, decided["idempotency_key"])
        assert row["settled"] == keys
        assert [c["state"] for c in storage.conflicts(None, 10)] == ["edge", "merged", "merged"]

    drive(tmp_path, body)


def test_a_decision_at_the_cloud_is_seen_by_nodes_whatever_it_was(tmp_path: Path) -> None:
    async def body(client: ClientSession, storage: Storage) -> None:
        await send(client, record(1))
        await client.put("/v1/records/ai-result/r1", json={"data": {"at": "cloud"}}, headers={"If-Match": '"1"'})
        edge = record(2, version=2, base_version=1, data={"at": "edge"})
        assert await send(client, edge) == ["conflict"]
        async with client.post("/v1/conflicts/1/decide", json={"take": "cloud"}) as answer:
            decided = await answer.json()
        assert (decided["version"], decided["data"]) == (3, {"at": "cloud"})
        assert decided["settled"] == [edge["idempotency_key"]]
        assert [r["seq"] for r in storage.feed(2, None, 10)] == [decided["seq"]]

    drive(tmp_path, body)


def test_the_storage_of_an_earlier_version_gets_its_columns(tmp_path: Path) -> None:
    Storage(tmp_path, reserve_mb=1).close()
    connection = apsw.Connection(str(tmp_path / "cloud.sqlite"))
    connection.execute("DROP INDEX conflicts_record")
    for table in ("records", "conflicts"):
        connection.execute(f"ALTER TABLE {table} DROP COLUMN key")
    connection.close()
    storage = Storage(tmp_path, reserve_mb=1)
    assert storage.add_record("n1", record())["outcome"] == "stored"
    storage.close()


WRONG: tuple[dict[str, Any], ...] = (
    {"version": 0},
    {"version": True},
    {"version": 1, "base_version": 1},
    {"type": "AI"},
    {"id": "../x"},
    {"changed_time": "2026-11-29T03:00:00"},
    {"data": []},
    {"data": {"x": "y" * shapes.MAX_DATA_BYTES}},
    {"study": "patient"},
    {"base_key": "x"},
    {"settles": ["x"]},
    {"colour": "red"},
)


def test_a_wrong_record_is_refused_alone(tmp_path: Path) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        records = [record(n, id=f"r{n}") | wrong for n, wrong in enumerate(WRONG)]
        assert await send(client, *records, record(99)) == [*["rejected"] * len(WRONG), "stored"]

    drive(tmp_path, body)


def test_a_wrong_batch_is_refused_whole(tmp_path: Path) -> None:
    async def body(client: ClientSession, storage: Storage) -> None:
        for data in (
            b"{",
            b"[]",
            b"{}",
            b'{"node": "n", "records": []}',
            b'{"node": "n", "records": [1]}',
            b"[" * 9999,
        ):
            async with client.post("/v1/records", data=data) as answer:
                assert answer.status == 400
        assert storage.counts()["records"] == 0

    drive(tmp_path, body)


AMBIGUOUS = {
    "33 deep": b"[" * 32 + b"]" * 32,
    "1,200 deep": b"[" * 1200 + b"]" * 1200,
    "a number of 5,000 digits": b"9" * 5000,
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "beyond doubles": b"1e999",
    "a lone surrogate": b'"\\ud800"',
    "no UTF-8": b'"\xff"',
    "a name twice": b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_nodes_could_not_read_does_not_come_in(name: str, tmp_path: Path) -> None:
    """Of a node or of the cloud's own people, since all other nodes get it; see config/cloud-api.yaml."""
    value = b'{"n": ' + AMBIGUOUS[name] + b"}"

    async def body(client: ClientSession, storage: Storage) -> None:
        texts = [json.dumps(record(n, id=f"r{n}", data={"n": 0})).encode() for n in (1, 2)]
        batch = b'{"node": "n", "records": [%s, %s]}' % (texts[0].replace(b'{"n": 0}', value), texts[1])
        async with client.post("/v1/records", data=batch) as answer:
            if answer.status == 200:
                first, second = [o["outcome"] for o in (await answer.json())["outcomes"]]
                assert (first, second) == ("rejected", "stored")
            else:
                assert answer.status == 400, "it cannot be told which record it is in; a node sends them one by one"
        for path, inner in (
            ("/v1/records/limits/warnings", b'{"data": %s}'),
            ("/v1/nodes/n1/desired", b'{"state": %s}'),
        ):
            async with client.put(path, data=inner % value, headers={"If-Match": '"0"'}) as answer:
                assert answer.status == 400 and "cloud-api.yaml" in await answer.text()
        assert storage.record("ai-result", "r1") is None and storage.record("limits", "warnings") is None
        assert storage.nodes() == []
        async with client.put("/v1/records/limits/warnings", data=b'{"data": {}, "data": {"a": 1}}',
                              headers={"If-Match": '"0"'}) as answer:  # fmt: skip
            assert answer.status == 400

    drive(tmp_path, body)


def test_heartbeat_desired_state_and_report(tmp_path: Path) -> None:
    async def body(client: ClientSession, storage: Storage) -> None:
        async with client.post("/v1/heartbeat", json={"node": "n1", "version": "0.1.0"}) as answer:
            assert await answer.json() == {"generation": 0}
        async with client.get("/v1/nodes/n1/desired") as answer:
            assert answer.status == 404
        async with client.put("/v1/nodes/n1/desired", json={"state": {"log_level": "debug"}}) as answer:
            assert await answer.json() == {"generation": 1}
        async with client.get("/v1/nodes/n1/desired") as answer:
            assert await answer.json() == {"generation": 1, "state": {"log_level": "debug"}}
            tag = answer.headers["ETag"]
        async with client.get("/v1/nodes/n1/desired", headers={"If-None-Match": tag}) as answer:
            assert answer.status == 304
        async with client.post(
            "/v1/nodes/n1/report", json={"generation": 1, "applied": False, "reason": "no"}
        ) as answer:
            assert answer.status == 200
        async with client.post("/v1/nodes/n2/report", json={"generation": 1, "applied": True}) as answer:
            assert answer.status == 404
        assert storage.nodes()[0]["report"] == {"generation": 1, "applied": False, "reason": "no"}

    drive(tmp_path, body)


def test_the_page_shows_what_arrived_and_escapes_it(tmp_path: Path) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        ds, data = secondary_capture()
        await stow(client, [data])
        await send(client, record(data={"text": "<script>alert(1)</script>"}))
        async with client.get("/") as answer:
            text = await answer.text()
            assert "script-src" not in answer.headers["Content-Security-Policy"]
        assert ds.SOPInstanceUID in text and "ai-result" in text
        assert "<script" not in text and "&lt;script" in text

    drive(tmp_path, body)


def test_only_who_has_the_token_is_served(tmp_path: Path) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401),
                                ({"Authorization": "Bearer 0123456789abcdef"}, 200)):  # fmt: skip
            async with client.get("/v1/records", headers=headers) as answer:
                assert answer.status == status
        async with client.get("/health") as answer:
            assert answer.status == 200

    drive(tmp_path, body, "0123456789abcdef")


def test_without_a_token_no_page_of_another_site_gets_in(tmp_path: Path) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            async with client.get("/v1/records", headers=headers) as answer:
                assert answer.status == 403

    drive(tmp_path, body)
    with pytest.raises(OperatorError, match="no token"):
        run_cloud(tmp_path, "0.0.0.0", 0)


def test_routes_and_the_description_agree(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "config" / "cloud-api.yaml").read_text(encoding="utf-8")
    described: set[tuple[str, str]] = set()
    path = ""
    for line in document.partition("\npaths:\n")[2].partition("\ncomponents:\n")[0].splitlines():
        if match := re.fullmatch(r"  (/\S*):", line):
            path = match[1]
        elif match := re.fullmatch(r"    (get|post|put):(?: &\w+)?", line):
            described.add((match[1].upper(), path))
    storage = Storage(tmp_path)
    routes = {
        (route.method, re.sub(r"\{(\w+):[^{}]*(?:\{[^}]*\})?[^}]*\}", r"{\1}", route.resource.canonical))
        for route in make_app(storage).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    storage.close()
    assert routes == described
