"""When is a series complete? Pure decision on evidence.

Association boundaries mean nothing by the standard (PS3.4 B), so no single sign is
trusted where a better one can be had: a count that the sender states, the release of every
association that brought the series together with a stack without gaps, and in the end
silence. The reason is kept with the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dicomnode.geometry import StackReport


@dataclass(frozen=True, slots=True)
class AssociationEvidence:
    """One association that brought instances of the series: state and how many."""

    state: str
    instances: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about a series.

    ``expected`` is a count stated by the sender, else None. ``stack`` describes the slices
    that carry a position, None when the images have none (projection radiography).
    ``silent_seconds`` is node time since the last instance arrived.
    """

    instances: int
    associations: Sequence[AssociationEvidence]
    expected: int | None
    stack: StackReport | None
    silent_seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """``complete`` with its ``reason``, or how long to wait at most."""

    complete: bool
    reason: str
    wait_seconds: float = 0.0


def decide(evidence: Evidence, quiet_seconds: float) -> Verdict:
    """Complete now, or wait; better evidence ends the quiet period earlier.

    A stated count that was exceeded is disproved and counts for nothing.
    """
    states = [a.state for a in evidence.associations]
    if evidence.expected is not None and evidence.instances == evidence.expected > 0:
        return Verdict(True, f"expected-count: the sender stated {evidence.expected} instance(s) and they are here")
    if states and all(state == "released" for state in states):
        several = max(a.instances for a in evidence.associations) > 1
        short = evidence.expected is not None and evidence.instances < evidence.expected
        if evidence.stack is None and not short:
            return Verdict(True, "association-released: the sender ended its association in order")
        if evidence.stack is not None and evidence.stack.contiguous and several and not short:
            return Verdict(
                True,
                f"association-released, contiguous geometry: {len(evidence.stack.order)} slices without a gap",
            )
    remaining = quiet_seconds - evidence.silent_seconds
    if remaining > 0:
        return Verdict(False, "", remaining)
    return Verdict(True, f"quiet-period: nothing arrived for {quiet_seconds:g} s{_doubt(evidence, states)}")


def _doubt(evidence: Evidence, states: Sequence[str]) -> str:
    """What speaks against completeness, told with the quiet period."""
    doubts = []
    if evidence.expected is not None and evidence.instances < evidence.expected:
        doubts.append(f"{evidence.instances} of {evidence.expected} stated instances arrived")
    if "open" in states:
        doubts.append("an association is still open")
    cut = sum(state in ("aborted", "lost") for state in states)
    if cut:
        doubts.append(f"{cut} association(s) ended without release")
    if evidence.stack is not None:
        doubts.extend(evidence.stack.problems.values())
    return f"; {'; '.join(doubts)}" if doubts else ""
