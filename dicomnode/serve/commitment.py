"""Storage commitment on associations that peers open, in both roles (PS3.4 J).

As SCP: an N-ACTION is answered with success when the request is committed; the report follows on
the same association while the peer stays, else the courier brings it. As SCU: an N-EVENT-REPORT
about what this node asked of that peer. The standard wants the peer to propose the SCP role for
that; one that does not is heard all the same, because a report counts only from the peer that was
asked, in a transaction of this node's own.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from typing import Any

from pynetdicom.dimse_primitives import N_ACTION, N_EVENT_REPORT

from dicomnode import doorbell, logs, metrics
from dicomnode.commitment import (
    NO_SUCH_ACTION,
    NO_SUCH_CLASS,
    NO_SUCH_INSTANCE,
    NOT_AUTHORIZED,
    PROCESSING_FAILURE,
    REQUEST,
    RESOURCE_LIMITATION,
    SOP_CLASS,
    SOP_INSTANCE,
    SUCCESS,
    UNRECOGNIZED_OPERATION,
    Refused,
    parse_request,
)
from dicomnode.dimse.invoke import invoke
from dicomnode.errors import NodeError, StorageError
from dicomnode.index.database import Database
from dicomnode.index.promises import Promise
from dicomnode.index.reports import LEASE_SECONDS, IncomingReports, OwedReports
from dicomnode.settings import Peer, Settings

JUDGE_SECONDS = 30.0
"""A request that takes longer to judge is reported by the courier."""

COURTESY_SECONDS = 0.1
"""Many a peer releases right after the response; a report that crosses that helps nobody."""

_COMMENT = 64
"""Characters of an Error Comment, VR LO."""


class Commitment:
    """For peers with ``commit`` in ``allow`` as their SCP, with ``commitment = true`` as their SCU."""

    classes = frozenset({SOP_CLASS})

    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings = settings
        self._owner = f"receiver {os.getpid()}"
        self._owed = OwedReports(settings, db, self._owner)
        self._incoming = IncomingReports(settings, db)
        self._log = logs.get()

    def roles(self, sop_class: str, peer: Peer) -> tuple[bool, bool]:
        mine = sop_class == SOP_CLASS
        return mine and ("commit" in peer.allow or peer.commitment), mine and peer.commitment

    def negotiate(self, assoc: Any, proposed: Mapping[str, bytes]) -> dict[str, bytes]:
        """This SOP class has no extended negotiation."""
        del assoc, proposed
        return {}

    def close(self) -> None:
        """Nothing is held between requests."""

    def serve(self, assoc: Any, request: Any, context: Any) -> None:
        """Answer one request with one response; the report of a commitment may follow it."""
        peer: Peer = assoc.node_peer
        syntax = str(context.transfer_syntax[0])
        promise: Promise | None = None
        status, comment = SUCCESS, ""
        try:
            _check(request)
            if isinstance(request, N_EVENT_REPORT):
                if not peer.commitment:
                    raise Refused(PROCESSING_FAILURE, "this peer is not asked for storage commitment")  # noqa: TRY301
                data = _bytes(request.EventInformation)
                status, comment = self._incoming.take(peer.name, int(request.EventTypeID), data, syntax)
            else:
                if "commit" not in peer.allow:
                    raise Refused(NOT_AUTHORIZED, "this peer may not ask for storage commitment")  # noqa: TRY301
                wanted = parse_request(_bytes(request.ActionInformation), syntax)
                promise = self._owed.promises.receive(peer.name, wanted, self._owner, LEASE_SECONDS)
        except Refused as refused:
            status, comment = refused.status, refused.comment
            self._log.warning("commitment refused", peer=peer.name, status=f"0x{status:04X}", cause=comment)
        except StorageError as error:
            status, comment = RESOURCE_LIMITATION, error.cause
            self._log.error("commitment not stored", peer=peer.name, cause=error.cause, hint=error.hint)
        except NodeError as error:
            status, comment = PROCESSING_FAILURE, error.cause
            self._log.error("commitment not served", peer=peer.name, cause=error.cause, hint=error.hint)
        except Exception as error:  # noqa: BLE001 the peer gets an answer; values stay out of the log
            status, comment = PROCESSING_FAILURE, "unexpected error"
            self._log.error("commitment not served", peer=peer.name, exc_type=logs.fault(error))
        _respond(assoc, request, int(context.context_id), status, comment)
        if isinstance(request, N_ACTION):
            metrics.commitment_request(status)
        if promise is not None:
            self._report(assoc, context, promise)

    def _report(self, assoc: Any, context: Any, promise: Promise) -> None:
        """On this association; what does not come about here is left to the courier."""
        try:
            cause = self._report_here(assoc, context, promise)
        except NodeError as error:
            cause = error.cause
            self._log.error("commitment not reported", peer=promise.peer, cause=error.cause, hint=error.hint)
        except Exception as error:  # noqa: BLE001 the row is committed, the courier goes on with it
            cause = "unexpected error"
            self._log.error("commitment not reported", peer=promise.peer, exc_type=logs.fault(error))
        if cause:
            self._owed.hand_on(promise, cause)
            doorbell.ring(self._settings.node.data_dir, "courier")

    def _report_here(self, assoc: Any, context: Any, promise: Promise) -> str:
        """Why the report was not sent on this association; empty when it was."""
        deadline = time.monotonic() + JUDGE_SECONDS

        def pause(seconds: float) -> bool:
            if seconds or assoc.wire.waiting():
                assoc.wait(max(seconds, 0.001), lambda: False)
            return bool(assoc.usable()) and time.monotonic() < deadline

        judged = self._owed.judge(promise, pause)
        if judged is None or not pause(COURTESY_SECONDS):
            return "the association ended before the report" if not assoc.usable() else "the judgement takes long"
        report = N_EVENT_REPORT()
        report.MessageID = 1
        report.AffectedSOPClassUID, report.AffectedSOPInstanceUID = SOP_CLASS, SOP_INSTANCE
        report.EventTypeID, information = self._owed.message(judged, str(context.transfer_syntax[0]))
        report.EventInformation = io.BytesIO(information)
        seconds = self._settings.delivery.commitment_wait_seconds
        status = invoke(assoc, int(context.context_id), report, seconds)
        if status is None:
            return "the peer did not answer the report on the association of its request"
        self._owed.record(judged, status)
        return ""


def _check(request: Any) -> None:
    """Raises Refused when the operation is none of the well-known instance (PS3.4 J.3.5)."""
    if isinstance(request, N_ACTION):
        named = (request.RequestedSOPClassUID, request.RequestedSOPInstanceUID)
    elif isinstance(request, N_EVENT_REPORT):
        named = (request.AffectedSOPClassUID, request.AffectedSOPInstanceUID)
    else:
        raise Refused(UNRECOGNIZED_OPERATION, "this SOP class has no such operation")
    if str(named[0]) != SOP_CLASS:
        raise Refused(NO_SUCH_CLASS, "the command names another SOP class than its context")
    if str(named[1]) != SOP_INSTANCE:
        raise Refused(NO_SUCH_INSTANCE, "there is only the well-known instance")
    if isinstance(request, N_ACTION) and request.ActionTypeID != REQUEST:
        raise Refused(NO_SUCH_ACTION, "this SOP class has no such action type")


def _bytes(stream: Any) -> bytes:
    return bytes(stream.getvalue()) if stream is not None else b""


def _respond(assoc: Any, request: Any, context_id: int, status: int, comment: str) -> None:
    """Send the response. Nothing is sent to a peer that is gone."""
    if not assoc.usable():
        return
    response = type(request)()
    response.MessageIDBeingRespondedTo = request.MessageID
    response.Status = status
    if isinstance(request, N_ACTION | N_EVENT_REPORT):
        response.AffectedSOPClassUID, response.AffectedSOPInstanceUID = SOP_CLASS, SOP_INSTANCE
        if isinstance(request, N_ACTION):
            response.ActionTypeID = request.ActionTypeID
        else:
            response.EventTypeID = request.EventTypeID
    if comment:
        response.ErrorComment = comment[:_COMMENT]
    assoc.dimse.send_msg(response, context_id)
