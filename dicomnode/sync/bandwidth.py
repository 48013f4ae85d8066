"""A cap on what goes out: a token bucket. What is urgent never waits for it, but counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Bucket:
    """``rate``: bytes per second, 0: no cap; ``burst`` seconds of it may be saved up.

    Pure but for its clock: :meth:`take` says how long to wait.
    """

    def __init__(self, rate: float, burst: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._most = rate * burst
        self._level = self._most
        self._clock = clock
        self._at = clock()

    def take(self, size: int) -> float:
        """Take ``size`` bytes; seconds until they have been earned."""
        if self._rate <= 0:
            return 0.0
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate) - size
        self._at = now
        return max(0.0, -self._level / self._rate)

    async def wait(self, size: int) -> None:
        seconds = self.take(size)
        if seconds:
            await asyncio.sleep(seconds)

    async def borrow(self, size: int) -> None:
        """For what is urgent: the others pay for it."""
        self.take(size)
