"""How far the outputs of a model version have moved from their reference window. Pure.

Population stability index over quintiles of the reference: PSI = sum((p - q) ln(p / q)), with q
the shares of the reference in five bins and p those of the recent values, half a count added to
each bin so that an empty one stays finite. Two samples of one distribution give about
(bins - 1)(1/n + 1/m) by chance (Yurdakul, Statistical Properties of Population Stability Index,
Western Michigan University 2018), which is subtracted: small windows must not look like drift.
By custom 0.1 is worth a look and 0.25 is a shift. It sees a change of the shape as well as of
the middle, and needs no assumption on the distribution; it does not say whether the model, the
scanner or the patients have changed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

BINS = 5
LEAST = 20
"""Values that each of the two windows needs."""


@dataclass(frozen=True, slots=True)
class Drift:
    """``psi`` >= 0; the means of both windows in the measurement's unit."""

    psi: float
    reference_mean: float
    recent_mean: float


def drift(values: Sequence[float], reference: int, recent: int) -> Drift | None:
    """Compare the last ``recent`` values with the first ``reference`` ones, oldest first.

    The windows never overlap. None where either would hold fewer than LEAST finite values.
    """
    finite = [v for v in values if math.isfinite(v)]
    first = finite[:reference]
    last = finite[len(first) :][-recent:]
    if min(len(first), len(last)) < LEAST:
        return None
    return Drift(psi(first, last), mean(first), mean(last))


def psi(reference: Sequence[float], recent: Sequence[float]) -> float:
    """Population stability index less what chance gives, at least 0."""
    ordered = sorted(reference)
    edges = {ordered[len(ordered) * k // BINS] for k in range(1, BINS)}
    # (e, 1) parts what is above e from the rest, (e, 0) what is below it: a value that comes
    # often is a bin of its own, else a constant that gets smaller would stay in its bin.
    cuts = sorted({(e, 1.0) for e in edges} | {(e, 0.0) for e in edges if ordered.count(e) > 1})
    q, p = _shares(reference, cuts), _shares(recent, cuts)
    value = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    return max(0.0, value - len(cuts) * (1 / len(reference) + 1 / len(recent)))


def _shares(values: Sequence[float], cuts: Sequence[tuple[float, float]]) -> list[float]:
    counts = [0.5] * (len(cuts) + 1)
    for value in values:
        counts[bisect_left(cuts, (value, 0.5))] += 1.0
    return [count / sum(counts) for count in counts]
