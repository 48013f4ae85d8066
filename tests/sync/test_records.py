"""Records changed at both ends, against the reference endpoint: who wins, what is kept, who decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from dicomnode.cloud.storage import Storage
from dicomnode.errors import NodeError, OperatorError, PeerError
from dicomnode.index.database import Database
from dicomnode.index.record_reviews import Reviews, serving
from dicomnode.index.records import Taken
from dicomnode.settings import Settings
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.feed_page import checked, page_of
from dicomnode.sync.pull_records import RecordPuller
from dicomnode.sync.sender import CloudSender
from tests.cloud import endpoint as served
from tests.cloud.endpoint import endpoint
from tests.sync.index_case import CANARY, CANARY_ID, FakeClock, add_results, as_they_are, make_settings


@dataclass
class Node:
    """A node's index with what the sidecar runs on it."""

    settings: Settings
    db: Database
    clock: FakeClock
    endpoints: Endpoints
    sender: CloudSender
    puller: RecordPuller
    reviews: Reviews

    def set(self, kind: str, name: str, **fields: Any) -> int:
        return self.reviews.change(kind, name, fields)

    def holds(self, kind: str, name: str) -> dict[str, Any]:
        return serving(self.db, kind, name)

    async def push(self) -> int:
        return await self.sender.flush()

    async def pull(self) -> dict[Taken, int]:
        return await self.puller.run_once()

    async def exchange(self) -> None:
        """Until there is nothing more to do."""
        for _ in range(2):
            await self.push()
            await self.pull()

    def outcomes(self) -> list[str]:
        return [r["outcome"] for r in self.reviews.listing()][::-1]


@dataclass
class Cloud:
    url: str
    storage: Storage
    client: ClientSession

    async def change(self, kind: str, name: str, **data: Any) -> None:
        """Somebody at the cloud sets the whole value."""
        held = self.storage.record(kind, name)
        version = held["version"] if held else 0
        async with self.client.put(
            f"/v1/records/{kind}/{name}", json={"data": data}, headers={"If-Match": f'"{version}"'}
        ) as answer:
            assert answer.status == 200

    def holds(self, kind: str, name: str) -> Any:
        row = self.storage.record(kind, name)
        return row and row["data"]

    def open(self) -> list[str]:
        return [c["type"] for c in self.storage.conflicts("open", 99)]


Body = Callable[..., Awaitable[None]]


@asynccontextmanager
async def nodes(tmp_path: Path, count: int = 1, **sync: Any) -> AsyncIterator[tuple[Any, ...]]:
    found: list[Node] = []
    async with endpoint(tmp_path / "cloud") as (url, storage), ClientSession(url) as client:
        for number in range(count):
            data = tmp_path / f"node{number}"
            clock = FakeClock(start=datetime.now(UTC))
            db = Database(data, clock)
            settings = make_settings(
                data,
                node={"data_dir": data, "ae_title": f"NODE{number}", "reserve_mb": 1},
                cloud={"stow_url": f"{url}/studies", "records_url": f"{url}/v1", "health_url": f"{url}/health"},
                delivery={"backoff_seconds": 1},
                sync=sync,
            )
            endpoints, leaving = Endpoints(settings, db), Departures(settings, db)
            found.append(
                Node(settings, db, clock, endpoints, CloudSender(settings, db, endpoints, leaving),
                     RecordPuller(settings, db, endpoints, leaving), Reviews(db, settings.cloud_plan))
            )  # fmt: skip
        try:
            yield (Cloud(url, storage, client), *found)
        finally:
            for node in found:
                node.db.close()


def run(tmp_path: Path, body: Body, count: int = 1, **sync: Any) -> None:
    async def main() -> None:
        async with nodes(tmp_path, count, **sync) as parts:
            await body(*parts)

    asyncio.run(main())


PREF, LIMIT = ("preferences", "dashboard"), ("limits", "warnings")


def test_a_change_travels_in_both_directions_and_an_echo_does_nothing(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        assert node.set(*PREF, language="zh") == 1
        assert node.set(*PREF, language="zh") == 0
        await node.exchange()
        assert cloud.holds(*PREF) == {"language": "zh"}
        await cloud.change(*PREF, language="en", refresh_seconds=20)
        assert (await node.pull()) == {Taken.applied: 1}
        assert node.holds(*PREF) == {"language": "en", "refresh_seconds": 20}
        assert node.set(*PREF, refresh_seconds=30) == 3, "it goes on from the cloud's version"
        await node.exchange()
        assert cloud.holds(*PREF) == {"language": "en", "refresh_seconds": 30}
        assert node.reviews.listing() == [] and cloud.storage.conflicts(None, 9) == []
        arrived = cloud.storage.counts(), len(cloud.storage.arrivals())
        await node.exchange()
        assert (cloud.storage.counts(), len(cloud.storage.arrivals())) == arrived, "nothing more to say"

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("strategy", "serves", "outcome"),
    [
        ("edge", {"disk_free_mb": 1, "open_reviews": 7}, "edge"),
        ("cloud", {"disk_free_mb": 2, "oldest_sync_hours": 5}, "cloud"),
        ("merge", {"disk_free_mb": 1, "open_reviews": 7, "oldest_sync_hours": 5}, "merged"),
        ("newest", {"disk_free_mb": 2, "oldest_sync_hours": 5}, "cloud"),
    ],
)
def test_strategies_end_with_one_value_at_both_ends(
    tmp_path: Path, strategy: str, serves: dict[str, Any], outcome: str
) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        node.clock.now -= 100.0  # so that the cloud's change is the newer one, and none is ahead of the clock
        node.set(*LIMIT, disk_free_mb=0)
        await node.exchange()
        await cloud.change(*LIMIT, disk_free_mb=2, oldest_sync_hours=5)
        for reviews in (5, 6, 7):  # a branch of three changes, all of which build on what the cloud has left behind
            node.set(*LIMIT, disk_free_mb=1, open_reviews=reviews)
        await node.push()
        assert len(cloud.open()) == 3, "versions 2 and 3 of the node are not mistaken for the cloud's version 2"
        await node.exchange()
        assert node.holds(*LIMIT) == cloud.holds(*LIMIT) == serves
        assert cloud.open() == [] and node.outcomes() == [outcome]
        kept = node.reviews.show(1)
        assert kept["edge_data"] == {"disk_free_mb": 1, "open_reviews": 7}
        assert kept["cloud_data"] == {"disk_free_mb": 2, "oldest_sync_hours": 5}
        assert kept["common_data"] == {"disk_free_mb": 0}
        before = len(cloud.storage.arrivals())
        await node.exchange()
        assert len(cloud.storage.arrivals()) == before

    run(tmp_path, body, conflicts={"settings": strategy})


@pytest.mark.parametrize("take", ["cloud", "edge", "merged"])
def test_a_review_is_decided_here(tmp_path: Path, take: Any) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        node.set(*PREF, language="zh")
        await node.exchange()
        await cloud.change(*PREF, language="en")
        node.set(*PREF, refresh_seconds=9)
        await node.exchange()
        assert node.holds(*PREF) == {"language": "en"}, "the cloud's value serves until then"
        assert node.reviews.counts() == {"preferences": 1} and cloud.open() == ["preferences"]
        [listed] = node.reviews.listing(state="open")
        assert listed["fields"] == ["language", "refresh_seconds"] and "edge_data" not in listed
        data = {"language": "zh", "refresh_seconds": 12} if take == "merged" else None
        node.reviews.decide(1, take, data, who="cli:anna")
        with pytest.raises(OperatorError, match="decided by cli:anna"):
            node.reviews.decide(1, take, data, who="cli:bert")
        await node.exchange()
        wanted = {"cloud": {"language": "en"}, "edge": {"language": "zh", "refresh_seconds": 9}}.get(take, data)
        assert node.holds(*PREF) == cloud.holds(*PREF) == wanted
        assert cloud.open() == [] and [c["state"] for c in cloud.storage.conflicts(None, 9)] == [take]
        assert node.reviews.counts() == {} and node.reviews.decided() == {take: 1}

    run(tmp_path, body, conflicts={"preferences": "review"})


@pytest.mark.parametrize("take", ["cloud", "edge"])
def test_a_review_is_decided_at_the_cloud(tmp_path: Path, take: str) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="en")
        node.set(*PREF, language="zh")
        await node.exchange()
        assert node.reviews.counts() == {"preferences": 1}
        node.set(*PREF, refresh_seconds=7)  # work goes on meanwhile, and decides nothing
        await node.exchange()
        assert node.reviews.counts() == {"preferences": 1} and cloud.open() == ["preferences"]
        async with cloud.client.post("/v1/conflicts/1/decide", json={"take": take}) as answer:
            assert answer.status == 200
        await node.exchange()
        assert node.reviews.counts() == {} and node.reviews.decided() == {"cloud": 1}
        assert node.holds(*PREF) == cloud.holds(*PREF)
        assert cloud.holds(*PREF)["language"] == {"cloud": "en", "edge": "zh"}[take]

    run(tmp_path, body, conflicts={"preferences": "review"})


def test_two_nodes_on_one_record_end_alike(tmp_path: Path) -> None:
    async def body(cloud: Cloud, one: Node, two: Node) -> None:
        one.set(*LIMIT, disk_free_mb=100)
        two.set(*LIMIT, open_reviews=3)
        for _ in range(3):
            await one.exchange()
            await two.exchange()
        assert one.holds(*LIMIT) == two.holds(*LIMIT) == cloud.holds(*LIMIT) == {"disk_free_mb": 100, "open_reviews": 3}
        one.set(*LIMIT, disk_free_mb=200)
        two.set(*LIMIT, disk_free_mb=300)
        await one.push()
        await two.push()
        for _ in range(3):
            await two.exchange()
            await one.exchange()
        assert one.holds(*LIMIT) == two.holds(*LIMIT) == cloud.holds(*LIMIT) == {"disk_free_mb": 300, "open_reviews": 3}
        assert cloud.open() == []

    run(tmp_path, body, 2)


def test_what_is_exchanged_on_its_way_out_stays_at_home(tmp_path: Path) -> None:
    """The cloud knows a study by pseudonyms; it may change what left as it is, and only that."""

    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        [study] = cloud.storage.feed(0, "study", 9)
        name = str(node.db.value("SELECT record_id FROM records WHERE type = 'study'"))
        assert study["id"] != name and CANARY not in json.dumps(study)
        await cloud.change("study", study["id"], **study["data"] | {
            "PatientSex": "F", "PatientID": "P-OTHER", "PatientName": "EVE", "NumberOfStudyRelatedInstances": 9,
        })  # fmt: skip
        assert await node.pull() == {Taken.applied: 1}
        home = node.holds("study", name)
        assert (home["PatientSex"], home["NumberOfStudyRelatedInstances"]) == ("F", 9)
        assert home["PatientID"] == CANARY_ID and home["PatientName"] == CANARY
        assert home["StudyInstanceUID"] == name
        [result] = cloud.storage.feed(0, "ai-result", 9)
        await cloud.change("result-review", result["id"], status="accepted", reason="seen", by="EVE")
        assert await node.pull() == {Taken.refused: 1}, "a field that this type does not have"
        await cloud.change("result-review", result["id"], status="rejected", reason="motion")
        assert await node.pull() == {Taken.applied: 1}
        ours = str(node.db.value("SELECT record_id FROM records WHERE type = 'ai-result'"))
        assert ours != result["id"] and node.holds("result-review", ours)["status"] == "rejected"
        await cloud.change("study", "2.25.4711", PatientName="OTHER")
        assert await node.pull() == {Taken.unknown: 1}
        assert node.db.value("SELECT count(*) FROM cloud_records WHERE cloud_id = '2.25.4711'") == 0

    run(tmp_path, body)


def test_a_correction_outlives_the_next_analysis(tmp_path: Path) -> None:
    """The node tells a study's metadata after each job; what people corrected is not taken back by that."""

    async def body(cloud: Cloud, node: Node) -> None:
        from dicomnode.index.cloud_rows import put_record

        plan = node.settings.cloud_plan

        def tell(**data: Any) -> int:
            with node.db.transaction():
                return put_record(node.db, plan, "study", "1.2.3", data)

        tell(StudyDescription="CT", AccessionNumber="A1", count=1)
        as_they_are(node.db)
        await node.exchange()
        await cloud.change("study", "1.2.3", StudyDescription="CT chest", AccessionNumber="A1", count=1)
        await node.exchange()
        assert tell(StudyDescription="CT", AccessionNumber="A1", count=1) == 0
        tell(StudyDescription="CT", AccessionNumber="A1", count=2)
        assert node.holds("study", "1.2.3") == {"StudyDescription": "CT chest", "AccessionNumber": "A1", "count": 2}

    run(tmp_path, body)


def test_a_record_that_concerned_nothing_here_is_fetched_when_it_does(tmp_path: Path) -> None:
    """Another node told of a study first: its record was not kept, so it is asked for once ours is in conflict."""

    async def body(cloud: Cloud, one: Node, two: Node) -> None:
        from dicomnode.index.cloud_rows import put_record

        def tell(node: Node, **data: Any) -> None:
            with node.db.transaction():
                put_record(node.db, node.settings.cloud_plan, "study", "1.2.3", data)
            as_they_are(node.db)

        tell(one, StudyDescription="CT", count=1)
        await one.exchange()
        assert await two.pull() == {Taken.unknown: 1} and two.db.value("SELECT count(*) FROM cloud_records") == 0
        two.clock.now += 60.0
        tell(two, StudyDescription="CT chest", count=2)
        await two.push()
        assert await two.pull() == {}, "now it is asked for"
        assert await two.pull() == {Taken.kept: 1}
        await two.exchange()
        await one.exchange()
        assert one.holds("study", "1.2.3") == two.holds("study", "1.2.3") == cloud.holds("study", "1.2.3")
        assert one.holds("study", "1.2.3") == {"StudyDescription": "CT chest", "count": 2} and cloud.open() == []

    run(tmp_path, body, 2)


def test_an_old_change_that_was_parked_does_not_come_back(tmp_path: Path) -> None:
    """Somebody requeues it when a later one has arrived: it is in conflict, and what serves goes on serving."""

    async def body(cloud: Cloud, node: Node) -> None:
        node.set(*PREF, language="zh")
        await node.exchange()
        node.set(*PREF, language="en")
        node.db._connection().execute("UPDATE sync_items SET state = 'rejected' WHERE state = 'pending'")
        node.set(*PREF, refresh_seconds=9)
        await node.exchange()
        serves = {"language": "en", "refresh_seconds": 9}
        assert cloud.holds(*PREF) == serves
        node.sender.outbox.requeue(2)
        await node.push()
        assert cloud.open() == ["preferences"]
        await node.exchange()
        await node.exchange()
        assert cloud.open() == [] and cloud.holds(*PREF) == node.holds(*PREF) == serves
        before = len(cloud.storage.arrivals())
        await node.exchange()
        assert len(cloud.storage.arrivals()) == before and node.puller.records.missing() == []

    run(tmp_path, body)


def test_corrections_of_patients_leave_without_identity_and_wait_for_people(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        name = str(node.db.value("SELECT pseudonym FROM pseudonyms WHERE kind = 'patient'"))
        node.set("patient", name, PatientID=CANARY_ID, PatientName=CANARY, PatientSex="M")
        await node.exchange()
        assert cloud.holds("patient", name) == {"PatientSex": "M"}
        node.set("patient", name, PatientSex="O")
        await cloud.change("patient", name, PatientSex="F", PatientName="EVE")
        await node.exchange()
        assert node.holds("patient", name) == {"PatientID": CANARY_ID, "PatientName": CANARY, "PatientSex": "F"}
        assert node.reviews.counts() == {"patient": 1}
        node.reviews.decide(1, "edge", who="cli:anna")
        await node.exchange()
        assert node.holds("patient", name)["PatientSex"] == "O" and cloud.holds("patient", name) == {"PatientSex": "O"}
        told = json.dumps([*node.reviews.listing(), *node.db.rows("SELECT * FROM events")])
        assert CANARY not in told and CANARY_ID not in told and "EVE" not in told

    run(tmp_path, body)


def test_a_change_with_the_wrong_form_is_refused(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        for kind, name, fields in (
            ("preferences", "dashboard", {"language": "fr"}),
            ("preferences", "other", {"language": "en"}),
            ("limits", "warnings", {"disk_free_mb": True}),
            ("limits", "warnings", {"colour": 1}),
            ("ai-result", "x", {"model": "y"}),
            ("study", "1.2.3", {"StudyDescription": "no such study"}),
        ):
            with pytest.raises(OperatorError):
                node.reviews.change(kind, name, fields)
        await cloud.change(*PREF, language="fr")
        assert await node.pull() == {Taken.refused: 1}
        assert node.holds(*PREF) == {}
        assert "fr" not in str(node.db.rows("SELECT text FROM events WHERE kind = 'record-refused'"))

    run(tmp_path, body)


def test_an_endpoint_that_is_behind_takes_nothing_back(tmp_path: Path) -> None:
    """A backup that was set up again, or the cloud after a restore."""

    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="en")
        await cloud.change(*PREF, language="zh")
        await node.exchange()
        with cloud.storage._transaction() as db:
            for table in ("records", "arrivals", "keys"):
                db.execute(f"DELETE FROM {table}")
            db.execute("DELETE FROM sqlite_sequence")
        await cloud.change(*PREF, language="en", refresh_seconds=5)
        assert await node.pull() == {Taken.stale: 1}
        assert node.holds(*PREF) == {"language": "zh"}
        node.set(*PREF, refresh_seconds=6)
        await node.exchange()
        assert cloud.holds(*PREF) == node.holds(*PREF) == {"language": "zh", "refresh_seconds": 6}

    run(tmp_path, body)


@pytest.mark.parametrize(
    "page",
    [
        None, [], {}, {"records": [], "next": "1"}, {"records": [], "next": True},
        {"records": [1], "next": -1},
    ],
)  # fmt: skip
def test_a_page_of_another_form_is_told(page: Any) -> None:
    with pytest.raises(PeerError):
        page_of(page)


def test_a_record_that_lacks_something_is_told() -> None:
    row: Mapping[str, Any] = {
        "type": "study", "id": "1", "version": 1, "key": "k", "node": "", "data": {}, "changed_time": "",
        "settled": [], "seq": 1,
    }  # fmt: skip
    assert checked([row]) == ([row], [])
    for change in ({"data": None}, {"version": -1}, {"version": True}, {"settled": [1]}):
        kept, [unkept] = checked([{**row, **change}])
        assert kept == [] and (unkept.type, unkept.name, unkept.seq) == ("study", "1", 1) and "missing" in unkept.why


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"status": 503}, None),
        ({"status": 429}, None),
        ({"status": 401}, "HTTP 401"),
        ({"status": 302, "headers": {"Location": "http://192.0.2.1/"}}, "HTTP 302"),
        ({"text": "<html>"}, "not JSON"),
        ({"text": "[]"}, "not a page"),
        ({"text": '{"records": [{"type": "study"}], "next": 0, "newest": 9}'}, "is whole"),
        ({"body": b" " * (65 << 20)}, "longer"),
        ("cut", None),
    ],
)
def test_a_bad_answer_changes_nothing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, told: str | None
) -> None:
    """Where it passes the endpoint is blamed and all waits; else an operator is told; the place in the feed stays."""
    make_app, bad = served.make_app, [True]

    @web.middleware
    async def broken(request: web.Request, handler: Any) -> web.StreamResponse:
        if not bad or request.method != "GET" or request.path != "/v1/records":
            return await handler(request)  # type: ignore[no-any-return]
        if answer != "cut":
            return web.Response(**answer)
        stream = web.StreamResponse(headers={"Content-Length": "1000"})
        await stream.prepare(request)
        await stream.write(b'{"records": [')
        assert request.transport is not None
        request.transport.abort()
        return stream

    def app(*arguments: Any) -> web.Application:
        made = make_app(*arguments)
        made.middlewares.append(broken)
        return made

    monkeypatch.setattr(served, "make_app", app)

    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="zh")
        if told is None:
            assert await node.pull() == {}
            assert not node.endpoints.health[0].well
        else:
            with pytest.raises(NodeError, match=told):
                await node.pull()
        assert node.db.rows("SELECT * FROM cloud_records") == node.db.rows("SELECT * FROM record_feeds") == []
        bad.clear()
        node.clock.now += 60.0
        assert await node.pull() == {Taken.applied: 1}
        assert node.holds(*PREF) == {"language": "zh"}

    run(tmp_path, body)
