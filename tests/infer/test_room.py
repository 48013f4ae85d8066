"""Memory for a volume: ready before it is needed, given away once, and never written to afterwards."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from dicomnode.infer.room import Room


def resident(array: np.ndarray) -> int:
    """Bytes of ``array`` that the kernel has pages for."""
    begin = array.__array_interface__["data"][0]
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(begin // mmap.PAGESIZE * 8)
        count = -(-array.nbytes // mmap.PAGESIZE)
        entries = np.frombuffer(pages.read(count * 8), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63))) * mmap.PAGESIZE


def test_what_was_asked_for_is_there_and_no_more() -> None:
    room = Room(64 << 20)
    for _ in range(8):
        room.grow(1 << 20)
    volume = room.array((64, 512, 512), np.int16)
    assert volume.flags.c_contiguous and volume.flags.writeable
    assert 8 << 20 <= resident(volume) <= 10 << 20, "up to one huge page more"


def test_it_is_given_away_once_and_left_alone_then() -> None:
    room = Room(1 << 20)
    room.grow(100)
    volume = room.array((4, 10, 10), np.int16)
    volume[:] = 7
    room.grow(1 << 20)
    again = room.array((4, 10, 10), np.int16)
    again[:] = 3
    assert (volume == 7).all() and not np.shares_memory(volume, again)


def test_a_larger_volume_lies_elsewhere() -> None:
    room = Room(1000)
    room.grow(5000)
    volume = room.array((10, 100), np.float32)
    assert volume.shape == (10, 100) and volume.dtype == np.float32


def test_a_range_that_the_system_does_not_grant() -> None:
    with pytest.raises((OSError, ValueError, OverflowError)):
        Room(1 << 62)
