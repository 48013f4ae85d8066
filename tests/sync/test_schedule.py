"""Periodic work goes on whatever one task or the wall clock does."""

from __future__ import annotations

import asyncio
import time

from dicomnode import metrics
from dicomnode.errors import OperatorError
from dicomnode.sync.schedule import Schedule


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
        begin = time.monotonic()
        await schedule.stop()
        assert time.monotonic() - begin < 1
        assert cancelled == [1]

    asyncio.run(main())
