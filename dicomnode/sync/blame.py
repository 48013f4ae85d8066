"""Who is to blame when a request fails: the endpoint, or one item that it cannot digest.

An item that makes a receiver answer 5xx, or drop the line, must not hold back its class for ever. So
after some failures of a batch its items go alone; what fails then, while others are stored, is a
suspect: it waits by itself, always goes alone, and is parked when that has happened often enough. What
speaks against an item is kept in its row; what is known of endpoints is of this life of the process, each
by itself: what a backup stores says nothing of the primary. To lose it costs time and parks nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dicomnode.cloud_settings import Lane
from dicomnode.index.database import Row
from dicomnode.sync.refusal import Fault, Step, decide
from dicomnode.sync.reply import Fate, Verdict
from dicomnode.sync.sizes import TOO_LARGE, halves
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
    """One per sender. ``number``: of an endpoint."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[Class, int], Seen] = {}
        self._suspects: dict[int, dict[int, int]] = {}
        self._disliked: dict[int, dict[int, int]] = {}
        self._taken: dict[tuple[bool, int], int] = {}
        self._refused: dict[tuple[bool, int, int], set[int]] = {}

    def alone(self, lane: Class, number: int) -> bool:
        """Whether the items of a class go one by one."""
        return self._lanes.get((lane, number), Seen()).failures >= WHOLE_FAILURES

    def there(self, lane: Class, number: int, answers: int) -> bool:
        """Whether an endpoint gave a good answer (``answers``: count of them) since the class failed last."""
        return answers > self._lanes.get((lane, number), Seen(answers=answers)).answers

    def others_stored(self, lane: Class, number: int, items: Iterable[Row]) -> bool:
        """Whether others of the kind were taken since this class failed last, or when these ``items`` were not."""
        if any(i["strikes"] for i in items):
            return True
        taken = self._stored(lane, number)
        return taken > self._lanes.get((lane, number), Seen(taken=taken)).taken

    def proven(self, lane: Class, number: int, items: Iterable[Row]) -> frozenset[int]:
        """Of which ``items`` were refused for themselves here, and others of the kind stored since."""
        taken = self._stored(lane, number)
        return frozenset(i["id"] for i in items if taken > self._disliked.get(i["id"], {}).get(number, taken))

    def alike(self, lane: Class, number: int, items: Iterable[Row]) -> Mapping[int, int]:
        """HTTP status -> other items that were refused with it since anything of the kind was stored."""
        here = {i["id"] for i in items}
        known = self._refused.items()
        return {s: len(ids - here) for (kind, at, s), ids in known if kind is lane[1] and at == number}

    def lane_failed(self, lane: Class, number: int, answers: int) -> None:
        failures = self._lanes.get((lane, number), Seen()).failures + 1
        self._lanes[(lane, number)] = Seen(failures, answers, self._stored(lane, number))

    def lane_went(self, lane: Class, number: int, verdicts: Mapping[str, Verdict]) -> None:
        self._lanes.pop((lane, number), None)
        if any(v.fate is Fate.stored for v in verdicts.values()):
            self._taken[(lane[1], number)] = self._stored(lane, number) + 1
            self._refused = {k: ids for k, ids in self._refused.items() if k[:2] != (lane[1], number)}

    def item_refused(self, lane: Class, number: int, item: Row, status: int) -> None:
        """For itself, whatever became of it."""
        self._refused.setdefault((lane[1], number, status), set()).add(item["id"])
        self._disliked.setdefault(item["id"], {}).setdefault(number, self._stored(lane, number))

    def item_failed(self, lane: Class, number: int, item: Row) -> int:
        """It failed and the endpoint is not to blame: its strikes now; one for each time that others were stored."""
        taken = self._stored(lane, number)
        before = self._suspects.setdefault(item["id"], {})
        strikes = int(item["strikes"]) + (taken > before.get(number, 0))
        before[number] = taken
        return strikes

    def acquit(self, item: int) -> None:
        self._suspects.pop(item, None)
        self._disliked.pop(item, None)

    def _stored(self, lane: Class, number: int) -> int:
        return self._taken.get((lane[1], number), 0)


def weighed(
    verdicts: Mapping[str, Verdict], *, proven: Collection[str], alike: Mapping[int, int]
) -> dict[str, Verdict]:
    """Refusals of single items, in the order of their requests, seen beside each other and what was stored. Pure.

    ``proven``: items that were refused before, and others stored since. ``alike``: as in
    :func:`dicomnode.sync.refusal.decide`. An item is refused for good only where others were stored after it was.
    """
    here = Counter(v.status for v in verdicts.values() if v.fate is Fate.reject and v.status)
    stored = any(v.fate is Fate.stored for v in verdicts.values())
    found = dict(verdicts)
    later = False
    for key, verdict in reversed(list(verdicts.items())):
        later |= verdict.fate is Fate.stored
        if verdict.fate is not Fate.reject or not verdict.status:
            continue
        others = 0 if stored else here[verdict.status] - 1 + alike.get(verdict.status, 0)
        step = decide(Fault.item, together=False, stored=later or key in proven, alike=others)
        if step is Step.operator:
            cause = f"HTTP {verdict.status}, and so for each item by itself: check cloud.stow_url and what is before it"
            found[key] = Verdict(Fate.operator, cause, status=verdict.status)
        elif step is Step.doubt:
            cause = f"{verdict.cause}; it is asked for again once others were stored"
            found[key] = Verdict(Fate.retry, cause, status=verdict.status)
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
    proven: Collection[str],
    alike: Mapping[int, int],
) -> Answer:
    """One request; where it is refused for what was sent, each is asked for by itself; for its size, in halves."""
    answer = await request(list(things.values()))
    if not _apart(answer):
        return _with_blame(answer, proven, alike)
    if any(v.status == TOO_LARGE for v in answer.verdicts.values()):
        return _with_blame(await _in_halves(request, dict(things), streams), proven, alike)
    return await one_by_one(
        request, things, streams, there=True, others_stored=others_stored, proven=proven, alike=alike
    )


async def _in_halves(
    request: Callable[[Sequence[T]], Awaitable[Answer]], things: dict[str, T], streams: Mapping[str, str]
) -> Answer:
    """Until something is stored; how large it was is known then, and the rest, without a verdict, goes by that."""
    verdicts: dict[str, Verdict] = {}
    held: set[str] = set()
    heard, waiting = False, halves(things)
    while waiting and _refusals(verdicts) < MOST_UNPROVEN:
        some = {k: t for k, t in waiting.pop(0).items() if streams[k] not in held}
        if not some:
            continue
        answer = await request(list(some.values()))
        if _apart(answer):
            sized = any(v.status == TOO_LARGE for v in answer.verdicts.values())
            waiting[:0] = halves(some) if sized else [{k: t} for k, t in some.items()]
            continue
        verdicts |= answer.verdicts
        held |= {streams[k] for k in some if k not in answer.verdicts or not _settled(answer.verdicts[k])}
        heard |= not answer.whole and answer.heard
        if answer.whole:
            return Answer(verdicts, answer.whole, answer.wait, answer.mendable, heard)
        if any(v.fate is Fate.stored for v in verdicts.values()):
            break
    return Answer(verdicts, heard=heard)


async def one_by_one(
    request: Callable[[Sequence[T]], Awaitable[Answer]],
    things: Mapping[str, T],
    streams: Mapping[str, str],
    *,
    there: bool,
    others_stored: bool,
    proven: Collection[str],
    alike: Mapping[int, int],
) -> Answer:
    """A request for each; what fails holds back its stream only, and has no verdict where it was not asked for.

    It fails as a whole where nothing was stored, here or (``others_stored``) by others meanwhile.
    ``there``: something says that the endpoint is there, so all are tried, but for refusals: a token that is
    wrong for one is wrong for all, and every try may count against it.
    """
    verdicts: dict[str, Verdict] = {}
    held: set[str] = set()
    here, stored = False, others_stored
    bad: list[Answer] = []
    heard = False
    for key, thing in things.items():
        if streams[key] in held:
            continue
        one = await request([thing])
        verdicts |= one.verdicts
        here |= one.verdicts[key].fate is Fate.stored
        stored |= here
        if not _settled(one.verdicts[key]):
            held.add(streams[key])
        if not one.whole:
            heard |= one.heard
            if not here and _refusals(verdicts) >= MOST_UNPROVEN:
                break
            continue
        bad.append(one)
        if stored or (there and not one.mendable):
            continue
        if len(bad) >= MOST_UNPROVEN or (one.wait is not None and not there):
            break
    whole = bad[-1] if bad and not stored else Answer({})
    return _with_blame(Answer(verdicts, whole.whole, whole.wait, whole.mendable, heard), proven, alike)


def _apart(answer: Answer) -> bool:
    return any(v.fate is Fate.alone for v in answer.verdicts.values())


def _settled(verdict: Verdict) -> bool:
    return verdict.fate in {Fate.stored, Fate.reject}


def _refusals(verdicts: Mapping[str, Verdict]) -> int:
    return sum(v.fate is Fate.reject and bool(v.status) for v in verdicts.values())


def _with_blame(answer: Answer, proven: Collection[str], alike: Mapping[int, int]) -> Answer:
    """``answer`` with its refusals weighed; it failed as a whole where they turn out to blame the endpoint."""
    found = weighed(answer.verdicts, proven=proven, alike=alike)
    turned = [v for k, v in found.items() if v != answer.verdicts[k] and v.fate is Fate.operator]
    if turned:
        return Answer(found, turned[0].cause, None, True, answer.heard)
    spoken = any(v.fate is Fate.stored or not v.status for v in found.values())  # a refusal of all is no good answer
    return Answer(found, answer.whole, answer.wait, answer.mendable, answer.heard and spoken)
