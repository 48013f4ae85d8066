"""The desired state that the cloud has for this node: its shape, and whether it may be. Pure.

Rules replace those of the configuration while the state serves; what they may not do is decided
here, since the cloud is not the operator: nothing leaves with patient identity that the operator
did not let leave, and no condition looks at what the receivers do not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from dicomnode.errors import SettingsError
from dicomnode.fleet_settings import Part
from dicomnode.peer_settings import Section
from dicomnode.rule_settings import Rule
from dicomnode.settings import Settings
from dicomnode.settings_words import plain

OPERATION = "take the desired state"
VERSION = r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}$"
REASON_MOST = 1000


class Desired(Section):
    """A part that is left out is as the operator has it: ``None``, or no models."""

    models: dict[str, str] = Field(default_factory=dict, max_length=100, description="name -> version that serves")
    rules: tuple[Rule, ...] | None = Field(None, max_length=1000, description="as [[rules]], in their place")
    log_level: Literal["debug", "info", "warning", "error"] | None = Field(None, description="as logging.level")

    @field_validator("models")
    @classmethod
    def _plain(cls, value: dict[str, str]) -> dict[str, str]:
        import re

        for name, version in value.items():
            if not re.match(VERSION, name) or not re.match(VERSION, version):
                raise ValueError("a name or version is not letters, digits and . + _ -")
        return value

    @property
    def parts(self) -> tuple[Part, ...]:
        found: list[Part] = []
        if self.models:
            found.append("models")
        if self.rules is not None:
            found.append("rules")
        if self.log_level is not None:
            found.append("log_level")
        return tuple(found)


def read_desired(state: Mapping[str, Any]) -> Desired:
    """Raises SettingsError with every wrong key, as reading a configuration does."""
    try:
        # As JSON has it: a list is a tuple, and 1 is no text.
        return Desired.model_validate_json(json.dumps(dict(state)))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'state'}: {_said(e)}" for e in error.errors(include_url=False)]
        raise SettingsError(OPERATION, "; ".join(lines), "See config/cloud-api.yaml") from None


def _said(error: ErrorDetails) -> str:
    """What pydantic found, without its name for a key that is unknown."""
    if error["type"] != "extra_forbidden":
        return plain(error)
    parts = ", ".join(Desired.model_fields)
    return f"this version does not know it; a state has {parts}" if len(error["loc"]) == 1 else "unknown key"


def check_accepted(desired: Desired, accept: Sequence[Part]) -> None:
    """Raises SettingsError for a part that the operator does not let the cloud set."""
    for part in desired.parts:
        if part not in accept:
            raise SettingsError(OPERATION, f"this node does not let the cloud set {part}", "See fleet.accept")


def with_rules(settings: Settings, rules: Sequence[Rule] | None) -> Settings:
    """The settings that serve with ``rules`` in place of the configuration's; None: as they are."""
    return settings if rules is None else settings.model_copy(update={"rules": tuple(rules)})


def check_rules(settings: Settings, rules: Sequence[Rule], read: frozenset[str]) -> Settings:
    """The settings with these rules, once they are as right as the operator's own have to be.

    ``read``: keywords that the receivers read of each object. Raises SettingsError.
    """
    changed = with_rules(settings, rules)
    try:
        changed.check_rules()
    except ValueError as error:
        raise SettingsError(OPERATION, str(error), "The peers are those of this node's configuration") from None
    _check_identity(settings.rules, rules)
    for rule in rules:
        unread = sorted(set(rule.keywords) - read - settings.rule_keywords)
        if unread:
            cause = f"rules '{rule.name}': the receivers do not read {unread[0]}"
            raise SettingsError(OPERATION, cause, "A rule of the node's own configuration has to name it")
    return changed


def check_pins(own: Sequence[Rule], rules: Sequence[Rule], active: Mapping[str, str]) -> None:
    """``name@version`` in a rule skips what holds a version back (staged, not approved, rolled back).

    So the cloud may pin what is ``active``, name -> version, and what the operator's ``own`` rules pin.
    Raises SettingsError.
    """
    pinned = {reference for rule in own for reference in rule.every_model}
    for rule in rules:
        for reference in rule.every_model:
            name, at, version = reference.partition("@")
            if at and active.get(name) != version and reference not in pinned:
                cause = f"rules '{rule.name}': {reference} is not the active version, nor pinned by the operator"
                raise SettingsError(OPERATION, cause, f"Name '{name}'; under models is which version serves")


def _check_identity(own: Sequence[Rule], rules: Sequence[Rule]) -> None:
    """Nothing leaves with identity that leaves without it by the operator's ``own`` rules.

    A rule that keeps identity is the operator's own, but for where its results go. Where several
    rules ask for one model, identity leaves if all of them keep it: one that removes it has to stay, too.
    """
    kept = [rule for rule in rules if rule.cloud_identity == "kept"]
    for rule in kept:
        if not any(_same_reach(rule, known) for known in own):
            cause = f"rules '{rule.name}': cloud_identity = \"kept\" is the operator's to say"
            raise SettingsError(OPERATION, cause, "Leave it out, or have the rule as the node's configuration has it")
    for known in own if kept else ():
        shared = any(set(known.every_model) & set(rule.every_model) for rule in kept)
        if known.cloud_identity == "removed" and shared and not any(_same_reach(rule, known) for rule in rules):
            cause = (
                f"rules '{known.name}' removes identity from what other rules keep it in, and is left out or changed"
            )
            raise SettingsError(OPERATION, cause, "Have it as the node's configuration has it")


def _same_reach(one: Rule, other: Rule) -> bool:
    """The same name, conditions, models and results, with the same word on identity."""
    free = {"priority", "send_to", "notify"}
    return one.model_dump(exclude=free) == other.model_dump(exclude=free)


def digest(state: Mapping[str, Any]) -> str:
    """Tells two states of one generation apart."""
    return hashlib.sha256(json.dumps(dict(state), sort_keys=True, separators=(",", ":")).encode()).hexdigest()
