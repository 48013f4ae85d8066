"""Keeping up with the signed repository: when to look, what was found, and which archives are wanted of it.

A failure changes nothing of what serves: it is a row with state and reason, an event when it is
new, and it is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta

from dicomnode import logs, metrics
from dicomnode.clock import iso
from dicomnode.errors import NodeError
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events, Models, Severity
from dicomnode.index.trust import Offer, State, Trust, release
from dicomnode.offline import may_ask
from dicomnode.settings import ModelPull, Settings
from dicomnode.sync.pull import Wanted, in_daemon_thread
from dicomnode.sync.source import source_for
from dicomnode.sync.trust import BoundedFetcher, Expired, Refused, read_root, refresh

CLOCK_SLACK = timedelta(days=1)
"""A wall clock that stands further before the last good look was set back; expiry means nothing then."""


def choose(entry: ModelPull, offers: Sequence[Offer], active: str | None) -> Offer | None:
    """The offer that an entry wants: the version it names, else the newest; never one older than what serves. Pure."""
    mine = [o for o in offers if o.name == entry.name and entry.version in ("", o.version)]
    if not mine:
        return None
    newest = max(mine, key=lambda o: (o.order, o.target))
    if not entry.version and active is not None and newest.order < release(active):
        return None
    return newest


def clock_set_back(row: Row | None, now: datetime) -> bool:
    """Whether the wall clock is before what this node has seen; else metadata of then would look fresh. Pure."""
    good = row["good_time"] if row else None
    return good is not None and now < datetime.fromisoformat(good) - CLOCK_SLACK


class ModelRepository:
    def __init__(self, settings: Settings, db: Database) -> None:
        self._cloud = settings.cloud
        self._settings, self._mode = settings.cloud.repository, settings.sync.offline_mode
        self._cache = settings.node.data_dir / "trust"
        self._work = settings.node.data_dir / "staging" / "trust"
        self._db = db
        self._trust = Trust(db, self._settings.metadata_url)
        self._log = logs.get()

    async def run_once(self) -> bool:
        """Look once; whether something else is wanted than before."""
        if not may_ask(self._mode):
            return False
        before = await asyncio.to_thread(self.offered)
        state, reason, hint = await in_daemon_thread(self._look)
        if state == "current":
            return await asyncio.to_thread(self.offered) != before
        metrics.MODEL_REPOSITORY_FAILURES.labels(state).inc()
        self._log.warning("models cannot be followed", state=state, cause=reason)
        if await asyncio.to_thread(self._trust.bad, state, reason):
            text = f"{reason}. {hint}" if hint else reason
            severity: Severity = "warning" if state == "away" else "error"
            await asyncio.to_thread(
                Events(self._db).add, severity, f"model-repository-{state}", "models", f"{text}; what serves goes on"
            )
        return False

    def _look(self) -> tuple[State, str, str]:
        """Blocking; state, reason and hint."""
        try:
            known, now = self._trust.row(), self._db.clock.wall()
            if clock_set_back(known, now):
                return "refused", f"the clock was set back to {iso(now)}", "Set the clock"
            assert self._settings.root_file is not None  # the settings see to it
            root = read_root(self._settings.root_file)
            url = self._settings.metadata_url
            fetcher = BoundedFetcher(source_for(url, self._cloud, self._db.clock), self._cloud.timeout_seconds)
            trusted = refresh(root, url, self._cache, self._work, fetcher)
        except Expired as error:
            return "expired", error.cause, error.hint
        except Refused as error:
            return "refused", error.cause, error.hint
        except NodeError as error:
            return "away", f"{error.operation}: {error.cause}", error.hint
        self._trust.good(trusted)
        if known is None or known["state"] != "current":
            found = f"{len(trusted.offers)} archives, valid until {iso(trusted.expires)}"
            Events(self._db).add("info", "model-repository", "models", f"the repository is trusted: {found}")
        if trusted.reason and (known is None or known["reason"] != trusted.reason):
            text = f"{trusted.reason}. Ask who runs the repository; what its other roles sign is followed"
            Events(self._db).add("warning", "model-repository-role", "models", text)
        return "current", "", ""

    def offered(self, *, stale: bool = False) -> list[Wanted]:
        """Archives that the settings follow and the repository vouches for now; with ``stale``: vouched for last."""
        active = Models(self._db).active()
        offers = self._trust.offers(stale=stale)
        found = []
        for entry in self._cloud.models:
            offer = None if entry.url else choose(entry, offers, active.get(entry.name))
            if offer is not None:
                url = f"{self._settings.archives_url}/{offer.target}"
                named = {"signed": True, "by_version": bool(entry.version)}
                found.append(Wanted(offer.name, offer.version, url, offer.sha256, entry.plan, offer.length, **named))
        return found

    def vouched(self, name: str, version: str, sha256: str) -> str:
        """Why a version must not go on by itself; empty while the repository lists exactly that archive."""
        row, offers = self._trust.row(), self._trust.offers()
        if row is None or not offers:
            why = row["reason"] if row else "it has not been looked at yet"
            return f"the repository vouches for nothing now ({why})"
        if not any((o.name, o.version, o.sha256) == (name, version, sha256) for o in offers):
            return "the repository does not list it any more"
        return ""
