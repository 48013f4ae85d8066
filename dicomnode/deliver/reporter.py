"""Storage commitment SCP: reports that could not be sent on the association of their request (PS3.4 J.3.3).

The node then opens an association itself and proposes to be the SCP of it (PS3.7 D.3.3.4).
"""

from __future__ import annotations

import io
from functools import partial

from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.presentation import build_context

from dicomnode import doorbell, logs
from dicomnode.commitment import SOP_CLASS, SOP_INSTANCE, Told
from dicomnode.deliver.commitment import MOST_ON_ONE, SYNTAXES, TOLD_AFTER
from dicomnode.deliver.crew import Crew
from dicomnode.deliver.scu import patience
from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.invoke import invoke
from dicomnode.dimse.requestor import associate
from dicomnode.errors import PeerError, PeerRefused
from dicomnode.index.commitment import Commitments, Role, hold
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.index.promises import Promise, Promises
from dicomnode.index.reports import LEASE_SECONDS, OwedReports
from dicomnode.index.states import backoff_seconds
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport

FORGET_SECONDS = 3600.0


class Reporter:
    """Peers get their reports side by side by ``crew``."""

    def __init__(self, settings: Settings, db: Database, owner: str, crew: Crew | None = None) -> None:
        self._settings = settings
        self._db = db
        self._owner = owner
        self._transport = Transport(settings.tls)
        self._crew = crew or Crew(0)
        self._promises = Promises(db)
        self._owed = OwedReports(settings, db, owner)
        self._events = Events(db)
        self._log = logs.get()
        self._forget_at = 0.0

    def start(self) -> None:
        """Take back what a former life of this reporter held."""
        self._promises.expire(self._owner)

    def run_once(self) -> float:
        """Have reported what is due; returns seconds until the next look is needed at most."""
        now = self._db.clock.ticks()
        if now >= self._forget_at:
            self._forget_at = now + FORGET_SECONDS
            Commitments(self._db).forget()
        self._promises.expire()
        for peer in self._promises.due_peers():
            self._crew.take(peer, partial(self._serve, peer))
        due = self._promises.next_due_in()
        return doorbell.SLOW_BEAT_SECONDS if due is None else min(doorbell.SLOW_BEAT_SECONDS, max(due, 0.01))

    def _serve(self, name: str) -> bool:
        promise = self._next(name)
        if promise is None:
            return False
        peer = self._settings.peer(name)
        try:
            if peer is None or not peer.reachable:
                raise PeerRefused("N-EVENT-REPORT", f"peer '{name}' is not in [[peers]] or lacks host and port")
            assoc = self._associate(peer)
        except PeerError as error:
            self._away(promise, error.cause)
            return True
        try:
            self._report_all(assoc, promise)
            if assoc.usable():
                assoc.release()
        finally:
            assoc.end()
        return True

    def _next(self, name: str) -> Promise | None:
        """The oldest report that is due, judged; None as well when the process is to end."""
        found = self._promises.lease(name, self._owner, LEASE_SECONDS, 1)
        if not found:
            return None
        promise = self._owed.judge(found[0], self._pause)
        if promise is None:
            self._owed.hand_on(found[0], "the judgement was interrupted")
        return promise

    def _pause(self, seconds: float) -> bool:
        return not self._crew.stopping.wait(seconds) if seconds else not self._crew.stopping.is_set()

    def _associate(self, peer: Peer) -> NodeAssociation:
        """Raises PeerError. A peer that does not answer the proposal of roles gets its report all the same."""
        assoc = associate(
            self._settings.node.ae_title,
            peer,
            [build_context(SOP_CLASS, list(SYNTAXES))],
            patience(self._settings.delivery),
            operation="N-EVENT-REPORT",
            roles={SOP_CLASS: (False, True)},
            transport=self._transport,
        )
        answer = assoc.acceptor.role_selection.get(SOP_CLASS)
        if answer is not None and not answer.scp_role:
            assoc.release()
            assoc.end()
            raise PeerRefused("N-EVENT-REPORT", f"peer '{peer.name}' does not let this node be the SCP of commitment")
        return assoc

    def _report_all(self, assoc: NodeAssociation, first: Promise) -> None:
        promise: Promise | None = first
        number = 0
        while promise is not None:
            number += 1
            context = assoc.accepted_contexts[0]
            request = N_EVENT_REPORT()
            request.MessageID = number
            request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = SOP_CLASS, SOP_INSTANCE
            request.EventTypeID, information = self._owed.message(promise, str(context.transfer_syntax[0]))
            request.EventInformation = io.BytesIO(information)
            status = invoke(assoc, int(context.context_id), request, self._settings.delivery.response_seconds)
            told = self._owed.record(promise, status)
            if told is Told.retry:
                hold(self._db, Role.scp, promise.peer, self._settings.delivery.backoff_seconds)
            if status is None and assoc.usable():
                assoc.abort(block=False)
            more = status is not None and assoc.usable() and number < MOST_ON_ONE
            promise = self._next(promise.peer) if more else None

    def _away(self, promise: Promise, cause: str) -> None:
        delivery = self._settings.delivery
        self._owed.retry(promise, cause)
        wait = backoff_seconds(promise.attempts, delivery.backoff_seconds, delivery.backoff_max_seconds)
        hold(self._db, Role.scp, promise.peer, wait)
        if promise.attempts == TOLD_AFTER:
            self._events.add(
                "warning",
                "commitment-unreported",
                promise.peer,
                f"commitment {promise.id} of {len(promise.request.references)} object(s): {cause}; tried on",
            )
