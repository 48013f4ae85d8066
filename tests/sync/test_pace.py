"""A reply without an end is read at the pace of a line, not at that of the processor."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dicomnode.errors import PeerError
from dicomnode.sync import http
from dicomnode.sync.http import READ_AT_ONCE_BYTES, READ_BYTES_PER_SECOND, read_bounded, read_ends


class Reply:
    """``content`` of it goes on for ever, or for ``size`` bytes, as quick as it is read."""

    def __init__(self, size: int | None = None) -> None:
        self.content, self.left = self, size

    async def iter_chunked(self, most: int) -> Any:
        while self.left is None or self.left > 0:
            yield b" " * (most if self.left is None else min(most, self.left))
            self.left = None if self.left is None else self.left - most


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each wait, on a clock that goes on by nothing else."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(http.time, "monotonic", lambda: 100.0 + sum(waits))
    monkeypatch.setattr(http.asyncio, "sleep", sleep)
    return waits


def test_a_reply_of_usual_size_is_read_at_once(slept: list[float]) -> None:
    assert len(asyncio.run(read_bounded(Reply(READ_AT_ONCE_BYTES), 4 << 20))) == READ_AT_ONCE_BYTES  # type: ignore[arg-type]
    assert slept == []


def test_one_without_an_end_takes_the_time_of_its_bytes(slept: list[float]) -> None:
    limit, most = 16 << 20, 32 << 20
    with pytest.raises(PeerError, match="longer"):
        asyncio.run(read_bounded(Reply(), limit))  # type: ignore[arg-type]
    assert sum(slept) == pytest.approx((limit - READ_AT_ONCE_BYTES) / READ_BYTES_PER_SECOND, rel=0.02)
    slept.clear()
    progress = http.Progress()
    begin, _ = asyncio.run(read_ends(Reply(), limit, 100, most, progress))  # type: ignore[arg-type]
    assert limit < len(begin) <= limit + (64 << 10)
    assert sum(slept) == pytest.approx((most - READ_AT_ONCE_BYTES) / READ_BYTES_PER_SECOND, rel=0.02)


def test_a_slow_one_never_waits(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    at = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(at)))  # a chunk each second
    asyncio.run(read_bounded(Reply(3 << 20), 4 << 20))  # type: ignore[arg-type]
    assert slept == []
