"""Storage commitment SCU: asks peers to accept responsibility for the results that they stored (PS3.4 J).

For each study one N-ACTION. The report may come on the same association, for which it is kept
open a while, or later on one that the peer opens (:mod:`dicomnode.serve.commitment`).
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from pynetdicom import evt
from pynetdicom.dimse_primitives import N_ACTION
from pynetdicom.presentation import build_context

from dicomnode import doorbell, logs
from dicomnode.commitment import REQUEST, SOP_CLASS, SOP_INSTANCE, accepted, encode_request
from dicomnode.deliver.crew import Crew
from dicomnode.deliver.scu import patience
from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.invoke import invoke
from dicomnode.dimse.requestor import associate
from dicomnode.errors import PeerError
from dicomnode.index.asks import Ask, Asks
from dicomnode.index.commitment import Role, hold
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.index.reports import IncomingReports
from dicomnode.index.states import backoff_seconds
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport

SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
TOLD_AFTER = 3
"""Attempts after which an operator hears that a peer cannot be asked."""

MOST_ON_ONE = 100
"""Transactions on one association."""

_LOOK_SECONDS = 0.2
_PASSING = frozenset({0x0110, 0x0210, 0x0213})


class Asker:
    """Peers are asked side by side by ``crew``."""

    def __init__(self, settings: Settings, db: Database, owner: str, crew: Crew | None = None) -> None:
        self._settings = settings
        self._db = db
        self._owner = owner
        self._transport = Transport(settings.tls)
        self._crew = crew or Crew(0)
        self._asks = Asks(db)
        self._reports = IncomingReports(settings, db)
        self._events = Events(db)
        self._log = logs.get()

    def start(self) -> None:
        """What a former life of this asker was asking is asked again."""
        self._expire(self._owner)

    def run_once(self) -> float:
        """Have asked what is due; returns seconds until the next look is needed at most."""
        self._expire()
        for destination in dict.fromkeys([*self._asks.due_peers(), *self._asks.ready_destinations()]):
            self._crew.take(destination, partial(self._serve, destination))
        due = self._asks.next_due_in()
        return doorbell.SLOW_BEAT_SECONDS if due is None else min(doorbell.SLOW_BEAT_SECONDS, max(due, 0.01))

    def _expire(self, own: str | None = None) -> None:
        for late in self._asks.expire(own):
            cause = "no report came in time" if late["state"] == "waiting" else "the courier ended while it asked"
            self._log.warning("commitment is asked for again", peer=late["peer"], count=late["instances"], cause=cause)
            if late["state"] == "waiting":
                self._events.add(
                    "warning",
                    "commitment-late",
                    late["peer"],
                    f"commitment {late['id']}: {cause}; {late['instances']} result(s) are asked for again",
                )

    def _serve(self, destination: str) -> bool:
        peer = self._settings.peer(destination)
        if peer is not None and not peer.commitment:
            return self._asks.give_up(destination) > 0
        self._asks.make(destination)
        ask = self._next(destination)
        if ask is None:
            return False
        if peer is None or not peer.reachable:
            self._away(ask, f"peer '{destination}' is not in [[peers]] or lacks host and port")
            return True
        heard: list[str] = []
        try:
            assoc = associate(
                self._settings.node.ae_title,
                peer,
                [build_context(SOP_CLASS, list(SYNTAXES))],
                patience(self._settings.delivery),
                operation="N-ACTION",
                handlers=[(evt.EVT_N_EVENT_REPORT, self._on_report, [peer.name, heard])],
                transport=self._transport,
            )
        except PeerError as error:
            self._away(ask, error.cause)
            return True
        try:
            self._ask_all(assoc, peer, ask, heard)
            if assoc.usable():
                assoc._is_paused = True  # pynetdicom took it back when it served a report, and waits for it
                assoc.release()
        finally:
            assoc.end()
        return True

    def _next(self, destination: str) -> Ask | None:
        delivery = self._settings.delivery
        seconds = 2 * (delivery.connect_seconds + delivery.response_seconds)
        found = self._asks.lease(destination, self._owner, seconds, 1)
        return found[0] if found else None

    def _ask_all(self, assoc: NodeAssociation, peer: Peer, first: Ask, heard: Sequence[str]) -> None:
        """One after the other, each with its report while reports come on this association.

        Many an SCP cannot take a request while it waits for the answer to its own report.
        """
        ask: Ask | None = first
        number = 0
        reports_here = True
        while ask is not None:
            number += 1
            if self._ask(assoc, peer, ask, number) and reports_here:
                before = len(heard)
                self._wait(assoc, ask.id)
                reports_here = len(heard) > before
            ask = self._next(peer.name) if number < MOST_ON_ONE and assoc.usable() else None

    def _ask(self, assoc: NodeAssociation, peer: Peer, ask: Ask, message_id: int) -> bool:
        """One N-ACTION; True when the peer took it."""
        context = assoc.accepted_contexts[0]
        request = N_ACTION()
        request.MessageID = message_id
        request.RequestedSOPClassUID, request.RequestedSOPInstanceUID = SOP_CLASS, SOP_INSTANCE
        request.ActionTypeID = REQUEST
        request.ActionInformation = io.BytesIO(encode_request(ask.request, str(context.transfer_syntax[0])))
        if not assoc.usable():
            self._away(ask, "the association was cut")
            return False
        status = invoke(assoc, int(context.context_id), request, self._settings.delivery.response_seconds)
        delivery = self._settings.delivery
        fields = {"peer": peer.name, "instance": logs.uid_hash(ask.request.TransactionUID)}
        if status is None:
            cause = "the peer did not answer the request"
            self._log.warning("commitment not asked", cause=cause, **fields)
            self._asks.lost(
                ask.id,
                self._owner,
                cause,
                backoff_seconds(ask.attempts, delivery.backoff_seconds, delivery.backoff_max_seconds),
            )
            if assoc.usable():
                assoc.abort(block=False)
            return False
        if accepted(status):
            self._asks.accepted(ask.id, self._owner, delivery.commitment_timeout_seconds)
            self._log.info("commitment asked", count=len(ask.request.references), **fields)
            return True
        self._refused(ask, peer, status)
        return False

    def _refused(self, ask: Ask, peer: Peer, status: int) -> None:
        delivery = self._settings.delivery
        cause = f"the peer refused the request, status 0x{status:04X}"
        wait = delivery.backoff_max_seconds
        if status in _PASSING:
            wait = backoff_seconds(ask.attempts, delivery.backoff_seconds, delivery.backoff_max_seconds)
        self._asks.retry(ask.id, self._owner, cause, wait)
        self._log.warning("commitment not asked", peer=peer.name, cause=cause, attempts=ask.attempts)
        if ask.attempts == 1:
            self._tell(ask, cause)

    def _away(self, ask: Ask, cause: str) -> None:
        delivery = self._settings.delivery
        wait = backoff_seconds(ask.attempts, delivery.backoff_seconds, delivery.backoff_max_seconds)
        self._asks.retry(ask.id, self._owner, cause, wait)
        hold(self._db, Role.scu, ask.peer, wait)
        self._log.warning("commitment not asked", peer=ask.peer, cause=cause, attempts=ask.attempts)
        if ask.attempts == TOLD_AFTER:
            self._tell(ask, cause)

    def _tell(self, ask: Ask, cause: str) -> None:
        count = len(ask.request.references)
        self._events.add(
            "error", "commitment-refused", ask.peer, f"commitment {ask.id} of {count} result(s): {cause}; tried on"
        )

    def _wait(self, assoc: NodeAssociation, ask_id: int) -> None:
        """Keep the association open for the report; one that comes by another way ends the wait too."""
        deadline = time.monotonic() + self._settings.delivery.commitment_wait_seconds
        while (
            (remaining := deadline - time.monotonic()) > 0
            and assoc.usable()
            and not self._crew.stopping.is_set()
            and self._asks.waits(ask_id)
        ):
            before = assoc.wire.received
            assoc.wait(min(remaining, _LOOK_SECONDS), lambda: assoc.wire.received > before)  # noqa: B023

    def _on_report(self, event: Any, peer: str, heard: list[str]) -> tuple[int, None]:
        """In the thread of the association; success is answered after the commit."""
        heard.append(peer)
        request = event.request
        data = request.EventInformation.getvalue() if request.EventInformation is not None else b""
        status, _ = self._reports.take(peer, int(request.EventTypeID), data, str(event.context.transfer_syntax))
        return status, None
