"""Records and conflicts over HTTP, on the dashboard, in /metrics and by the command line: values only to who may."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from typer.testing import CliRunner

from dicomnode.admin.application import make_app
from dicomnode.admin.connection import Runner
from dicomnode.cli import app
from dicomnode.cloud_settings import OFF
from dicomnode.conflicts import Outcome
from dicomnode.index.database import Database
from dicomnode.index.record_reviews import Reviews, serving
from tests.admin.test_admin_http import drive, node
from tests.sync.index_case import CANARY, CANARY_ID, FakeClock, add_results, make_settings

HEADER = {"X-Dicomnode": "1"}
REFUSED = {"seq": 7, "type": "limits", "cloud_id": "", "why": "too deep", "time": "2026-01-02T00:00:00Z"}
DEEP = "data: it is nested more than 32 deep"
SAID_IN = {
    "en": ("Records of the cloud that were not taken", DEEP, "Correct the field at the cloud", "too deep"),
    "zh": (
        "未接收的云端记录",
        "data: 嵌套超过 32 层",
        "PatientID 应为：不超过 64 个字符，且不含反斜杠",
        "请在云端改正该字段",
    ),
}
"""Of the section of refused records: reason and what to do."""


@pytest.fixture
def db(tmp_path: Path) -> Any:
    database = Database(tmp_path, FakeClock())
    yield database
    database.close()


def conflict(db: Database, **more: Any) -> int:
    """An open review of a patient's record, as :class:`dicomnode.index.records.Records` writes it."""
    side = {"PatientID": CANARY_ID, "PatientName": CANARY, "PatientSex": "M"}
    with db.transaction():
        held = {"type": "patient", "record_id": "PABC", "version": 2, "changed_time": "2026-01-01T00:00:00Z"}
        db.insert("records", held | {"data": json.dumps(side | {"PatientSex": "F"})})
        row = {
            "type": "patient", "record_id": "PABC", "strategy": "review", "outcome": Outcome.review,
            "why": "a person decides for this kind of data", "fields": '["PatientSex"]', "keys": "[]",
            "edge_version": 2, "edge_time": "", "edge_data": json.dumps(side), "cloud_version": 2, "cloud_time": "",
            "cloud_data": json.dumps(side | {"PatientSex": "F"}), "cloud_node": "", "common_version": 1,
            "common_data": json.dumps(side | {"PatientSex": ""}), "state": "open", "created_at": db.clock.ticks(),
            "created_time": "2026-01-01T00:00:00+00:00",
        }  # fmt: skip
        return db.insert("record_conflicts", row | more)


def test_values_are_shown_on_this_machine_only(db: Database, tmp_path: Path) -> None:
    number = conflict(db)
    with db.transaction():
        for n, why in enumerate(("PatientID is not at most 64 characters without a backslash", DEEP)):
            more = {"seq": 3 + n, "type": "patient", "cloud_id": CANARY_ID, "why": why, "time": "2026-01-01"}
            db.insert("refused_records", REFUSED | more | {"address": ""})
        db.insert("refused_records", REFUSED | {"address": "https://cloud.example/v1"})

    async def body(client: ClientSession) -> None:
        for page in ("/", "/?lang=zh", "/metrics", "/api/v1/status", "/api/v1/conflicts", "/api/v1/records"):
            async with client.get(page) as answer:
                text = await answer.text()
            assert answer.status == 200 and CANARY not in text and CANARY_ID not in text, page
        for page in (f"/api/v1/conflicts/{number}", "/api/v1/records/patient/PABC"):
            for headers in ({}, {**HEADER, "X-Forwarded-For": "10.0.0.9"}, {**HEADER, "Origin": "http://evil"}):
                async with client.get(page, headers=headers) as answer:
                    assert answer.status == 403 and CANARY not in await answer.text()
                    assert "hint" in (await answer.json())["error"]
            async with client.get(page, headers=HEADER) as answer:
                assert answer.status == 200 and CANARY in await answer.text()
        async with client.get("/api/v1/conflicts?state=open") as answer:
            [listed] = (await answer.json())["conflicts"]
        assert listed["fields"] == ["PatientSex"]
        async with client.get("/metrics") as answer:
            text = await answer.text()
        assert 'dicomnode_record_reviews_open{type="patient"} 1.0' in text
        for lang, words in (
            ("en", ("Records changed at both ends", "to decide", *SAID_IN["en"])),
            ("zh", ("两端均有修改的记录", "待裁决", *SAID_IN["zh"])),
        ):
            async with client.get("/", params={"lang": lang}) as answer:
                page = await answer.text()
            assert [w for w in words if w not in page] == [] and f"dicomnode conflicts show {number}" in page
        async with client.get("/api/v1/records/refused") as answer:
            assert (await answer.json())["refused"][0] == REFUSED
        url = f"/api/v1/conflicts/{number}/decide"
        for wrong in ({}, {"take": "both"}, {"take": "merged"}, {"take": "edge", "data": {}}, {"take": "edge", "x": 1}):
            async with client.post(url, json=wrong, headers=HEADER) as answer:
                assert answer.status == 400, wrong
        async with client.post(url, json={"take": "edge"}) as answer:
            assert answer.status == 403
        async with client.post("/api/v1/conflicts/99/decide", json={"take": "edge"}, headers=HEADER) as answer:
            assert answer.status == 404
        async with client.post(url, json={"take": "edge"}, headers=HEADER) as answer:
            assert answer.status == 200 and (await answer.json())["version"] == 3
        assert serving(db, "patient", "PABC")["PatientSex"] == "M"
        events = json.dumps(db.rows("SELECT * FROM events"))
        assert "conflict-decided" in events and CANARY not in events

    drive(db, node(tmp_path), body)


def test_preferences_and_limits_are_what_the_dashboard_does(db: Database, tmp_path: Path) -> None:
    async def put(client: ClientSession, path: str, status: int = 200, **changes: Any) -> Any:
        async with client.put(f"/api/v1/records/{path}", json={"changes": changes}, headers=HEADER) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json()

    async def body(client: ClientSession) -> None:
        assert (await put(client, "preferences/dashboard", language="zh", refresh_seconds=33))["version"] == 1
        async with client.get("/") as answer:
            page = await answer.text()
        assert 'lang="zh-CN"' in page and 'content="33"' in page
        async with client.get("/", params={"lang": "en"}) as answer:
            assert 'lang="en"' in await answer.text(), "who asks for a language gets it"
        assert page.count('class="card bad"') == 0
        await put(client, "limits/warnings", disk_free_mb=10**9)
        async with client.get("/") as answer:
            assert (await answer.text()).count('class="card bad"') == 1
        async with client.get("/metrics") as answer:
            assert 'dicomnode_warning_limit{limit="disk_free_mb"} 1e+09' in await answer.text()
        assert (await put(client, "limits/warnings", disk_free_mb=None))["version"] == 2
        async with client.get("/") as answer:
            assert (await answer.text()).count('class="card bad"') == 0
        for path, changes in (("limits/other", {"disk_free_mb": 1}), ("limits/warnings", {"colour": 1}), ("job/1", {})):
            await put(client, path, 400, **changes)
        await put(client, "study/1.2.3", 404, StudyDescription="x")
        for blank in ("StudyDate", [1], ["open_reviews"]):
            request = {"changes": {}, "blank": blank}
            async with client.put("/api/v1/records/limits/warnings", json=request, headers=HEADER) as answer:
                assert answer.status == 400

    drive(db, node(tmp_path), body)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    db = Database(data, FakeClock())
    add_results(db, data)
    settings = make_settings(data)
    config = tmp_path / "c.toml"
    config.write_text(f'[node]\ndata_dir = "{data}"\nreserve_mb = 1\n[http]\nport = 0\n')
    monkeypatch.setenv("DICOMNODE_CONFIG", str(config))

    def call(*words: str, code: int = 0, **more: Any) -> str:
        done = CliRunner().invoke(app, list(words), **more)
        assert done.exit_code == code, done.output
        return done.output

    done = json.loads(call("records", "set", "patient", CANARY_ID, "PatientSex=F", "--json"))
    assert done["version"] == 1 and CANARY_ID not in done["record_id"]
    assert serving(db, "patient", done["record_id"])["PatientName"] == CANARY, "it begins with what the index has"
    assert CANARY in call("records", "show", "patient", CANARY_ID)
    assert json.loads(call("records", "refused", "--json")) == []
    assert CANARY not in call("records", "list") and done["record_id"] in call("records", "list", "--type", "patient")
    call("records", "set", "patient", done["record_id"], "PatientSex=M")
    assert "nothing has changed" in call("records", "set", "patient", CANARY_ID, "PatientSex=M")
    call("records", "set", "patient", CANARY_ID, "--blank", "PatientSex")
    assert serving(db, "patient", done["record_id"])["PatientSex"] == ""
    call("records", "set", "patient", CANARY_ID, "--blank", "PatientID", code=1)
    call("records", "set", "patient", CANARY_ID, code=2)
    call("records", "set", "limits", "warnings", "disk_free_mb=500")
    assert serving(db, "limits", "warnings") == {"disk_free_mb": 500}
    number = conflict(db)
    listed = call("conflicts", "list", "--state", "open")
    assert "PatientSex" in listed and CANARY not in listed
    shown = call("conflicts", "show", str(number))
    assert '"M"' in shown and '"F"' in shown
    whole = json.dumps({"PatientID": CANARY_ID, "PatientSex": "O"})
    assert "merged" in call("conflicts", "decide", str(number), "merged", "--data", "-", input=whole)
    assert serving(db, "patient", "PABC") == {"PatientID": CANARY_ID, "PatientSex": "O"}
    assert Reviews(db, OFF).counts() == {} and settings.sync.conflicts.patients == "review"
    db.close()


def test_a_dashboard_without_refused_records_has_no_section_for_them(db: Database, tmp_path: Path) -> None:
    async def body(client: ClientSession) -> None:
        async with client.get("/") as answer:
            assert "refused_records" not in await answer.text()

    drive(db, node(tmp_path), body)


def test_who_may_not_see_values_is_told_why_by_the_real_server(db: Database, tmp_path: Path) -> None:
    """Its connections take an exception for one of aiohttp's own, whose text may quote a request."""
    number = conflict(db)

    async def main() -> None:
        runner = Runner(make_app(db, node(tmp_path)), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/api/v1/conflicts/{number}"
        async with ClientSession() as client, client.get(url) as answer:
            assert answer.status == 403
            assert "X-Dicomnode: 1" in (await answer.json())["error"]["hint"]
        await runner.cleanup()

    asyncio.run(main())
