"""Periodic work goes on whatever one task or the wall clock does."""

from __future__ import annotations

import asyncio
import time

import pytest

from dicomnode import metrics
from dicomnode.errors import OperatorError
from dicomnode.sync.schedule import WATCH, Schedule


def test_a_failing_task_is_shown_and_does_not_stop_the_others() -> None:
    async def main() -> None:
        schedule, done, failed = Schedule(), asyncio.Event(), asyncio.Event()

        async def good() -> None:
            if failed.is_set():
                done.set()

        async def bad() -> None:
            failed.set()
            raise OperatorError("do", "cannot", "mend it")

        schedule.every("good", 0.02, good)
        schedule.every("bad", 0.02, bad)
        schedule.start()
        await asyncio.wait_for(done.wait(), 10)
        await schedule.stop()
        report = schedule.report()
        assert report["bad"]["error"] == "do: cannot. mend it"
        assert report["good"]["error"] == ""
        assert report["bad"]["runs"] >= 1
        assert report["bad"]["last_time"]

    asyncio.run(main())
    text = metrics.snapshot()
    assert '"task":"bad","outcome":"failed"' in text.replace(" ", "")


def test_a_wall_clock_that_is_set_back_does_not_put_tasks_to_sleep() -> None:
    async def main() -> None:
        wall = [time.time()]
        schedule, runs = Schedule(lambda: wall[0]), asyncio.Queue[int]()

        async def task() -> None:
            runs.put_nowait(1)

        schedule.every("task", 3600, task)
        schedule.start()
        await asyncio.wait_for(runs.get(), 10)
        offset = wall[0] - time.monotonic()
        schedule.realign(offset)
        wall[0] -= 10 * 365 * 86400
        moved = schedule.realign(offset)
        await asyncio.wait_for(runs.get(), 10)
        assert schedule.realign(moved) - moved < 1
        await schedule.stop()

    asyncio.run(main())


def test_the_watch_is_shown_as_every_other_and_outlives_a_fault_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.sync.schedule.WATCH_SECONDS", 0.01)

    async def main() -> None:
        wall: list[float] = [time.time()]
        schedule = Schedule(lambda: wall[0])
        schedule.start()

        async def until(error: str) -> None:
            while schedule.report()[WATCH]["error"] != error or not schedule.report()[WATCH]["runs"]:
                await asyncio.sleep(0.01)

        await asyncio.wait_for(until(""), 10)
        right = wall.pop()
        await asyncio.wait_for(until("IndexError"), 10)
        wall.append(right)
        await asyncio.wait_for(until(""), 10)
        await schedule.stop()

    asyncio.run(main())


def test_soon_and_stop_in_the_middle_of_a_task() -> None:
    async def main() -> None:
        schedule, begun = Schedule(), asyncio.Event()
        cancelled = []

        async def long() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(1)
                raise

        schedule.every("long", 3600, long)
        schedule.start()
        await asyncio.wait_for(begun.wait(), 10)
        while not schedule.report()["long"]["running_seconds"]:
            await asyncio.sleep(0.001)
        assert schedule.report()["long"]["runs"] == 0, "one that hangs is seen while it does"
        await schedule.stop()
        assert cancelled == [1], "it was not waited for"

    asyncio.run(main())
