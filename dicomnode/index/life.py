"""The life of model versions: state, history and the one pointer to what serves.

Every change is one transaction with its row of history (who, when, why) and, where it changes
what serves, with the pointer in ``models``. A worker reads the pointer when it begins a job, so a
change takes effect with the next job and without a restart; the job that runs goes on with the
version that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode.clock import iso
from dicomnode.errors import IllegalTransition, OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.model_states import ModelEvent, ModelState, next_model_state

APPROVE, REMOVE = "approve", "remove"
"""Events of the history that change no state."""

TEXT_MOST = 200
"""Characters kept of ``who`` and ``why``."""


@dataclass(frozen=True, slots=True)
class Change:
    """Who changes a state and why; ``automatic`` when the node did it by its own rules."""

    who: str
    why: str = ""
    automatic: bool = False


class Life:
    """State changes raise IllegalTransition where the table of :mod:`model_states` has none."""

    def __init__(self, db: Database) -> None:
        self.db = db

    # Looking

    def versions(self, name: str | None = None) -> list[Row]:
        """Rows of one model or of all: ``peers`` parsed, ``previous`` true for the version before the active one."""
        where, parameters = ("WHERE v.name = ?", [name]) if name else ("", [])
        rows = self.db.rows(
            "SELECT v.*, m.previous_version FROM model_versions v LEFT JOIN models m ON m.name = v.name"
            f" {where} ORDER BY v.name, v.since_at, v.version",
            parameters,
        )
        for row in rows:
            row["peers"] = json.loads(row["peers"])
            row["faulty"] = bool(row["faulty"])
            row["previous"] = row.pop("previous_version") == row["version"]
        return rows

    def state(self, name: str, version: str) -> str | None:
        row = self._row(name, version)
        return row["state"] if row else None

    def held_back(self) -> dict[str, frozenset[str]]:
        """Name -> versions that must not serve only because they are the newest on the disk."""
        found: dict[str, set[str]] = {}
        for row in self.db.rows("SELECT name, version FROM model_versions WHERE state != 'active'"):
            found.setdefault(row["name"], set()).add(row["version"])
        return {name: frozenset(versions) for name, versions in found.items()}

    def unfit(self, name: str) -> frozenset[str]:
        """Versions that must not step in for another: rolled back, staged or on trial."""
        waiting = (ModelState.staged, ModelState.shadow, ModelState.canary)
        return frozenset(r["version"] for r in self.versions(name) if r["faulty"] or r["state"] in waiting)

    def served_before(self, name: str) -> list[str]:
        """Versions that were active before the one that is, the last one first; none that was rolled back."""
        active, previous = self._pointer(name)
        rows = self.db.rows(
            "SELECT version, max(id) AS last FROM model_history WHERE name = ? AND event = 'activate'"
            " GROUP BY version ORDER BY last DESC",
            (name,),
        )
        unfit = {r["version"] for r in self.versions(name) if r["faulty"]} | {active}
        return [v for v in dict.fromkeys((previous, *(r["version"] for r in rows))) if v and v not in unfit]

    def in_state(self, state: ModelState, name: str | None = None) -> list[Row]:
        return [row for row in self.versions(name) if row["state"] == state]

    def history(self, name: str | None = None, limit: int = 100) -> list[Row]:
        """Newest first; ``peers`` parsed."""
        where, parameters = ("WHERE name = ?", [name]) if name else ("", [])
        rows = self.db.rows(f"SELECT * FROM model_history {where} ORDER BY id DESC LIMIT ?", (*parameters, limit))
        for row in rows:
            row["peers"] = json.loads(row["peers"] or "[]")
            row["automatic"] = bool(row["automatic"])
        return rows

    def rolled_back(self) -> list[Row]:
        """The last automatic roll-back of each version: ``name``, ``version``, ``why``, ``time``."""
        return self.db.rows(
            "SELECT name, version, why, max(time) AS time FROM model_history"
            " WHERE automatic = 1 AND event = 'roll_back' GROUP BY name, version ORDER BY name, version"
        )

    def by_hand(self, name: str, version: str, node: str) -> str:
        """Who set the state of a version last, when not ``node`` and without an approval since; else empty."""
        last = self.db.row(
            "SELECT who, automatic, id FROM model_history WHERE name = ? AND version = ? ORDER BY id DESC LIMIT 1",
            (name, version),
        )
        if last is None or last["automatic"] or last["who"] == node:
            return ""
        approved = self.db.value("SELECT count(*) FROM model_history WHERE id = ? AND event = ?", (last["id"], APPROVE))
        return "" if approved else str(last["who"])

    # Changing

    def approve(self, name: str, version: str, *, who: str, why: str = "") -> None:
        """An operator lets a version go on by its policy, up to serving.

        Raises OperatorError where there is no such version, IllegalTransition where it does not wait.
        """
        with self.db.transaction():
            row = self._row(name, version)
            operation, hint = f"approve {name}@{version}", "See 'dicomnode models list'; a retired one is staged first"
            if row is None:
                raise OperatorError(operation, "no such version waits", hint)
            if row["state"] not in (ModelState.staged, ModelState.shadow, ModelState.canary):
                raise IllegalTransition(operation, f"it is {row['state']}", hint)
            self.db.execute(
                "UPDATE model_versions SET approved_by = ?, approved_time = ? WHERE name = ? AND version = ?",
                (who[:TEXT_MOST], iso(self.db.clock.wall()), name, version),
            )
            self._record(name, version, APPROVE, row["state"], ModelState(row["state"]), Change(who, why))

    def wait_for(self, name: str, version: str, code: str | None, text: str | None) -> bool:
        """Note what a version waits for on its way up; True when the kind of it is new."""
        row = self._row(name, version)
        if row is None or (row["waits"], row["waits_for"]) == (code, text):
            return False
        with self.db.transaction(sync=False):
            self.db.execute(
                "UPDATE model_versions SET waits = ?, waits_for = ? WHERE name = ? AND version = ?",
                (code, text, name, version),
            )
        return bool(row["waits"] != code)

    def stage(self, name: str, version: str, *, who: str, why: str = "") -> ModelState:
        """A new version, or one that is taken out of shadow or canary, or back from retirement."""
        with self.db.transaction():
            if self._row(name, version) is None:
                return self._begin(name, version, Change(who, why))
            return self._move(name, version, ModelEvent.stage, Change(who, why))

    def shadow(self, name: str, version: str, *, who: str, why: str = "") -> ModelState:
        with self.db.transaction():
            self._known(name, version, Change(who, why))
            return self._move(name, version, ModelEvent.shadow, Change(who, why))

    def canary(
        self, name: str, version: str, *, percent: float, peers: Sequence[str] = (), who: str, why: str = ""
    ) -> ModelState:
        """``percent`` 0..100 of the studies and all that ``peers`` send. One canary of a model at a time."""
        if not 0.0 <= percent <= 100.0 or (percent == 0.0 and not peers):
            raise OperatorError("make a canary", "it would serve nobody", "Give a share of 0 to 100 %, or peers")
        with self.db.transaction():
            others = [r["version"] for r in self.in_state(ModelState.canary, name) if r["version"] != version]
            if others:
                raise OperatorError(
                    "make a canary", f"{name} {others[0]} is one already", "Activate, stage or retire that one first"
                )
            self._known(name, version, Change(who, why))
            return self._move(name, version, ModelEvent.canary, Change(who, why), percent, peers)

    def retire(self, name: str, version: str, *, who: str, why: str = "") -> ModelState:
        with self.db.transaction():
            self._known(name, version, Change(who, why))
            return self._move(name, version, ModelEvent.retire, Change(who, why))

    def removed(self, name: str, version: str, *, who: str, why: str, automatic: bool = False) -> None:
        """Its folder has left the disk; inside a transaction."""
        row = self._row(name, version)
        if row is not None:
            state = ModelState(row["state"])
            self._record(name, version, REMOVE, state, state, Change(who, why, automatic))

    def removed_time(self, name: str, version: str) -> str | None:
        """When the folder of a version was removed last; None where it never was."""
        query = "SELECT max(time) FROM model_history WHERE name = ? AND version = ? AND event = ?"
        found = self.db.value(query, (name, version, REMOVE))
        return None if found is None else str(found)

    def activate(self, name: str, version: str, *, who: str, why: str = "") -> None:
        """Make it the one that serves; what served before is retired and kept for :meth:`roll_back`."""
        change = Change(who, why)
        with self.db.transaction():
            active, _ = self._pointer(name)
            if active == version:
                return
            self._known(name, version, change)
            if active is not None:
                self._move(name, active, ModelEvent.displace, Change(who, f"{version} was activated"))
            self._move(name, version, ModelEvent.activate, change)
            self._point(name, version, active)

    def roll_back(self, name: str, version: str, target: str | None, change: Change) -> None:
        """Take ``version`` out of service: a canary, or the active one with ``target`` in its place.

        Raises OperatorError when ``version`` does not serve any more, so that of two that roll
        back at once only one does, and when an active version would have no successor.
        """
        with self.db.transaction():
            active, _ = self._pointer(name)
            if active != version:
                self._move(name, version, ModelEvent.roll_back, change)
                return
            if target is None or target == version:
                raise OperatorError(
                    "roll back model", f"no earlier version of '{name}' was active", "See 'dicomnode models list'"
                )
            self._move(name, version, ModelEvent.roll_back, change)
            back = Change(change.who, f"{version} was rolled back: {change.why}".strip(" :"), change.automatic)
            self._known(name, target, back)
            self._move(name, target, ModelEvent.activate, back)
            # Never the one that was just found wanting: a second roll-back would bring it back.
            self._point(name, target, next((v for v in self.served_before(name) if v != target), None))

    # Rows

    def _row(self, name: str, version: str) -> Row | None:
        return self.db.row("SELECT * FROM model_versions WHERE name = ? AND version = ?", (name, version))

    def _pointer(self, name: str) -> tuple[str | None, str | None]:
        row = self.db.row("SELECT version, previous_version FROM models WHERE name = ?", (name,))
        return (row["version"], row["previous_version"]) if row else (None, None)

    def _point(self, name: str, version: str, previous: str | None) -> None:
        self.db.insert(
            "models",
            {
                "name": name,
                "version": version,
                "previous_version": previous,
                "activated_time": iso(self.db.clock.wall()),
            },
            conflict="OR REPLACE",
        )

    def _known(self, name: str, version: str, change: Change) -> None:
        if self._row(name, version) is None:
            self._begin(name, version, change)

    def _begin(self, name: str, version: str, change: Change) -> ModelState:
        self._set(name, version, ModelState.staged)
        self._record(name, version, ModelEvent.stage, None, ModelState.staged, change)
        return ModelState.staged

    def _move(
        self,
        name: str,
        version: str,
        event: ModelEvent,
        change: Change,
        percent: float = 0.0,
        peers: Sequence[str] = (),
    ) -> ModelState:
        row = self._row(name, version)
        if row is None:
            raise OperatorError("change model state", f"there is no {name} {version}", "See 'dicomnode models list'")
        state = next_model_state(row["state"], event)
        faulty = event is ModelEvent.roll_back or (bool(row["faulty"]) and event is ModelEvent.retire)
        self._set(name, version, state, percent, peers, faulty=faulty)
        self._record(name, version, event, row["state"], state, change, percent, peers)
        return state

    def _set(
        self,
        name: str,
        version: str,
        state: ModelState,
        percent: float = 0.0,
        peers: Sequence[str] = (),
        *,
        faulty: bool = False,
    ) -> None:
        """Insert or update; never OR REPLACE, which would silently delete another version that is active."""
        row: dict[str, Any] = {
            "state": state,
            "percent": percent,
            "peers": json.dumps(list(peers)),
            "faulty": int(faulty),
            "since_at": self.db.clock.ticks(),
            "since_time": iso(self.db.clock.wall()),
        }
        if self._row(name, version) is None:
            self.db.insert("model_versions", {"name": name, "version": version, **row})
            return
        changes = ", ".join(f"{key} = ?" for key in row)
        self.db.execute(
            f"UPDATE model_versions SET {changes} WHERE name = ? AND version = ?", (*row.values(), name, version)
        )

    def _record(
        self,
        name: str,
        version: str,
        event: str,
        former: str | None,
        state: ModelState,
        change: Change,
        percent: float = 0.0,
        peers: Sequence[str] = (),
    ) -> None:
        self.db.insert(
            "model_history",
            {
                "name": name,
                "version": version,
                "event": event,
                "from_state": former,
                "to_state": state,
                "percent": percent,
                "peers": json.dumps(list(peers)),
                "automatic": int(change.automatic),
                "who": change.who[:TEXT_MOST],
                "why": change.why[:TEXT_MOST],
                "at": self.db.clock.ticks(),
                "time": iso(self.db.clock.wall()),
            },
        )
