"""De-identification in a child: the same bytes, errors come back, a dead child is replaced."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode.errors import MalformedDataSet
from dicomnode.sync.aside import Aside, leave
from tests.sync.index_case import secondary_capture

KEY = b"k" * 32


@pytest.fixture(scope="module")
def aside() -> Iterator[Aside]:
    made = Aside()
    yield made
    made.close()


def test_the_child_does_the_same(aside: Aside, tmp_path: Path) -> None:
    path = tmp_path / "one.dcm"
    path.write_bytes(secondary_capture()[1])
    assert aside.leave(path, KEY) == leave(path, KEY)
    path.write_bytes(b"rubbish")
    with pytest.raises(MalformedDataSet, match="cannot be de-identified"):
        aside.leave(path, KEY)
    with pytest.raises(MalformedDataSet, match="cannot be read"):
        aside.leave(tmp_path / "none", KEY)


def test_a_dead_child_is_replaced(aside: Aside, tmp_path: Path) -> None:
    path = tmp_path / "one.dcm"
    path.write_bytes(secondary_capture()[1])
    before = aside.leave(path, KEY)
    for child in multiprocessing.active_children():
        child.kill()
    assert aside.leave(path, KEY) == before
