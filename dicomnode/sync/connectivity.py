"""Which endpoint is used, and whether the cloud is there. Pure: values in, values out.

An endpoint that fails is left alone until its back-off is over, and the best other one is taken at
once. The primary is taken again when it has answered twice in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from dicomnode.index.states import backoff_seconds
from dicomnode.offline import Mode, longest_wait, may_ask

RETURN_AFTER = 2
"""Good answers in a row after which an endpoint that had failed counts as well."""

SMOOTHING = 0.3
"""Weight of the newest latency in the mean."""


class Link(StrEnum):
    online = "online"  # the primary is well and in use
    degraded = "degraded"  # a backup is in use, or the one in use is slow or has not proven itself again
    offline = "offline"  # nobody answers, or nobody is asked: everything waits


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of one endpoint. ``latency``: mean seconds of an answer; times are node time."""

    failures: int = 0
    successes: int = 0
    latency: float | None = None
    not_before: float = 0.0

    @property
    def well(self) -> bool:
        return self.failures == 0 and self.successes > 0

    def usable(self, now: float) -> bool:
        return now >= self.not_before


@dataclass(frozen=True, slots=True)
class Limits:
    mode: Mode = "auto"
    first: float = 2.0
    longest: float = 900.0
    slow_seconds: float = 5.0


def succeeded(health: Health, latency: float, *, proven: bool = False) -> Health:
    """After a good answer. A failure is forgotten after :data:`RETURN_AFTER` of them.

    ``proven``: it was no probe, something was taken; then at once.
    """
    successes = max(health.successes + 1, RETURN_AFTER if proven else 0)
    mean = latency if health.latency is None else (1 - SMOOTHING) * health.latency + SMOOTHING * latency
    forgiven = health.failures == 0 or successes >= RETURN_AFTER
    return Health(0 if forgiven else health.failures, successes, mean, 0.0)


def failed(health: Health, now: float, limits: Limits, wait: float | None = None) -> Health:
    """After a failure; ``wait``: the endpoint named the seconds itself (Retry-After)."""
    failures = health.failures + 1
    longest = longest_wait(limits.mode, limits.longest)
    pause = backoff_seconds(failures, limits.first, longest) if wait is None else wait
    return replace(health, failures=failures, successes=0, not_before=now + pause)


def choose(endpoints: Sequence[Health], now: float, mode: Mode = "auto") -> int | None:
    """The endpoint to use, None when nothing may be sent now.

    The primary (the first) when it is well, else the quickest backup that is well, else the first
    that may be tried, one that has not failed before one that has.
    """
    if not may_ask(mode):
        return None
    usable = [i for i, h in enumerate(endpoints) if h.usable(now)]
    well = [i for i in usable if endpoints[i].well]
    if 0 in well:
        return 0
    if well:
        return min(well, key=lambda i: (endpoints[i].latency or 0.0, i))
    return min(usable, key=lambda i: (endpoints[i].failures > 0, i)) if usable else None


def link(endpoints: Sequence[Health], now: float, limits: Limits) -> Link:
    """The state of the line as people see it."""
    chosen = choose(endpoints, now, limits.mode)
    answered = chosen is not None and endpoints[chosen].successes > 0
    if not answered:
        return Link.degraded if limits.mode == "never" and endpoints else Link.offline
    assert chosen is not None
    used = endpoints[chosen]
    slow = used.latency is not None and used.latency > limits.slow_seconds
    return Link.online if chosen == 0 and used.well and not slow else Link.degraded
