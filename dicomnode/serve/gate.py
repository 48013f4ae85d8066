"""How many queries one caller may ask: at once, and per second. Over it a query waits a little, then is refused.

The wait is what slows a flood down: a caller has one answer outstanding on an association, so
each of its associations asks no more than once in ``PATIENCE_SECONDS``. A burst of an honest
workstation only waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

PATIENCE_SECONDS = 1.0
LOOK_SECONDS = 0.1
"""A waiting query looks this often whether its caller has cancelled or gone."""

EVENT_SECONDS = 60.0
"""Refusals of one caller are reported at most this often."""


@dataclass(slots=True)
class _Caller:
    """A bucket with one token for each query; it holds as many as a second brings, and at least one."""

    tokens: float
    filled_at: float
    active: int = 0
    refused: int = 0
    reported_at: float = float("-inf")


class QueryGate:
    """Thread-safe; callers are the AE titles of listed peers, so there are few."""

    def __init__(
        self,
        per_second: float,
        at_once: int,
        clock: Callable[[], float] = time.monotonic,
        patience: float | None = None,
    ) -> None:
        self._per_second = per_second
        self._most_tokens = max(1.0, per_second)
        self._at_once = at_once
        self._clock = clock
        self._patience = PATIENCE_SECONDS if patience is None else patience
        self._free = threading.Condition()
        self._callers: dict[str, _Caller] = {}

    def enter(self, caller: str, given_up: Callable[[], bool]) -> bool:
        """Wait for admission; after True, :meth:`leave` must follow. ``given_up``: nobody wants the answer any more."""
        deadline = self._clock() + self._patience
        while True:
            with self._free:
                state = self._state(caller)
                if state.active < self._at_once and state.tokens >= 1.0:
                    state.tokens -= 1.0
                    state.active += 1
                    return True
                remaining = deadline - self._clock()
                if remaining <= 0:
                    state.refused += 1
                    return False
                missing = max(0.0, 1.0 - state.tokens) / self._per_second
                self._free.wait(min(remaining, LOOK_SECONDS, missing or LOOK_SECONDS))
            if given_up():
                return False

    def leave(self, caller: str) -> None:
        with self._free:
            self._callers[caller].active -= 1
            self._free.notify_all()

    def _state(self, caller: str) -> _Caller:
        now = self._clock()
        state = self._callers.setdefault(caller, _Caller(self._most_tokens, now))
        state.tokens = min(self._most_tokens, state.tokens + (now - state.filled_at) * self._per_second)
        state.filled_at = now
        return state

    def to_report(self, caller: str) -> int:
        """Refusals since the last report, 0 when it is too early for another."""
        with self._free:
            state, now = self._state(caller), self._clock()
            if not state.refused or now - state.reported_at < EVENT_SECONDS:
                return 0
            count, state.refused, state.reported_at = state.refused, 0, now
            return count
