"""What every test may use: an index on a clock that only the test moves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from dicomnode import doorbell
from dicomnode.index.database import Database
from tests.index.rows import FakeClock

os.environ.setdefault("DICOMNODE__DIMSE__JOURNAL_MB", "8")  # hundreds of nodes are started; each makes its journals

settings.register_profile(
    "node",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.getenv("CI")),
)
settings.load_profile("node")


@pytest.fixture(autouse=True)
def _fresh_logs() -> Iterator[None]:
    """Logs are set up per process: what one test configured must not write to its closed stream later."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True, scope="session")
def _close_ringer() -> Iterator[None]:
    yield
    if doorbell._ringer is not None:
        doorbell._ringer.close()
        doorbell._ringer = None


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not here: real DICOM files are not compared")
    return SHARED_DATA


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def db(tmp_path: Path, clock: FakeClock) -> Iterator[Database]:
    database = Database(tmp_path / "data", clock)
    yield database
    database.close()
