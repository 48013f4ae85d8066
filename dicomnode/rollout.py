"""Which version of a model analyses a study, and when a version has to go back. Pure.

A canary's share is a matter of the study alone: a number from 0 to 100 is derived from
StudyInstanceUID, model and version, and a study is the canary's while its number is below the
share. So all series of a study go to one version, a retry does not flip, a share that is
raised keeps the studies it had, and two canaries one after the other do not always meet the
same patients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Role = Literal["active", "canary", "pinned"]
RunState = Literal["running", "done", "refused", "error", "lost", "stopped"]
Reason = Literal["errors", "time", "disagreement"]
_BAD = frozenset({"error", "lost", "refused"})
_ENDED = frozenset({"done", *_BAD})


@dataclass(frozen=True, slots=True)
class Canary:
    """A version on trial: ``percent`` (0..100) of the studies, and all that ``peers`` send."""

    version: str
    percent: float
    peers: tuple[str, ...] = ()


def bucket(study_uid: str, name: str, version: str) -> float:
    """A number in 0 <= n < 100, uniform over studies, the same for ever."""
    digest = hashlib.sha256("\0".join((name, version, study_uid)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * 100.0


def choose(
    name: str,
    study_uid: str,
    callers: Sequence[str],
    canaries: Sequence[Canary],
    *,
    active: str,
    before: str | None = None,
) -> tuple[Role, str]:
    """Role and version for a series of the study; ``active`` is what serves all others.

    ``callers``: peer names and calling AE titles that sent the series. ``before``: the version
    that the study's series went to, or this job at its former attempt: kept while it serves.
    """
    on_trial = {c.version for c in canaries}
    if before is not None and before == active:
        return "active", active
    if before is not None and before in on_trial:
        return "canary", before
    for canary in canaries:
        if set(callers) & set(canary.peers) or bucket(study_uid, name, canary.version) < canary.percent:
            return "canary", canary.version
    return "active", active


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt at a job by one version. ``seconds``: reading, inference and post-processing.

    ``engine``: name of what it ran on. ``settled``: False while a better engine was being built for
    the version, or had too little memory for the moment: how fast it is shows later.
    """

    state: str
    instances: int = 0
    seconds: float = 0.0
    engine: str = ""
    settled: bool = True

    @property
    def ended(self) -> bool:
        """A stop of the node, and what still runs, says nothing of the version."""
        return self.state in _ENDED


@dataclass(frozen=True, slots=True)
class Compared:
    """What two versions made of one series.

    ``least_dice``: of the segment that agrees least, None where neither made any;
    ``greatest_difference``: of the measurements, as a share of the greater value.
    """

    least_dice: float | None
    greatest_difference: float | None
    same_findings: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """See ``[rollout]`` of the settings, which says what each of them means."""

    min_runs: int = 5
    max_error_excess: float = 0.2
    min_errors: int = 3
    max_slowdown: float = 2.0
    max_disagreement: float = 0.25
    min_dice: float = 0.85
    max_difference: float = 0.15


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a version has to go back; ``text`` is for the operator."""

    reason: Reason
    text: str


def agrees(one: Compared, limits: Limits) -> bool:
    """Same findings, masks and measurements within the limits."""
    return (
        one.same_findings
        and (one.least_dice is None or one.least_dice >= limits.min_dice)
        and (one.greatest_difference is None or one.greatest_difference <= limits.max_difference)
    )


def agreement(compared: Sequence[Compared], limits: Limits) -> float | None:
    """Share of the comparisons that agree, 0..1; None without any."""
    return sum(agrees(c, limits) for c in compared) / len(compared) if compared else None


def error_rate(runs: Sequence[Run]) -> float:
    """Share of the ended attempts that gave no result, 0..1; 0 without any.

    A series that is refused counts: a contract that is stricter than that of the version
    before leaves studies without a result. What both refuse cancels out in :func:`judge`.
    """
    ended = [r for r in runs if r.ended]
    return sum(r.state in _BAD for r in ended) / len(ended) if ended else 0.0


def seconds_per_image(runs: Sequence[Run]) -> float | None:
    """Median over the finished attempts, seconds; None without any."""
    done = [r.seconds / max(1, r.instances) for r in runs if r.state == "done" and r.seconds > 0]
    return median(done) if done else None


def comparable(
    runs: Sequence[Run], reference: Sequence[Run], least: int
) -> Iterator[tuple[Sequence[Run], Sequence[Run]]]:
    """Finished runs of both that may be compared in time: at least ``least`` of the version on trial.

    Those on one engine. Only where the two have no engine in common, all of either on the engines
    that they will stay on: a version that no better engine takes is slower for good.
    """
    mine, theirs = ([r for r in some if r.state == "done"] for some in (runs, reference))
    alone = True
    for engine in sorted({r.engine for r in mine} & {r.engine for r in theirs}):
        here, there = ([r for r in some if r.engine == engine] for some in (mine, theirs))
        if len(here) >= least:
            alone &= not (any(r.settled for r in here) and any(r.settled for r in there))
            yield here, there
    settled = [r for r in mine if r.settled]
    if alone and len(settled) >= least:
        yield settled, [r for r in theirs if r.settled]


def judge(
    runs: Sequence[Run], reference: Sequence[Run], compared: Sequence[Compared], limits: Limits
) -> Verdict | None:
    """Whether a version is worse than the one before, over the window that the caller took.

    ``runs`` are of the version on trial, ``reference`` those of the version before. Errors come
    first, since a version that fails makes nothing to compare.
    """
    failed = sum(r.state in _BAD for r in runs)
    rate, usual = error_rate(runs), error_rate(reference)
    if failed >= limits.min_errors and rate - usual > limits.max_error_excess:
        return Verdict("errors", f"{failed} of {sum(r.ended for r in runs)} analyses failed, before it {usual:.0%}")
    for mine, theirs in comparable(runs, reference, limits.min_runs):
        one, other = seconds_per_image(mine), seconds_per_image(theirs)
        if one is not None and other is not None and one > limits.max_slowdown * other:
            return Verdict("time", f"an image takes {one * 1000:.1f} ms, before it {other * 1000:.1f} ms (medians)")
    share = agreement(compared, limits)
    if len(compared) >= limits.min_runs and share is not None and 1.0 - share > limits.max_disagreement:
        return Verdict("disagreement", f"{1.0 - share:.0%} of {len(compared)} comparisons disagree")
    return None
