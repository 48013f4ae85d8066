"""Who is to blame when a request fails as a whole: the endpoint, or one item that it cannot digest.

An item that makes a receiver answer 5xx, or drop the line, must not hold back its class for ever. So
after some failures of a batch its items go alone; what fails then, while others are stored, is a
suspect: it waits by itself, always goes alone, and is parked when that has happened often enough.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dicomnode.cloud_settings import Lane
from dicomnode.index.database import Row
from dicomnode.sync.reply import Fate, Verdict
from dicomnode.sync.stow import Answer

T = TypeVar("T")
Class = tuple[Lane, bool]
"""Objects (True) or records of a class: each fails by itself."""

WHOLE_FAILURES = 3
"""Failures of a class in a row after which its items go alone."""

MOST_TRIES = 10
"""Failures of one item, each while others were stored, after which it is parked."""

MOST_UNPROVEN = 5
"""Items that are tried alone while nothing says that the endpoint is there."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A count of failures, and how many good answers and stored items there had been at the last one."""

    failures: int = 0
    answers: int = -1
    taken: int = -1


class Blame:
    """One per sender, in memory: after a restart everything is innocent again."""

    def __init__(self) -> None:
        self._lanes: dict[Class, Seen] = {}
        self._suspects: dict[int, Seen] = {}
        self._taken = 0

    def split(self, lane: Class, items: Sequence[Row]) -> list[tuple[list[Row], bool]]:
        """What goes together (False) and what one by one (True); a stream stays in one of them."""
        every = self._lanes.get(lane, Seen()).failures >= WHOLE_FAILURES
        doubtful = {i["stream"] for i in items if every or i["id"] in self._suspects}
        parts = [([i for i in items if (i["stream"] in doubtful) is alone], alone) for alone in (False, True)]
        return [(some, alone) for some, alone in parts if some]

    def there(self, lane: Class, answers: int) -> bool:
        """Whether an endpoint gave a good answer (``answers``: count of them) since the class failed last."""
        return answers > self._lanes.get(lane, Seen(answers=answers)).answers

    def others_stored(self, lane: Class, items: Iterable[Row]) -> bool:
        """Whether another class was taken since this one failed last, or others when these ``items`` were not."""
        if any(i["id"] in self._suspects for i in items):
            return True
        return self._taken > self._lanes.get(lane, Seen(taken=self._taken)).taken

    def lane_failed(self, lane: Class, answers: int) -> None:
        self._lanes[lane] = Seen(self._lanes.get(lane, Seen()).failures + 1, answers, self._taken)

    def lane_went(self, lane: Class, verdicts: Mapping[str, Verdict]) -> None:
        self._lanes.pop(lane, None)
        self._taken += any(v.fate is Fate.stored for v in verdicts.values())

    def item_failed(self, item: int) -> bool:
        """It failed and the endpoint is not to blame; True when it is to be parked."""
        seen = self._suspects.get(item, Seen())
        self._suspects[item] = Seen(seen.failures + (self._taken > max(0, seen.taken)), taken=self._taken)
        return self._suspects[item].failures >= MOST_TRIES

    def acquit(self, item: int) -> None:
        self._suspects.pop(item, None)


async def together(request: Callable[[Sequence[T]], Awaitable[Answer]], things: Mapping[str, T]) -> Answer:
    """One request; what it refuses as a whole is asked for one by one.

    Where each one alone is refused with the same HTTP status, the endpoint is meant, not the items.
    """
    answer = await request(list(things.values()))
    verdicts = dict(answer.verdicts)
    lone = [k for k in things if verdicts[k].fate is Fate.alone]
    for key in lone:
        one = await request([things[key]])
        verdicts |= one.verdicts
        if one.whole:
            return Answer(verdicts, one.whole, one.wait, one.mendable)
    causes = {verdicts[k].cause if verdicts[k].fate is Fate.reject else "" for k in lone}
    if len(lone) > 1 and len(causes) == 1 and (cause := causes.pop()).startswith("HTTP"):
        cause = f"{cause}, and so was each item by itself: check cloud.stow_url and what stands before it"
        return Answer(verdicts | dict.fromkeys(lone, Verdict(Fate.operator, cause)), cause, None, True)
    return Answer(verdicts, answer.whole, answer.wait, answer.mendable)


async def one_by_one(
    request: Callable[[Sequence[T]], Awaitable[Answer]],
    things: Mapping[str, T],
    streams: Mapping[str, str],
    *,
    there: bool,
    others_stored: bool,
) -> Answer:
    """A request for each; what fails holds back its stream only, and has no verdict where it was not asked for.

    It fails as a whole where nothing was stored, here or (``others_stored``) by others meanwhile.
    ``there``: something says that the endpoint is there, so all are tried.
    """
    verdicts: dict[str, Verdict] = {}
    held: set[str] = set()
    stored = others_stored
    bad: list[Answer] = []
    for key, thing in things.items():
        if streams[key] in held:
            continue
        one = await request([thing])
        verdicts |= one.verdicts
        stored |= one.verdicts[key].fate is Fate.stored
        if one.verdicts[key].fate not in {Fate.stored, Fate.reject}:
            held.add(streams[key])
        if not one.whole:
            continue
        bad.append(one)
        if one.mendable:
            return Answer(verdicts, one.whole, one.wait, one.mendable)
        if not (there or stored) and (one.wait is not None or len(bad) >= MOST_UNPROVEN):
            break
    if bad and not stored:
        return Answer(verdicts, bad[-1].whole, bad[-1].wait)
    return Answer(verdicts)
