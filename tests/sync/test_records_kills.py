"""Records of two nodes and the cloud through kill -9: every change has its effect once, and all ends agree."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.database import Database
from dicomnode.index.record_reviews import Reviews, serving
from dicomnode.index.records import Records
from dicomnode.settings import load_settings
from tests.sync.test_records import Cloud, Node, run

PREF, LIMIT = ("preferences", "dashboard"), ("limits", "warnings")
KILLS = 12
PUTS = 2 * sum(v % 3 == 0 for n in range(KILLS) for v in (n, 100 + n))
"""Changes at the cloud."""
CONFIG = """
[node]
ae_title = "NODE{number}"
data_dir = "{data}"
reserve_mb = 1
[http]
port = 0
[delivery]
backoff_seconds = 0.2
backoff_max_seconds = 0.5
[cloud]
stow_url = "{url}/studies"
records_url = "{url}/v1"
health_url = "{url}/health"
[sync]
urgent_seconds = 0.1
normal_seconds = 0.1
batch_seconds = 0.1
pull_seconds = 0.1
"""


class Died(Exception):
    """Stands for the end of the process: nothing after it runs."""


def again(node: Node) -> None:
    """What the next life of the sidecar does first."""
    node.sender.start()


@pytest.mark.parametrize("point", ["stored, not settled", "page kept", "decided, not committed", "decided", "page"])
def test_the_work_goes_on_from_wherever_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Each step by itself: the process ends in it, the next one finds its rows."""
    struck: list[str] = []

    def once(kind: type, name: str, *, after: bool) -> None:
        original = getattr(kind, name)

        def dying(self: Any, *arguments: Any, **more: Any) -> Any:
            if struck:
                return original(self, *arguments, **more)
            struck.append(name)
            if after:
                original(self, *arguments, **more)
            raise Died

        monkeypatch.setattr(kind, name, dying)

    async def body(cloud: Cloud, one: Node, two: Node) -> None:
        for node in (one, two):
            node.set(*LIMIT, open_reviews=1)
            await node.exchange()
        await one.exchange()
        one.set(*LIMIT, disk_free_mb=10)
        two.set(*LIMIT, oldest_sync_hours=5, open_reviews=2)
        await one.push()
        kind, name, after = {
            "stored, not settled": (CloudOutbox, "settle", False),
            "page": (Records, "keep", False),
            "page kept": (Records, "keep", True),
            "decided, not committed": (Records, "_done", True),
            "decided": (Records, "take_all", True),
        }[point]
        once(kind, name, after=after)
        for node in (two, one) * 3:
            with contextlib.suppress(Died):
                await node.exchange()
            again(node)
        assert struck
        wanted = {"disk_free_mb": 10, "oldest_sync_hours": 5, "open_reviews": 2}
        assert one.holds(*LIMIT) == two.holds(*LIMIT) == cloud.holds(*LIMIT) == wanted
        assert cloud.open() == []
        assert [c["decided_as"] for c in two.reviews.listing()] == ["merged"], "decided once, whatever was repeated"
        before = len(cloud.storage.arrivals())
        for node in (one, two):
            await node.exchange()
        assert len(cloud.storage.arrivals()) == before

    run(tmp_path, body, 2)


def start(*words: str, folder: Path, name: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dicomnode", *words], stdout=subprocess.PIPE, stderr=log, env={**os.environ}
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def put(url: str, kind: str, name: str, **changes: Any) -> None:
    """A change at the cloud on what serves there, tried again when a node was quicker."""
    address = f"{url}/v1/records/{kind}/{name}"
    for _ in range(50):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                held = json.load(answer)
        except urllib.error.HTTPError as error:
            assert error.code == 404
            held = {"version": 0, "data": {}}
        body = json.dumps({"data": held["data"] | changes}).encode()
        headers = {"If-Match": f'"{held["version"]}"', "Content-Type": "application/json"}
        request = urllib.request.Request(address, body, headers, method="PUT")
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except urllib.error.HTTPError as error:
            assert error.code == 412
    raise AssertionError("never in time")


def cloud_rows(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = apsw.Connection(str(folder / "cloud.sqlite"))
    try:
        return list(connection.execute(sql))
    finally:
        connection.close()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[str]:
    process = start("cloud", "--data-dir", str(tmp_path / "cloud"), "--port", "0", "--json", "--reserve-mb", "1",
                    folder=tmp_path, name="cloud")  # fmt: skip
    assert process.stdout
    text = b""
    while b"}" not in text:
        line = process.stdout.readline()
        assert line, (tmp_path / "cloud.log").read_text()
        text += line
    yield str(json.loads(text)["page"]).rstrip("/")
    kill(process)


@pytest.mark.slow
def test_sidecars_killed_at_random_moments_lose_and_double_nothing(tmp_path: Path, cloud: str) -> None:
    """Two whole sidecars, changes at both of them and at the cloud, a kill -9 after each few of them."""
    chance = random.Random(f"{os.environ.get('PYTEST_XDIST_WORKER', '')}{time.time_ns()}")
    boxes = []
    for number in range(2):
        data, config = tmp_path / f"node{number}", tmp_path / f"{number}.toml"
        config.write_text(CONFIG.format(number=number, data=data, url=cloud), encoding="utf-8")
        boxes.append((Database(data), load_settings(config), config))
    with contextlib.ExitStack() as stack:
        running: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: [kill(p) for p in running])

        def sidecar(number: int) -> subprocess.Popen[bytes]:
            return start("run", "sidecar", "--config", str(boxes[number][2]), folder=tmp_path, name=f"node{number}")

        def change(value: int) -> None:
            db, settings, _ = boxes[value % 2]
            reviews = Reviews(db, settings.cloud_plan)
            reviews.change(*LIMIT, {chance.choice(("disk_free_mb", "open_reviews")): value})
            reviews.change(*PREF, {"refresh_seconds": 2 + value})
            if value % 3 == 0:
                put(cloud, *LIMIT, oldest_sync_hours=value)
                put(cloud, *PREF, language=chance.choice(("en", "zh")))

        running.extend(sidecar(n) for n in range(2))
        for value in range(KILLS):
            change(value)
            time.sleep(chance.uniform(0.0, 2.0))  # the moment of the kill is what is tried
            change(100 + value)
            victim = value % 2
            kill(running[victim])
            running[victim] = sidecar(victim)

        def state() -> Any:
            held = [serving(db, *record) for db, _, _ in boxes for record in (LIMIT, PREF)]
            there = [json.loads(d) for (d,) in cloud_rows(tmp_path / "cloud", "SELECT data FROM records ORDER BY type")]
            waiting = [
                db.value("SELECT (SELECT count(*) FROM sync_items WHERE state IN ('pending', 'sending'))"
                         " + (SELECT count(*) FROM cloud_records WHERE state = 'new')") for db, _, _ in boxes
            ]  # fmt: skip
            open_there = cloud_rows(tmp_path / "cloud", "SELECT count(*) FROM conflicts WHERE state = 'open'")[0][0]
            ours = {"preferences", "limits"}
            kinds = [k for (k,) in cloud_rows(tmp_path / "cloud", "SELECT type FROM records ORDER BY type")]
            theirs = [d for k, d in zip(kinds, there, strict=True) if k in ours]
            agree = held[0] == held[2] == theirs[0] and held[1] == held[3] == theirs[1]
            return agree and not any(waiting) and not open_there, (held, theirs, waiting, open_there)

        deadline = time.monotonic() + 90
        while not state()[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert state()[0], state()[1]
        for process in running:
            kill(process)
        running.clear()
    known = dict(cloud_rows(tmp_path / "cloud", "SELECT key, outcome FROM keys"))
    assert "conflict" in known.values(), "both ends did change the same record"
    items = 0
    for db, _, _ in boxes:
        for row in db.rows("SELECT idempotency_key, outcome, state FROM sync_items WHERE record_id IS NOT NULL"):
            items += 1
            assert row["state"] == "stored"
            there = known[row["idempotency_key"]]
            assert (row["outcome"] == "stored") == (there == "stored"), "both ends know the same of each change"
        db.close()
    assert items == len(known), "every change arrived, under its one key"
    stored = cloud_rows(tmp_path / "cloud", "SELECT count(*) FROM keys WHERE outcome = 'stored'")[0][0]
    own = cloud_rows(tmp_path / "cloud", "SELECT count(*) FROM arrivals WHERE kind = 'record'")[0][0] - stored
    assert own == PUTS, "and had its effect once: the rest was changed at the cloud itself"
