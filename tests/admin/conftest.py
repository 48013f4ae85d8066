"""What the sidecar's tests use, too: an index on a clock that only the test moves."""

from __future__ import annotations

from tests.sync.conftest import clock, db

__all__ = ["clock", "db"]
