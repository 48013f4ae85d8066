"""How a model that was pulled goes from ``staged`` to ``active`` by itself, and what it waits for. Pure.

Each step is taken only while nothing speaks against it; the way back is that of
:mod:`dicomnode.rollout`. An operator's own change ends the climb, an approval resumes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Goal = Literal["stage", "shadow", "canary", "activate"]
Code = Literal[
    "approval", "studies", "hours", "goal", "by-hand", "worse", "rolled-back", "not-offered", "retired", "failed"
]
_HEIGHT: dict[Goal, int] = {"stage": 0, "shadow": 1, "canary": 2, "activate": 3}
_HELD_BACK: dict[str, Code] = {"retired": "retired"}


@dataclass(frozen=True, slots=True)
class Plan:
    """See ``[[cloud.models]]``, which says what each of them means. Of studies and hours both must be reached."""

    goal: Goal = "activate"
    shadow_studies: int = 0
    shadow_hours: float = 0.0
    canary_percent: float = 0.0
    canary_studies: int = 0
    canary_hours: float = 0.0
    approve: bool = False

    @property
    def shadow(self) -> bool:
        """Whether it is to be in the shadow at all."""
        return self.goal == "shadow" or (_HEIGHT[self.goal] > 1 and bool(self.shadow_studies or self.shadow_hours))

    @property
    def canary(self) -> bool:
        return _HEIGHT[self.goal] >= 2 and self.canary_percent > 0

    @property
    def at_once(self) -> bool:
        """Whether it serves as soon as it has been verified."""
        return self.goal == "activate" and not (self.shadow or self.canary or self.approve)


@dataclass(frozen=True, slots=True)
class Facts:
    """A version as it is now.

    ``hours`` and ``studies`` since it came into its state: comparisons in the shadow, studies that it
    served as a canary. ``by_hand``: who changed its state last, when that was not the node.
    ``verdict``: why it is worse than what serves; empty when it is not. ``not_offered``: why the
    repository does not vouch for it now. ``alone``: no other version of the model serves, so there is
    nothing to compare with.
    """

    state: str
    faulty: bool = False
    hours: float = 0.0
    studies: int = 0
    approved: bool = False
    by_hand: str = ""
    verdict: str = ""
    not_offered: str = ""
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    action: Literal["shadow", "canary", "activate"]
    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """``text`` is for the operator."""

    code: Code
    text: str


def next_move(plan: Plan, facts: Facts) -> Move | Wait | None:
    """The next step of a version, or what it waits for; None when it serves."""
    if facts.state == "active":
        return None
    if facts.faulty:
        return Wait("rolled-back", "it was rolled back; it does not come back by itself")
    if facts.state in _HELD_BACK:
        return Wait(_HELD_BACK[facts.state], "it is retired")
    if facts.by_hand:
        return Wait("by-hand", f"its state was set by {facts.by_hand}; 'models approve' hands it back to the policy")
    if facts.not_offered:
        return Wait("not-offered", facts.not_offered)
    if facts.verdict and facts.state in ("shadow", "canary"):
        return Wait("worse", facts.verdict)
    move = _step(plan, facts)
    if isinstance(move, Move) and move.action != "shadow" and plan.approve and not facts.approved:
        return Wait("approval", "an operator has to approve it: 'dicomnode models approve NAME@VERSION'")
    return move


def _step(plan: Plan, facts: Facts) -> Move | Wait:
    if facts.state == "canary":
        done = _time_left(plan.canary_studies, plan.canary_hours, facts)
        return done or _activate(plan, f"served {facts.studies} studies in {facts.hours:.0f} h as a canary")
    if facts.state == "staged" and plan.shadow and not facts.alone:
        return Move("shadow", "verified")
    if facts.state == "shadow":
        if plan.goal == "shadow":
            return Wait("goal", "its policy ends in the shadow")
        waits = _time_left(plan.shadow_studies, plan.shadow_hours, facts)
        if waits and not facts.alone:
            return waits
        why = f"{facts.studies} comparisons in {facts.hours:.0f} h in the shadow"
    else:
        why = "verified"
    if plan.canary and not facts.alone:
        return Move("canary", why)
    return _activate(plan, why)


def _activate(plan: Plan, why: str) -> Move | Wait:
    if plan.goal == "activate":
        return Move("activate", why)
    return Wait("goal", f"its policy ends at '{plan.goal}'")


def _time_left(studies: int, hours: float, facts: Facts) -> Wait | None:
    if facts.studies < studies:
        return Wait("studies", f"{facts.studies} of {studies} studies")
    if facts.hours < hours:
        return Wait("hours", f"{facts.hours:.1f} of {hours:g} hours")
    return None
