"""Power cuts in recordings of a real node: every promise holds, and breaks without any one fsync of the design.

A part of the moments and of the states; ``scripts/crash --power`` takes all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from scripts.crashing.cuts import RECORDINGS
from scripts.crashing.power import Explorers, Recording, explorers, removals, unnoticed
from scripts.crashing.shim import describe

pytestmark = pytest.mark.slow

RESTS_ON = {
    "intake": (
        "the intake journal",
        "an object",
        "an object's folder",
        "the write-ahead log",
        "the database",
        "the store's root",
        "the journal's folder",
    ),
    "replaced": ("the intake journal", "the database"),
    "results": ("an object", "an object's folder", "the write-ahead log", "the database"),
    "bundle": ("a file of a bundle", "a folder of staging", "a folder of models", "data_dir", "the database"),
    "upgrade": ("the rollback journal", "data_dir", "the database"),
}
"""By recording, what the design fsyncs there; of the first two each single call is taken away."""

PART = {"intake": 0.6, "replaced": 1.0, "results": 0.5, "bundle": 0.5, "upgrade": 0.5}
SEED = 5


@dataclass(frozen=True, slots=True)
class Recorded:
    recording: Recording
    explorers: Explorers


@pytest.fixture(scope="class")
def recorded(
    request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recorded]:
    name = request.cls.name
    recording = RECORDINGS[name](tmp_path_factory.mktemp(name), library)
    with explorers(recording) as pool:
        yield Recorded(recording, pool)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", RESTS_ON[metafunc.cls.name])


class Cuts:
    """One recording; a class for each, because tests run in random order and a class stays together."""

    name: ClassVar[str]

    def test_every_promise_holds_after_a_power_cut(self, recorded: Recorded) -> None:
        outcome = recorded.explorers.all(rounds=1, quick=True, seed=SEED, part=PART[self.name])
        assert outcome.breaches == []
        assert outcome.moments >= 5 and outcome.states >= 7 * outcome.moments

    def test_a_missing_fsync_is_noticed(self, recorded: Recorded, kind: str) -> None:
        tried, kept = unnoticed(recorded.recording, recorded.explorers, kind)
        assert tried > 0, f"the recording has no fsync of {kind}"
        assert kept == [], "nobody misses these"

    def test_the_list_names_every_kind_of_fsync_that_is_needed(self, recorded: Recorded) -> None:
        assert set(removals(recorded.recording)) == set(RESTS_ON[self.name])


class TestIntake(Cuts):
    name = "intake"

    def test_each_acknowledgement_rests_on_an_fsync_of_its_own(self, recorded: Recorded) -> None:
        recording = recorded.recording
        for before, answer in itertools.pairwise((-1, *recording.fresh)):
            between = [e for e in recording.events if before < e.number < answer and e.kind == "S"]
            assert between, f"nothing was synced before {describe(recording.events[answer])}"


class TestReplaced(Cuts):
    name = "replaced"


class TestResults(Cuts):
    name = "results"


class TestBundle(Cuts):
    name = "bundle"


class TestUpgrade(Cuts):
    name = "upgrade"
