"""What the sender works with: one lease of items, how they are grouped, and who makes them ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dicomnode.cloud_settings import Lane
from dicomnode.index.database import Row
from dicomnode.sync.blame import Class

T = TypeVar("T")


class Prepare(Protocol):
    """What leaves in place of what is stored (:class:`dicomnode.sync.departure.Departures`)."""

    def ready(self) -> None:
        """Raises OperatorError when nothing can be prepared, so nothing may leave."""

    def object(self, item: Row, path: Path) -> tuple[str, bytes | None]:
        """SOPInstanceUID and content of an object; None: the file as it is. Raises InputError for one that cannot."""

    def record(self, item: Row) -> Mapping[str, Any]:
        """A record as config/cloud-api.yaml has it. Raises InputError for one that cannot leave."""

    def keep(self) -> None:
        """Commit what the pseudonyms stand for; before anything of it is sent."""


@dataclass(slots=True)
class Batch:
    """What became of the items of one lease."""

    stored: list[int] = field(default_factory=list)
    conflicts: set[int] = field(default_factory=set)
    again: list[tuple[int, str]] = field(default_factory=list)
    untried: list[int] = field(default_factory=list)
    moved: list[tuple[int, str]] = field(default_factory=list)  # to be asked for elsewhere
    settled: int = 0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Ready(Generic[T]):
    """One item that can be sent, by the ``key`` that answers have; ``size``: bytes that leave."""

    key: str
    item: Row
    size: int
    thing: T


def first_of(ready: Sequence[Ready[T]], most: float) -> Sequence[Ready[T]]:
    """As many from the front as make ``most`` bytes together, one at least. Pure."""
    total = 0
    for count, one in enumerate(ready):
        total += one.size
        if count and total > most:
            return ready[:count]
    return ready


def class_of(lane: Lane, item: Row) -> Class:
    return lane, item["result_id"] is not None


def runs(items: Sequence[Row]) -> Iterator[list[Row]]:
    """Items in as few requests as possible: objects or records each, and every stream in its order. Pure."""
    left = list(items)
    while left:
        objects = left[0]["result_id"] is not None
        run: list[Row] = []
        rest: list[Row] = []
        held: set[str] = set()
        for item in left:
            if (item["result_id"] is not None) == objects and item["stream"] not in held:
                run.append(item)
            else:
                held.add(item["stream"])
                rest.append(item)
        yield run
        left = rest
