"""Desired states that came from the cloud: decided once, the last good one serves.

What serves is in the row that says so, rules and log level included, so that the one
transaction that activates the models makes all of it true, or none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from dicomnode import logs
from dicomnode.clock import iso
from dicomnode.desired import check_pins, check_rules
from dicomnode.errors import SettingsError
from dicomnode.index.database import Database, Row
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.index.operation import Events, Models
from dicomnode.rule_settings import Rule
from dicomnode.settings import Settings

KEPT = 50
"""Rows; what serves stays in any case."""

Status = Literal["applied", "refused"]


class DesiredStates:
    def __init__(self, db: Database) -> None:
        self.db = db

    def decide(self, generation: int, digest: str, state: Mapping[str, Any], status: Status, reason: str = "") -> None:
        """Write the row of a decision; call it in the transaction of what it says. Applied: it serves from now on."""
        now = iso(self.db.clock.wall())
        with self.db.transaction():
            known = self.row(generation)
            serves = status == "applied"
            if serves:
                self.db.execute("UPDATE desired_states SET serves = 0 WHERE serves = 1")
            same = known is not None and (known["status"], known["reason"]) == (status, reason)
            self.db.insert(
                "desired_states",
                {
                    "generation": generation,
                    "digest": digest,
                    "state": json.dumps(dict(state)),
                    "status": status,
                    "reason": reason,
                    "serves": int(serves),
                    "reported": int(same and bool(known and known["reported"])),
                    "received_time": known["received_time"] if known else now,
                    "decided_time": now,
                    "decided_at": self.db.clock.ticks(),
                },
                conflict="OR REPLACE",
            )
            self.db.execute(
                "DELETE FROM desired_states WHERE serves = 0 AND generation NOT IN"
                " (SELECT generation FROM desired_states ORDER BY generation DESC LIMIT ?)",
                (KEPT,),
            )

    def row(self, generation: int) -> Row | None:
        return _parsed(self.db.row("SELECT * FROM desired_states WHERE generation = ?", (generation,)))

    def newest(self) -> Row | None:
        """The highest generation that was decided."""
        return _parsed(self.db.row("SELECT * FROM desired_states ORDER BY generation DESC LIMIT 1"))

    def serving(self) -> Row | None:
        """The last good one; None: everything is as the operator has it."""
        return _parsed(self.db.row("SELECT * FROM desired_states WHERE serves = 1"))

    def listing(self, limit: int = KEPT) -> list[Row]:
        """Newest generation first."""
        rows = self.db.rows("SELECT * FROM desired_states ORDER BY generation DESC LIMIT ?", (limit,))
        return [row for row in map(_parsed, rows) if row is not None]

    def reported(self, generation: int, status: Status, reason: str) -> None:
        """The cloud knows of this decision; nothing when another was made since."""
        with self.db.transaction():
            self.db.execute(
                "UPDATE desired_states SET reported = 1 WHERE generation = ? AND status = ? AND reason = ?",
                (generation, status, reason),
            )

    def clear(self) -> int:
        """Forget all: rules and log level are the operator's again, and any generation may come. How many rows."""
        with self.db.transaction():
            count = int(self.db.value("SELECT count(*) FROM desired_states"))
            self.db.execute("DELETE FROM desired_states")
        return count

    def log_level(self) -> str | None:
        """For the heartbeat of each process."""
        value = self.db.value("SELECT json_extract(state, '$.log_level') FROM desired_states WHERE serves = 1")
        return str(value) if value else None

    def rules(self) -> tuple[int, list[Any]] | None:
        """Generation and rules that stand in place of the configuration's; None where those serve."""
        row = self.db.row(
            "SELECT generation, json_extract(state, '$.rules') AS rules FROM desired_states WHERE serves = 1"
        )
        return None if row is None or row["rules"] is None else (int(row["generation"]), json.loads(row["rules"]))


class ServingRules:
    """The rules that serve now: the desired ones where there are any, else the configuration's.

    Each process asks today's configuration again: what the operator took back since ends with
    the next start. ``tell``: an event says that desired rules cannot serve.
    """

    def __init__(self, settings: Settings, db: Database, *, tell: bool = True) -> None:
        self._settings, self._own, self._allowed = settings, settings.rules, "rules" in settings.fleet.accept
        self._states, self._tell = DesiredStates(db), tell
        self._known: tuple[int, tuple[Rule, ...]] | None = None

    def __call__(self) -> tuple[Rule, ...]:
        found = self._states.rules() if self._allowed else None
        if found is None:
            return self._own
        generation, raw = found
        if self._known is None or self._known[0] != generation:
            self._known = generation, self._checked(generation, raw)
        rules = self._known[1]
        if rules is self._own or not any("@" in reference for rule in rules for reference in rule.every_model):
            return rules
        try:  # a version that was active then may have been rolled back since
            check_pins(self._own, rules, Models(self._states.db).active())
        except SettingsError as error:
            self._refused(generation, error.cause)
            return self._own
        return rules

    def _checked(self, generation: int, raw: list[Any]) -> tuple[Rule, ...]:
        try:
            rules = tuple(Rule.model_validate_json(json.dumps(rule)) for rule in raw)
            check_rules(self._settings, rules, frozenset(HEADER_KEYS))
        except ValueError:  # a version before the one that took them
            self._refused(generation, "they cannot be read")
            return self._own
        except SettingsError as error:
            self._refused(generation, error.cause)
            return self._own
        return rules

    def _refused(self, generation: int, cause: str) -> None:
        if not self._tell:
            return
        logs.get().error("desired rules cannot serve, those of the configuration do", count=generation)
        events, subject = Events(self._states.db), f"generation {generation}"
        text = f"{cause}; the rules of the configuration serve"
        last = events.listing(1, "desired-rules-refused")
        if not last or (last[0]["subject"], last[0]["text"]) != (subject, text):  # said once, not by each process
            events.add("error", "desired-rules-refused", subject, text)


def serving_settings(settings: Settings, db: Database) -> Settings:
    """The settings with the rules that serve now."""
    return settings.model_copy(update={"rules": ServingRules(settings, db, tell=False)()})


def _parsed(row: Row | None) -> Row | None:
    if row is not None:
        row["state"] = json.loads(row["state"])
        row["serves"], row["reported"] = bool(row["serves"]), bool(row["reported"])
    return row
