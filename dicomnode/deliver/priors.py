"""Fetches earlier studies that jobs wish for, from the PACS that their rules name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from dicomnode import doorbell, logs, metrics
from dicomnode.deliver.crew import Crew
from dicomnode.deliver.prior_scu import asked, candidates, move
from dicomnode.dimse.requestor import Patience
from dicomnode.errors import PeerAway, PeerError, PeerRefused
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.index.prior_work import Priors
from dicomnode.priors import Candidate, load, ranked
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport

LONGEST_BACKOFF_SECONDS = 60.0


class PriorFetcher:
    """Peers are asked side by side by ``crew``; ``on_decided`` is called when a job may go on."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        owner: str,
        crew: Crew | None = None,
        on_decided: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._db = db
        self._owner = owner
        self._crew = crew or Crew(0)
        self._transport = Transport(settings.tls)
        self._priors = Priors(db)
        self._events = Events(db)
        self._on_decided = on_decided
        self._log = logs.get()

    def start(self) -> None:
        """Take back what a former life asked for."""
        self._priors.start()

    def run_once(self) -> float:
        """Settle and ask what is due; returns seconds until the next look is needed at most."""
        if self._priors.tend():
            self._on_decided()
        for peer in self._priors.due_peers():
            self._crew.take(peer, partial(self._serve, peer))
        due = self._priors.next_due_in()
        return doorbell.SLOW_BEAT_SECONDS if due is None else min(doorbell.SLOW_BEAT_SECONDS, max(due, 0.05))

    def _serve(self, name: str) -> bool:
        row = self._priors.ask(name, self._owner)
        if row is None:
            return False
        outcome: metrics.PriorOutcome
        try:
            outcome = self._fetch(self._peer(name), row)
        except PeerError as error:
            outcome = "retried"
            self._log.warning("earlier study not fetched", peer=name, job=row["job_id"], cause=error.cause)
            delivery = self._settings.delivery
            self._priors.retry(row, error.cause, first=delivery.backoff_seconds, longest=LONGEST_BACKOFF_SECONDS)
            if isinstance(error, PeerRefused) and row["attempts"] == 1:
                self._events.add(
                    "warning", "prior-refused", name, f"job {row['job_id']}: {error.cause}. {error.hint}".strip()
                )
        metrics.prior(outcome)
        self._on_decided()
        return True

    def _peer(self, name: str) -> Peer:
        peer = self._settings.peer(name)
        if peer is None or not peer.reachable:
            raise PeerAway("C-FIND", f"peer '{name}' is not in [[peers]] or lacks host and port")
        return peer

    def _fetch(self, peer: Peer, row: Row) -> metrics.PriorOutcome:
        """One series of the latest study that fits. Raises PeerError."""
        wish, current = load(row["wish"]), self._priors.wanted(row)
        left = max(1.0, float(row["deadline_at"]) - self._db.clock.ticks())
        patience = Patience(self._settings.delivery.connect_seconds, left)
        assoc = asked(self._settings.node.ae_title, peer, patience, self._transport)
        try:
            tried = set(json.loads(row["tried"]))
            found = [
                c
                for c in ranked(current, candidates(assoc, peer, current, wish), wish, lenient=True)
                if c.text("SeriesInstanceUID") not in tried
            ]
            if not found:
                if assoc.usable():
                    assoc.release()
                self._priors.absent(row, f"peer '{peer.name}' has none that fits")
                return "absent"
            self._move(assoc, peer, row, found[0])
            if assoc.usable():
                assoc.release()
        finally:
            assoc.end()
        return "fetched"

    def _move(self, assoc: Any, peer: Peer, row: Row, chosen: Candidate) -> None:
        study, series = chosen.text("StudyInstanceUID"), chosen.text("SeriesInstanceUID")
        if not (chosen.images and self._priors.held(series) >= chosen.images):
            if not self._priors.held(series):  # a series that came by itself stays what it is
                self._priors.expect(row, [series])
            moved = move(assoc, peer, study, series, self._settings.node.ae_title)
            self._log.info("earlier study fetched", peer=peer.name, job=row["job_id"], count=moved.completed)
            self._priors.moved(row, study, series, moved.completed or chosen.images)
            return
        self._priors.moved(row, study, series, chosen.images)
