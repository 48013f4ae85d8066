"""Reads run where they are answered while they are quick, and aside when they were not."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dicomnode.admin.reading import QUICK_SECONDS, Reading


def test_a_read_goes_aside_while_it_is_slow_and_comes_back() -> None:
    now, takes = [0.0], [0.0]
    here: list[bool] = []

    def read(answer: int) -> int:
        here.append(threading.current_thread() is threading.main_thread())
        now[0] += takes[0]
        return answer

    def other() -> None:
        here.append(threading.current_thread() is threading.main_thread())

    async def main(executor: ThreadPoolExecutor) -> None:
        reading = Reading(executor, lambda: now[0])
        for seconds in (0.0, 0.0, 2 * QUICK_SECONDS, 2 * QUICK_SECONDS, 0.0, 0.0):
            takes[0] = seconds
            assert await reading(read, 7) == 7
        await reading(other)  # each read by itself

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(main(executor))
    assert here == [False, True, True, False, False, True, False]


def test_an_error_is_the_callers() -> None:
    def read() -> None:
        raise ValueError("no")

    async def main(executor: ThreadPoolExecutor) -> None:
        reading = Reading(executor)
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                await reading(read)

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(main(executor))
