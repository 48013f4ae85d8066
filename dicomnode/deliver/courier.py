"""The courier: carries results from outbox rows to DICOM peers until each has them."""

from __future__ import annotations

import time
from functools import partial

from dicomnode import doorbell, durable, logs, metrics
from dicomnode.deliver.crew import Crew
from dicomnode.deliver.scu import Outgoing, SendOutcome, Sent, send_batch
from dicomnode.durable import ObjectStore
from dicomnode.errors import PeerError
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.index.outbox import Outbox
from dicomnode.orders import LABELMAP
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport


class Courier:
    """Destinations are served side by side, each with its own lease, by ``crew``."""

    def __init__(self, settings: Settings, db: Database, owner: str, crew: Crew | None = None) -> None:
        self._settings = settings
        self._crew = crew or Crew(0)
        self._db = db
        self._owner = owner
        self._outbox = Outbox(db, "deliveries")
        self._store = ObjectStore(settings.node.data_dir)
        self._events = Events(db)
        self._transport = Transport(settings.tls)
        self._log = logs.get()

    def start(self) -> None:
        """Take back what a former life of this courier held."""
        count = self._outbox.expire(self._owner)
        if count:
            self._log.info("deliveries resumed", count=count)

    def run_once(self) -> float:
        """Have sent what is due; returns seconds until the next look is needed at most."""
        self._outbox.expire()
        for destination in self._outbox.due_destinations():
            self._crew.take(destination, partial(self._serve, destination))
        due = self._outbox.next_due_in()
        return doorbell.SLOW_BEAT_SECONDS if due is None else min(doorbell.SLOW_BEAT_SECONDS, max(due, 0.01))

    def _serve(self, destination: str) -> bool:
        delivery = self._settings.delivery
        lease = delivery.response_seconds * 2 + delivery.connect_seconds
        items = self._outbox.lease(destination, self._owner, lease, delivery.batch)
        if not items:
            return False
        peer = self._settings.peer(destination)
        if peer is None or not peer.reachable:
            for item in items:
                self._retry(item, f"peer '{destination}' is not in [[peers]] or lacks host and port")
        else:
            self._send(peer, items, lease)
        return True

    def _send(self, peer: Peer, items: list[Row], lease: float) -> None:
        by_id = {int(item["id"]): item for item in items}
        begin = time.perf_counter()
        waiting = set(by_id)

        def report(outcome: SendOutcome) -> None:
            nonlocal begin
            waiting.discard(outcome.key)
            self._record(by_id[outcome.key], peer, outcome, time.perf_counter() - begin)
            begin = time.perf_counter()
            if waiting:
                self._outbox.extend(sorted(waiting), self._owner, lease)

        for item in items:
            if not self._intact(item):
                waiting.discard(int(item["id"]))
                self._reject(item, peer, "the stored object is damaged or gone: its SHA-256 differs")
        items = [i for i in items if int(i["id"]) in waiting]
        if not items:
            return
        outgoing = [
            Outgoing(
                int(i["id"]),
                self._store.path(i["file"]),
                i["SOPClassUID"],
                i["TransferSyntaxUID"],
                i["SOPInstanceUID"],
                i["StudyInstanceUID"],
                fallback=i["fallback_result_id"] is not None and i["kind"] == LABELMAP,
            )
            for i in items
        ]
        try:
            settings = self._settings
            send_batch(settings.node.ae_title, peer, settings.delivery, outgoing, report, self._transport)
        except PeerError as error:
            self._log.warning("peer away", peer=peer.name, cause=error.cause, hint=error.hint, count=len(waiting))
            for key in sorted(waiting):
                self._retry(by_id[key], error.cause)

    def _record(self, item: Row, peer: Peer, outcome: SendOutcome, seconds: float) -> None:
        uid = logs.uid_hash(item["SOPInstanceUID"])
        if outcome.sent is Sent.stored:
            self._outbox.stored(item["id"], self._owner, commit=peer.commitment)
            metrics.delivery("stored")
            metrics.observe("deliver", seconds)
            self._log.info(
                "result stored at peer",
                peer=peer.name,
                kind=item["kind"],
                instance=uid,
                delivery=item["id"],
                seconds=round(seconds, 3),
                cause=outcome.cause,
            )
        elif outcome.sent is Sent.retry:
            self._retry(item, outcome.cause)
        elif outcome.sent is Sent.fallback and self._fall_back(item, peer, outcome.cause):
            pass
        else:
            self._reject(item, peer, outcome.cause)

    def _fall_back(self, item: Row, peer: Peer, cause: str) -> bool:
        """Whether the peer gets what stands in for the object, with the next association."""
        told = f"binary SEG instead of the label map: {cause}"
        if not self._outbox.fall_back(item["id"], self._owner, told):
            return False
        metrics.delivery("retried")
        self._log.warning("peer takes no label map", peer=peer.name, delivery=item["id"], cause=cause)
        self._events.add("warning", "delivery-fallback", peer.name, f"delivery {item['id']}: {told}")
        return True

    def _intact(self, item: Row) -> bool:
        try:
            return durable.sha256_file(self._store.path(item["file"])) == str(item["sha256"])
        except OSError:
            return False

    def _reject(self, item: Row, peer: Peer, cause: str) -> None:
        self._outbox.reject(item["id"], self._owner, cause)
        metrics.delivery("rejected")
        self._log.error(
            "result rejected",
            peer=peer.name,
            kind=item["kind"],
            delivery=item["id"],
            cause=cause,
            instance=logs.uid_hash(item["SOPInstanceUID"]),
        )
        self._events.add("error", "delivery-rejected", peer.name, f"delivery {item['id']}: {cause}")

    def _retry(self, item: Row, cause: str) -> None:
        delivery = self._settings.delivery
        metrics.delivery("retried")
        self._outbox.retry(
            item["id"], self._owner, cause, first=delivery.backoff_seconds, longest=delivery.backoff_max_seconds
        )
