"""Connects and aborts in their thousands leave nothing behind: no thread, no descriptor, no memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.crashing.flood import CALLERS, Look, flood, leaks, measure, slope

COUNT = 6000
"""``scripts/crash --flood`` sends 10,000 to a whole node.

Measured: one receiver's RSS rises in steps of half a MB until some 3,500 to 6,500 associations, and
by 0.1 MB in the next 7,000. From 2,000 to 4,000 the steps alone made 1.25 MB per 1,000 at times.
"""


def test_a_slope_is_of_all_looks() -> None:
    flat = [Look(n, 10, 20, 50 << 20) for n in range(0, 5000, 500)]
    assert slope(flat) == 0 and leaks(flat) == []
    rising = [Look(n, 10, 20, (50 << 20) + n * 2000) for n in range(0, 5000, 500)]
    assert slope(rising) == pytest.approx(2_000_000)


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (Look(1000, 30, 20, 1 << 20), "threads"),
        (Look(1000, 10, 60, 1 << 20), "descriptors"),
        (Look(1000, 10, 20, 4 << 20), "RSS grows by 3.00 MB"),
    ],
)
def test_what_is_not_flat_is_told(last: Look, text: str) -> None:
    (found,) = leaks([Look(0, 10, 20, 1 << 20), last])
    assert text in found


class Node:
    """Stands in for a flood: ``rss`` bytes after so many callers."""

    def __init__(self, rss: Callable[[int], int]) -> None:
        self.count, self._rss = 0, rss

    def run(self, count: int) -> None:
        self.count += count

    def look(self) -> Look:
        return Look(self.count, 10, 20, self._rss(self.count))


def test_steps_that_end_are_no_leak_and_one_that_goes_on_is_found() -> None:
    steps: Any = Node(lambda count: min(count, 5000) * 2000)
    assert leaks(measure(steps, 6000)) == [] and steps.count == 9000
    leaking: Any = Node(lambda count: count * 2000)
    assert leaks(measure(leaking, 6000)) == ["RSS grows by 1.91 MB per 1,000 associations"]
    flat: Any = Node(lambda count: 1)
    assert leaks(measure(flat, 6000)) == [] and flat.count == 6000


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_flood_leaves_nothing_behind(tmp_path: Path) -> None:
    report = flood(tmp_path, COUNT, 1, lambda _: None, workers=1, verb=("run", "receiver"))
    assert report.wrong == [], report.rows
    assert all(report.counts[caller.__name__] > 50 for caller in CALLERS), "each kind came"
