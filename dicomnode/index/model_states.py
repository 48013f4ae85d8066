"""The life of a model version as a table: what may follow what, and by which event. Pure.

``staged``: on this box and verified, serves nobody. ``shadow``: analyses what the active version
has analysed; its results go into the comparison table and nowhere else. ``canary``: serves a
share of the studies, or those of chosen peers. ``active``: serves the rest; at most one version
of a model. ``retired``: served or waited before and does not any more; its folder stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from dicomnode.errors import IllegalTransition


class ModelState(StrEnum):
    staged = "staged"
    shadow = "shadow"
    canary = "canary"
    active = "active"
    retired = "retired"


class ModelEvent(StrEnum):
    stage = "stage"  # take out of use, ready to begin again
    shadow = "shadow"
    canary = "canary"  # also changes the share or the peers of a canary
    activate = "activate"
    displace = "displace"  # another version was activated
    roll_back = "roll_back"  # it was found wanting, by the operator or by the node
    retire = "retire"


MODEL_TABLE: Mapping[tuple[ModelState, ModelEvent], ModelState] = {
    (ModelState.staged, ModelEvent.shadow): ModelState.shadow,
    (ModelState.staged, ModelEvent.canary): ModelState.canary,
    (ModelState.staged, ModelEvent.activate): ModelState.active,
    (ModelState.staged, ModelEvent.retire): ModelState.retired,
    (ModelState.shadow, ModelEvent.stage): ModelState.staged,
    (ModelState.shadow, ModelEvent.canary): ModelState.canary,
    (ModelState.shadow, ModelEvent.activate): ModelState.active,
    (ModelState.shadow, ModelEvent.retire): ModelState.retired,
    (ModelState.canary, ModelEvent.stage): ModelState.staged,
    (ModelState.canary, ModelEvent.shadow): ModelState.shadow,
    (ModelState.canary, ModelEvent.canary): ModelState.canary,
    (ModelState.canary, ModelEvent.activate): ModelState.active,
    (ModelState.canary, ModelEvent.roll_back): ModelState.retired,
    (ModelState.canary, ModelEvent.retire): ModelState.retired,
    (ModelState.active, ModelEvent.displace): ModelState.retired,
    (ModelState.active, ModelEvent.roll_back): ModelState.retired,
    (ModelState.retired, ModelEvent.stage): ModelState.staged,
    (ModelState.retired, ModelEvent.activate): ModelState.active,
}
"""What serves is never taken away without another in its place: ``active`` cannot be retired or
staged, only displaced or rolled back. A retired version comes back by ``stage``, or at once by
``activate``, which is how the version before returns."""

SERVING = frozenset({ModelState.active, ModelState.canary})
"""States in which a version makes results that are delivered."""


def next_model_state(state: str, event: ModelEvent) -> ModelState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return MODEL_TABLE[ModelState(state), event]
    except (KeyError, ValueError):
        raise IllegalTransition("change model state", f"'{event}' is not possible in state '{state}'") from None
