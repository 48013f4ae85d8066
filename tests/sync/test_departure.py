"""What leaves the node by default, byte for byte, and to whom: against the reference endpoint."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.cloud.storage import Storage
from dicomnode.cloud_settings import CloudPlan, Sync
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database
from dicomnode.index.mapping import PseudonymRows
from dicomnode.metrics_cloud import REGISTRY
from dicomnode.pseudonyms import Pseudonyms
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.node_record import describe_node
from tests.cloud.endpoint import endpoint
from tests.sync.index_case import (
    CANARY,
    CANARY_ID,
    FakeClock,
    add_objects,
    add_results,
    as_they_are,
    make_settings,
    secondary_capture,
    sender_of,
    states,
)

PLAN = CloudPlan("cloud", Sync().lanes, records=True)


@pytest.fixture
def db(tmp_path: Path, clock: FakeClock) -> Any:
    database = Database(tmp_path / "data", clock)
    yield database
    database.close()


@asynccontextmanager
async def cloud(tmp_path: Path, **more: Any) -> AsyncIterator[tuple[Any, Storage]]:
    """Settings that name the reference endpoint, and what it stores."""
    async with endpoint(tmp_path / "cloud") as (url, storage):
        section = {"stow_url": f"{url}/studies", "records_url": f"{url}/v1", "health_url": f"{url}/health", **more}
        yield make_settings(tmp_path / "data", cloud=section, delivery={"backoff_seconds": 1}), storage


def test_results_and_records_arrive_without_the_patient(db: Database, tmp_path: Path) -> None:
    uids = add_results(db, tmp_path / "data", 2, cloud=PLAN)

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            assert describe_node(settings, db) == 1 and describe_node(settings, db) == 0
            assert await sender_of(settings, db).flush() == 5
            assert states(db) == ["stored"] * 5
            arrived = [(a["kind"], a["name"].partition("/")[0]) for a in storage.arrivals()]
            assert [k for k, _ in arrived] == ["record", "object", "object", "record", "record"]
            assert [n for k, n in arrived if k == "record"] == ["study", "ai-result", "settings"]
            codec = Pseudonyms((tmp_path / "data" / "cloud-pseudonyms.key").read_bytes())
            held = storage.rows("SELECT SOPInstanceUID, PatientID, PatientIdentityRemoved FROM objects")
            assert {r["SOPInstanceUID"] for r in held} == {codec.uid(u) for u in uids}
            assert {r["PatientIdentityRemoved"] for r in held} == {"YES"}
            [summary] = storage.feed(0, "ai-result", 9)
            assert {o["SOPInstanceUID"] for o in summary["data"]["objects"]} == {codec.uid(u) for u in uids}

    asyncio.run(main())
    home = {str(r[k]) for r in db.rows("SELECT SOPInstanceUID, StudyInstanceUID, SeriesInstanceUID FROM instances i"
            " JOIN series se ON se.id = i.series_id JOIN studies st ON st.id = se.study_id") for k in r}  # fmt: skip
    sent = b"".join(p.read_bytes() for p in (tmp_path / "cloud").rglob("*") if p.is_file())
    for word in (CANARY, *CANARY.split("^"), CANARY_ID, *home):
        assert word.encode() not in sent
    for uid in uids:
        [row] = PseudonymRows(db).find(uid)
        assert PseudonymRows(db).find(row["pseudonym"])[0]["original"] == uid, "reversible at home"


def test_a_picture_that_may_show_the_patient_is_parked(db: Database, tmp_path: Path) -> None:
    parts = []
    for said in ("YES", "NO", ""):
        ds, _ = secondary_capture()
        ds.BurnedInAnnotation = said
        buffer = BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        parts.append(("SR", buffer.getvalue()))
    add_objects(db, tmp_path / "data", parts)

    def departures() -> dict[str, float]:
        name, objects = "dicomnode_departures_total", {"what": "object"}
        every = ("removed", "kept", "withheld")
        return {i: REGISTRY.get_sample_value(name, {**objects, "identity": i}) or 0.0 for i in every}

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            before = departures()
            await sender_of(settings, db).flush()
            assert states(db) == ["rejected", "stored", "rejected"] and len(storage.rows("SELECT * FROM objects")) == 1
            now = departures()
            assert {i: now[i] - before[i] for i in now} == {"removed": 1, "kept": 0, "withheld": 2}
            told = [r["text"] for r in db.rows("SELECT text FROM events WHERE kind = 'sync-rejected'")]
            assert len(told) == 2 and all("BurnedInAnnotation" in t for t in told)

    asyncio.run(main())


def test_a_rule_that_keeps_identity_is_obeyed(db: Database, tmp_path: Path) -> None:
    uids = add_results(db, tmp_path / "data", 1, cloud=PLAN)
    as_they_are(db)

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            assert await sender_of(settings, db).flush() == 3
            assert [r["SOPInstanceUID"] for r in storage.rows("SELECT * FROM objects")] == uids
            [study] = storage.feed(0, "study", 9)
            assert study["data"]["PatientID"] == CANARY_ID

    asyncio.run(main())


@pytest.mark.parametrize(
    "rules",
    [
        [{"name": "chest-ct", "models": ["ct-lung"]}],
        [{"name": "chest-ct2", "models": ["ct-lung"], "cloud_identity": "kept"}],
        [],
    ],
    ids=["taken back", "another rule", "gone"],
)
def test_what_leaves_is_decided_at_departure(db: Database, tmp_path: Path, rules: list[Any]) -> None:
    """Jobs were made while their rule kept identity; the operator has taken that back before they left."""
    add_results(db, tmp_path / "data", 2, cloud=PLAN)
    as_they_are(db)

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            await sender_of(
                settings.model_copy(update={"rules": make_settings(tmp_path / "data", rules=rules).rules}), db
            ).flush()
            objects = storage.rows("SELECT * FROM objects")
            assert len(objects) == 2
            for row in objects:
                assert row["PatientIdentityRemoved"] == "YES" and row["PatientID"] != CANARY_ID
                content = storage.objects.path(row["file"]).read_bytes()
                assert b"CANARY" not in content
            told = json.dumps(storage.feed(0, None, 99))
            assert "CANARY" not in told
            for row in db.rows("SELECT SOPInstanceUID FROM results UNION SELECT StudyInstanceUID FROM studies"):
                assert next(iter(row.values())) not in told

    asyncio.run(main())


def test_a_correction_leaves_by_todays_word_on_patients(db: Database, tmp_path: Path) -> None:
    said = {"PatientName": CANARY, "PatientSex": "F"}
    item = dict.fromkeys(("idempotency_key", "version", "base_version", "base_key", "settles", "changed_time"))
    item |= {"type": "patient", "record_id": "P1", "study_id": None, "job_id": None, "identified": 1}
    item["data"] = json.dumps(said)
    for word, left in (("kept", said), ("removed", {"PatientSex": "F"})):
        settings = make_settings(tmp_path / "data", sync={"patients_identity": word})
        assert Departures(settings, db).record(item)["data"] == left


def test_sending_again_is_once_in_effect(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path / "data", 2, cloud=PLAN)

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            for _ in range(3):
                await sender_of(settings, db).flush()
                db._connection().execute("UPDATE sync_items SET state = 'pending'")
            assert len(storage.arrivals()) == 4 and storage.counts()["repeated"] == 4
            assert (
                storage.conflicts(None, 9) == []
                and storage.rows("SELECT max(differing) AS n FROM objects")[0]["n"] == 0
            )

    asyncio.run(main())


def test_the_key_is_the_nodes_own_and_never_replaced(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path / "data", cloud=PLAN)
    key = tmp_path / "data" / "cloud-pseudonyms.key"

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            await sender_of(settings, db).flush()
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
            add_results(db, tmp_path / "data", cloud=PLAN)
            key.chmod(0o644)
            with pytest.raises(OperatorError, match="chmod 600"):
                await sender_of(settings, db).flush()
            key.unlink()
            with pytest.raises(OperatorError, match="another key"):
                await sender_of(settings, db).flush()
            assert not key.exists() and len(storage.arrivals()) == 3, "nothing left"

    asyncio.run(main())


def test_what_cannot_be_deidentified_is_parked(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path / "data", 2)
    from dicomnode import durable

    row = db.row("SELECT id, file FROM results LIMIT 1")
    assert row is not None
    path = durable.ObjectStore(tmp_path / "data").path(row["file"])
    path.write_bytes(b"this is not DICOM")
    db._connection().execute("UPDATE results SET sha256 = ? WHERE id = ?", (durable.sha256_file(path), row["id"]))

    async def main() -> None:
        async with cloud(tmp_path) as (settings, storage):
            assert await sender_of(settings, db).flush() == 2
            assert len(storage.arrivals()) == 1

    asyncio.run(main())
    assert states(db) == ["rejected", "stored"]


def test_fail_over_and_return(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    """The backup takes what the primary does not, at once; the primary is taken again when it is well."""

    async def main() -> None:
        async with endpoint(tmp_path / "one") as (url, _):
            gone = url  # its port is free again below
        async with endpoint(tmp_path / "two") as (second, backup):
            section = {
                "stow_url": f"{gone}/studies", "health_url": f"{gone}/health",
                "backups": [{"name": "second", "stow_url": f"{second}/studies", "health_url": f"{second}/health"}],
            }  # fmt: skip
            settings = make_settings(tmp_path / "data", cloud=section)
            sender = sender_of(settings, db)
            lines = sender.endpoints
            assert lines.link == "offline"
            add_results(db, tmp_path / "data", 2)
            assert await sender.flush() == 2 and len(backup.arrivals()) == 2
            assert lines.link == "degraded" and [e["in_use"] for e in lines.report()["endpoints"]] == [False, True]
            [event] = db.rows("SELECT * FROM events")
            assert (event["severity"], event["subject"]) == ("warning", "cloud primary")

            port = int(gone.rsplit(":", 1)[1])
            async with endpoint(tmp_path / "one", port=port) as (_, primary):
                for _ in range(2):
                    clock.now += 5
                    await lines.probe()
                assert lines.link == "online"
                add_results(db, tmp_path / "data")
                assert await sender.flush() == 1 and len(primary.arrivals()) == 1
            clock.now += 5
            await lines.probe()
            assert lines.link == "degraded"

    asyncio.run(main())
    assert states(db) == ["stored"] * 3
    assert json.dumps([e["severity"] for e in db.rows("SELECT * FROM events")]) == '["warning", "info", "warning"]'


@pytest.mark.parametrize("mode", ["always", "never"])
def test_offline_mode(db: Database, tmp_path: Path, mode: str) -> None:
    add_results(db, tmp_path / "data")

    async def main() -> None:
        async with endpoint(tmp_path / "cloud") as (url, storage):
            section = {"stow_url": f"{url}/studies"}
            sender = sender_of(make_settings(tmp_path / "data", cloud=section, sync={"offline_mode": mode}), db)
            await sender.endpoints.probe()
            sent = await sender.flush()
            assert (sent, len(storage.arrivals())) == ((0, 0) if mode == "always" else (1, 1))
            assert sender.endpoints.link == ("offline" if mode == "always" else "online")

    asyncio.run(main())


def test_who_holds_the_index_may_note_what_left_while_another_commits(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is decided inside a transaction and notes its pseudonyms there; a lane commits its own meanwhile."""
    departures = Departures(make_settings(tmp_path / "data", cloud={"stow_url": "https://cloud/studies"}), db)
    departures.ready()
    departures._note({("study", "left"): "home"})
    commits = threading.Event()
    keep = departures._rows.keep

    def seen(mapping: Any, codec: Any) -> None:
        commits.set()
        keep(mapping, codec)

    monkeypatch.setattr(departures._rows, "keep", seen)
    lane, other = (threading.Thread(target=departures.keep, daemon=True) for _ in range(2))
    decider = threading.Thread(target=departures._note, args=({("study", "more"): "home2"},), daemon=True)
    with db.transaction():
        lane.start()
        assert commits.wait(10)
        decider.start()
        decider.join(5)
        assert not decider.is_alive(), "it waits for the commit, which waits for it"
        other.start()
        other.join(0.1)
        assert other.is_alive(), "what another thread is committing is not there yet"
    lane.join(10)
    other.join(10)
    assert {r["pseudonym"] for r in db.rows("SELECT pseudonym FROM pseudonyms")} == {"left", "more"}


def test_rows_that_could_not_be_kept_are_kept_later(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    departures = Departures(make_settings(tmp_path / "data", cloud={"stow_url": "https://cloud/studies"}), db)
    departures._note({("study", "left"): "home"})
    keep = departures._rows.keep

    def full(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(departures._rows, "keep", full)
    with pytest.raises(OSError):
        departures.keep()
    monkeypatch.setattr(departures._rows, "keep", keep)
    departures.keep()
    assert [r["original"] for r in db.rows("SELECT original FROM pseudonyms")] == ["home"]


def test_the_token_goes_to_the_endpoint_alone(db: Database, tmp_path: Path) -> None:
    """A health page elsewhere is asked without it; one that is not confidential is not asked at all."""
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    asked: list[str] = []

    async def health(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Authorization", ""))
        return web.Response()

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/health", health)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        here = f"http://127.0.0.1:{runner.addresses[0][1]}"
        for stow in (here, "https://cloud.example"):
            section = {"stow_url": f"{stow}/studies", "health_url": f"{here}/health", "token_file": token}
            lines = Endpoints(make_settings(tmp_path / "data", cloud=section), db)
            await lines.probe()
            assert lines.report()["endpoints"][0]["error"] == ""
        open_line = {"stow_url": "https://cloud.example/studies", "health_url": "http://cloud.example/health"}
        lines = Endpoints(make_settings(tmp_path / "data", cloud=open_line), db)
        await lines.probe()
        assert "not https" in lines.report()["endpoints"][0]["error"]
        await runner.cleanup()

    asyncio.run(main())
    assert asked == ["Bearer secret", ""]
