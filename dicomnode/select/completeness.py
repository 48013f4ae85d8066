"""When is a series complete? Pure decision on evidence.

Association boundaries mean nothing by the standard (PS3.4 B), so no single sign is
trusted where a better one can be had: the list of a completed performed procedure step, a
count that the sender states, the release of every association that brought the series
together with a stack without gaps, and in the end silence. The reason is kept with the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dicomnode.geometry import StackReport
from dicomnode.index.procedure import WITHHELD
from dicomnode.select.steps import Standing

_HOLES = frozenset({"GAP", "NON_UNIFORM"})
"""Problems of a stack that missing slices can make."""


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
    ``silent_seconds`` is node time since the last instance arrived. ``standing`` is what
    performed procedure steps say about it.
    """

    instances: int
    associations: Sequence[AssociationEvidence]
    expected: int | None
    stack: StackReport | None
    silent_seconds: float
    standing: Standing = field(default_factory=Standing)

    @property
    def released(self) -> bool:
        """Every association that brought it ended in order."""
        return bool(self.associations) and all(a.state == "released" for a in self.associations)

    @property
    def short(self) -> bool:
        """Fewer are here than the sender stated."""
        return self.expected is not None and self.instances < self.expected

    @property
    def several(self) -> bool:
        """One association brought more than one: some modalities open one per image, which proves nothing."""
        return any(a.instances > 1 for a in self.associations)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``complete`` with its ``reason``, or how long to wait at most.

    A series that is complete but must not be analysed has ``analyse`` False.
    """

    complete: bool
    reason: str
    wait_seconds: float = 0.0
    analyse: bool = True


def decide(evidence: Evidence, quiet_seconds: float, step_seconds: float = 0.0) -> Verdict:
    """Complete now, or wait; better evidence ends the quiet period earlier.

    While listed instances are missing, nothing but silence ends the wait; while a step runs,
    silence alone does not: both for ``step_seconds`` after the last image or message.
    """
    standing = evidence.standing
    if standing.withheld:
        return Verdict(True, WITHHELD, analyse=False)
    early = "" if standing.missing else _early(evidence)
    if early:
        return Verdict(True, early)
    remaining = max(quiet_seconds - evidence.silent_seconds, standing.holds_back(evidence.silent_seconds, step_seconds))
    if remaining > 0:
        return Verdict(False, "", remaining)
    return Verdict(True, f"quiet-period: nothing arrived for {quiet_seconds:g} s{_doubt(evidence)}")


def _early(evidence: Evidence) -> str:
    """The reason to end the quiet period, "" without one.

    A stated count that was exceeded is disproved and counts for nothing.
    """
    standing, stack = evidence.standing, evidence.stack
    if standing.exact:
        how = " and ".join(standing.states).lower()
        return f"procedure-step: it is {how}, and the {evidence.instances} instance(s) that it lists are here"
    if evidence.expected is not None and evidence.instances == evidence.expected > 0:
        return f"expected-count: the sender stated {evidence.expected} instance(s) and they are here"
    if not evidence.released or evidence.short:
        return ""
    if stack is None:
        return "association-released: the sender ended its association in order"
    if stack.contiguous and evidence.several:
        return f"association-released, contiguous geometry: {len(stack.order)} slices without a gap"
    if standing.ended and evidence.several and not _HOLES & stack.problems.keys():
        how = " and ".join(standing.states).lower()
        return f"procedure-step, association-released: the step is {how}, and no slice is known to be missing"
    return ""


def _doubt(evidence: Evidence) -> str:
    """What speaks against completeness, told with the quiet period."""
    states = [a.state for a in evidence.associations]
    doubts = []
    if evidence.standing.missing:
        doubts.append(f"{evidence.standing.missing} instance(s) that the procedure step lists did not arrive")
    if evidence.standing.running:
        doubts.append("the procedure step is still in progress")
    if evidence.short:
        doubts.append(f"{evidence.instances} of {evidence.expected} stated instances arrived")
    if "open" in states:
        doubts.append("an association is still open")
    cut = sum(state in ("aborted", "lost") for state in states)
    if cut:
        doubts.append(f"{cut} association(s) ended without release")
    if evidence.stack is not None:
        doubts.extend(evidence.stack.problems.values())
    return f"; {'; '.join(doubts)}" if doubts else ""
