"""The limit on queries of one caller, on a clock that only the test moves."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from dicomnode import metrics
from dicomnode.serve.gate import EVENT_SECONDS, QueryGate


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def never() -> bool:
    return False


def gate(per_second: float = 5.0, at_once: int = 100, patience: float = 0.0) -> tuple[QueryGate, Clock]:
    clock = Clock()
    return QueryGate(per_second, at_once, clock, patience), clock


def admitted(queries: QueryGate, caller: str, count: int) -> int:
    """How many of ``count`` quick queries are served."""
    served = 0
    for _ in range(count):
        if queries.enter(caller, never):
            served += 1
            queries.leave(caller)
    return served


def test_rate() -> None:
    queries, clock = gate(per_second=5.0)
    assert admitted(queries, "A", 20) == 5, "a burst of one second"
    assert admitted(queries, "B", 20) == 5, "each caller for itself"
    clock.now += 0.4
    assert admitted(queries, "A", 20) == 2
    clock.now += 3600
    assert admitted(queries, "A", 20) == 5, "what was not used is not saved up"


def test_a_slow_rate_lets_single_queries_pass() -> None:
    queries, clock = gate(per_second=0.5)
    assert admitted(queries, "A", 3) == 1
    clock.now += 1
    assert admitted(queries, "A", 3) == 0
    clock.now += 1
    assert admitted(queries, "A", 3) == 1


def test_number_at_once() -> None:
    queries, _ = gate(per_second=1000, at_once=2)
    assert [queries.enter("A", never) for _ in range(3)] == [True, True, False]
    assert queries.enter("B", never)
    queries.leave("A")
    assert [queries.enter("A", never) for _ in range(2)] == [True, False]


def test_a_waiting_query_gets_its_turn() -> None:
    queries = QueryGate(1000, 1, patience=60)
    assert queries.enter("A", never)
    waiting, got = threading.Event(), []

    def wait() -> bool:
        waiting.set()
        return False

    thread = threading.Thread(target=lambda: got.append(queries.enter("A", wait)))
    thread.start()
    assert waiting.wait(10), "it waits and looks whether its caller is still there"
    assert not got
    queries.leave("A")
    thread.join(10)
    assert got == [True]


def test_who_has_gone_does_not_wait_and_is_no_refusal() -> None:
    queries = QueryGate(1000, 1, patience=60)
    assert queries.enter("A", never)
    assert not queries.enter("A", lambda: True)
    assert queries.to_report("A") == 0


def test_reports_are_throttled() -> None:
    queries, clock = gate(per_second=1.0)
    admitted(queries, "A", 8)
    assert queries.to_report("A") == 7
    admitted(queries, "A", 3)
    assert queries.to_report("A") == 0
    clock.now += EVENT_SECONDS
    assert queries.to_report("A") == 3
    assert queries.to_report("B") == 0


@pytest.mark.parametrize(
    ("service", "status", "answers"), [("find", 0x0000, 3), ("find", 0xA700, 0), ("get", 0xB000, 0)]
)
def test_metrics(service: str, status: int, answers: int) -> None:
    registry = metrics.REGISTRY
    labels = {"service": service, "status": f"0x{status:04X}"}

    def values() -> list[float]:
        return [
            registry.get_sample_value("dicomnode_query_retrieve_total", labels) or 0.0,
            registry.get_sample_value("dicomnode_query_retrieve_seconds_count", {"service": service}) or 0.0,
            registry.get_sample_value("dicomnode_find_answers_total") or 0.0,
        ]

    before = values()
    metrics.queried(service, status, 0.01, answers)
    assert [after - b for after, b in zip(values(), before, strict=True)] == [1, 1, answers]
    metrics.prepare("receiver-1")
    assert (
        registry.get_sample_value("dicomnode_query_retrieve_total", {"service": "move", "status": "0x0000"}) is not None
    )
