"""A cloud of several hospitals: what a token may see and do, and what it never does, whatever it asks for."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
from aiohttp import ClientSession

from dicomnode.cloud import callers as callers_module
from dicomnode.cloud import schema
from dicomnode.cloud.callers import Caller, Callers, read_nodes
from dicomnode.cloud.run import run_cloud
from dicomnode.cloud.storage import Storage
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database
from dicomnode.index.record_reviews import Reviews, serving
from dicomnode.index.records import Taken
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.pull_records import RecordPuller
from dicomnode.sync.sender import CloudSender
from tests.cloud.endpoint import endpoint, multipart, record
from tests.sync.index_case import make_settings, secondary_capture

ADMIN, A, A2, B = (f"{name}-0123456789abcdef" for name in ("admin", "a", "a2", "b"))
TOKENS = {A: Caller("north", "CT-A"), A2: Caller("north", "CT-A2"), B: Caller("south", "CT-B")}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def callers(tmp_path: Path) -> AsyncIterator[tuple[dict[str, ClientSession], Storage, str]]:
    """A client for each token: admin, a and a2 of one site, b of another."""
    async with endpoint(tmp_path / "cloud", ADMIN, nodes=TOKENS) as (url, storage):
        tokens = {"admin": ADMIN, "a": A, "a2": A2, "b": B}
        clients = {name: ClientSession(url, headers=bearer(token)) for name, token in tokens.items()}
        try:
            yield clients, storage, url
        finally:
            for client in clients.values():
                await client.close()


async def get(client: ClientSession, path: str) -> tuple[int, Any]:
    async with client.get(path) as answer:
        kind = answer.headers.get("Content-Type", "")
        return answer.status, await answer.json() if "json" in kind else await answer.read()


async def call(client: ClientSession, method: str, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    async with client.request(method, path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


def test_a_node_never_sees_the_records_of_another_site(tmp_path: Path) -> None:
    async def main() -> None:
        async with callers(tmp_path) as (of, _, _):
            mine = record(1, data={"PatientID": "PSEUDO-A"})
            assert (await call(of["a"], "POST", "/v1/records", {"node": "CT-A", "records": [mine]}))[0] == 200
            for path in ("/v1/records", "/v1/records?after=0", "/v1/records?type=ai-result", "/v1/records?site=south"):
                status, page = await get(of["b"], path)
                assert status == 200 and page["records"] == [] and page["newest"] == 0, path
                assert (page["site"], page["node"]) == ("south", "CT-B")
            for path in ("/v1/records?site=north", "/v1/records/ai-result/r1?site=north"):
                status, refused = await get(of["b"], path)
                assert status == 403 and "another site" in refused["error"]["cause"]
            assert (await get(of["b"], "/v1/records/ai-result/r1"))[0] == 404
            # A neighbour of the same site does see it.
            status, page = await get(of["a2"], "/v1/records")
            assert [r["data"] for r in page["records"]] == [{"PatientID": "PSEUDO-A"}] and page["newest"] > 0
            status, page = await get(of["admin"], "/v1/records?site=north")
            assert [(r["site"], r["node"]) for r in page["records"]] == [("north", "CT-A")]

    asyncio.run(main())


def test_the_same_names_at_two_sites_are_two_things(tmp_path: Path) -> None:
    ds, content = secondary_capture()

    async def main() -> None:
        async with callers(tmp_path) as (of, storage, _):
            for who, node in (("a", "CT-A"), ("b", "CT-B")):
                one = record(1, data={"by": node})  # the same id and the same idempotency key
                status, said = await call(of[who], "POST", "/v1/records", {"node": node, "records": [one]})
                assert (status, said["outcomes"][0]["outcome"]) == (200, "stored")
                body = {"node": node, "version": node}
                assert (await call(of[who], "POST", "/v1/heartbeat", body)) == (200, {"generation": 0})
            assert (await get(of["a"], "/v1/records/ai-result/r1"))[1]["data"] == {"by": "CT-A"}
            assert (await get(of["b"], "/v1/records/ai-result/r1"))[1]["data"] == {"by": "CT-B"}
            changed = {"data": {"by": "somebody"}}
            path = "/v1/records/ai-result/r1?site=north"
            assert (await call(of["admin"], "PUT", path, changed, **{"If-Match": '"1"'}))[0] == 200
            assert (await get(of["b"], "/v1/records/ai-result/r1"))[1]["data"] == {"by": "CT-B"}

            data, headers = multipart([content])
            async with of["a"].post("/studies", data=data, headers=headers) as answer:
                assert answer.status == 200
            assert (await get(of["a2"], f"/v1/objects/{ds.SOPInstanceUID}")) == (200, content)
            assert (await get(of["b"], f"/v1/objects/{ds.SOPInstanceUID}"))[0] == 404
            other, headers = multipart([content[:-1] + b"\1"])
            async with of["b"].post("/studies", data=other, headers=headers) as answer:
                assert answer.status == 200, "another site's object with this UID says nothing about ours"
            assert storage.counts()["objects"] == 2

    asyncio.run(main())


def test_a_node_speaks_for_itself_alone_and_changes_nothing_of_the_cloud(tmp_path: Path) -> None:
    async def main() -> None:
        async with callers(tmp_path) as (of, _, url):
            desire = {"state": {"log_level": "debug"}}
            path = "/v1/nodes/CT-A/desired?site=north"
            assert await call(of["admin"], "PUT", path, desire) == (200, {"generation": 1})
            assert (await get(of["a"], "/v1/nodes/CT-A/desired"))[1]["generation"] == 1
            done = {"generation": 1, "applied": True}
            for who in ("a2", "b"):
                sent = {"node": "CT-A", "records": [record()]}
                assert (await call(of[who], "POST", "/v1/records", sent))[0] == 403
                assert (await call(of[who], "POST", "/v1/heartbeat", {"node": "CT-A"}))[0] == 403
                assert (await call(of[who], "POST", "/v1/nodes/CT-A/report", done))[0] == 403
                assert (await get(of[who], "/v1/nodes/CT-A/desired"))[0] == 403
            change = {"data": {}}
            for method, where, body in (
                ("PUT", "/v1/nodes/CT-A/desired", desire),
                ("PUT", "/v1/records/limits/warnings", change),
                ("POST", "/v1/conflicts/1/decide", {"take": "edge"}),
                ("GET", "/v1/conflicts", None),
                ("GET", "/v1/nodes", None),
                ("GET", "/", None),
            ):
                status, said = await call(of["a"], method, where, body, **{"If-Match": '"0"'})
                assert status == 403 and said["error"]["hint"], where
            async with ClientSession(url) as client, client.get("/v1/records", headers=bearer("x" * 20)) as answer:
                assert answer.status == 401

    asyncio.run(main())


def test_a_node_with_the_token_of_its_neighbour_takes_nothing(tmp_path: Path) -> None:
    """Preferences may begin at the cloud, so only the token tells whose they are."""

    def node(name: str, token: str, url: str) -> tuple[Database, RecordPuller, CloudSender, Reviews]:
        data, file = tmp_path / name, tmp_path / f"{name}.token"
        file.write_text(token)
        db = Database(data)
        cloud = {"stow_url": f"{url}/studies", "records_url": f"{url}/v1", "health_url": f"{url}/health"}
        settings = make_settings(
            data,
            node={"data_dir": data, "ae_title": name, "reserve_mb": 1},
            cloud={**cloud, "token_file": file},
        )
        endpoints, leaving = Endpoints(settings, db), Departures(settings, db)
        sender = CloudSender(settings, db, endpoints, leaving)
        return db, RecordPuller(settings, db, endpoints, leaving), sender, Reviews(db, settings.cloud_plan)

    async def main() -> None:
        async with callers(tmp_path) as (of, _, url):
            one, other = node("CT-A", A, url), node("CT-B", B, url)
            try:
                one[3].change("preferences", "dashboard", {"language": "zh"})
                await one[2].flush()
                assert (await get(of["a"], "/v1/records"))[1]["records"]
                assert await other[1].run_once() == {}, "nothing of the other site"
                (tmp_path / "CT-B.token").write_text(A)
                with pytest.raises(OperatorError, match="that of another node") as caught:
                    await other[1].run_once()
                assert "cloud.token_file" in caught.value.hint
                assert serving(other[0], "preferences", "dashboard") == {}
                (tmp_path / "CT-B.token").write_text(B)
                change = {"data": {"language": "en"}}
                path = "/v1/records/preferences/dashboard?site=south"
                assert (await call(of["admin"], "PUT", path, change, **{"If-Match": '"0"'}))[0] == 200
                assert await other[1].run_once() == {Taken.applied: 1}
                assert serving(other[0], "preferences", "dashboard") == {"language": "en"}
            finally:
                one[0].close()
                other[0].close()

    asyncio.run(main())


def test_tokens_come_from_a_folder_for_each_site(tmp_path: Path) -> None:
    for site, node, token in (("north", "CT-A", A), ("south", "CT-B", B)):
        (tmp_path / site).mkdir()
        (tmp_path / site / node).write_text(f"{token}\n")
    assert read_nodes(tmp_path) == {A: TOKENS[A], B: TOKENS[B]}
    (tmp_path / "south" / "CT-B").write_text(A)
    with pytest.raises(OperatorError, match="south/CT-B has the token of north/CT-A"):
        read_nodes(tmp_path)
    (tmp_path / "south" / "CT-B").write_text("short")
    with pytest.raises(OperatorError, match="16 characters"):
        read_nodes(tmp_path)
    with pytest.raises(OperatorError, match="there is none"):
        read_nodes(tmp_path / "north")
    (tmp_path / "south" / "CT-B").write_text(B)
    (tmp_path / "admin").write_text(B)
    with pytest.raises(OperatorError, match="also that of a node"):
        run_cloud(tmp_path / "cloud", "127.0.0.1", 0, token_file=tmp_path / "admin", nodes_dir=tmp_path)


def test_the_folder_of_tokens_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New, changed and removed files count without a restart; what is wrong with one hits no other."""
    monkeypatch.setattr(callers_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(callers_module, "UNKNOWN_SECONDS", 0.0)
    folder = tmp_path / "nodes"

    def put(site: str, node: str, token: str) -> None:
        (folder / site).mkdir(parents=True, exist_ok=True)
        (folder / site / node).write_text(token)

    async def main() -> None:
        put("north", "CT-A", A)
        nodes = read_nodes(folder)
        async with (
            endpoint(tmp_path / "cloud", ADMIN, nodes=nodes, nodes_dir=folder) as (url, _),
            ClientSession(url) as client,
        ):

            async def who(token: str) -> str:
                async with client.get("/v1/records", headers=bearer(token) if token else {}) as answer:
                    page = await answer.json()
                    return f"{page['site']}/{page['node']}" if answer.status == 200 else str(answer.status)

            assert (await who(A), await who(B), await who(ADMIN)) == ("north/CT-A", "401", "/")
            put("south", "CT-B", B)
            assert (await who(A), await who(B)) == ("north/CT-A", "south/CT-B"), "a new site"
            put("north", "CT-A", A2)
            assert (await who(A), await who(A2)) == ("401", "north/CT-A"), "another token, the same file"
            put("north", "CT-A2", A2)
            assert (await who(A2), await who(B)) == ("401", "south/CT-B"), "whose it is cannot be told"
            put("north", "CT-A2", "half")
            assert (await who(A2), await who("half")) == ("north/CT-A", "401")
            put("north", "CT-A2", ADMIN)
            assert (await who(ADMIN), await who(A2)) == ("/", "north/CT-A"), "and never a node's"
            (folder / "north" / "CT-A2").unlink()
            (folder / "north" / "CT-A").unlink()
            assert (await who(A2), await who(B)) == ("401", "south/CT-B")
            shutil.rmtree(folder)
            assert (await who(B), await who(""), await who(ADMIN)) == ("401", "401", "/"), "that opens nothing"

    asyncio.run(main())


def test_the_folder_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "CT-A").write_text(A)
    now, looks = [0.0], 0
    real = callers_module._stamps

    def counted(folder: Path) -> Any:
        nonlocal looks
        looks += 1
        return real(folder)

    monkeypatch.setattr(callers_module, "_stamps", counted)
    callers = Callers(None, {A: TOKENS[A]}, tmp_path, lambda: now[0])

    async def ask(token: str, times: int) -> int:
        before = looks
        for _ in range(times):
            now[0] += 0.015625
            await callers.follow(token)
        return looks - before

    assert asyncio.run(ask(A, 640)) == 10, "of one that is known, 10 seconds"
    assert 50 <= asyncio.run(ask(B, 640)) <= 100, "of one that is not"
    assert callers.find(A) == TOKENS[A] and callers.find(B) is None


def test_data_of_an_earlier_version_stays_and_belongs_to_no_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = apsw.Connection(str(tmp_path / "cloud.sqlite"))
    connection.execute(
        "CREATE TABLE records (type TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, node TEXT NOT NULL,"
        " study TEXT, data TEXT NOT NULL, changed_time TEXT NOT NULL, received_time TEXT NOT NULL,"
        " seq INTEGER NOT NULL, key TEXT NOT NULL DEFAULT '', PRIMARY KEY (type, id)) WITHOUT ROWID;"
        "CREATE UNIQUE INDEX records_seq ON records(seq);"
        "CREATE TABLE nodes (name TEXT PRIMARY KEY, heartbeat TEXT, heartbeat_time TEXT,"
        " generation INTEGER NOT NULL DEFAULT 0, desired TEXT, report TEXT, report_time TEXT) WITHOUT ROWID;"
        "INSERT INTO nodes (name, generation) VALUES ('OLD', 7);"
        "INSERT INTO records VALUES ('ai-result', 'r1', 3, 'OLD', NULL, '{\"a\": 1}', 't', 't', 5, 'k')"
    )
    connection.close()
    with monkeypatch.context() as broken:  # the process ends in the middle of it
        broken.setattr(schema, "_INDEXES", ("CREATE INDEX no_such ON nothing(x)",))
        with pytest.raises(apsw.SQLError):
            Storage(tmp_path, reserve_mb=1)
    for _ in range(2):  # and opening it again changes nothing
        storage = Storage(tmp_path, reserve_mb=1)
        assert [(r["site"], r["id"], r["version"]) for r in storage.feed(0, None, 9)] == [("", "r1", 3)]
        assert [(n["site"], n["name"], n["generation"]) for n in storage.nodes()] == [("", "OLD", 7)]
        storage.close()
