"""C-FIND as SCP (PS3.4 C.4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dicomnode.index.database import Database
from dicomnode.index.matching import IdentifierError, Options, Plan, Root, Row, plan_find
from dicomnode.index.query import Ended, run
from dicomnode.serve.exchange import (
    CANCELLED,
    IDENTIFIER_MISMATCH,
    LIMIT_REACHED,
    OUT_OF_RESOURCES,
    PENDING,
    PENDING_WARNING,
    SUCCESS,
    Exchange,
)
from dicomnode.serve.identifier import encode_identifier, parse_identifier
from dicomnode.settings import Settings


@dataclass(frozen=True, slots=True)
class Finding:
    """How a query ended: the final status, and how many matches were sent."""

    status: int
    answers: int = 0


def find(
    settings: Settings, db: Database, exchange: Exchange, root: Root, *, relational: bool, options: Options
) -> Finding:
    """Answer one request. Raises MalformedDataSet, StorageError."""
    try:
        identifier = parse_identifier(exchange.identifier, exchange.transfer_syntax_uid)
        plan = plan_find(root, identifier, relational=relational, options=options)
    except IdentifierError:
        exchange.respond(IDENTIFIER_MISMATCH)
        return Finding(IDENTIFIER_MISMATCH)
    dimse = settings.dimse
    found = run(db, plan, limit=dimse.query_max_answers, seconds=dimse.query_seconds, cancelled=exchange.cancelled)
    status = PENDING_WARNING if plan.unsupported else PENDING
    sent = 0
    if found.ended is not Ended.cancelled:
        for answer in answers(plan, found.rows, settings.node.ae_title, exchange.transfer_syntax_uid):
            # Looking costs a system call. What was sent before may have taken any time, so look after it.
            if not exchange.holding and exchange.cancelled():
                break
            exchange.answer(status, answer)
            sent += 1
    final = {Ended.complete: SUCCESS, Ended.limit: LIMIT_REACHED, Ended.deadline: OUT_OF_RESOURCES}.get(
        found.ended, CANCELLED
    )
    if exchange.cancelled():
        final = CANCELLED
    exchange.respond(final)
    return Finding(final, sent)


def answers(plan: Plan, rows: list[Row], ae_title: str, transfer_syntax_uid: str) -> Iterator[bytes]:
    """One identifier for each row: what was asked for, and what the standard adds to it."""
    for found in plan.answers(rows):
        values = found | {"QueryRetrieveLevel": plan.level.value, "RetrieveAETitle": ae_title}
        values["InstanceAvailability"] = "ONLINE"
        yield encode_identifier(values, transfer_syntax_uid)
