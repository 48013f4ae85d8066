"""The query/retrieve services as the receiver's listener uses them."""

from __future__ import annotations

import time
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

from dicomnode import logs, metrics
from dicomnode.errors import MalformedDataSet, NodeError
from dicomnode.index.corrections import serving_corrections
from dicomnode.index.database import Database
from dicomnode.index.matching import Options, Root
from dicomnode.index.operation import Events
from dicomnode.serve.exchange import (
    CANCELLED,
    CANNOT_COUNT,
    OUT_OF_RESOURCES,
    UNABLE_TO_PROCESS,
    UNRECOGNIZED_OPERATION,
    Exchange,
)
from dicomnode.serve.find import Finding, find
from dicomnode.serve.gate import QueryGate
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

_FIND_FIELDS = 4
"""Relational queries, date-time matching, fuzzy names, timezone (PS3.4 table C.5-1)."""

_TOO_MANY = "more C-FIND requests than dimse.query_per_second or dimse.queries_at_once allow"


class QueryRetrieve:
    """C-FIND, C-MOVE and C-GET, Patient Root and Study Root.

    Each SOP class is open to a peer whose ``allow`` has its word: find, move or get.
    """

    classes = frozenset(_MODELS)

    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._retriever = Retriever(settings, db)
        self._gate = QueryGate(settings.dimse.query_per_second, settings.dimse.queries_at_once)
        self._events = Events(db)
        self._log = logs.get()

    def roles(self, sop_class: str, peer: Peer) -> tuple[bool, bool]:
        return _MODELS[sop_class][0] in peer.allow, False

    def negotiate(self, assoc: Any, proposed: Mapping[str, bytes]) -> dict[str, bytes]:
        """SOP Class Extended Negotiation (PS3.4 C.5.1.1, C.5.2.1).

        Relational queries for all; for C-FIND also combined date-time matching, fuzzy matching
        of person names and timezone query adjustment. The fields for enhanced multi-frame
        conversion, and those of later editions, are answered with 0. As many fields are
        answered as were proposed.
        """
        answers: dict[str, bytes] = {}
        for uid, info in proposed.items():
            model = _MODELS.get(str(uid))
            if model is not None and info:
                known = _FIND_FIELDS if model[0] == "find" else 1
                answers[str(uid)] = bytes(int(field == 1) if n < known else 0 for n, field in enumerate(info))
        assoc.node_extended = answers
        return answers

    def serve(self, assoc: Any, request: Any, context: Any) -> None:
        """Answer one request; every path ends with one final response."""
        if not isinstance(request, C_FIND | C_GET | C_MOVE):
            assoc.refuse_request(request, int(context.context_id), UNRECOGNIZED_OPERATION)
            return
        exchange = Exchange(assoc, request, context)
        service, root, kind = _MODELS[exchange.sop_class_uid]
        fields = getattr(assoc, "node_extended", {}).get(exchange.sop_class_uid, b"")
        relational = fields[:1] == b"\1"
        peer = assoc.node_peer.name
        begin = time.perf_counter()
        answers = 0
        try:
            if not isinstance(request, kind) or str(request.AffectedSOPClassUID) != exchange.sop_class_uid:
                status = UNABLE_TO_PROCESS
                exchange.respond(status)
            elif service == "find":
                found = self._find(exchange, root, relational, self._options(fields))
                status, answers = found.status, found.answers
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
        seconds = time.perf_counter() - begin
        metrics.queried(service, status, seconds, answers)
        self._log.info(
            "request served",
            peer=peer,
            service=service,
            status=f"0x{status:04X}",
            count=answers,
            seconds=round(seconds, 4),
        )

    def _options(self, fields: bytes) -> Options:
        """What the fields of C-FIND's extended negotiation stand for."""
        combined, fuzzy, timezone = (fields[n : n + 1] == b"\1" for n in (1, 2, 3))
        unknown = self._settings.dimse.query_match_unknown
        corrections = serving_corrections(self._settings, self._db)
        return Options(combined=combined, fuzzy=fuzzy, timezone=timezone, unknown=unknown, corrections=corrections)

    def _find(self, exchange: Exchange, root: Root, relational: bool, options: Options) -> Finding:
        """C-FIND within the rate and number that one caller may ask at."""
        peer = exchange.assoc.node_peer
        caller = peer.ae_title
        if not self._gate.enter(caller, exchange.cancelled):
            status = CANCELLED if exchange.cancelled() else OUT_OF_RESOURCES
            exchange.respond(status)
            count = self._gate.to_report(caller)
            if count:
                self._log.warning("queries refused", peer=peer.name, count=count)
                self._events.add("warning", "query-refused", peer.name, f"{count} answered with 0xA700: {_TOO_MANY}")
            return Finding(status)
        try:
            return find(self._settings, self._db, exchange, root, relational=relational, options=options)
        finally:
            self._gate.leave(caller)

    def close(self) -> None:
        self._retriever.close()
