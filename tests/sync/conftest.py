"""An index on a clock that only the test moves, wall time with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode.index.database import Database
from tests.sync.index_case import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def db(tmp_path: Path, clock: FakeClock) -> Iterator[Database]:
    database = Database(tmp_path, clock)
    yield database
    database.close()
