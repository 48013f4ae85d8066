"""Power cuts: every moment of a recording, with what was not synced dropped, torn and out of order.

A proof is worth something only if it notices what is missing: :func:`explore` can leave out some
of the fsyncs, and then has to find a broken promise. :func:`needed` says which ones the design
rests on.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from scripts.crashing.disk import Disk, states
from scripts.crashing.shim import Event, describe
from scripts.crashing.survey import Promise, Recovery


@dataclass(frozen=True, slots=True)
class Recording:
    """What happened, from an empty folder (or ``before``) on, and what must hold after any of it.

    ``first``: number of the event from which on the promises are checked. ``moments``: numbers
    of events at which a promise grows, though nothing on the disk changes. ``fresh``: of them,
    those that acknowledged something new; ``rests_on``: kinds of fsync (:func:`kind_of_sync`)
    that the design needs here. Both say what :func:`removals` takes away.
    """

    name: str
    events: Sequence[Event]
    promises: Sequence[Promise]
    moments: frozenset[int]
    first: int = 0
    before: Callable[[], Disk] = Disk
    fresh: Sequence[int] = ()
    rests_on: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Breach:
    """A promise that did not hold: after which event, in which state."""

    event: Event
    state: str
    problem: str

    def __str__(self) -> str:
        return f"{self.problem}; power cut after {describe(self.event)}; {self.state}"


@dataclass(slots=True)
class Outcome:
    """``moments`` power cuts, in ``states`` states of the disk, of which ``different`` were not alike."""

    moments: int = 0
    states: int = 0
    different: int = 0
    breaches: list[Breach] = field(default_factory=list)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.moments + other.moments,
            self.states + other.states,
            self.different + other.different,
            self.breaches + other.breaches,
        )


@dataclass(frozen=True, slots=True)
class Task:
    """How to explore. ``dropped`` events never happened; ``first`` overrides the recording's.

    ``quick``: only just before each fsync, where most is uncertain, and where a promise grows.
    ``share`` (n, of) takes every ``of``-th moment. The search ends after ``most`` breaches.
    """

    rounds: int
    seed: int = 1
    dropped: frozenset[int] = frozenset()
    first: int | None = None
    quick: bool = False
    share: tuple[int, int] = (0, 1)
    most: int = 20


def explore(recording: Recording, recovery: Recovery, task: Task) -> Outcome:
    """Cut the power after each event."""
    disk, outcome = recording.before(), Outcome()
    worth = _worthwhile(recording) if task.quick else None
    first = recording.first if task.first is None else task.first
    started = recovery.started
    turn = 0
    for event in recording.events:
        changed = event.number not in task.dropped and disk.apply(event)
        if event.number < first or not (changed or event.number in recording.moments):
            continue
        if worth is not None and event.number not in worth:
            continue
        turn += 1
        if turn % task.share[1] != task.share[0]:
            continue
        outcome.moments += 1
        chance = random.Random(task.seed * 1_000_003 + event.number)
        for state, files in states(disk, chance, task.rounds if disk.uncertain() else 0):
            outcome.states += 1
            found = recovery.find(files)
            problems = [p for promise in recording.promises for p in promise(found, event.number)]
            outcome.breaches += [Breach(event, state, problem) for problem in problems[:3]]
            if len(outcome.breaches) >= task.most:
                outcome.different = recovery.started - started
                return outcome
    outcome.different = recovery.started - started
    return outcome


def _worthwhile(recording: Recording) -> set[int]:
    found = set(recording.moments)
    last = -1
    for event in recording.events:
        if event.kind == "S":
            found.add(last)
        elif event.kind in "OWTRLUMX":
            last = event.number
    return found | {last}


# All cores at once.

_here: tuple[Recording, Recovery] | None = None


def _begin(recording: Recording, folder: str) -> None:
    global _here  # noqa: PLW0603 what a process of the pool works on
    _here = recording, Recovery(Path(folder) / str(os.getpid()))


def _run(task: Task) -> Outcome:
    assert _here is not None
    return explore(*_here, task)


class Explorers:
    """Processes that explore one recording."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self._pool = pool
        self._count = count

    def all(self, *, rounds: int, quick: bool = False, seed: int = 1, part: float = 1.0) -> Outcome:
        """The whole recording, or ``part`` of its moments chosen by the seed, shared between the processes."""
        shares = self._count * 8  # uneven pieces even out
        chosen = sorted(random.Random(seed).sample(range(shares), max(1, round(part * shares))))
        tasks = [Task(rounds, seed, quick=quick, share=(n, shares)) for n in chosen]
        return sum(self._pool.map(_run, tasks), Outcome())

    def each(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        return self._pool.map(_run, tasks)


@contextmanager
def explorers(recording: Recording, *, processes: int | None = None) -> Iterator[Explorers]:
    count = processes or os.cpu_count() or 1
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="dicomnode-power-", dir=memory if memory.is_dir() else None)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(count, context, _begin, (recording, folder)) as pool:
            yield Explorers(pool, count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# What the design rests on.


def kind_of_sync(event: Event) -> str:
    """What an fsync is of, in words of the design."""
    path = PurePosixPath(event.path.removesuffix(" (deleted)"))
    if event.path in ("", "."):
        return "data_dir"
    if path.parts[0] == "objects":
        return ("the store's root", "an object's folder", "an object")[min(len(path.parts), 3) - 1]
    if path.parts[0] in ("models", "staging"):
        inside = path.suffix in (".json", ".onnx", ".md", ".npz", ".npy", ".gz", ".part")
        return "a file of a bundle" if inside else f"a folder of {path.parts[0]}"
    if path.parts[0] == "journal":
        return "the journal's folder" if len(path.parts) == 1 else "the intake journal"
    return {
        "index.sqlite": "the database",
        "index.sqlite-wal": "the write-ahead log",
        "index.sqlite-journal": "the rollback journal",
    }.get(path.name, path.name)


def syncs(recording: Recording) -> dict[str, list[int]]:
    """Numbers of the fsyncs that changed what is certain, by kind."""
    found: dict[str, list[int]] = {}
    disk = recording.before()
    for event in recording.events:
        if disk.apply(event) and event.kind == "S" and event.number >= recording.first:
            found.setdefault(kind_of_sync(event), []).append(event.number)
    return found


def removals(recording: Recording) -> dict[str, list[frozenset[int]]]:
    """What to leave out, by kind, so that a promise must break: of an intake any single fsync
    that an answer rests on, else all of a kind, as if its line were deleted from the program.
    """
    found: dict[str, list[frozenset[int]]] = {}
    for number, kind in needed(recording).items():
        found.setdefault(kind, []).append(frozenset((number,)))
    by_kind = syncs(recording)
    return found | {kind: [frozenset(by_kind.get(kind, ()))] for kind in recording.rests_on}


def unnoticed(recording: Recording, explorers: Explorers, kind: str) -> tuple[int, list[str]]:
    """How many removals of a kind were tried, and those of them after which every promise still held."""
    chosen = removals(recording).get(kind, [])
    tasks = [Task(1, dropped=d, first=max(min(d, default=0), recording.first), quick=True, most=1) for d in chosen]
    outcomes = zip(chosen, explorers.each(tasks), strict=True)
    kept = [
        describe(recording.events[min(d)]) if d else f"{kind}: there is none" for d, o in outcomes if not o.breaches
    ]
    return len(chosen), kept


def needed(recording: Recording) -> dict[int, str]:
    """The fsyncs without any one of which a promise must break, with what each is of.

    Each answer that acknowledged something new rests on the last fsync of the intake journal
    since the answer before or, where the object took the way without it, on those of its file,
    its folder and the write-ahead log. Then those that let the journal's records go: every
    object's file, and its folder. And what all of it stands in: the store's and the journal's
    folders, and the database before the log is used anew.

    Not in it, though done: commits on which no promise rests (heartbeats), SQLite's first of
    two fsyncs of a rollback journal, and the log's fsync of a retirement, which that of the
    checkpoint right after it repeats.
    """
    by_kind = syncs(recording)
    chosen: dict[int, str] = {}
    if not recording.fresh:
        return chosen
    before = recording.first - 1
    for answer in recording.fresh:
        last = {k: max((n for n in numbers if before < n < answer), default=-1) for k, numbers in by_kind.items()}
        journal = last.get("the intake journal", -1)
        rests = ["the intake journal"] if journal >= 0 else ["an object", "an object's folder", "the write-ahead log"]
        chosen |= {last[kind]: kind for kind in rests if last.get(kind, -1) >= 0}
        before = answer
    for kind in ("an object", "the store's root", "the journal's folder"):
        chosen |= dict.fromkeys(by_kind.get(kind, ()), kind)
    chosen |= dict.fromkeys(_last_before_commits(recording, by_kind), "an object's folder")
    chosen |= dict.fromkeys(_before_restarts(recording, by_kind), "the database")
    return chosen


def _last_before_commits(recording: Recording, by_kind: dict[str, list[int]]) -> Iterator[int]:
    """Of each folder the last fsync before the log's next one: what a durable row rests on."""
    commits, events = by_kind.get("the write-ahead log", []), recording.events
    latest: dict[tuple[str, int], int] = {}
    for number in by_kind.get("an object's folder", ()):
        latest[events[number].path, next((c for c in commits if c > number), len(events))] = number
    yield from latest.values()


def _before_restarts(recording: Recording, by_kind: dict[str, list[int]]) -> Iterator[int]:
    """The database's fsyncs after which its log was used anew or removed, before the next one."""
    first = recording.fresh[0]
    numbers = [n for n in by_kind.get("the database", ()) if n > first]
    log = "index.sqlite-wal"
    restarts = [
        e.number for e in recording.events if e.path == log and (e.kind == "U" or (e.kind == "W" and e.offset == 0))
    ]
    before = first
    for number, following in zip(numbers, [*numbers[1:], len(recording.events)], strict=True):
        if any(before <= answer < number for answer in recording.fresh):  # else it moved nothing that was promised
            before = number
            if any(number < restart < following for restart in restarts):
                yield number
