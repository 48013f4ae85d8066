"""Steps of a rule: what each waits for, and what becomes of it when that is known. Pure.

A step runs when every step that it names has ended well and all its conditions hold. It is
skipped when a condition does not hold, or when what it follows was skipped; it is not run when
what it follows failed. The answer depends on how the earlier steps ended, not on their order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from dicomnode.priors import Wish

OPEN = frozenset({"waiting", "pending", "running"})
"""States of a job that has not ended."""


class Fate(StrEnum):
    wait = "wait"
    run = "run"
    skip = "skip"
    bar = "bar"


@dataclass(frozen=True, slots=True)
class When:
    """One condition on an earlier step; with ``prior`` and no step, on whether an earlier study was found.

    ``ended``: the step ended in one of these states, whatever it found. ``measurement`` lies
    within the inclusive bounds, for ``segment`` where given, else for any. ``finding`` has the
    ``value`` (code or meaning; ``*``: positive) or a probability within the bounds. A
    ``segment`` alone was found, or with ``found`` False was not.
    """

    step: str = ""
    ended: tuple[str, ...] = ()
    measurement: str = ""
    finding: str = ""
    segment: str = ""
    found: bool = True
    value: str = ""
    minimum: float | None = None
    maximum: float | None = None
    prior: bool | None = None

    @property
    def text(self) -> str:
        """The condition in words, without any value of a patient."""
        if self.prior is not None:
            return f"an earlier study is {'' if self.prior else 'not '}found"
        whose = f"of step {self.step}"
        if self.ended:
            return f"step {self.step} ended as {' or '.join(self.ended)}"
        bounds = " and ".join(
            f"{word} {bound:g}"
            for word, bound in (("at least", self.minimum), ("at most", self.maximum))
            if bound is not None
        )
        if self.measurement:
            return f"{self.measurement} {f'({self.segment}) ' if self.segment else ''}{whose} is {bounds}"
        if self.finding:
            wanted = "positive" if self.value == "*" else self.value
            return f"{self.finding} {whose} is {wanted or f'of probability {bounds}'}"
        return f"segment {self.segment} {whose} was {'' if self.found else 'not '}found"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a step waits for: it follows ``after``, and every condition of ``when`` holds.

    ``prior``: an earlier study that is looked for once all this is so; it is not waited for longer
    than the wish says. ``inputs``: conditions on further series of the study, by the model's names
    for them, and for how long they are waited for. ``masks``: ``step`` or ``step:segment label`` whose mask
    is an input, by the model's names for them.
    """

    after: tuple[str, ...] = ()
    when: tuple[When, ...] = ()
    prior: Wish | None = None
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs_seconds: float = 600.0
    masks: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[str, ...]:
        """Every step that has to be known, in the order in which they are named."""
        masked = (ref.partition(":")[0] for ref in self.masks.values())
        return tuple(dict.fromkeys((*self.after, *(w.step for w in self.when if w.step), *masked)))

    @property
    def any(self) -> bool:
        return bool(self.after or self.when or self.prior or self.inputs or self.masks)


@dataclass(frozen=True, slots=True)
class Known:
    """How a step stands: the state of its job, and the summary of its result."""

    state: str
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    fate: Fate
    reason: str = ""


def decide(needs: Needs, known: Mapping[str, Known]) -> Decision:
    """What becomes of a waiting step by those before it. ``known`` lacks steps that do not exist (any more)."""
    if any(name in known and known[name].state in OPEN for name in needs.steps):
        return Decision(Fate.wait)
    forgiven = {w.step for w in needs.when if w.ended}
    for name in needs.steps:
        if name not in known:
            return Decision(Fate.bar, f"step {name}, which it follows, does not exist")
        state = known[name].state
        if name not in forgiven and state not in ("done", "skipped"):
            return Decision(Fate.bar, f"step {name}, which it follows, ended as {state}")
    for name in needs.steps:
        if name not in forgiven and known[name].state == "skipped":
            return Decision(Fate.skip, f"step {name}, which it follows, was skipped")
    for when in needs.when:
        if when.prior is None and not holds(when, known[when.step]):
            return Decision(Fate.skip, f"its condition does not hold: {when.text}")
    return Decision(Fate.run)


def decide_prior(needs: Needs, *, found: bool, cause: str) -> Decision:
    """What becomes of a step that may run by :func:`decide`, once the earlier study was found or was not."""
    for when in needs.when:
        if when.prior is not None and when.prior is not found:
            told = f": {cause}" if cause else ""
            return Decision(Fate.skip, f"its condition does not hold: {when.text}{told}")
    return Decision(Fate.run)


def holds(when: When, known: Known) -> bool:
    """Whether a condition holds on a step that has ended; what the step did not give meets nothing."""
    if when.ended:
        return known.state in when.ended
    if when.measurement:
        return any(
            m.get("key") == when.measurement
            and (not when.segment or _same(m.get("segment"), when.segment))
            and _within(m["value"], when)
            for m in known.summary.get("measurements", ())
        )
    if when.finding:
        return any(f.get("key") == when.finding and _finding_meets(f, when) for f in known.summary.get("findings", ()))
    found = any(_same(label, when.segment) for label in known.summary.get("segments", ()))
    return found is when.found


def _finding_meets(finding: Mapping[str, Any], when: When) -> bool:
    if when.value == "*":
        return bool(finding.get("positive"))
    if when.value:
        return any(_same(finding.get(key), when.value) for key in ("answer", "code"))
    return _within(finding.get("probability"), when)


def _within(value: Any, when: When) -> bool:
    return (
        isinstance(value, int | float)
        and math.isfinite(value)
        and (when.minimum is None or value >= when.minimum)
        and (when.maximum is None or value <= when.maximum)
    )


def _same(one: object, other: str) -> bool:
    return isinstance(one, str) and one.strip().casefold() == other.strip().casefold()


def circle(follows: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Steps that wait for one another, the first again at the end; empty when there are none."""
    from graphlib import CycleError, TopologicalSorter

    try:
        TopologicalSorter(follows).prepare()
    except CycleError as error:
        return tuple(reversed(error.args[1]))
    return ()


def in_order(follows: Mapping[str, Sequence[str]]) -> list[str]:
    """Steps so that each comes behind what it follows; else as they were written."""
    done: list[str] = []
    left = list(follows)
    while left:
        ready = next(name for name in left if all(other in done for other in follows[name]))
        done.append(ready)
        left.remove(ready)
    return done


def dump(needs: Needs, jobs: Mapping[str, int]) -> str:
    """As a job's row keeps it; ``jobs``: id of the job of each step that is named."""
    return json.dumps({**asdict(needs), "jobs": dict(jobs)}, sort_keys=True)


def load(text: str) -> tuple[Needs, dict[str, int]]:
    data = json.loads(text)
    wish = data.get("prior")
    prior = Wish(**{**wish, "sources": tuple(wish["sources"])}) if wish else None
    inputs, seconds = data.get("inputs", {}), float(data.get("inputs_seconds", 600.0))
    needs = Needs(
        tuple(data["after"]), tuple(_when(w) for w in data["when"]), prior, inputs, seconds, data.get("masks", {})
    )
    return needs, dict(data["jobs"])


def _when(data: Mapping[str, Any]) -> When:
    return When(**{**data, "ended": tuple(data["ended"])})
