"""How large a request an endpoint takes, as its answers HTTP 413 (Content Too Large) and others have shown. Pure.

A batch that is too large is halved until it passes, and for an hour batches are made no larger than what passed, so
that not each of them is refused first. What is too large by itself goes to a backup that may take it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TypeVar

TOO_LARGE = int(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
REMEMBERED_SECONDS = 3600.0
"""Then it is found out anew: somebody may have raised the limit."""

NAMES_BYTES = 1024
"""By so much objects of the same kind may differ for their names and numbers alone."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Known:
    """Bytes of the largest request that passed, and of the smallest ones that did not: of several, of one alone."""

    passed: int = 0
    refused: int = 0
    alone: int = 0
    until: float = 0.0


class Sizes:
    """By endpoint and kind (objects: True, records: False); times are node time."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], Known] = {}

    def passed(self, number: int, objects: bool, size: int) -> None:
        """A request of so many bytes was not too large, whatever became of it."""
        known = self._known.get((number, objects))
        if known is None:
            return
        if size >= known.refused or (known.alone and size >= known.alone):  # the limit is another one now
            del self._known[(number, objects)]
        else:
            self._known[(number, objects)] = replace(known, passed=max(known.passed, size))

    def refused(self, number: int, objects: bool, size: int, now: float, *, alone: bool) -> None:
        known = self._now(number, objects, now)
        smallest = min(known.refused or size, size)
        if alone:
            known = replace(known, alone=min(known.alone or size, size))
        passed = known.passed if known.passed < smallest else 0
        until = now + REMEMBERED_SECONDS
        self._known[(number, objects)] = replace(known, refused=smallest, passed=passed, until=until)

    def most(self, number: int, objects: bool, now: float) -> float:
        """Bytes that a request of several should have."""
        known = self._now(number, objects, now)
        return max(known.passed, known.refused // 2) if known.refused else float("inf")

    def too_large(self, number: int, objects: bool, size: int, now: float) -> bool:
        """Whether one of that size was refused alone."""
        known = self._now(number, objects, now)
        return bool(known.alone) and size + NAMES_BYTES >= known.alone

    def _now(self, number: int, objects: bool, now: float) -> Known:
        known = self._known.get((number, objects), Known())
        return known if now < known.until else Known()


def halves(things: dict[str, T]) -> list[dict[str, T]]:
    keys = list(things)
    middle = len(keys) // 2
    return [{k: things[k] for k in part} for part in (keys[:middle], keys[middle:])]
