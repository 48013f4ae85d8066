"""The admin application over real HTTP: answers, refusals, headers, no patient data."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, TCPConnector
from aiohttp.test_utils import TestServer

from dicomnode import metrics
from dicomnode.admin.application import make_app
from dicomnode.admin.ready import check_models
from dicomnode.admin.status import status_report
from dicomnode.commitment import Reference, Request
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.notices import make_notices
from dicomnode.index.operation import Events, Models, Processes
from dicomnode.index.outbox import Outbox
from dicomnode.index.promises import Promises
from dicomnode.infer.placement import Candidate, Weights, decide
from dicomnode.settings import Settings
from tests.index.rows import instance, outcome, select
from tests.sync.index_case import CANARY, FakeClock, add_job, add_results, make_settings, states

PACS = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 11199, "allow": ["echo"]}
RULE = {"name": "chest", "match": {"Modality": "CT"}, "models": ["ct-lung"], "send_to": ["pacs"]}
XSS = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
CHANGE = {"X-Dicomnode": "1"}

Body = Callable[[ClientSession], Awaitable[None]]


def node(tmp_path: Path, **sections: Any) -> Settings:
    return make_settings(tmp_path, **{"peers": [PACS], "rules": [RULE], "dimse": {"workers": 1}, **sections})


def drive(db: Database, settings: Settings, body: Body) -> None:
    async def main() -> None:
        async with (
            TestServer(make_app(db, settings), host="127.0.0.1") as server,
            ClientSession(server.make_url("/"), connector=TCPConnector(force_close=True)) as client,
        ):
            await body(client)

    asyncio.run(main())


def populate(db: Database, tmp_path: Path) -> int:
    """One finished job with results, one refused; returns the refused one's id."""
    add_results(db, tmp_path, 2, destinations=("pacs",))
    refused = add_job(db, tmp_path, reason=XSS)
    leased = Jobs(db).lease("worker", 60)
    assert leased is not None
    Jobs(db).refuse(refused, "worker", f"GAP: {XSS}")
    outbox = Outbox(db, "deliveries")
    [first, *_] = outbox.lease("pacs", "courier", 60, 1)
    outbox.reject(first["id"], "courier", XSS)
    Events(db).add("error", XSS, XSS, XSS)
    Models(db).activate("ct-lung", "1.0.0")
    Processes(db).beat(
        "worker", "ready", {"models": {"ready": {}, "failed": {"ct-lung": XSS}}}, metrics.snapshot()
    )  # fmt: skip
    return refused


ALL_PAGES = [
    "/", "/?lang=zh", "/health", "/ready", "/metrics", "/api/v1/status", "/api/v1/jobs", "/api/v1/jobs/1",
    "/api/v1/deliveries", "/api/v1/commitments", "/api/v1/notifications", "/api/v1/sync",
    "/static/style.css", "/static/app.js", "/nothing", "/api/v1/jobs/99",
]  # fmt: skip


def test_no_page_carries_patient_data_and_all_have_the_headers(db: Database, tmp_path: Path) -> None:
    populate(db, tmp_path)

    async def body(client: ClientSession) -> None:
        for page in ALL_PAGES:
            async with client.get(page) as answer:
                text = await answer.text()
                assert "CANARY" not in text, page
                assert CANARY not in text
                assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
                assert "unsafe" not in answer.headers["Content-Security-Policy"]
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Cache-Control"] == "no-store"
                assert "Server" not in answer.headers
                assert str(tmp_path) not in text, "paths of this machine stay here"

    drive(db, node(tmp_path), body)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_stored_strings_are_text_on_the_dashboard(db: Database, tmp_path: Path, lang: str) -> None:
    populate(db, tmp_path)
    uids = [r["StudyInstanceUID"] for r in db.rows("SELECT StudyInstanceUID FROM studies")]

    async def body(client: ClientSession) -> None:
        async with client.get("/", params={"lang": lang}) as answer:
            text = await answer.text()
            assert answer.status == 200
        assert "&lt;script&gt;" in text
        assert re.findall(r"<script[^>]*>", text) == ['<script src="/static/app.js" defer>']
        assert not re.search(r"<img|\son\w+=|style=|<style|javascript:", text.replace("&lt;img src=x onerror=", ""))
        assert not any(uid in text for uid in uids), "studies appear by a hash"

    drive(db, node(tmp_path), body)


@pytest.mark.parametrize(
    ("lang", "words"),
    [
        (
            "en",
            (
                "Engine or place",
                "locality 0.70",
                ": chosen",
                "out of the question, load 95% is above 90%",
                ": failed, ",
            ),
        ),
        ("zh", ("引擎或执行位置", "数据就近 0.70", ": 已选择", "不可用, load 95% is above 90%", ": 失败, ")),
    ],
)
def test_the_dashboard_says_where_a_job_was_done_and_with_which_scores(
    db: Database, tmp_path: Path, lang: str, words: tuple[str, ...]
) -> None:
    places = [Candidate("gpu0", 0.7, 1.0, 0.1, 0.2), Candidate("local", 1.0, 0.5, 0.95, 0.0)]
    decision = {**decide(places, Weights(), 0.9).as_dict(), "tried": [{"name": "gpu1", "cause": "HTTP 503"}]}
    Catalogue(db).commit([instance()])
    [job_id] = select(db, "1.2.20")
    jobs = Jobs(db)
    assert jobs.lease("w", 60) is not None
    jobs.place(job_id, "w", decision)
    made = outcome()
    jobs.finish(job_id, "w", replace(made, summary={**made.summary, "engine": "kserve gpu0"}))
    [row] = jobs.listing()
    assert (row["engine"], row["placement"]) == ("kserve gpu0", decision)

    async def body(client: ClientSession) -> None:
        async with client.get("/", params={"lang": lang}) as answer:
            text = html.unescape(await answer.text())
        assert "<summary>gpu0<small> kserve gpu0</small></summary>" in text and "0.840 (" in text and "HTTP 503" in text
        for found in words:
            assert found in text, found

    drive(db, node(tmp_path), body)


def test_language(db: Database, tmp_path: Path) -> None:
    async def body(client: ClientSession) -> None:
        for params, accept, expected in [
            ({}, "", "en"),
            ({}, "zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
            ({}, "en-US,zh;q=0.5", "en"),
            ({}, "fr,zh;q=0.2", "zh-CN"),
            ({}, "zh;q=oops", "en"),
            ({"lang": "zh"}, "en", "zh-CN"),
            ({"lang": "'\"><script>"}, "", "en"),
        ]:
            async with client.get("/", params=params, headers={"Accept-Language": accept}) as answer:
                assert f'<html lang="{expected}">' in await answer.text()

    drive(db, node(tmp_path), body)


def test_ready_needs_receiver_port_worker_and_disk(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    seen: list[tuple[int, set[str]]] = []

    async def look(settings: Settings) -> None:
        async with (
            TestServer(make_app(db, settings), host="127.0.0.1") as server,
            ClientSession() as client,
            client.get(server.make_url("/ready")) as answer,
        ):
            found = await answer.json()
            assert found["ready"] is (answer.status == 200)
            seen.append((answer.status, {k for k, c in found["checks"].items() if not c["ok"]}))

    async def main() -> None:
        receiver = await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", 0)
        port = receiver.sockets[0].getsockname()[1]
        settings = node(
            tmp_path,
            dimse={"workers": 1, "host": "127.0.0.1", "port": 0},
            cloud={"stow_url": "https://away.invalid/studies"},
        )
        await look(settings)
        Processes(db).beat("receiver", "ready", {"port": port})
        await look(settings)
        Processes(db).beat("receiver-1", "ready", {"port": port})
        await look(settings)
        ready = {"ct-lung": {"name": "ct-lung", "version": "1.0.0", "engine": "onnxruntime-cpu"}}
        Processes(db).beat("worker", "ready", {"models": {"ready": ready, "failed": {}}})
        await look(settings)
        full = settings.model_copy(update={"node": settings.node.model_copy(update={"reserve_mb": 1 << 40})})
        await look(full)
        clock.now += 60
        await look(settings)
        clock.now -= 60
        receiver.close()
        await receiver.wait_closed()
        await look(settings)

    asyncio.run(main())
    assert seen == [
        (503, {"receivers", "dimse", "models"}),
        (503, {"receivers", "dimse", "models"}),
        (503, {"models"}),
        (200, set()),
        (503, {"disk"}),
        (503, {"receivers", "dimse", "models"}),
        (503, {"dimse"}),
    ]


def test_builds_and_rejected_engines_show_in_status_and_ready(db: Database, tmp_path: Path) -> None:
    ready = {
        "ct-lung": {
            "name": "ct-lung",
            "version": "1.0.0",
            "engine": "onnxruntime-gpu 1.31.1",
            "rejected": ["tensorrt fp16 GOLDEN_MISMATCH: 3 % of the voxels"],
        }
    }
    building = {"ct-lung@1.0.0": {"step": "Building Engine", "share": 0.42, "seconds": 90}}
    detail = {
        "engines_rejected": {"tensorrt": "LIB_MISSING: not installed"},
        "models": {"ready": ready, "failed": {}, "building": building},
    }
    Processes(db).beat("worker", "ready", detail)
    models = status_report(db, node(tmp_path))["models"]
    assert models["building"] == building
    assert models["engines_rejected"] == {
        "ct-lung on tensorrt fp16": "GOLDEN_MISMATCH: 3 % of the voxels",
        "tensorrt": "LIB_MISSING: not installed",
    }
    told = check_models(Processes(db).listing(), frozenset(["ct-lung"]))
    assert told.ok and "ct-lung 1.0.0 (onnxruntime-gpu 1.31.1)" in told.detail
    assert "ct-lung@1.0.0: Building Engine 42%" in told.detail and "GOLDEN_MISMATCH" in told.detail


def test_an_index_that_does_not_answer_is_un_ready(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import apsw

    def broken() -> None:
        raise apsw.BusyError("locked")

    monkeypatch.setattr(db, "remember_time", broken)

    async def body(client: ClientSession) -> None:
        async with client.get("/ready") as answer:
            assert answer.status == 503
            assert (await answer.json())["checks"]["index"]["ok"] is False
        async with client.get("/health") as answer:
            assert answer.status == 200

    drive(db, node(tmp_path), body)


def test_retry_of_jobs_and_deliveries(db: Database, tmp_path: Path) -> None:
    job = populate(db, tmp_path)

    async def body(client: ClientSession) -> None:
        async def post(path: str) -> int:
            async with client.post(path, headers=CHANGE) as answer:
                return answer.status

        assert await post(f"/api/v1/jobs/{job}/retry") == 202
        assert Jobs(db).counts()["pending"] == 1
        assert await post(f"/api/v1/jobs/{job}/retry") == 409
        assert await post("/api/v1/jobs/99/retry") == 404
        assert await post("/api/v1/jobs/abc/retry") == 404
        assert states(db, "deliveries") == ["rejected", "pending"]
        assert await post("/api/v1/deliveries/1/retry") == 202
        assert states(db, "deliveries") == ["pending", "pending"]
        assert await post("/api/v1/deliveries/99/retry") == 404
        assert await post("/api/v1/sync/1/retry") == 202
        assert await post("/api/v1/status") == 405

    drive(db, node(tmp_path), body)


def test_commitments_are_shown_and_retried(db: Database, tmp_path: Path) -> None:
    promise = Promises(db).receive("ct1", Request("1.2.77", (Reference("1.2.1", "1.2.88"),)), "r", 60)
    assert promise is not None
    Promises(db).reject(promise.id, "r", XSS)

    async def body(client: ClientSession) -> None:
        async with client.get("/api/v1/commitments?state=rejected") as answer:
            text = await answer.text()
            (row,) = json.loads(text)["commitments"]
            assert (row["role"], row["peer"], row["TransactionUID"], row["instances"]) == ("scp", "ct1", "1.2.77", 1)
            assert "1.2.88" not in text and "lease_owner" not in row
        async with client.get("/api/v1/commitments?state=oops") as answer:
            assert answer.status == 400
        for language, words in (("en", ("Commitment", "by ct1")), ("zh", ("存储确认", "来自 ct1"))):
            async with client.get(f"/?lang={language}") as answer:
                page = await answer.text()
                assert all(w in page for w in words) and f"/api/v1/commitments/{row['id']}/retry" in page
                assert XSS not in page
        async with client.get("/metrics") as answer:
            found = await answer.text()
            assert 'dicomnode_queue_commitments{peer="ct1",role="scp",state="rejected"} 1.0' in found
            assert 'dicomnode_queue_oldest_commitment_seconds{peer="ct1",role="scp"} 0.0' in found
        async with client.post(f"/api/v1/commitments/{row['id']}/retry", headers=CHANGE) as answer:
            assert (answer.status, (await answer.json())["state"]) == (202, "pending")
        async with client.post("/api/v1/commitments/99/retry", headers=CHANGE) as answer:
            assert answer.status == 404
        async with client.get("/api/v1/status") as answer:
            assert (await answer.json())["commitments"]["scp"]["pending"] == 1

    drive(db, node(tmp_path), body)


def test_notifications_are_shown_and_retried(db: Database, tmp_path: Path) -> None:
    job_id = add_job(db, tmp_path)
    with db.transaction():
        for study in db.rows("SELECT id FROM studies"):
            make_notices(
                db, job_id=job_id, study_id=study["id"], results={1: "1.2"}, notify=("ris",), destinations=("pacs",)
            )
        db.execute("UPDATE notifications SET state = 'rejected', last_error = ?", (XSS,))

    async def body(client: ClientSession) -> None:
        async with client.get("/api/v1/notifications?state=rejected") as answer:
            (row,) = (await answer.json())["notifications"]
            assert (row["destination"], row["retrieve_from"]) == ("ris", "pacs") and "lease_owner" not in row
        async with client.get("/api/v1/notifications?state=oops") as answer:
            assert answer.status == 400
        async with client.get("/") as answer:
            text = await answer.text()
            assert "Notifications (IAN)" in text and f"/api/v1/notifications/{row['id']}/retry" in text
        async with client.post(f"/api/v1/notifications/{row['id']}/retry", headers=CHANGE) as answer:
            assert (answer.status, (await answer.json())["state"]) == (202, "waiting")
        async with client.post("/api/v1/notifications/99/retry", headers=CHANGE) as answer:
            assert answer.status == 404
        async with client.get("/api/v1/status") as answer:
            status = await answer.json()
            assert status["notifications"]["waiting"] == 1 and set(status["procedure_steps"].values()) == {0}
        async with client.get("/metrics") as answer:
            assert 'dicomnode_queue_notifications{destination="ris",state="waiting"} 1.0' in await answer.text()

    drive(db, node(tmp_path), body)


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {}, 403),
        ("127.0.0.1", {"X-Dicomnode": "1", "Origin": "http://evil.example"}, 403),
        ("127.0.0.1", {"X-Dicomnode": "1", "Origin": "null"}, 403),
        ("127.0.0.1", {"X-Dicomnode": "1", "Sec-Fetch-Site": "cross-site"}, 403),
        ("127.0.0.1", {"X-Dicomnode": "1", "X-Forwarded-For": "10.0.0.1"}, 403),
        ("127.0.0.1", {"X-Dicomnode": "1", "Host": "evil.example"}, 421),
        ("127.0.0.1", {"X-Dicomnode": "1", "Host": "127.0.0.1.evil.example"}, 421),
        ("127.0.0.1", {"X-Dicomnode": "1", "Host": "["}, 421),
        ("0.0.0.0", {"X-Dicomnode": "1"}, 403),
        ("node.hospital.example", {"X-Dicomnode": "1"}, 403),
        ("localhost", {"X-Dicomnode": "1"}, 202),
        ("127.0.0.1", {"X-Dicomnode": "1", "Sec-Fetch-Site": "same-origin"}, 202),
    ],
)
def test_who_may_change(db: Database, tmp_path: Path, host: str, headers: dict[str, str], status: int) -> None:
    job = populate(db, tmp_path)

    async def body(client: ClientSession) -> None:
        async with client.post(f"/api/v1/jobs/{job}/retry", headers=headers) as answer:
            assert answer.status == status, await answer.text()
            if status != 202:
                assert (await answer.json())["error"]["hint"]

    drive(db, node(tmp_path, http={"host": host, "port": 0}), body)
    assert Jobs(db).counts()["refused"] == (0 if status == 202 else 1)


def test_dns_rebinding_cannot_read(db: Database, tmp_path: Path) -> None:
    async def body(client: ClientSession) -> None:
        for page in ("/", "/metrics", "/api/v1/jobs"):
            async with client.get(page, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 421

    drive(db, node(tmp_path), body)


def test_off_loopback_the_page_has_no_buttons_and_no_script(db: Database, tmp_path: Path) -> None:
    populate(db, tmp_path)

    async def body(client: ClientSession) -> None:
        async with client.get("/", headers={"Host": "node.hospital.example"}) as answer:
            text = await answer.text()
            assert answer.status == 200
            assert "<button" not in text
            assert "<script" not in text

    drive(db, node(tmp_path, http={"host": "0.0.0.0", "port": 0}), body)


def test_queries_are_checked_and_columns_hidden(db: Database, tmp_path: Path) -> None:
    populate(db, tmp_path)

    async def body(client: ClientSession) -> None:
        for query in ("state=oops", "limit=0", "limit=1001", "limit=x", "limit=9" * 3, "state=' OR 1=1--"):
            async with client.get(f"/api/v1/jobs?{query}") as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["hint"]
        async with client.get("/api/v1/jobs?state=refused&limit=1") as answer:
            assert [j["state"] for j in (await answer.json())["jobs"]] == ["refused"]
        async with client.get("/api/v1/jobs/1") as answer:
            job = await answer.json()
            assert len(job["results"]) == 2
            assert not {"file", "lease_owner"} & {k for r in (job, *job["results"], *job["deliveries"]) for k in r}
        async with client.get("/api/v1/deliveries") as answer:
            assert {"file", "sha256", "lease_owner"}.isdisjoint((await answer.json())["deliveries"][0])

    drive(db, node(tmp_path), body)


def test_large_bodies_are_refused_or_ignored(db: Database, tmp_path: Path) -> None:
    populate(db, tmp_path)

    async def body(client: ClientSession) -> None:
        async with client.post("/api/v1/jobs/1/retry", data=b"x" * (1 << 20), headers=CHANGE) as answer:
            assert answer.status in {409, 413}

    drive(db, node(tmp_path), body)


def test_metrics_of_all_processes(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    populate(db, tmp_path)
    receiver = json.dumps({"dicomnode_store": [["dicomnode_store_total", {"status": "0x0000"}, 7.0]]})
    Processes(db).beat("receiver-1", "ready", {}, receiver)
    Processes(db).beat("receiver-2", "ready", {}, '{"dicomnode_store": [["evil_total", {}, 1], 5], "evil": []}')
    Processes(db).beat("receiver-3", "ready", {}, "{half")

    async def body(client: ClientSession) -> None:
        async with client.get("/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = await answer.text()
        families = {f.name: f for f in text_string_to_metric_families(text)}
        stores = [
            (s.labels, s.value) for s in families["dicomnode_store"].samples if s.labels["process"] == "receiver-1"
        ]
        assert stores == [({"status": "0x0000", "process": "receiver-1"}, 7.0)]
        assert "evil" not in families
        jobs = {s.labels["state"]: s.value for s in families["dicomnode_queue_jobs"].samples}
        assert (jobs["done"], jobs["refused"]) == (1, 1)
        deliveries = {s.labels["state"]: s.value for s in families["dicomnode_queue_deliveries"].samples}
        assert deliveries == {"pending": 1, "rejected": 1}
        assert families["dicomnode_build_info"].samples[0].labels["version"]
        assert families["dicomnode_disk_free_bytes"].samples[0].value > 0
        assert {s.labels["process"] for s in families["dicomnode_process_up"].samples} >= {"worker", "receiver-1"}

    drive(db, node(tmp_path), body)


def test_status_tells_it_all(db: Database, tmp_path: Path) -> None:
    populate(db, tmp_path)
    Processes(db).beat("sidecar", "ready", {"port": 1, "scheduled": {"heartbeat": {"runs": 3, "error": ""}}})

    async def body(client: ClientSession) -> None:
        async with client.get("/api/v1/status") as answer:
            found = await answer.json()
        assert found["instances"] == {"studies": 4, "series": 4, "instances": 4}
        assert found["jobs"]["refused"] == 1
        assert found["deliveries"]["rejected"] == 1
        assert found["sync_items"]["pending"] == 2
        assert found["models"]["active"] == {"ct-lung": "1.0.0"}
        assert found["scheduled"]["heartbeat"]["runs"] == 3
        assert found["events"][0]["text"] == XSS
        assert [p["name"] for p in found["processes"]] == ["sidecar", "worker"]

    drive(db, node(tmp_path), body)


def test_routes_and_openapi_agree(db: Database, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "config" / "openapi.yaml").read_text(encoding="utf-8")
    described: set[tuple[str, str]] = set()
    path = ""
    for line in document.partition("\npaths:\n")[2].partition("\ncomponents:\n")[0].splitlines():
        if match := re.fullmatch(r"  (/\S*):", line):
            path = match[1]
        elif match := re.fullmatch(r"    (get|post|put|delete|patch):", line):
            described.add((match[1].upper(), path))
    routes = set()
    for route in make_app(db, node(tmp_path)).router.routes():
        assert route.resource is not None
        if route.method != "HEAD":
            routes.add(
                (route.method, re.sub(r"\{(\w+):[^{}]*(?:\{[^}]*\})?[^}]*\}", r"{\1}", route.resource.canonical))
            )
    assert routes == described
    assert "status" in document
