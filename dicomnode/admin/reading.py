"""Reads of the index in the thread that answers, as long as they are quick.

Two more changes of thread cost a request more than the read itself where all cores are busy: each is a wait for the
processor and for Python's lock. A read that took long (a cold disk, a large index) goes to a thread of its own from
then on, so that the others are answered meanwhile, until it is quick again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

QUICK_SECONDS = 0.25
"""Wall time: a share of a busy processor counts, too, and is no reason to wait for another thread as well."""


class Reading:
    """``aside`` runs what is not known to be quick. For functions that only read; for one event loop."""

    def __init__(self, aside: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self._aside = aside
        self._clock = clock
        self._quick: dict[str, bool] = {}

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        name = function.__qualname__
        if self._quick.get(name):
            return self._timed(name, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._aside, self._timed, name, function, *arguments)

    def _timed(self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        begin = self._clock()
        try:
            return function(*arguments)
        finally:
            self._quick[name] = self._clock() - begin < QUICK_SECONDS
