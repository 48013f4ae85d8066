"""Reports of storage commitment: those that are owed to peers, and those that peers send (PS3.4 J.3.3).

Acceptor and courier use both, each on associations of its own.
"""

from __future__ import annotations

import time
from typing import Literal

from dicomnode import logs, metrics
from dicomnode.commitment import (
    INVALID_ARGUMENT_VALUE,
    PROCESSING_FAILURE,
    SUCCESS,
    Refused,
    Told,
    classify_report_status,
    encode_report,
    parse_report,
)
from dicomnode.durable import ObjectStore
from dicomnode.errors import NodeError
from dicomnode.index.asks import Asks, Taken
from dicomnode.index.database import Database
from dicomnode.index.durability import Durability, Pause
from dicomnode.index.operation import Events
from dicomnode.index.promises import Promise, Promises
from dicomnode.settings import Settings

LEASE_SECONDS = 120.0
"""While a report is prepared and sent; longer than reading one object of the largest size takes."""

_EXTEND_SECONDS = 20.0


class OwedReports:
    """Judges what was asked, keeps the judgement, and records how its report fared."""

    def __init__(self, settings: Settings, db: Database, owner: str) -> None:
        self.promises = Promises(db)
        self._settings = settings
        self._owner = owner
        self._durability = Durability(db, ObjectStore(settings.node.data_dir))
        self._events = Events(db)
        self._log = logs.get()

    def judge(self, promise: Promise, pause: Pause) -> Promise | None:
        """The promise with its verdicts; None when ``pause`` said so or the lease is lost."""
        if promise.verdicts is not None:
            return promise
        extended = time.monotonic()

        def go_on(seconds: float) -> bool:
            nonlocal extended
            if time.monotonic() - extended > _EXTEND_SECONDS:
                extended = time.monotonic()
                if not self.promises.extend(promise.id, self._owner, LEASE_SECONDS):
                    return False
            return pause(seconds)

        judgement = self._durability.judge(promise.request.references, go_on)
        if judgement is None or not self.promises.judged(promise.id, self._owner, judgement.verdicts):
            return None
        if judgement.damaged:
            self._log.error("stored objects are damaged", peer=promise.peer, count=judgement.damaged)
            self._events.add(
                "error",
                "object-damaged",
                promise.peer,
                f"commitment {promise.id}: {judgement.damaged} stored object(s) could not be read back as they came;"
                " they were not committed to, and the next copies that come replace them",
            )
        return Promise(promise.id, promise.peer, promise.request, judgement.verdicts, promise.attempts)

    def message(self, promise: Promise, transfer_syntax_uid: str) -> tuple[int, bytes]:
        """Event Type ID and event information of a promise that was judged."""
        assert promise.verdicts is not None
        return encode_report(promise.request, promise.verdicts, self._settings.node.ae_title, transfer_syntax_uid)

    def record(self, promise: Promise, status: int | None) -> Told:
        """What the peer's answer to the report means for its row."""
        told, cause = classify_report_status(status)
        failed = sum(1 for v in promise.verdicts or () if v)
        if told is Told.taken:
            self.promises.reported(promise.id, self._owner)
            self._log.info(
                "commitment reported",
                peer=promise.peer,
                instance=logs.uid_hash(promise.request.TransactionUID),
                count=len(promise.request.references),
                failed=failed,
                cause=cause,
            )
            metrics.committed("scp", len(promise.request.references) - failed, failed)
        elif told is Told.rejected:
            self.promises.reject(promise.id, self._owner, cause)
            self._log.error("commitment report refused", peer=promise.peer, cause=cause)
            self._events.add("error", "commitment-rejected", promise.peer, f"commitment {promise.id}: {cause}")
        else:
            self.retry(promise, cause)
            return told
        metrics.commitment_report("sent", "done" if told is Told.taken else "refused")
        return told

    def hand_on(self, promise: Promise, cause: str) -> None:
        """The courier reports, on an association of its own."""
        self.promises.hand_on(promise.id, self._owner, cause)
        metrics.commitment_report("sent", "retried")

    def retry(self, promise: Promise, cause: str) -> None:
        delivery = self._settings.delivery
        self._log.warning("commitment not reported yet", peer=promise.peer, cause=cause, attempts=promise.attempts)
        self.promises.retry(
            promise.id, self._owner, cause, first=delivery.backoff_seconds, longest=delivery.backoff_max_seconds
        )
        metrics.commitment_report("sent", "retried")


class IncomingReports:
    """Commits what a peer reports about what it was asked."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._delivery = settings.delivery
        self._asks = Asks(db)
        self._events = Events(db)
        self._log = logs.get()

    def take(self, peer: str, event_type: int, data: bytes, transfer_syntax_uid: str) -> tuple[int, str]:
        """Status of the N-EVENT-REPORT-RSP and a comment; with success everything is committed.

        A report is believed only of the peer that was asked, and only about what it was asked.
        """
        try:
            report = parse_report(event_type, data, transfer_syntax_uid)
            delivery = self._delivery
            taken = self._asks.take(peer, report, first=delivery.backoff_seconds, longest=delivery.backoff_max_seconds)
        except Refused as refused:
            return self._refuse(peer, refused.status, refused.comment)
        except NodeError as error:
            self._log.error("commitment report not stored", peer=peer, cause=error.cause, hint=error.hint)
            return self._refuse(peer, PROCESSING_FAILURE, error.cause)
        if taken is None:
            self._log.warning("unknown commitment", peer=peer, instance=logs.uid_hash(report.TransactionUID))
            return self._refuse(peer, INVALID_ARGUMENT_VALUE, "this peer was not asked in this transaction")
        self._tell(peer, taken)
        metrics.commitment_report("received", "done")
        metrics.committed("scu", taken.committed, sum(taken.reasons.values()))
        return SUCCESS, ""

    def _tell(self, peer: str, taken: Taken) -> None:
        failed = sum(taken.reasons.values())
        self._log.info(
            "commitment report taken", peer=peer, count=taken.committed, failed=failed, missing=taken.missing
        )
        if not (failed or taken.unanswered or taken.withheld):
            return
        severity: Literal["warning", "error"] = "error" if taken.missing else "warning"
        reasons = ", ".join(f"{count} with 0x{reason:04X}" for reason, count in sorted(taken.reasons.items()))
        text = [f"{taken.missing} result(s) are sent again"] * bool(taken.missing)
        text += [f"{taken.unanswered} are asked for again"] * bool(taken.unanswered)
        text += [f"{taken.withheld} were withdrawn and are not sent again"] * bool(taken.withheld)
        self._events.add(
            severity,
            "commitment-failed",
            peer,
            f"commitment {taken.id}: not committed to {reasons or 'what the report does not name'};"
            f" {', '.join(text) or 'nothing changes'}",
        )

    def _refuse(self, peer: str, status: int, comment: str) -> tuple[int, str]:
        self._log.warning("commitment report refused", peer=peer, status=f"0x{status:04X}", cause=comment)
        metrics.commitment_report("received", "refused")
        return status, comment
