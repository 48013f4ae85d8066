"""Modality Performed Procedure Step as SCP: N-CREATE, N-SET and N-GET (PS3.4 F.7, F.8).

A success is sent after the step is committed, and the worker is rung, because what the step
says can complete a series.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from pynetdicom.dimse_primitives import N_CREATE, N_GET, N_SET
from pynetdicom.sop_class import (
    ModalityPerformedProcedureStep,
    ModalityPerformedProcedureStepRetrieve,
)

from dicomnode import doorbell, durable, logs, metrics
from dicomnode.errors import MalformedDataSet, NodeError, StorageError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.index.procedure import Step, Steps
from dicomnode.nested import EXPLICIT_LITTLE, DataSet, encode, parse
from dicomnode.serve.procedure_step import (
    CLASS_INSTANCE_CONFLICT,
    DUPLICATE_INSTANCE,
    INVALID_ATTRIBUTE_VALUE,
    INVALID_INSTANCE,
    NO_SUCH_CLASS,
    NO_SUCH_INSTANCE,
    OPTIONAL_NOT_SUPPORTED,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    SUCCESS,
    UID,
    UNRECOGNIZED_OPERATION,
    Fault,
    Refused,
    changed,
    created,
    only,
    refuse,
    selected,
)
from dicomnode.settings import Peer, Settings

STEP = str(ModalityPerformedProcedureStep)
RETRIEVE = str(ModalityPerformedProcedureStepRetrieve)
_COMMENT = 64
"""Characters of an Error Comment, VR LO."""

_OPERATIONS: Mapping[tuple[str, type], str] = {
    (STEP, N_CREATE): "N-CREATE",
    (STEP, N_SET): "N-SET",
    (RETRIEVE, N_GET): "N-GET",
}


def new_uid() -> str:
    """A UID for a step whose modality gave none (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


class ProcedureSteps:
    """MPPS and MPPS Retrieve, for peers with ``mpps`` in ``allow``."""

    classes = frozenset({STEP, RETRIEVE})

    def __init__(self, settings: Settings, db: Database, make_uid: Callable[[], str] = new_uid) -> None:
        self._data_dir = settings.node.data_dir
        self._reserve = settings.node.reserve_mb * 1024 * 1024
        self._steps = Steps(db)
        self._events = Events(db)
        self._make_uid = make_uid
        self._log = logs.get()

    def roles(self, sop_class: str, peer: Peer) -> tuple[bool, bool]:
        return sop_class in self.classes and "mpps" in peer.allow, False

    def negotiate(self, assoc: Any, proposed: Mapping[str, bytes]) -> dict[str, bytes]:
        """These SOP classes have no extended negotiation."""
        del assoc, proposed
        return {}

    def serve(self, assoc: Any, request: Any, context: Any) -> None:
        """Answer one request with one response."""
        exchange = _Exchange(assoc, request, context)
        operation = _OPERATIONS.get((exchange.sop_class_uid, type(request)), "other")
        peer: Peer = assoc.node_peer
        try:
            if operation == "N-CREATE":
                self._create(exchange, peer)
            elif operation == "N-SET":
                self._set(exchange, peer)
            elif operation == "N-GET":
                self._get(exchange)
            else:
                raise refuse(UNRECOGNIZED_OPERATION, "this SOP class has no such operation")  # noqa: TRY301
        except Refused as refused:
            exchange.refuse(refused.fault)
        except MalformedDataSet as error:
            exchange.refuse(Fault(INVALID_ATTRIBUTE_VALUE, error.cause))
        except StorageError as error:
            exchange.refuse(Fault(RESOURCE_LIMITATION, error.cause))
            self._log.error("procedure step not stored", peer=peer.name, cause=error.cause, hint=error.hint)
        except NodeError as error:
            exchange.refuse(Fault(PROCESSING_FAILURE, error.cause))
            self._log.error("procedure step not served", peer=peer.name, cause=error.cause, hint=error.hint)
        except Exception as error:  # noqa: BLE001 the peer gets an answer; values stay out of the log
            exchange.refuse(Fault(PROCESSING_FAILURE, "unexpected error"))
            self._log.error("procedure step not served", peer=peer.name, exc_type=type(error).__name__)
        metrics.procedure_step(operation, exchange.status)
        if exchange.status not in (SUCCESS, OPTIONAL_NOT_SUPPORTED):
            self._log.warning(
                "procedure step refused",
                peer=peer.name,
                operation=operation,
                status=f"0x{exchange.status:04X}",
                cause=exchange.comment,
            )

    def close(self) -> None:
        """Nothing is held between requests."""

    def _create(self, exchange: _Exchange, peer: Peer) -> None:
        uid = exchange.instance_uid or self._make_uid()
        if exchange.requested_class != STEP:
            raise refuse(NO_SUCH_CLASS, "the command names another SOP class than its context")
        if not UID.fullmatch(uid):
            raise refuse(INVALID_INSTANCE, "the SOP Instance UID is not a UID")
        if durable.free_bytes(self._data_dir) < self._reserve:  # a step that was begun may still end
            raise refuse(RESOURCE_LIMITATION, "free space is at the reserve")
        step = created(exchange.read())
        if not self._steps.create(uid, step, peer.name):
            raise refuse(DUPLICATE_INSTANCE, "a step with this SOP Instance UID exists")
        self._told(peer, uid, step)
        exchange.respond(SUCCESS, instance_uid=uid)

    def _set(self, exchange: _Exchange, peer: Peer) -> None:
        if exchange.requested_class != STEP:
            raise refuse(CLASS_INSTANCE_CONFLICT, "the instance is none of the SOP class that is named")
        modification: DataSet | None = None
        while True:
            row = self._steps.read(exchange.instance_uid)
            if row is None:
                raise refuse(NO_SUCH_INSTANCE, "there is no step with this SOP Instance UID")
            if modification is None:
                modification = exchange.read()
            exchange.request_data = modification
            step = changed(row["state"], parse(row["attributes"], EXPLICIT_LITTLE), modification)
            if self._steps.replace(int(row["id"]), int(row["version"]), step):
                break  # else another N-SET came in between
        self._told(peer, exchange.instance_uid, step)
        if step.wrong_entry:
            self._events.add(
                "warning",
                "procedure-step",
                peer.name,
                "a step was discontinued because the wrong worklist entry was selected; its series are not analysed",
            )
        exchange.respond(SUCCESS, instance_uid=exchange.instance_uid)

    def _get(self, exchange: _Exchange) -> None:
        """F.8.2: the class may be named as that of the step or that of its retrieval."""
        if exchange.requested_class not in self.classes:
            raise refuse(CLASS_INSTANCE_CONFLICT, "the instance is none of the SOP class that is named")
        row = self._steps.read(exchange.instance_uid)
        if row is None:
            raise refuse(NO_SUCH_INSTANCE, "there is no step with this SOP Instance UID")
        found, lacking = selected(parse(row["attributes"], EXPLICIT_LITTLE), exchange.tags)
        status = OPTIONAL_NOT_SUPPORTED if lacking else SUCCESS
        exchange.respond(status, instance_uid=exchange.instance_uid, data=found)

    def _told(self, peer: Peer, uid: str, step: Step) -> None:
        doorbell.ring(self._data_dir, "worker")
        self._log.info(
            "procedure step",
            peer=peer.name,
            instance=logs.uid_hash(uid),
            state=step.state.value,
            series=len(step.series or ()),
            count=sum(len(s.instances) for s in step.series or ()),
        )


class _Exchange:
    """One request and its response."""

    def __init__(self, assoc: Any, request: Any, context: Any) -> None:
        self._assoc = assoc
        self._request = request
        self._context_id = int(context.context_id)
        self._syntax = str(context.transfer_syntax[0])
        self.sop_class_uid = str(context.abstract_syntax)
        self.request_data: DataSet = {}
        self.status = PROCESSING_FAILURE
        self.comment = ""

    @property
    def requested_class(self) -> str:
        return str(self._field("Requested", "SOPClassUID") or "")

    @property
    def instance_uid(self) -> str:
        return str(self._field("Requested", "SOPInstanceUID") or "")

    def _field(self, prefix: str, name: str) -> Any:
        """N-CREATE calls Affected what the others call Requested (PS3.7 10.3)."""
        prefix = "Affected" if isinstance(self._request, N_CREATE) else prefix
        return getattr(self._request, prefix + name, None)

    @property
    def tags(self) -> tuple[int, ...]:
        """Attribute Identifier List of an N-GET."""
        found = self._request.AttributeIdentifierList
        if found is None:
            return ()
        return tuple(int(t) for t in found) if isinstance(found, list) else (int(found),)

    def read(self) -> DataSet:
        """The data set of the request. Raises MalformedDataSet."""
        name = "ModificationList" if isinstance(self._request, N_SET) else "AttributeList"
        stream = getattr(self._request, name)
        self.request_data = parse(stream.getvalue() if stream is not None else b"", self._syntax)
        return self.request_data

    def refuse(self, fault: Fault) -> None:
        """With a wrong value goes the attribute that has it, nothing else of the request (PS3.7 C.5.11)."""
        wrong = only(self.request_data, fault.tags) if fault.status == INVALID_ATTRIBUTE_VALUE else {}
        self.comment = fault.comment
        self.respond(fault.status, instance_uid=self.instance_uid, data=wrong or None, fault=fault)

    def respond(
        self, status: int, *, instance_uid: str = "", data: DataSet | None = None, fault: Fault | None = None
    ) -> None:
        """Send the response. Nothing is sent to a peer that is gone."""
        self.status = status
        if not self._assoc.usable():
            return
        response = type(self._request)()
        response.MessageIDBeingRespondedTo = self._request.MessageID
        response.Status = status
        if isinstance(response, N_CREATE | N_SET | N_GET):
            response.AffectedSOPClassUID = self.requested_class
            response.AffectedSOPInstanceUID = instance_uid if UID.fullmatch(instance_uid) else None
            if data is not None:
                response.AttributeList = io.BytesIO(encode(data, self._syntax))
        if fault is not None:
            response.ErrorComment = fault.comment[:_COMMENT]
            response.ErrorID = fault.error_id
            if fault.tags and isinstance(response, N_SET | N_GET):
                response.AttributeIdentifierList = list(fault.tags)
        self._assoc.dimse.send_msg(response, self._context_id)
