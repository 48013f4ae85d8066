"""Power cuts: every moment of a recording, with what was not synced dropped, torn and out of order.

A recording is worth something only if it notices what is missing: :func:`explore` can leave out
some of the fsyncs, and then has to find a broken promise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from scripts.crashing.disk import Disk, states
from scripts.crashing.shim import Event, describe
from scripts.crashing.survey import Promise, Recovery


@dataclass(frozen=True, slots=True)
class Recording:
    """What happened, from an empty folder (or ``before``) on, and what must hold after any of it.

    ``first``: number of the event from which on the promises are checked. ``moments``: numbers
    of events at which a promise grows, though nothing on the disk changes.
    """

    name: str
    events: Sequence[Event]
    promises: Sequence[Promise]
    moments: frozenset[int]
    first: int = 0
    before: Callable[[], Disk] = Disk


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
    """``moments`` power cuts, in ``states`` states of the disk, of which some were alike."""

    moments: int = 0
    states: int = 0
    breaches: list[Breach] = field(default_factory=list)


def explore(
    recording: Recording,
    recovery: Recovery,
    *,
    rounds: int,
    seed: int = 1,
    dropped: Collection[int] = (),
    most: int = 20,
    quick: bool = False,
) -> Outcome:
    """Cut the power after each event; ends after ``most`` breaches. ``dropped`` events never happened.

    ``quick``: only just before each fsync, where most is uncertain, and where a promise grows.
    """
    disk, chance, outcome = recording.before(), random.Random(seed), Outcome()
    worth = _moments(recording) if quick else None
    for event in recording.events:
        changed = event.number not in dropped and disk.apply(event)
        if event.number < recording.first or not (changed or event.number in recording.moments):
            continue
        if worth is not None and event.number not in worth:
            continue
        outcome.moments += 1
        for state, files in states(disk, chance, rounds if disk.uncertain() else 0):
            outcome.states += 1
            found = recovery.find(files)
            problems = [p for promise in recording.promises for p in promise(found, event.number)]
            outcome.breaches += [Breach(event, state, problem) for problem in problems[:3]]
            if len(outcome.breaches) >= most:
                return outcome
    return outcome


def _moments(recording: Recording) -> set[int]:
    found = set(recording.moments)
    last = -1
    for event in recording.events:
        if event.kind == "S":
            found.add(last)
        elif event.kind in "OWTRLUMX":
            last = event.number
    return found | {last}


def kind_of_sync(event: Event) -> str:
    """What an fsync is of, in words of the design."""
    path = PurePosixPath(event.path.removesuffix(" (deleted)"))
    if event.path in ("", "."):
        return "data_dir"
    if path.parts[0] == "objects":
        return ("the store's root", "an object's folder", "an object")[min(len(path.parts), 3) - 1]
    if path.parts[0] in ("models", "staging"):
        inside = path.suffix in (".json", ".onnx", ".md", ".npz", ".npy", ".gz")
        return "a file of a bundle" if inside else f"a folder of {path.parts[0]}"
    return {
        "index.sqlite": "the database",
        "index.sqlite-wal": "the write-ahead log",
        "index.sqlite-journal": "the rollback journal",
    }.get(path.name, path.name)


def syncs(recording: Recording) -> dict[str, list[int]]:
    """Numbers of the fsyncs of each kind."""
    found: dict[str, list[int]] = {}
    for event in recording.events:
        if event.kind == "S":
            found.setdefault(kind_of_sync(event), []).append(event.number)
    return found


def before_each(recording: Recording, moment: int, since: int) -> Iterator[tuple[str, int]]:
    """The last fsync of each kind between two moments: what an acknowledgement at ``moment`` rests on."""
    last: dict[str, int] = {}
    for event in recording.events[since + 1 : moment]:
        if event.kind == "S":
            last[kind_of_sync(event)] = event.number
    yield from last.items()
