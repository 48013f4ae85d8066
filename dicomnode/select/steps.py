"""What performed procedure steps say about one series, taken together. Pure.

A step that ended lists what it made: exactly that being here is the best evidence of
completeness there is, and a listed instance that is not here is proof of the contrary. A
step that runs, and one that names no instances, prove nothing by themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dicomnode.index.procedure import FINAL, StepState

FORGOTTEN_SECONDS = 6 * 3600.0
"""A step of which nothing was heard for so long is not running any more: nobody closed it."""


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """One step that speaks of the series.

    ``names``: its Performed Series Sequence has the series, with the instances ``listed``.
    ``age_seconds`` is node time since its last message.
    """

    state: str
    age_seconds: float
    names: bool = True
    listed: frozenset[str] = field(default_factory=frozenset)
    wrong_entry: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """What the steps amount to.

    ``withheld``: the images carry the wrong identity and must not be analysed. ``missing``
    instances are listed and not here. ``exact``: everything that is listed is here and
    nothing else. ``ended``: it ended without a list. ``running``: more may come.
    ``states`` are those of the steps that name the series, ``age_seconds`` is of the latest
    message.
    """

    withheld: bool = False
    missing: int = 0
    exact: bool = False
    ended: bool = False
    running: bool = False
    states: tuple[str, ...] = ()
    age_seconds: float = 0.0

    @property
    def settled(self) -> bool:
        """Nothing else needs to be known."""
        return self.withheld or self.exact

    def holds_back(self, silent_seconds: float, step_seconds: float) -> float:
        """Seconds for which the series has to wait at most, however quiet it is."""
        if self.settled or not (self.missing or self.running):
            return 0.0
        return max(0.0, step_seconds - min(silent_seconds, self.age_seconds))


def judge(steps: Sequence[StepEvidence], held: frozenset[str]) -> Standing:
    """Take the steps together, in whatever order they came.

    The wrong worklist entry withholds a series unless a completed step names it too: then
    the modality has corrected itself. A list counts only while every step that names the
    series has ended and has one.
    """
    wrong = any(step.wrong_entry for step in steps)
    speaking = [step for step in steps if not step.wrong_entry]
    naming = [step for step in speaking if step.names]
    age = min((step.age_seconds for step in steps), default=0.0)
    states = tuple(sorted({step.state for step in naming}))
    if wrong and not any(step.state == StepState.completed for step in naming):
        return Standing(withheld=True, states=states, age_seconds=age)
    listed = frozenset[str]().union(*(step.listed for step in speaking))
    running = any(step.state not in FINAL and step.age_seconds < FORGOTTEN_SECONDS for step in speaking)
    ended = bool(naming) and all(step.state in FINAL for step in naming) and not running
    return Standing(
        missing=len(listed - held),
        exact=ended and bool(held) and all(step.listed for step in naming) and listed == held,
        ended=ended and not listed,
        running=running,
        states=states,
        age_seconds=age,
    )


def referenced_steps(attributes: Mapping[str, str]) -> tuple[str, ...]:
    """UIDs in Referenced Performed Procedure Step Sequence (0008,1111), where the index keeps it."""
    try:
        items = json.loads(attributes.get("ReferencedPerformedProcedureStepSequence", "") or "[]")
        found = [item["ReferencedSOPInstanceUID"] for item in items]
    except (ValueError, TypeError, KeyError):
        return ()
    return tuple(uid for uid in found if isinstance(uid, str) and re.fullmatch(r"[0-9.]{1,64}", uid))
