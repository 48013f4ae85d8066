"""Which version a study goes to, when one has to go back, and drift: decisions as functions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.drift import drift, psi
from dicomnode.rollout import Canary, Compared, Limits, Run, agreement, bucket, choose, judge

UIDS = st.from_regex(r"\A1\.2\.[0-9]{1,20}\Z")
LIMITS = Limits()


@given(UIDS, st.floats(0, 100), st.floats(0, 100))
def test_a_greater_share_keeps_the_studies_that_it_had(study: str, less: float, more: float) -> None:
    less, more = sorted((less, more))

    def role(percent: float) -> str:
        return choose("m", study, (), [Canary("2", percent)], active="1")[0]

    assert role(less) == role(less)
    assert role(more) == "canary" or role(less) == "active"
    assert role(0.0) == "active" and role(100.0) == "canary"


def test_the_share_is_what_was_asked_for() -> None:
    studies = [f"1.2.840.{n}" for n in range(20_000)]
    for percent in (1.0, 10.0, 50.0):
        share = sum(bucket(s, "m", "2.0.0") < percent for s in studies) / len(studies)
        assert share == pytest.approx(percent / 100, abs=0.01)
    both = sum(bucket(s, "m", "2.0.0") < 50 and bucket(s, "m", "3.0.0") < 50 for s in studies) / len(studies)
    assert both == pytest.approx(0.25, abs=0.02)  # versions do not meet the same studies


def test_a_bucket_never_changes() -> None:
    """Studies stay with their version over restarts and upgrades of the node."""
    assert bucket("1.2.3", "ct-lung", "1.1.0") == pytest.approx(79.207016, abs=1e-5)


@given(UIDS, st.floats(0, 100))
def test_a_study_stays_while_its_version_serves(study: str, percent: float) -> None:
    canaries = [Canary("2", percent)]
    assert choose("m", study, (), canaries, active="1", before="1") == ("active", "1")
    assert choose("m", study, (), canaries, active="1", before="2") == ("canary", "2")
    assert choose("m", study, (), [], active="1", before="2") == ("active", "1")  # rolled back
    assert choose("m", study, (), [], active="3", before="1") == ("active", "3")  # displaced


def test_chosen_peers_go_to_the_canary() -> None:
    canaries = [Canary("2", 0.0, ("ct1", "CT2_AE"))]
    assert choose("m", "1.2", ("ct1", "CT1_AE"), canaries, active="1") == ("canary", "2")
    assert choose("m", "1.2", ("ct2", "CT2_AE"), canaries, active="1") == ("canary", "2")
    assert choose("m", "1.2", ("ct3",), canaries, active="1") == ("active", "1")


def runs(done: int = 0, error: int = 0, *, seconds: float = 1.0, state: str = "error") -> list[Run]:
    return [Run("done", 10, seconds)] * done + [Run(state, 10)] * error


GOOD = Compared(0.99, 0.01, True)


@pytest.mark.parametrize(
    ("mine", "theirs", "compared", "reason"),
    [
        (runs(20), runs(20), [GOOD] * 20, None),
        (runs(0, 2), runs(20), [], None),  # two failures are no verdict
        (runs(0, 3), runs(20), [], "errors"),
        (runs(0, 3, state="lost"), runs(20), [], "errors"),
        (runs(0, 3, state="refused"), runs(20), [], "errors"),
        (runs(0, 9, state="stopped"), runs(20), [], None),
        (runs(0, 9, state="running"), runs(20), [], None),
        (runs(10, 3), runs(10, 3), [], None),  # both fail alike: it is the studies
        (runs(30, 3), runs(20), [], None),
        (runs(10, 3), [], [], "errors"),
        (runs(5, seconds=2.1), runs(20), [], "time"),
        (runs(4, seconds=9.0), runs(20), [], None),
        (runs(20, seconds=1.9), runs(20), [], None),
        (runs(20, seconds=9.0), [], [], None),
        (runs(20), runs(20), [GOOD] * 3 + [Compared(0.5, 0.0, True)] * 2, "disagreement"),
        (runs(20), runs(20), [GOOD] * 3 + [Compared(0.99, 0.5, True)] * 2, "disagreement"),
        (runs(20), runs(20), [GOOD] * 3 + [Compared(0.99, 0.0, False)] * 2, "disagreement"),
        (runs(20), runs(20), [GOOD] * 9 + [Compared(0.5, 0.0, True)] * 3, None),
        (runs(20), runs(20), [Compared(0.0, 1.0, False)] * 4, None),
        (runs(20), runs(20), [Compared(None, None, True)] * 9, None),
    ],
)
def test_verdict(mine: list[Run], theirs: list[Run], compared: list[Compared], reason: str | None) -> None:
    verdict = judge(mine, theirs, compared, LIMITS)
    assert (verdict.reason if verdict else None) == reason


@given(st.lists(st.sampled_from(["done", "error", "lost", "refused", "stopped", "running"]), max_size=30))
def test_the_same_record_as_before_is_never_worse(states: list[str]) -> None:
    record = [Run(s, 10, 1.0) for s in states]
    assert judge(record, record, [GOOD] * 30, LIMITS) is None


def on(engine: str, count: int, seconds: float, *, settled: bool = True) -> list[Run]:
    return [Run("done", 10, seconds, engine, settled)] * count


GPU, CPU = "tensorrt", "onnxruntime-cpu"


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        # Its plan is being built, and the next engine stands in: twenty times slower, and no fault of its own.
        (on(CPU, 9, 20.0, settled=False), on(GPU, 20, 1.0), None),
        (on(CPU, 9, 20.0, settled=False) + on(GPU, 4, 1.0), on(GPU, 20, 1.0), None),
        (on(CPU, 9, 20.0, settled=False) + on(GPU, 5, 2.5), on(GPU, 20, 1.0), "time"),
        # No better engine takes it: that is how fast it is.
        (on(CPU, 5, 20.0), on(GPU, 20, 1.0), "time"),
        (on(CPU, 5, 20.0), on(GPU, 20, 1.0) + on(CPU, 3, 20.0, settled=False), "time"),
        (on(CPU, 4, 20.0), on(GPU, 20, 1.0), None),
        # The one before has been on the slower engine for a while, or is for good.
        (on(GPU, 5, 1.0), on(CPU, 20, 20.0), None),
        (on(CPU, 5, 60.0, settled=False), on(CPU, 2, 20.0, settled=False) + on(GPU, 20, 1.0), "time"),
        (on(CPU, 9, 20.0) + on(GPU, 9, 1.0), on(CPU, 3, 20.0) + on(GPU, 20, 1.0), None),
    ],
)
def test_time_is_compared_on_one_engine_and_across_engines_only_when_they_stay(
    mine: list[Run], theirs: list[Run], reason: str | None
) -> None:
    verdict = judge(mine, theirs, [], LIMITS)
    assert (verdict.reason if verdict else None) == reason


def test_agreement_is_a_share() -> None:
    assert agreement([], LIMITS) is None
    assert agreement([GOOD, GOOD, Compared(0.1, None, True), GOOD], LIMITS) == 0.75


def test_drift_sees_a_shift_and_not_chance() -> None:
    chance = random.Random(4)
    values = [chance.gauss(100, 10) for _ in range(300)]
    calm = drift(values, 200, 100)
    assert calm is not None and calm.psi < 0.1
    moved = drift(values[:200] + [v + 10 for v in values[200:]], 200, 100)
    assert moved is not None and moved.psi > 0.25
    assert moved.recent_mean - moved.reference_mean == pytest.approx(10, abs=3)
    wider = drift(values[:200] + [100 + (v - 100) * 3 for v in values[200:]], 200, 100)
    assert wider is not None and wider.psi > 0.25  # the mean alone would not show it


def test_drift_of_a_constant_goes_both_ways() -> None:
    assert psi([1.0] * 50, [1.0] * 50) == 0.0
    assert psi([1.0] * 50, [0.0] * 50) > 0.25
    assert psi([1.0] * 50, [2.0] * 50) > 0.25


def test_drift_needs_two_windows_that_do_not_overlap() -> None:
    assert drift([1.0] * 30, 200, 100) is None
    assert drift([1.0] * 20 + [float("nan")] * 99 + [1.0] * 19, 20, 100) is None
    found = drift([0.0] * 20 + [1.0] * 20, 20, 100)
    assert found is not None and (found.reference_mean, found.recent_mean) == (0.0, 1.0)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=60), st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=60)
)
def test_psi_is_a_number_and_not_negative(reference: list[float], recent: list[float]) -> None:
    assert 0.0 <= psi(reference, recent) < 50
    assert psi(reference, reference) == 0.0
