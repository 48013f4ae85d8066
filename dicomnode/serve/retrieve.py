"""C-MOVE and C-GET as SCP (PS3.4 C.4.2, C.4.3): C-STORE sub-operations from the stored files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pynetdicom.presentation import build_context

from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.requestor import MAX_CONTEXTS, Patience, associate
from dicomnode.dimse.store import NextFile, NotPart10, Opened, send_store
from dicomnode.durable import ObjectStore
from dicomnode.errors import PeerError
from dicomnode.index.corrections import serving_corrections
from dicomnode.index.database import Database
from dicomnode.index.matching import IdentifierError, Root, Row, plan_retrieve
from dicomnode.index.query import Ended, run
from dicomnode.serve.exchange import (
    CANCELLED,
    CANNOT_COUNT,
    DESTINATION_UNKNOWN,
    IDENTIFIER_MISMATCH,
    PENDING,
    Counts,
    Exchange,
)
from dicomnode.serve.identifier import parse_identifier
from dicomnode.serve.transcode import UNCOMPRESSED, NotTranscodable, Transcoder
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport

MAX_INSTANCES = 65535
"""Counts are US (PS3.7 9.1.3): more cannot be told."""


@dataclass(frozen=True, slots=True)
class Instance:
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: Path


@dataclass(frozen=True, slots=True)
class _Sending:
    """One association that carries sub-operations."""

    exchange: Exchange
    assoc: Any
    accepted: Mapping[str, Mapping[str, int]]
    originator: tuple[str, int] | None
    seconds: float
    ahead: NextFile = field(default_factory=NextFile)

    def look_ahead(self, following: Instance | None) -> Callable[[], None] | None:
        """Reads the next file if it goes out as it is stored."""
        if following is None:
            return None
        if following.transfer_syntax_uid not in self.accepted.get(following.sop_class_uid, {}):
            return None
        return partial(self.ahead.prepare, following.path)


class Refused(Exception):
    """The retrieve ends with ``status`` before any sub-operation."""

    def __init__(self, status: int) -> None:
        super().__init__(f"0x{status:04X}")
        self.status = status


class Retriever:
    """C-MOVE and C-GET over one index and store; thread-safe."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._transport = Transport(settings.tls)
        self._settings = settings
        self._db = db
        self._store = ObjectStore(settings.node.data_dir)
        self._transcode = Transcoder()

    def close(self) -> None:
        self._transcode.close()

    def get(self, exchange: Exchange, root: Root, *, relational: bool) -> int:
        """Sub-operations on the requestor's own association; the final status."""
        try:
            instances = self._select(exchange, root, relational)
        except Refused as refusal:
            exchange.respond(refusal.status)
            return refusal.status
        counts = Counts(remaining=len(instances))
        self._send_all(exchange, exchange.assoc, instances, counts, None)
        return self._finish(exchange, counts)

    def move(self, exchange: Exchange, root: Root, *, relational: bool) -> int:
        """Sub-operations on an association to a listed peer; the final status."""
        target = self._destination(str(exchange.request.MoveDestination or ""))
        if target is None:
            exchange.respond(DESTINATION_UNKNOWN)
            return DESTINATION_UNKNOWN
        try:
            instances = self._select(exchange, root, relational)
        except Refused as refusal:
            exchange.respond(refusal.status)
            return refusal.status
        counts = Counts(remaining=len(instances))
        originator = (exchange.assoc.node_peer.ae_title, exchange.message_id)
        for batch in batches(instances):
            if exchange.cancelled():
                break
            assoc = self._associate(target, batch)
            if assoc is None:
                for instance in batch:
                    counts.add(None, instance.sop_instance_uid)
                continue
            try:
                self._send_all(exchange, assoc, batch, counts, originator)
            finally:
                if assoc.usable():
                    assoc.release()
                assoc.end()
        return self._finish(exchange, counts)

    def _finish(self, exchange: Exchange, counts: Counts) -> int:
        # A cancel that comes after the last sub-operation finds nothing to stop.
        status = CANCELLED if counts.remaining else counts.final_status()
        exchange.respond_final(status, counts)
        return status

    def _select(self, exchange: Exchange, root: Root, relational: bool) -> list[Instance]:
        """What the identifier names. Raises Refused, MalformedDataSet, StorageError."""
        identifier = parse_identifier(exchange.identifier, exchange.transfer_syntax_uid)
        try:
            corrections = serving_corrections(self._settings, self._db)
            plan = plan_retrieve(root, identifier, relational=relational, corrections=corrections)
        except IdentifierError:
            raise Refused(IDENTIFIER_MISMATCH) from None
        seconds = self._settings.dimse.query_seconds
        found = run(self._db, plan, limit=MAX_INSTANCES, seconds=seconds, cancelled=exchange.cancelled)
        match found.ended:
            case Ended.limit | Ended.deadline:
                raise Refused(CANNOT_COUNT)
            case Ended.cancelled:
                raise Refused(CANCELLED)
        return [self._instance(row) for row in found.rows]

    def _instance(self, row: Row) -> Instance:
        return Instance(
            row["SOPClassUID"], row["SOPInstanceUID"], row["TransferSyntaxUID"], self._store.path(row["file"])
        )

    def _destination(self, ae_title: str) -> Peer | None:
        """Only a listed peer with an address: a move must not send patients' data elsewhere."""
        wanted = ae_title.strip()
        return next((p for p in self._settings.peers if p.ae_title == wanted and p.reachable), None)

    def _send_all(
        self,
        exchange: Exchange,
        assoc: Any,
        instances: Sequence[Instance],
        counts: Counts,
        originator: tuple[str, int] | None,
    ) -> None:
        sending = _Sending(exchange, assoc, _accepted(assoc), originator, self._settings.delivery.response_seconds)
        try:
            for number, instance in enumerate(instances, start=1):
                if exchange.cancelled():
                    return
                following = instances[number] if number < len(instances) else None
                status = self._send(sending, instance, following, number % 65535 + 1)
                if status is None and exchange.gone():
                    return
                counts.add(status, instance.sop_instance_uid)
                if counts.remaining:
                    exchange.respond(PENDING, None, counts)
        finally:
            sending.ahead.close()

    def _send(self, sending: _Sending, instance: Instance, following: Instance | None, message_id: int) -> int | None:
        """C-STORE as stored, else in the uncompressed default; None when it could not be done."""
        if not sending.assoc.usable():
            return None
        contexts = sending.accepted.get(instance.sop_class_uid, {})
        data: Opened | bytes
        try:
            if instance.transfer_syntax_uid in contexts:
                context_id = contexts[instance.transfer_syntax_uid]
                data = sending.ahead.take(instance.path)
            else:
                syntax = next((s for s in UNCOMPRESSED if s in contexts), None)
                if syntax is None:
                    return None
                context_id = contexts[syntax]
                data = self._transcode(instance.path, syntax)
            return send_store(
                sending.assoc,
                context_id,
                message_id=message_id,
                sop_class_uid=instance.sop_class_uid,
                sop_instance_uid=instance.sop_instance_uid,
                data=data,
                originator=sending.originator,
                seconds=sending.seconds,
                given_up=sending.exchange.gone,
                meanwhile=sending.look_ahead(following),
            )
        except (OSError, NotPart10, NotTranscodable):
            return None

    def _associate(self, peer: Peer, instances: Sequence[Instance]) -> NodeAssociation | None:
        """Established association for these instances; None when there is none."""
        delivery = self._settings.delivery
        contexts = [build_context(c, list(syntaxes)) for c, syntaxes in proposals(instances)]
        patience = Patience(delivery.connect_seconds, delivery.response_seconds)
        try:
            return associate(
                self._settings.node.ae_title, peer, contexts, patience, operation="C-MOVE", transport=self._transport
            )
        except PeerError:
            return None


def _accepted(assoc: Any) -> dict[str, dict[str, int]]:
    """Context IDs on which we may send, by SOP class and transfer syntax; getscu proposes some 120."""
    found: dict[str, dict[str, int]] = {}
    for context in assoc.accepted_contexts:
        if context.as_scu:
            syntaxes = found.setdefault(str(context.abstract_syntax), {})
            syntaxes[str(context.transfer_syntax[0])] = int(context.context_id)
    return found


def proposals(instances: Sequence[Instance]) -> list[tuple[str, tuple[str, ...]]]:
    """Contexts to propose: each class in each stored syntax, and in the uncompressed default. Pure."""
    stored = dict.fromkeys((i.sop_class_uid, (i.transfer_syntax_uid,)) for i in instances)
    default = dict.fromkeys((i.sop_class_uid, UNCOMPRESSED) for i in instances)
    return [*stored, *default]


def batches(instances: Sequence[Instance]) -> Iterator[list[Instance]]:
    """Runs of instances whose contexts fit on one association (PS3.8 9.3.2.2: 128). Pure."""
    batch: list[Instance] = []
    seen: set[tuple[str, str]] = set()
    for instance in instances:
        wanted = {(instance.sop_class_uid, instance.transfer_syntax_uid), (instance.sop_class_uid, "")}
        if len(seen | wanted) > MAX_CONTEXTS:
            yield batch
            batch, seen = [], set()
        batch.append(instance)
        seen |= wanted
    if batch:
        yield batch
