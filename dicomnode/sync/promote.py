"""Takes a version that was pulled up its policy's ladder, one step at a time; see :mod:`dicomnode.ladder`.

Each step goes through the desk of the composition root, which verifies the bundle anew on this
box before anything changes. What a version waits for is in its row, for everybody to see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Protocol

from dicomnode import logs, rollout
from dicomnode.errors import NodeError
from dicomnode.index.database import Database, Row
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.index.trust import release
from dicomnode.ladder import Facts, Move, Wait, next_move
from dicomnode.rollout import Limits
from dicomnode.settings import ModelPull, Settings
from dicomnode.sync.pull import SYNC, in_daemon_thread

HOUR = 3600.0
PAUSE_SECONDS = 600.0
"""After a step that could not be taken."""

Vouched = Callable[[str, str, str], str]
"""Name, version and SHA-256 of the archive -> why the repository does not stand for it now; empty when it does."""


class Desk(Protocol):
    """:class:`dicomnode.model_desk.ModelDesk`."""

    def listing(self) -> list[Row]: ...

    def change(
        self, action: Any, name: str, version: str, *, who: str, why: str = "", percent: float = 0.0
    ) -> dict[str, Any]: ...


class Promoter:
    def __init__(self, settings: Settings, db: Database, desk: Desk, vouched: Vouched) -> None:
        self._entries, self._rules = settings.cloud.models, settings.rollout
        self._db, self._desk, self._vouched = db, desk, vouched
        self._life, self._runs, self._models = Life(db), Runs(db), Models(db)
        self._not_before: dict[tuple[str, str], float] = {}
        self._log = logs.get()

    async def run_once(self) -> int:
        """Look at each entry; how many steps were taken."""
        return sum([await in_daemon_thread(self._look, entry) for entry in self._entries])

    def _look(self, entry: ModelPull) -> bool:
        """Blocking: golden cases run before a step."""
        pulled = self._pulled(entry)
        row = next((r for r in self._life.versions(entry.name) if pulled and r["version"] == pulled["version"]), None)
        if pulled is None or row is None:
            return False
        name, version = entry.name, str(row["version"])
        self._supersede(entry, version)
        move = next_move(entry.plan, self._facts(entry, pulled, row))
        if isinstance(move, Wait):
            self._waits(name, version, move)
            return False
        if move is None:
            self._life.wait_for(name, version, None, None)
            return False
        if self._db.clock.ticks() < self._not_before.get((name, version), 0.0):
            return False
        return self._take(name, version, move, entry.canary_percent if move.action == "canary" else 0.0)

    def _supersede(self, entry: ModelPull, newest: str) -> None:
        """Older ones that the policy had on trial: nobody looks at them any more, but they would analyse for ever.

        A canary would even serve its share beside what is newer. What an operator has set stays, and so does
        what an entry names by its version.
        """
        if entry.version:
            return
        named = {e.version for e in self._entries if e.name == entry.name}
        pulled = {p["version"] for p in self._models.pulls() if p["name"] == entry.name and p["state"] == "placed"}
        for row in self._life.versions(entry.name):
            version = str(row["version"])
            if row["state"] not in ("staged", "shadow", "canary") or version not in pulled - named:
                continue
            if release(version) >= release(newest) or self._life.by_hand(entry.name, version, SYNC):
                continue
            try:
                why = f"policy: {newest} came after it"
                self._desk.change("retire", entry.name, version, who=SYNC, why=why)
            except NodeError as error:
                self._waits(entry.name, version, Wait("failed", f"'retire' was not possible: {error}"))
            else:
                self._life.wait_for(entry.name, version, None, None)

    def _take(self, name: str, version: str, move: Move, percent: float) -> bool:
        try:
            self._desk.change(move.action, name, version, who=SYNC, why=f"policy: {move.why}", percent=percent)
        except NodeError as error:
            self._not_before[name, version] = self._db.clock.ticks() + PAUSE_SECONDS
            self._waits(name, version, Wait("failed", f"'{move.action}' was not possible: {error}"))
            return False
        self._life.wait_for(name, version, None, None)
        self._log.info("model went on by its policy", model=name, version=version, step=move.action)
        return True

    def _waits(self, name: str, version: str, wait: Wait) -> None:
        """An event where somebody has to act; the text of the others only counts on."""
        if self._life.wait_for(name, version, wait.code, wait.text) and wait.code in ("approval", "worse", "failed"):
            severity = "info" if wait.code == "approval" else "error"
            Events(self._db).add(severity, f"model-waits-{wait.code}", f"{name}@{version}", wait.text)  # type: ignore[arg-type]

    def _pulled(self, entry: ModelPull) -> Row | None:
        """The pull that the entry is about: the newest that is here, none that is older than what serves."""
        mine = [
            p
            for p in self._models.pulls()
            if p["name"] == entry.name
            and p["state"] in ("placed", "activated")
            and entry.version in ("", p["version"])
            and entry.sha256 in ("", p["sha256"])
        ]
        newest = max(mine, key=lambda p: release(p["version"]), default=None)
        active = self._models.active().get(entry.name)
        if newest is None or entry.version or active is None:
            return newest
        return newest if release(newest["version"]) >= release(active) else None

    def _facts(self, entry: ModelPull, pulled: Row, row: Row) -> Facts:
        name, version, state = entry.name, str(row["version"]), str(row["state"])
        since = float(row["since_at"] or 0.0)
        studies, verdict = 0, ""
        if state == "shadow":
            studies = self._runs.times_compared(name, version, since)
            verdict = self._verdict(name, version, since, max(1, entry.shadow_studies))
        elif state == "canary":
            studies = self._runs.studies(name, version, since)
            verdict = self._verdict(name, version, since, self._rules.min_runs)
        others = [r for r in self._desk.listing() if r["name"] == name and r["version"] != version and r["serves"]]
        vouched = "" if entry.url else self._vouched(name, version, str(pulled["sha256"]))
        return Facts(
            state=state,
            faulty=row["faulty"],
            hours=max(0.0, self._db.clock.ticks() - since) / HOUR,
            studies=studies,
            approved=bool(row["approved_by"]),
            by_hand=self._life.by_hand(name, version, SYNC),
            verdict=verdict,
            not_offered=vouched,
            alone=not others,
        )

    def _verdict(self, name: str, version: str, since: float, enough: int) -> str:
        """As :mod:`dicomnode.rollout` judges; with as few comparisons as the policy asks for."""
        limits = Limits(**{f.name: getattr(self._rules, f.name) for f in fields(Limits)})
        limits = replace(limits, min_runs=min(limits.min_runs, enough))
        active = self._models.active().get(name, "")
        most = self._rules.watch_runs
        found = rollout.judge(
            self._runs.recent(name, version, most, since=since),
            self._runs.recent(name, active, most),
            self._runs.compared(name, version, most, since=since),
            limits,
        )
        return f"{found.reason}: {found.text}" if found else ""
