"""TLS in status, dashboard and /metrics: own certificate from its file, peers' from heartbeats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from dicomnode import metrics
from dicomnode.admin.tls_state import own_certificate, peer_certificates, tls_report
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database
from dicomnode.index.operation import Processes
from dicomnode.settings import Settings
from tests.admin.test_admin_http import drive, node
from tests.certificates import Authority, Issued, self_signed

MOMENT = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def section(authority: Authority, own: Issued, **keys: Any) -> dict[str, Any]:
    files = {"certificate_file": own.certificate_file, "key_file": own.key_file, "ca_file": authority.ca_file}
    return {"port": 2762, **files, **keys}


def heartbeat(peer: str, ends: datetime) -> str:
    metrics.TLS_PEER_SECONDS.clear()  # of other tests in this process
    metrics.peer_certificate(peer, ends.timestamp())
    try:
        return metrics.snapshot()
    finally:
        metrics.TLS_PEER_SECONDS.clear()


@pytest.mark.parametrize(("days", "state"), [(90, "valid"), (30.5, "valid"), (29.5, "expiring"), (-1, "expired")])
def test_own_certificate(authority: Authority, days: float, state: str) -> None:
    own = authority.issue("node.hospital", days=days, start_days=-400)
    found = tls_report(Settings(tls=section(authority, own)), [])
    assert (found["port"], found["required"], found["fault"], found["peers"]) == (2762, False, "", [])
    shown = found["certificate"]
    assert (shown["subject"], shown["sha256"], shown["state"]) == ("node.hospital", own.sha256, state)
    assert abs(shown["days_left"] - days) <= 1


def test_without_tls_and_with_a_broken_file(authority: Authority) -> None:
    assert tls_report(Settings(), [])["certificate"] is None and own_certificate(Settings().tls) is None
    own = authority.issue("node")
    settings = Settings(tls=section(authority, own))
    own.certificate_file.write_text("hello")
    with pytest.raises(OperatorError):
        own_certificate(settings.tls)
    found = tls_report(settings, [])
    assert found["certificate"] is None and "cannot be understood" in found["fault"]
    own.key_file.unlink()
    own.certificate_file.write_bytes(authority.ca_file.read_bytes())
    assert own_certificate(settings.tls) is not None, "the sidecar has no business with the key"


def test_of_each_peer_the_certificate_that_ends_last() -> None:
    rows = [
        {"name": "receiver-1", "metrics": heartbeat("ct", MOMENT)},
        {"name": "receiver-2", "metrics": heartbeat("ct", MOMENT + timedelta(days=300))},
        {"name": "courier", "metrics": heartbeat("pacs", MOMENT + timedelta(days=3))},
        {"name": "worker", "metrics": None},
        {"name": "sidecar", "metrics": "{damaged"},
        {"name": "odd", "metrics": heartbeat("ct", MOMENT).replace(str(MOMENT.timestamp()), "1e300")},
    ]
    found = [peer.as_json(MOMENT) for peer in peer_certificates(rows[:5])]
    assert [(p["peer"], p["days_left"], p["state"]) for p in found] == [("ct", 300, "valid"), ("pacs", 3, "expiring")]
    assert [p.peer for p in peer_certificates(rows)] == ["pacs"]


def test_status_page_and_metrics(db: Database, tmp_path: Path, authority: Authority) -> None:
    own = self_signed(authority.folder, "<b>node</b>")
    settings = node(tmp_path, tls=section(authority, own))
    Processes(db).beat("courier", "ready", {}, heartbeat("pacs", datetime.now(UTC) + timedelta(days=400)))

    async def body(client: ClientSession) -> None:
        async with client.get("/api/v1/status") as answer:
            tls = (await answer.json())["tls"]
            assert (tls["certificate"]["sha256"], tls["peers"][0]["peer"]) == (own.sha256, "pacs")
        for lang, words in (
            ("en", ("TLS certificates", "at port 2762", "runs out soon", "Days left", "this node")),
            ("zh", ("TLS 证书", "DICOM TLS 端口：2762", "即将到期", "剩余天数", "本节点")),
        ):
            async with client.get(f"/?lang={lang}") as answer:
                page = await answer.text()
                assert [word for word in words if word not in page] == []
                assert "&lt;time" not in page
                assert "<b>node" not in page and tls["certificate"]["not_after"] in page
        async with client.get("/metrics") as answer:
            text = await answer.text()
        ends = own.certificate.not_valid_after_utc.timestamp()
        (line,) = [one for one in text.splitlines() if one.startswith("dicomnode_tls_certificate_expiry")]
        assert float(line.split()[1]) == ends
        assert 'dicomnode_tls_peer_certificate_expiry_timestamp_seconds{peer="pacs",process="courier"}' in text

    drive(db, settings, body)


def test_metrics_and_page_without_a_certificate(db: Database, tmp_path: Path, authority: Authority) -> None:
    own = authority.issue("node")
    broken = node(tmp_path, tls=section(authority, own))

    async def off(client: ClientSession) -> None:
        async with client.get("/metrics") as answer:
            assert "\ndicomnode_tls_certificate_expiry_timestamp_seconds " not in await answer.text()
        async with client.get("/?lang=zh") as answer:
            assert "DICOM 传输未加密" in await answer.text()

    async def unreadable(client: ClientSession) -> None:
        own.certificate_file.unlink()
        async with client.get("/metrics") as answer:
            assert "\ndicomnode_tls_certificate_expiry_timestamp_seconds 0.0" in await answer.text()
        async with client.get("/") as answer:
            assert "tls.certificate_file" in await answer.text()

    drive(db, node(tmp_path), off)
    drive(db, broken, unreadable)


@pytest.fixture
def db(tmp_path: Path) -> Any:
    database = Database(tmp_path)
    yield database
    database.close()
