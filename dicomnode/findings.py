"""What a check found, with what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    ok = "OK"
    note = "NOTE"
    warn = "WARN"
    fault = "FAULT"


@dataclass(frozen=True, slots=True)
class Finding:
    """``text`` says what is, ``hint`` what to do; FAULT means that the node cannot do its work."""

    level: Level
    check: str
    text: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return {**asdict(self), "level": self.level.value}
