"""The feed goes on behind what it cannot use, ends where a cloud goes in circles, and rarely waits for the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from dicomnode.errors import PeerError
from dicomnode.index.database import Database
from dicomnode.index.records import TOGETHER, Taken
from dicomnode.sync.http import Progress, read_ends
from tests.sync.test_records import PREF, Cloud, Node, run
from tests.sync.test_records_bounds import feed, row


def test_a_page_of_which_no_record_is_whole_does_not_stop_the_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: dict[str, Any] = {
        "after=0&": {"records": [{"type": "study", "id": "1.2", "seq": 3}, {}, 7], "next": 5, "newest": 8},
        "after=5&": {"records": [{"type": "limits", "seq": 6}], "next": 6, "newest": 8},
        "after=6&": {"records": [row(8, data={"language": "zh"})], "next": 8, "newest": 8},
    }
    rest = {"records": [], "next": 8, "newest": 8}
    asked = feed(monkeypatch, lambda r: next((p for begin, p in pages.items() if begin in r.path_qs), rest))

    async def body(cloud: Cloud, node: Node) -> None:
        assert await node.pull() == {Taken.applied: 1} and len(asked) == 4
        assert node.holds(*PREF) == {"language": "zh"}
        left = [(r["seq"], r["type"], r["cloud_id"]) for r in node.reviews.refused()]
        assert sorted(left) == [(0, "", ""), (3, "study", "1.2"), (6, "limits", "")]
        assert {r["why"] for r in node.reviews.refused()} == {"a field of it is missing or of another type"}
        events = node.db.rows("SELECT severity, text FROM events WHERE kind LIKE 'record-%' ORDER BY id")
        assert [e["severity"] for e in events] == ["error", "warning"], "one record may be wrong, a page tells more"
        assert "No record of the page was whole" in events[0]["text"] and "seq 3" in events[0]["text"]
        asked.clear()
        assert await node.pull() == {} and len(asked) == 1, "each once"

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ({"records": [{}, {}], "next": 0, "newest": 9}, "no record of the page is whole"),
        ({"records": [row(1, type="patient", id="x")], "next": 99, "newest": 5}, "newest is behind"),
    ],
)
def test_a_feed_that_goes_round_in_circles_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Any, told: str
) -> None:
    bad = [True]
    asked = feed(monkeypatch, lambda request: page if bad else None)

    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="zh")
        for _ in range(3):
            asked.clear()
            with pytest.raises(PeerError, match=told):
                await node.pull()
            assert len(asked) < 5
        events = node.db.rows("SELECT severity FROM events WHERE kind LIKE 'record-%'")
        assert [e["severity"] for e in events] == ["error"] and node.reviews.refused() == []
        bad.clear()
        assert (await node.pull())[Taken.applied] == 1

    run(tmp_path, body)


class Reply:
    """A body in chunks of some size, as a line may cut it."""

    def __init__(self, body: bytes, size: int) -> None:
        self.content, self._body, self._size = self, body, size

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        for begin in range(0, len(self._body), self._size):
            yield self._body[begin : begin + self._size]


@pytest.mark.parametrize("length", [1, 99, 100, 101, 102, 999])
def test_what_is_read_of_a_reply_does_not_depend_on_the_chunks_in_which_it_comes(length: int) -> None:
    """Only what is the same twice is left out: a page that is too long was another one each time."""
    body = bytes(n % 251 for n in range(length))

    async def read(size: int) -> tuple[bytes, bytes]:
        return await read_ends(cast(Any, Reply(body, size)), 100, 10, 9999, Progress())

    for size in (1, 7, 64, 150, 1000):
        assert asyncio.run(read(size)) == (body[:101], body[-10:])


def test_what_is_mended_at_the_cloud_is_no_longer_listed_as_refused(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        await cloud.change(*PREF, language="xx")
        assert await node.pull() == {Taken.refused: 1}
        [left] = node.reviews.refused()
        assert (left["cloud_id"], left["why"]) == ("dashboard", "language is not en, zh or empty")
        await cloud.change(*PREF, language="yy")
        assert await node.pull() == {Taken.refused: 1} and len(node.reviews.refused()) == 2
        await cloud.change(*PREF, language="zh")
        assert await node.pull() == {Taken.applied: 1} and node.reviews.refused() == []

    run(tmp_path, body)


def test_records_are_decided_some_in_a_commit_and_one_that_fails_takes_none_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        records, number = node.puller.records, 3 * TOGETHER
        with node.db.transaction():
            for n in range(1, number + 1):
                held = {"type": "ai-result", "record_id": f"x{n}", "version": 1, "data": "{}", "changed_time": "2026"}
                node.db.insert("records", held)
        page = [row(n, type="result-review", id=f"x{n}", data={"status": "accepted"}) for n in range(1, number + 1)]
        records.keep("feed", page, number)
        with node.db.transaction():  # as a row that an earlier version kept
            node.db.execute("UPDATE cloud_records SET data = ? WHERE seq = ?", ("[" * 100_000, TOGETHER + 5))
        turns, turn = list[int](), Database._turn
        monkeypatch.setattr(Database, "_turn", lambda db: turns.append(1) or turn(db))
        assert records.take_all() == {Taken.applied: number - 1, Taken.refused: 1}
        assert len(turns) <= 2 + 1 + TOGETHER + 2, "three parts, of which one is done again by ones"
        held = node.db.rows("SELECT record_id FROM records WHERE type = 'result-review'")
        assert {r["record_id"] for r in held} == {f"x{n}" for n in range(1, number + 1)} - {f"x{TOGETHER + 5}"}
        assert [r["cloud_id"] for r in node.reviews.refused()] == [f"x{TOGETHER + 5}"]
        assert records.take_all() == {}

    run(tmp_path, body)
