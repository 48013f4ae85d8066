"""A disk that fails under a running node: EIO and ENOSPC, once and from then on, at steps of each kind.

A part of the steps, chosen by a seed; ``scripts/crash --faults`` takes all.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.crashing.faults import ACTIVATION, LATER, Case, Intake, Whole, intake_cases
from scripts.crashing.shim import Op

pytestmark = pytest.mark.slow

PART = 0.02
"""Of the steps: at least one of each kind of call and fault."""

EACH = 2
SEED = 7
SYNCS = 9
"""fsyncs that an intake is sure to make: journal, the long object's file, folder and row, what fills the ring."""


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Iterator[Intake]:
    with Intake(tmp_path_factory.mktemp("faults"), library) as running:
        yield running


def test_a_step_of_each_kind_fails(intake: Intake) -> None:
    chance = random.Random(SEED)
    by_op: dict[tuple[Op, str], list[Case]] = {}
    for case in intake_cases(intake, chance, PART):
        by_op.setdefault((case.op, case.match), []).append(case)
    chosen = [case for cases in by_op.values() for case in chance.sample(cases, min(EACH, len(cases)))]
    results = [intake.run(case) for case in chosen]
    assert [f"{r.case}: {r.outcome()}: {r.wrong}" for r in results if r.wrong] == []
    struck = {r.case.op for r in results if r.fired}
    assert struck >= {Op.create, Op.write, Op.sync, Op.rename}


def test_no_answer_of_success_comes_over_a_failed_fsync(intake: Intake) -> None:
    """Each fsync up to the answers, once: a process that goes on after it would answer what is not durable."""
    results = [intake.run(Case(Op.sync, errno.EIO, nth)) for nth in range(3, SYNCS, 2)]
    assert [f"{r.case}: {r.outcome()}: {r.wrong}" for r in results if r.wrong] == []
    assert all(r.fired for r in results)
    assert any(r.exit is not None and -1 in r.answers for r in results)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Iterator[Whole]:
    with Whole(tmp_path_factory.mktemp("whole"), library) as running:
        yield running


SOME = [
    later
    for later in LATER
    if later.case.code == errno.EIO
    and (later.when, later.case.op, later.case.match)
    in {("analysing", Op.sync, "objects/"), ("sending", Op.write, "index.sqlite-wal")}
]


@pytest.mark.parametrize("number", range(len(SOME)))
def test_results_and_deliveries_outlive_a_fault(whole: Whole, number: int) -> None:
    assert whole.run(SOME[number]).wrong == ()


@pytest.mark.parametrize("case", ACTIVATION[:2], ids=str)
def test_activation_says_that_it_failed(whole: Whole, case: Case) -> None:
    assert whole.activate(case) == []
