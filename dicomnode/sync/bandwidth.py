"""A cap on what goes out: one token bucket for all of it, with a bounded loan for what is urgent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LOAN_SHARE = 0.5
"""Of the rate, the part at which the loan is granted anew; the rest is the others', however much is urgent."""


class Bucket:
    """``rate``: bytes per second, 0: no cap; ``burst`` seconds of it may be saved up.

    What is urgent goes at once on a loan of at most ``loan`` seconds of the rate, which the others wait for; beyond
    it, it waits until some of that is granted anew. Pure but for its clock: :meth:`take` says how long to wait.
    """

    def __init__(
        self, rate: float, burst: float = 1.0, loan: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._most, self._most_loan = rate * burst, rate * loan
        self._level, self._loan = self._most, self._most_loan
        self._clock = clock
        self._at = clock()

    def take(self, size: int, *, urgent: bool = False) -> float:
        """Take ``size`` bytes; seconds until they have been earned."""
        if self._rate <= 0:
            return 0.0
        now = self._clock()
        earned = max(0.0, now - self._at) * self._rate
        self._level = min(self._most, self._level + earned)
        self._loan = min(self._most_loan, self._loan + earned * LOAN_SHARE)
        self._at = now
        short = max(0.0, size - max(0.0, self._level))
        self._level -= size
        if urgent:
            self._loan -= short
            return max(0.0, -self._loan / (self._rate * LOAN_SHARE))
        return max(0.0, -self._level / self._rate)

    async def wait(self, size: int) -> None:
        await self._sleep(self.take(size))

    async def borrow(self, size: int) -> None:
        """For what is urgent."""
        await self._sleep(self.take(size, urgent=True))

    @staticmethod
    async def _sleep(seconds: float) -> None:
        if seconds:
            await asyncio.sleep(seconds)
