"""How busy others keep this box: receivers that take in a study, other services.

The worker does one job at a time, so its own work is no load when it asks; what counts is
what it would have to share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

MIN_WINDOW_SECONDS = 1.0
"""Shorter stretches than this say nothing: the last answer is given again."""


def share_of_others(busy: float, own: float, elapsed: float, cores: int) -> float:
    """Share of all cores, 0 to 1, that other processes used. Pure.

    ``busy``: CPU seconds that the whole box worked in ``elapsed`` seconds, ``own``: those of
    this process and its children.
    """
    if elapsed <= 0 or cores <= 0:
        return 0.0
    return min(1.0, max(0.0, (busy - own) / (elapsed * cores)))


class LoadOfOthers:
    """Between one question and the next. The first answer is the load average of the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cores = os.cpu_count() or 1
        self._last = (clock(), *_cpu_seconds())
        self._value = min(1.0, os.getloadavg()[0] / self._cores)

    def sample(self) -> float:
        now = self._clock()
        at, busy, own = self._last
        if now - at >= MIN_WINDOW_SECONDS:
            current = (now, *_cpu_seconds())
            self._value = share_of_others(current[1] - busy, current[2] - own, now - at, self._cores)
            self._last = current
        return self._value


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of the box that were work, and those of this process and its children, ended ones too."""
    box = psutil.cpu_times()
    busy = sum(box) - box.idle - getattr(box, "iowait", 0.0) - getattr(box, "guest", 0.0)
    busy -= getattr(box, "guest_nice", 0.0)
    me = psutil.Process()
    own = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # a decoder that ended
        # With what those used that have ended since: else their past would look like load of others.
        own += times.user + times.system + times.children_user + times.children_system
    return busy, own
