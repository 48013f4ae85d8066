"""``scripts/crash --power``: a power cut after every step of every recording, and each fsync taken away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.crashing import recordings
from scripts.crashing.power import Explorers, Outcome, Recording, explorers, removals, unnoticed
from scripts.crashing.report import Report, Say
from scripts.crashing.shim import build

RECORDINGS: dict[str, Callable[[Path, Path], Recording]] = {
    "intake": recordings.intake,
    "replaced": recordings.replaced,
    "results": recordings.results,
    "bundle": recordings.bundle,
    "upgrade": recordings.upgrade,
    "crowd": recordings.crowd,
}
ROUNDS = 2
"""Random states of the disk of each sort, at each moment, beside the extremes."""


def power(folder: Path, seed: int, part: float, say: Say) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    library = build(folder)
    report = Report("power", "power cuts", ("recording", "steps", "cuts", "states of the disk", "different", "broken"))
    begin, total, tried, missed = time.monotonic(), Outcome(), 0, 0
    for recording in _recordings(folder, library, say):
        with explorers(recording) as pool:
            outcome = pool.all(rounds=ROUNDS, quick=recording.name == "crowd", seed=seed, part=part)
            total += outcome
            report.wrong += [f"{recording.name}: {breach}" for breach in outcome.breaches]
            for count, kept in _taken_away(recording, pool):
                tried, missed = tried + count, missed + len(kept)
                report.wrong += [f"{recording.name}: nobody misses the fsync of {text}" for text in kept]
        numbers = (outcome.moments, outcome.states, outcome.different, len(outcome.breaches))
        report.rows.append((recording.name, len(recording.events), *numbers))
        say(f"{recording.name}: {outcome.moments} cuts, {outcome.states} states, {len(outcome.breaches)} broken")
    report.counts = {
        "power_cuts": total.moments,
        "states": total.states,
        "different_states": total.different,
        "broken_promises": len(total.breaches),
        "fsyncs_taken_away": tried,
        "not_noticed": missed,
    }
    report.seconds = time.monotonic() - begin
    return report


def _recordings(folder: Path, library: Path, say: Say) -> Iterator[Recording]:
    for name, make in RECORDINGS.items():
        say(f"{name}: recording")
        yield make(folder / name, library)
    number = 0
    while True:  # the first start dies before its first fsync, its second, ...
        number += 1
        birth = recordings.birth(folder / f"birth-{number}", library, dies_before_sync=number)
        if birth is None:
            return
        yield birth


def _taken_away(recording: Recording, pool: Explorers) -> Iterator[tuple[int, list[str]]]:
    for kind in removals(recording):
        yield unnoticed(recording, pool, kind)
