"""Who is to blame when a request fails: the endpoint, or one item that it cannot digest.

An item that makes a receiver answer 5xx, or drop the line, must not hold back its class for ever. So
after some failures of a batch its items go alone; what fails then, while others are stored, is a
suspect: it waits by itself, always goes alone, and is parked when that has happened often enough. What
speaks against an item is kept in its row; what is known of the endpoint is of this life of the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dicomnode.cloud_settings import Lane
from dicomnode.index.database import Row
from dicomnode.sync.refusal import Fault, Step, decide
from dicomnode.sync.reply import Fate, Verdict
from dicomnode.sync.stow import Answer

T = TypeVar("T")
Class = tuple[Lane, bool]
"""Objects (True) or records of a class: each fails by itself."""

WHOLE_FAILURES = 3
"""Failures of a class in a row after which its items go alone."""

MOST_TRIES = 10
"""Failures of one item, each while others were stored, after which it is parked."""

MOST_REFUSED = 3
"""The same, where the answer was about address, token or rights: that does not pass for one item alone."""

MOST_UNPROVEN = 5
"""Items that are tried alone while nothing says that the endpoint is there, or that its rights are in order."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A count of failures, and how many good answers and stored items there had been at the last one."""

    failures: int = 0
    answers: int = -1
    taken: int = -1


class Blame:
    """One per sender."""

    def __init__(self) -> None:
        self._lanes: dict[Class, Seen] = {}
        self._suspects: dict[int, int] = {}
        self._taken = {True: 0, False: 0}
        self._refused: dict[tuple[bool, int], set[int]] = {}

    def alone(self, lane: Class) -> bool:
        """Whether the items of a class go one by one."""
        return self._lanes.get(lane, Seen()).failures >= WHOLE_FAILURES

    def there(self, lane: Class, answers: int) -> bool:
        """Whether an endpoint gave a good answer (``answers``: count of them) since the class failed last."""
        return answers > self._lanes.get(lane, Seen(answers=answers)).answers

    def others_stored(self, lane: Class, items: Iterable[Row]) -> bool:
        """Whether others of the kind were taken since this class failed last, or when these ``items`` were not."""
        if any(i["strikes"] for i in items):
            return True
        taken = self._taken[lane[1]]
        return taken > self._lanes.get(lane, Seen(taken=taken)).taken

    def alike(self, lane: Class, items: Iterable[Row]) -> Mapping[int, int]:
        """HTTP status -> other items that were refused with it since anything of the kind was stored."""
        here = {i["id"] for i in items}
        return {status: len(ids - here) for (kind, status), ids in self._refused.items() if kind is lane[1]}

    def lane_failed(self, lane: Class, answers: int) -> None:
        self._lanes[lane] = Seen(self._lanes.get(lane, Seen()).failures + 1, answers, self._taken[lane[1]])

    def lane_went(self, lane: Class, verdicts: Mapping[str, Verdict]) -> None:
        self._lanes.pop(lane, None)
        if any(v.fate is Fate.stored for v in verdicts.values()):
            self._taken[lane[1]] += 1
            self._refused = {k: ids for k, ids in self._refused.items() if k[0] is not lane[1]}

    def item_refused(self, lane: Class, item: Row, status: int) -> None:
        """It was parked for an answer to its request as a whole."""
        self._refused.setdefault((lane[1], status), set()).add(item["id"])

    def item_failed(self, lane: Class, item: Row) -> int:
        """It failed and the endpoint is not to blame: its strikes now; one for each time that others were stored."""
        taken = self._taken[lane[1]]
        strikes = int(item["strikes"]) + (taken > self._suspects.get(item["id"], 0))
        self._suspects[item["id"]] = taken
        return strikes

    def acquit(self, item: int) -> None:
        self._suspects.pop(item, None)


def weighed(verdicts: Mapping[str, Verdict], *, stored: bool, alike: Mapping[int, int]) -> dict[str, Verdict]:
    """Refusals of single items, seen beside each other: the same one of several, and nothing stored, is the endpoint's.

    ``stored``, ``alike``: of others before, as in :func:`dicomnode.sync.refusal.decide`. Pure.
    """
    stored = stored or any(v.fate is Fate.stored for v in verdicts.values())
    here = Counter(v.status for v in verdicts.values() if v.fate is Fate.reject and v.status)
    found = dict(verdicts)
    for key, verdict in verdicts.items():
        if verdict.fate is not Fate.reject or not verdict.status:
            continue
        others = here[verdict.status] - 1 + alike.get(verdict.status, 0)
        if decide(Fault.item, together=False, stored=stored, alike=others) is Step.operator:
            cause = f"HTTP {verdict.status}, and so for each item by itself: check cloud.stow_url and what is before it"
            found[key] = Verdict(Fate.operator, cause, status=verdict.status)
    return found


def least_tried_first(things: Mapping[str, T], items: Sequence[Row]) -> dict[str, T]:
    """``things`` of ``items``, every stream in its order; so that those at the front do not use up all tries. Pure."""
    tried: dict[str, int] = {}
    for item in items:
        tried.setdefault(str(item["stream"]), int(item["attempts"]))
    pairs = zip(things.items(), items, strict=True)
    return dict(pair for pair, _ in sorted(pairs, key=lambda p: tried[str(p[1]["stream"])]))


async def together(
    request: Callable[[Sequence[T]], Awaitable[Answer]],
    things: Mapping[str, T],
    streams: Mapping[str, str],
    *,
    others_stored: bool,
    alike: Mapping[int, int],
) -> Answer:
    """One request; where it is refused for what was sent, each is asked for by itself."""
    answer = await request(list(things.values()))
    if any(v.fate is Fate.alone for v in answer.verdicts.values()):
        return await one_by_one(request, things, streams, there=True, others_stored=others_stored, alike=alike)
    return _with_blame(answer, others_stored, alike)


async def one_by_one(
    request: Callable[[Sequence[T]], Awaitable[Answer]],
    things: Mapping[str, T],
    streams: Mapping[str, str],
    *,
    there: bool,
    others_stored: bool,
    alike: Mapping[int, int],
) -> Answer:
    """A request for each; what fails holds back its stream only, and has no verdict where it was not asked for.

    It fails as a whole where nothing was stored, here or (``others_stored``) by others meanwhile.
    ``there``: something says that the endpoint is there, so all are tried, but for a refusal of rights: a token
    that is wrong for one is wrong for all, and every try may count against it.
    """
    verdicts: dict[str, Verdict] = {}
    held: set[str] = set()
    stored = others_stored
    bad: list[Answer] = []
    heard = False
    for key, thing in things.items():
        if streams[key] in held:
            continue
        one = await request([thing])
        verdicts |= one.verdicts
        stored |= one.verdicts[key].fate is Fate.stored
        if one.verdicts[key].fate not in {Fate.stored, Fate.reject}:
            held.add(streams[key])
        if not one.whole:
            heard |= one.heard
            continue
        bad.append(one)
        if stored or (there and not one.mendable):
            continue
        if len(bad) >= MOST_UNPROVEN or (one.wait is not None and not there):
            break
    whole = bad[-1] if bad and not stored else Answer({})
    return _with_blame(Answer(verdicts, whole.whole, whole.wait, whole.mendable, heard), others_stored, alike)


def _with_blame(answer: Answer, stored: bool, alike: Mapping[int, int]) -> Answer:
    """``answer`` with its refusals weighed; it failed as a whole where they turn out to blame the endpoint."""
    found = weighed(answer.verdicts, stored=stored, alike=alike)
    turned = [v for k, v in found.items() if v != answer.verdicts[k]]
    return Answer(found, turned[0].cause, None, True) if turned else answer
