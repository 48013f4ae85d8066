"""Doorbells: a ring is seen, a missing stage is no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicomnode.doorbell import Doorbell, ring


@pytest.mark.parametrize("deep", [False, True], ids=["path", "abstract"])
def test_ring_is_seen_once(tmp_path: Path, deep: bool) -> None:
    folder = tmp_path / ("x" * 120 if deep else "d")
    bell = Doorbell(folder, "worker")
    try:
        assert not bell.wait(0)
        for _ in range(3):
            ring(folder, "worker")
        assert bell.wait(5) and not bell.wait(0), "several rings are one"
        ring(folder, "courier")
        assert not bell.wait(0)
    finally:
        bell.close()


def test_nobody_listens_and_full_queue(tmp_path: Path) -> None:
    ring(tmp_path / "nowhere", "worker")
    bell = Doorbell(tmp_path, "worker")
    for _ in range(2000):
        ring(tmp_path, "worker")
    assert bell.wait(5)
    bell.close()
    ring(tmp_path, "worker")


def test_next_life_takes_the_address(tmp_path: Path) -> None:
    Doorbell(tmp_path, "worker").close()
    bell = Doorbell(tmp_path, "worker")
    ring(tmp_path, "worker")
    assert bell.wait(5)
    bell.close()


def test_an_operators_ring_is_told_from_the_others(tmp_path: Path) -> None:
    bell = Doorbell(tmp_path, "sidecar")
    ring(tmp_path, "sidecar")
    assert bell.wait(5) and not bell.at_once()
    ring(tmp_path, "sidecar", at_once=True)
    ring(tmp_path, "sidecar")
    assert bell.wait(5) and bell.at_once() and not bell.at_once()
    bell.close()
