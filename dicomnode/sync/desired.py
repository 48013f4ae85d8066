"""The desired state at work: fetched with its ETag, decided once, applied whole or not at all, reported back.

A generation that is lower than one that was seen, or the same with another content, is refused:
a cloud that was set back, or a backup endpoint that lags, must not undo what came later. What is
refused may become possible (a model arrives), so the newest refusal is looked at again now and
then. Nothing here stops what serves, and what was decided outlives everything but its successor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dicomnode import doorbell, logs
from dicomnode.cloud_settings import node_name
from dicomnode.desired import (
    OPERATION,
    REASON_MOST,
    Desired,
    check_accepted,
    check_pins,
    check_rules,
    digest,
    read_desired,
)
from dicomnode.errors import NodeError, OperatorError, PeerRefused
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import DesiredStates
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.trust import release
from dicomnode.settings import Settings
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.fleet_calls import call
from dicomnode.sync.promote import Vouched

WHO = "cloud"
AGAIN_SECONDS = 300.0
"""Between two looks at the newest generation where it was refused."""


class Stale(PeerRefused):
    """A generation that must not be taken any more."""

    def __init__(self, generation: int, cause: str, hint: str) -> None:
        super().__init__(OPERATION, cause, hint)
        self.generation = generation


class Desk(Protocol):
    """:class:`dicomnode.model_desk.ModelDesk`."""

    def activate_all(
        self, versions: Mapping[str, str], *, who: str, why: str, also: Callable[[], None] = ...
    ) -> None: ...


class DesiredState:
    """``judge(settings)`` raises OperatorError for settings that cannot serve on this box; see ``check-config``.

    ``vouched``: see :mod:`dicomnode.sync.promote`.
    """

    def __init__(
        self,
        settings: Settings,
        db: Database,
        endpoints: Endpoints,
        desk: Desk,
        judge: Callable[[Settings], None],
        vouched: Vouched,
    ) -> None:
        self._settings, self._db, self._endpoints = settings, db, endpoints
        self._desk, self._judge, self._vouched = desk, judge, vouched
        self._path = f"/nodes/{node_name(settings.node.ae_title)}"
        self._states = DesiredStates(db)
        self._etag = ""
        self._log = logs.get()

    async def run_once(self) -> None:
        """Raises PeerAway and OperatorError; the schedule shows them, and everything stays as it is."""
        await self._report()
        reply = await call(self._endpoints, "GET", f"{self._path}/desired", etag=self._etag)
        if reply is None or reply.status == 404:
            return
        if reply.status == 304:
            if not await asyncio.to_thread(self._again):
                self._etag = ""
        elif reply.status == 200:
            try:
                await asyncio.to_thread(self._take, reply.body)
            except Stale as error:
                await self._post(error.generation, applied=False, reason=str(error)[:REASON_MOST])
                raise
            self._etag = reply.etag
        else:
            raise PeerRefused(OPERATION, f"HTTP {reply.status}", "Check cloud.records_url and the token")
        await self._report()

    def _again(self) -> bool:
        """Look at the newest again where it was refused; False when nothing is known any more."""
        newest = self._states.newest()
        if newest is None:
            return False
        due = self._db.clock.ticks() - float(newest["decided_at"]) >= AGAIN_SECONDS
        if newest["status"] == "refused" and due:
            self._decide(newest["generation"], newest["state"])
        return True

    def _take(self, body: Any) -> None:
        generation = body.get("generation") if isinstance(body, dict) else None
        state = body.get("state") if isinstance(body, dict) else None
        if not isinstance(generation, int) or generation < 1 or not isinstance(state, dict):
            raise PeerRefused(OPERATION, "what came has no generation and state", "See config/cloud-api.yaml")
        newest = self._states.newest()
        if newest is not None and generation < newest["generation"]:
            cause = f"generation {generation} is older than {newest['generation']}, which was seen here"
            hint = "The cloud was set back, or a backup lags; 'dicomnode desired clear' forgets what was seen"
            raise Stale(generation, cause, hint)
        known = self._states.row(generation)
        if known is None:
            self._decide(generation, state)
        elif known["digest"] != digest(state):
            cause = f"generation {generation} came again with another content"
            raise Stale(generation, cause, "A change needs a generation of its own")
        else:
            self._again()

    def _decide(self, generation: int, state: Mapping[str, Any]) -> None:
        """Blocking: golden cases may run. Applied or refused; either is committed."""
        mark = digest(state)
        try:
            desired = read_desired(state)
            self._check(desired)
            self._desk.activate_all(
                desired.models,
                who=WHO,
                why=f"desired generation {generation}",
                also=lambda: self._states.decide(generation, mark, state, "applied"),
            )
        except NodeError as error:
            self._refuse(generation, mark, state, error)
            return
        doorbell.ring(self._settings.node.data_dir, "worker")
        parts = ", ".join(desired.parts) or "nothing: everything is as the configuration has it"
        Events(self._db).add("info", "desired-state", f"generation {generation}", f"applied: {parts}")
        self._log.info("desired state applied", count=generation)

    def _refuse(self, generation: int, mark: str, state: Mapping[str, Any], error: NodeError) -> None:
        reason = str(error)[:REASON_MOST]
        known = self._states.row(generation)
        self._states.decide(generation, mark, state, "refused", reason)
        if known is None or known["reason"] != reason:
            Events(self._db).add("error", "desired-state-refused", f"generation {generation}", reason)
            self._log.error("desired state refused", count=generation, cause=error.cause)

    def _check(self, desired: Desired) -> None:
        """Everything but the bundles themselves. Raises OperatorError."""
        check_accepted(desired, self._settings.fleet.accept)
        if desired.rules is not None:
            self._judge(check_rules(self._settings, desired.rules, frozenset(HEADER_KEYS)))
        active, life = Models(self._db).active(), Life(self._db)
        check_pins(self._settings.rules, desired.rules or (), active | desired.models)
        for name, version in desired.models.items():
            row: Row = next((r for r in life.versions(name) if r["version"] == version), {})
            if active.get(name) == version:
                continue
            if row.get("faulty"):
                raise OperatorError(OPERATION, f"{name}@{version} was rolled back here", "Desire another version")
            if row.get("waits") == "worse":
                cause = f"{name}@{version} is worse than what serves: {row.get('waits_for')}"
                raise OperatorError(OPERATION, cause, "Desire another version")
            if name in active and release(version) < release(active[name]):
                hint = f"'dicomnode models activate {name}@{version}' is the operator's to say"
                raise OperatorError(OPERATION, f"{name}@{version} is older than {active[name]}, which serves", hint)
            if why := self._not_vouched(name, version):
                raise OperatorError(OPERATION, f"{name}@{version}: {why}", "See 'dicomnode models list'")
            if self._approval(name) and not row.get("approved_by"):
                hint = f"'dicomnode models approve {name}@{version}' lets it"
                raise OperatorError(OPERATION, f"{name}@{version} waits for an operator's approval", hint)

    def _not_vouched(self, name: str, version: str) -> str:
        """Why the repository that a version came from does not stand for it now; empty when it does, or for another."""
        pulled = [
            p
            for p in Models(self._db).pulls()
            if (p["name"], p["version"], p["source"]) == (name, version, "repository")
            and p["state"] in ("placed", "activated")
        ]
        answers = [self._vouched(name, version, str(p["sha256"])) for p in pulled]
        return "" if "" in answers else next(iter(answers), "")

    def _approval(self, name: str) -> bool:
        return any(entry.approve for entry in self._settings.cloud.models if entry.name == name)

    async def _report(self) -> None:
        """Tell the cloud of the newest decision until it has taken it."""
        row = await asyncio.to_thread(self._states.newest)
        if row is None or row["reported"]:
            return
        if await self._post(row["generation"], applied=row["status"] == "applied", reason=row["reason"]):
            await asyncio.to_thread(self._states.reported, row["generation"], row["status"], row["reason"])

    async def _post(self, generation: int, *, applied: bool, reason: str) -> bool:
        body: dict[str, Any] = {"generation": generation, "applied": applied}
        reply = await call(
            self._endpoints, "POST", f"{self._path}/report", body | ({"reason": reason} if reason else {})
        )
        return reply is not None and reply.status == 200
