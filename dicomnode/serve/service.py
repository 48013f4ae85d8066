"""The query/retrieve services as the receiver's listener uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pynetdicom.dimse_primitives import C_FIND, C_GET, C_MOVE
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelGet,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from dicomnode import logs
from dicomnode.errors import MalformedDataSet, NodeError
from dicomnode.index.database import Database
from dicomnode.index.matching import Root
from dicomnode.serve.exchange import CANNOT_COUNT, OUT_OF_RESOURCES, UNABLE_TO_PROCESS, Exchange
from dicomnode.serve.find import find
from dicomnode.serve.retrieve import Retriever
from dicomnode.settings import Peer, Service, Settings

_MODELS: Mapping[str, tuple[Service, Root, Any]] = {
    str(PatientRootQueryRetrieveInformationModelFind): ("find", Root.PATIENT, C_FIND),
    str(StudyRootQueryRetrieveInformationModelFind): ("find", Root.STUDY, C_FIND),
    str(PatientRootQueryRetrieveInformationModelMove): ("move", Root.PATIENT, C_MOVE),
    str(StudyRootQueryRetrieveInformationModelMove): ("move", Root.STUDY, C_MOVE),
    str(PatientRootQueryRetrieveInformationModelGet): ("get", Root.PATIENT, C_GET),
    str(StudyRootQueryRetrieveInformationModelGet): ("get", Root.STUDY, C_GET),
}


class QueryRetrieve:
    """C-FIND, C-MOVE and C-GET, Patient Root and Study Root.

    Each SOP class is open to a peer whose ``allow`` has its word: find, move or get.
    """

    classes = frozenset(_MODELS)

    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._retriever = Retriever(settings, db)
        self._log = logs.get()

    def roles(self, sop_class: str, peer: Peer) -> tuple[bool, bool]:
        return _MODELS[sop_class][0] in peer.allow, False

    def negotiate(self, assoc: Any, proposed: Mapping[str, bytes]) -> dict[str, bytes]:
        """SOP Class Extended Negotiation (PS3.4 C.5.1.1, C.5.2.1): relational queries, nothing else.

        C-FIND has four more fields (date-time, fuzzy names, timezone); they are answered with 0.
        """
        answers: dict[str, bytes] = {}
        for uid, info in proposed.items():
            if str(uid) in _MODELS and info:
                answers[str(uid)] = bytes([info[0] & 1]) + bytes(len(info) - 1)
        assoc.node_relational = frozenset(uid for uid, info in answers.items() if info[0])
        return answers

    def serve(self, assoc: Any, request: Any, context: Any) -> None:
        """Answer one request; every path ends with one final response."""
        exchange = Exchange(assoc, request, context)
        service, root, kind = _MODELS[exchange.sop_class_uid]
        relational = exchange.sop_class_uid in getattr(assoc, "node_relational", ())
        peer = assoc.node_peer.name
        try:
            if not isinstance(request, kind) or str(request.AffectedSOPClassUID) != exchange.sop_class_uid:
                status = UNABLE_TO_PROCESS
                exchange.respond(status)
            elif service == "find":
                status = find(self._settings, self._db, exchange, root, relational=relational)
            elif service == "move":
                status = self._retriever.move(exchange, root, relational=relational)
            else:
                status = self._retriever.get(exchange, root, relational=relational)
        except MalformedDataSet as error:
            status = UNABLE_TO_PROCESS
            self._log.warning("identifier not understood", peer=peer, service=service, cause=error.cause)
            exchange.respond(status)
        except NodeError as error:
            status = OUT_OF_RESOURCES if service == "find" else CANNOT_COUNT
            self._log.error("request not served", peer=peer, service=service, cause=error.cause, hint=error.hint)
            exchange.respond(status)
        except Exception as error:  # noqa: BLE001 the peer gets an answer; values stay out of the log
            status = UNABLE_TO_PROCESS
            self._log.error("request not served", peer=peer, service=service, exc_type=type(error).__name__)
            exchange.respond(status)
        self._log.info("request served", peer=peer, service=service, status=f"0x{status:04X}")

    def close(self) -> None:
        self._retriever.close()
