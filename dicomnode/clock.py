"""Time: the wall clock for people, and node time that never jumps for every deadline.

Node time is CLOCK_BOOTTIME plus a base that the index keeps for each boot, so it is the
same in all processes, does not follow corrections of the wall clock, and never runs
backwards across a restart. Leases, back-off and the quiet period use it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from dicomnode.errors import OperatorError


class Clock(Protocol):
    def wall(self) -> datetime:
        """Aware local time."""
        ...

    def ticks(self) -> float:
        """Node time in seconds; only differences and comparisons mean anything."""
        ...


@dataclass(frozen=True, slots=True)
class SystemClock:
    """The machine's clocks; ``base`` comes from the index (see Database)."""

    base: float = 0.0

    def wall(self) -> datetime:
        return datetime.now(UTC).astimezone()

    def ticks(self) -> float:
        return self.base + time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's identifier of this boot. Raises OperatorError where it cannot be read.

    Without it a reboot could not be told from a restart, and node time would run backwards.
    """
    path = Path("/proc/sys/kernel/random/boot_id")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise OperatorError(
            "read the boot id", f"{path}: {error.strerror}", "Let the process see /proc/sys (no ProcSubset=pid)"
        ) from None


def iso(moment: datetime) -> str:
    """ISO 8601 with offset and milliseconds."""
    return moment.isoformat(timespec="milliseconds")
