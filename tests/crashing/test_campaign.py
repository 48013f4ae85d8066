"""A short campaign of kills under load: with those of ``tests/e2e/test_kills.py`` there are fifty in each test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.crashing.campaign import kills
from scripts.crashing.kills import Plan

KILLS = 23

pytestmark = [pytest.mark.peers, pytest.mark.slow]


@pytest.mark.timeout(280)
def test_nothing_is_lost_or_doubled_whatever_is_killed(tmp_path: Path) -> None:
    report = kills(
        tmp_path, Plan(KILLS, seed=3, pace_seconds=0.5, series_per_round=2, small_series_per_round=3), lambda _: None
    )
    assert report.wrong == []
    assert (report.counts["kills"], report.counts["lost"]) == (KILLS, 0)
    assert len({row[0] for row in report.rows}) >= 4, "several kinds of processes were killed"
    assert report.counts["answers_of_success"] >= 100
