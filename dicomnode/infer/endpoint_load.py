"""How busy an inference endpoint is, 0 (idle) to 1. Pure.

Of an endpoint that others use too, its queue is all that matters and cannot be asked for by
the KServe protocol. Two sources, the higher one counts:

- latency: a server that takes ``r`` times as long as it did at its best for a request of the
  same size is busy to 1 - 1/r, as for an M/M/1 queue, where the mean response time is the
  service time divided by 1 - load (Kleinrock, Queueing Systems I, 3.2). Twice as slow is
  50 %, ten times 90 %.
- Triton's /metrics, where ``metrics_url`` is given: GPU utilisation, and waiting requests.

A reading of latency fades with a half-life, so that an endpoint that is skipped for its load
gets another chance.
"""

from __future__ import annotations

from collections.abc import Hashable

from prometheus_client.parser import text_string_to_metric_families

HALF_LIFE_SECONDS = 20.0
SMOOTHING = 0.5
"""Weight of the newest request in the running ratio."""

SLACK_SECONDS = 0.05
"""A delay up to this is the network's or the scheduler's, no queue: small requests would look busy by it."""

MAX_KEYS = 64


class LatencyLoad:
    """Load by latency. ``now`` is a monotonic clock in seconds."""

    def __init__(self) -> None:
        self._best: dict[Hashable, float] = {}
        self._ratio = 1.0
        self._at = 0.0

    def record(self, key: Hashable, seconds: float, now: float) -> None:
        """One request took ``seconds``; those of one ``key`` (model and size) are compared."""
        seconds = max(seconds, 1e-6)
        if key not in self._best and len(self._best) >= MAX_KEYS:
            self._best.pop(next(iter(self._best)))
        best = self._best[key] = min(self._best.get(key, seconds), seconds)
        ratio = 1.0 + max(0.0, seconds - best - SLACK_SECONDS) / best
        self._ratio = (1 - SMOOTHING) * self._faded(now) + SMOOTHING * ratio
        self._at = now

    def value(self, now: float) -> float:
        return 1.0 - 1.0 / self._faded(now)

    def _faded(self, now: float) -> float:
        fade: float = 0.5 ** (max(0.0, now - self._at) / HALF_LIFE_SECONDS)
        return 1.0 + (self._ratio - 1.0) * fade


def triton_load(metrics: str, model: str) -> float | None:
    """Load by the text of Triton's /metrics; None when it says nothing of it.

    ``nv_gpu_utilization`` (mean over the GPUs) and ``nv_inference_pending_request_count`` of
    the model: n waiting requests count as n / (n + 1). Raises ValueError when it is not
    Prometheus text.
    """
    gpus: list[float] = []
    waiting: float | None = None
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "nv_gpu_utilization":
                gpus.append(min(1.0, max(0.0, float(sample.value))))
            elif sample.name == "nv_inference_pending_request_count" and sample.labels.get("model") == model:
                waiting = (waiting or 0.0) + max(0.0, float(sample.value))
    found = [sum(gpus) / len(gpus)] if gpus else []
    if waiting is not None:
        found.append(waiting / (waiting + 1.0))
    return max(found) if found else None
