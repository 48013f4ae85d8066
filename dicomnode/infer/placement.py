"""Which engine or endpoint takes a job. Pure.

Each candidate is judged on four terms between 0 (bad) and 1 (good), which are weighted and
added; the weights are settings and only their proportions count. What is overloaded, away
or serves another version is skipped, with its reason. The decision names every candidate
with its terms, so that it can be understood afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LOCALITY = {"host": 1.0, "lan": 0.7, "wan": 0.3}
"""Data locality by network class: on this box, in the building, beyond it."""

CPU_FIT = 0.5
"""Resource fit of a CPU, against 1 for a GPU."""

_DIGITS = 9
"""Scores that agree to this many decimals are a tie."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Proportions of the four terms; none negative, not all zero."""

    locality: float = 0.4
    fit: float = 0.3
    load: float = 0.2
    cost: float = 0.1

    def __post_init__(self) -> None:
        values = (self.locality, self.fit, self.load, self.cost)
        if min(values) < 0 or sum(values) <= 0:
            raise ValueError("weights must not be negative, and one of them must be positive")


@dataclass(frozen=True, slots=True)
class Candidate:
    """All figures between 0 and 1; ``load`` and ``cost`` are better when small.

    ``unavailable``: why it cannot take the job at all, empty when it can.
    """

    name: str
    locality: float
    fit: float
    load: float
    cost: float
    unavailable: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate as it was judged; ``skipped`` says why it was out of the question."""

    name: str
    score: float
    locality: float
    fit: float
    load: float
    cost: float
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """``chosen`` is empty when no candidate may take the job; ``candidates`` are best first."""

    chosen: str
    candidates: tuple[Scored, ...]
    weights: Weights
    max_load: float

    @property
    def refusal(self) -> str:
        """Why there is no place, candidate by candidate; empty when there is one."""
        if self.chosen:
            return ""
        return "; ".join(f"{c.name}: {c.skipped}" for c in self.candidates) or "there is no engine or endpoint"

    def as_dict(self) -> dict[str, Any]:
        """For the job's row: plain values, scores with six decimals."""
        candidates = [{**asdict(c), "score": round(c.score, 6)} for c in self.candidates]
        return {
            "chosen": self.chosen or None,
            "candidates": candidates,
            "weights": asdict(self.weights),
            "max_load": self.max_load,
        }


def resource_fit(*, accelerated: bool, needed_bytes: int = 0, free_bytes: int | None = None) -> float:
    """1 for a GPU, CPU_FIT for a CPU, less in proportion where memory is short.

    ``free_bytes`` None: not known, as with an endpoint.
    """
    fit = 1.0 if accelerated else CPU_FIT
    if free_bytes is None or needed_bytes <= 0:
        return fit
    return fit * min(1.0, max(0, free_bytes) / needed_bytes)


def score(candidate: Candidate, weights: Weights) -> float:
    """Between 0 and 1: the weighted mean of locality, fit, idleness and cheapness."""
    total = weights.locality + weights.fit + weights.load + weights.cost
    return (
        weights.locality * candidate.locality
        + weights.fit * candidate.fit
        + weights.load * (1.0 - candidate.load)
        + weights.cost * (1.0 - candidate.cost)
    ) / total


def decide(candidates: Iterable[Candidate], weights: Weights, max_load: float) -> Decision:
    """The best candidate that is available and loaded to ``max_load`` at most.

    Of equal scores the one nearer to the data wins, then the less loaded, then the name; the
    order in which candidates are given does not matter.
    """
    judged = sorted((_judge(c, weights, max_load) for c in candidates), key=_rank)
    chosen = judged[0].name if judged and not judged[0].skipped else ""
    return Decision(chosen, tuple(judged), weights, max_load)


def _judge(candidate: Candidate, weights: Weights, max_load: float) -> Scored:
    skipped = candidate.unavailable
    if not skipped and not candidate.load <= max_load:  # so that a NaN is skipped, too
        skipped = f"load {candidate.load:.0%} is above {max_load:.0%}"
    return Scored(
        candidate.name,
        score(candidate, weights),
        candidate.locality,
        candidate.fit,
        candidate.load,
        candidate.cost,
        skipped,
    )


def _rank(scored: Scored) -> tuple[bool, float, float, float, str]:
    return bool(scored.skipped), -round(scored.score, _DIGITS), -scored.locality, scored.load, scored.name


def told(decision: dict[str, Any]) -> Sequence[str]:
    """A stored decision in lines for a person, best candidate first."""
    lines = []
    for c in decision.get("candidates", ()):
        terms = ", ".join(f"{key} {c[key]:.2f}" for key in ("locality", "fit", "load", "cost"))
        mark = "chosen" if c["name"] == decision.get("chosen") else c["skipped"] or "not chosen"
        lines.append(f"{c['name']}: score {c['score']:.3f} ({terms}), {mark}")
    lines += [f"{t['name']} failed: {t['cause']}" for t in decision.get("tried", ())]
    return lines
