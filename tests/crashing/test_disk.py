"""The model of a disk after a power cut, against hand-written traces."""

from __future__ import annotations

import random

import pytest

from scripts.crashing.disk import (
    Disk,
    NotModelled,
    all_but,
    all_names,
    everything,
    no_names,
    nothing_since,
    shuffled,
    size_alone,
    states,
    torn,
)
from scripts.crashing.shim import Event


class Trace:
    """Feeds a disk with calls."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.number = 0
        self("M", "", ino=1)
        self("S", "", ino=1)

    def __call__(
        self,
        kind: str,
        path: str,
        *,
        ino: int = 0,
        data: bytes = b"",
        offset: int = 0,
        length: int = 0,
        other: str = "",
    ) -> Trace:
        self.disk.apply(Event(self.number, kind, 1, 0, ino, offset, length, path, other, data))
        self.number += 1
        return self

    def made(self, path: str, ino: int, data: bytes) -> Trace:
        return self("O", path, ino=ino)("W", path, ino=ino, data=data)


def test_what_was_not_synced_may_be_gone() -> None:
    trace = Trace().made("a", 2, b"one")("S", "a", ino=2)
    assert trace.disk.crash(nothing_since, no_names) == {}, "the name is not certain yet"
    trace("S", "", ino=1)
    assert trace.disk.crash(nothing_since, no_names) == {"a": b"one"}
    trace("W", "a", ino=2, offset=3, data=b"two")
    assert trace.disk.crash(nothing_since) == {"a": b"one"}
    assert trace.disk.crash(everything) == {"a": b"onetwo"}
    assert trace.disk.crash(size_alone) == {"a": b"one\0\0\0"}
    assert not trace("S", "a", ino=2).disk.uncertain()


def test_a_rename_is_lost_without_its_directory_and_kept_with_it() -> None:
    trace = Trace().made("a", 2, b"old")("S", "a", ino=2)("S", "", ino=1)
    trace.made("b", 3, b"new")("R", "b", other="a")
    assert trace.disk.crash(everything, no_names) == {"a": b"old"}
    assert trace.disk.crash(everything, all_but(1)) == {"a": b"old", "b": b"new"}
    assert trace.disk.crash(nothing_since, all_names) == {"a": b""}, "a name may come before the data"
    trace("S", "", ino=1)
    assert trace.disk.crash(nothing_since, no_names) == {"a": b""}


def test_unsynced_sectors_are_of_any_age_and_a_torn_write_is_a_part() -> None:
    trace = Trace().made("a", 2, b"." * 2048)("S", "a", ino=2)("S", "", ino=1)
    trace("W", "a", ino=2, data=b"x" * 2048)
    chance = random.Random(1)
    mixed = {trace.disk.crash(shuffled(chance))["a"] for _ in range(50)}
    assert len(mixed) > 8
    assert all({s[n : n + 512] for n in range(0, 2048, 512)} <= {b"." * 512, b"x" * 512} for s in mixed)
    parts = {trace.disk.crash(torn(chance))["a"].count(b"x") for _ in range(50)}
    assert len(parts) > 8 and all(0 <= n <= 2048 for n in parts)


def test_what_is_certain_is_in_every_state() -> None:
    trace = Trace().made("a", 2, b"one")("S", "a", ino=2)("S", "", ino=1).made("b", 3, b"two")
    assert all(files["a"] == b"one" for _, files in states(trace.disk, random.Random(2), 5))
    assert {files.get("b") for _, files in states(trace.disk, random.Random(2), 5)} > {None, b"two"}


def test_a_call_that_is_not_described_is_refused() -> None:
    with pytest.raises(NotModelled):
        Trace()("!", "a", other="symlink")
