"""The notifier: tells peers by Instance Availability Notification where results are (PS3.4 R).

For each notice one N-CREATE, one association per batch. The SOP Instance UID of a notice is
stored before it is first sent, so a notice whose answer was lost is not made twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydicom import config as pydicom_config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import InstanceAvailabilityNotification

from dicomnode import doorbell, logs, metrics
from dicomnode.deliver.scu import Sent, patience
from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.requestor import associate
from dicomnode.errors import PeerError
from dicomnode.index.database import Database, Row
from dicomnode.index.notices import Notices
from dicomnode.index.operation import Events
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport

_PASSING = frozenset({0x0110, 0x0124, 0x0210, 0x0213})
"""Processing failure, not authorised, duplicate invocation, resource limitation: these can pass."""


class Notifier:
    def __init__(self, settings: Settings, db: Database, owner: str) -> None:
        self._transport = Transport(settings.tls)
        self._settings = settings
        self._owner = owner
        self._notices = Notices(db)
        self._events = Events(db)
        self._log = logs.get()

    def start(self) -> None:
        """Take back what a former life of this notifier held."""
        self._notices.expire(self._owner)

    def run_once(self) -> float:
        """Send what is due; returns seconds until the next look is needed at most."""
        self._notices.expire()
        self._notices.release()
        for destination in self._notices.due_destinations():
            self._serve(destination)
        due = self._notices.next_due_in()
        return doorbell.SLOW_BEAT_SECONDS if due is None else min(doorbell.SLOW_BEAT_SECONDS, max(due, 0.01))

    def _serve(self, destination: str) -> None:
        delivery = self._settings.delivery
        lease = delivery.connect_seconds + delivery.response_seconds * (delivery.batch + 1)
        notices = self._notices.lease(destination, self._owner, lease, delivery.batch)
        if not notices:
            return
        peer = self._settings.peer(destination)
        if peer is None or not peer.reachable:
            for notice in notices:
                self._retry(notice, f"peer '{destination}' is not in [[peers]] or lacks host and port")
            return
        waiting = {int(notice["id"]): notice for notice in notices}
        try:
            self._send(peer, waiting)
        except PeerError as error:
            self._log.warning("peer away", peer=peer.name, cause=error.cause, hint=error.hint, count=len(waiting))
            for notice in waiting.values():
                self._retry(notice, error.cause)

    def _send(self, peer: Peer, waiting: dict[int, Row]) -> None:
        """Send in order; what was answered leaves ``waiting``. Raises PeerError without an association."""
        settings = self._settings
        contexts = [build_context(InstanceAvailabilityNotification, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]
        assoc = associate(
            settings.node.ae_title,
            peer,
            contexts,
            patience(settings.delivery),
            operation="N-CREATE",
            transport=self._transport,
        )
        try:
            for number, notice in enumerate(list(waiting.values()), start=1):
                place = str(notice["retrieve_from"])
                title = self._retrieve_ae_title(place)
                if title is None:
                    self._record(notice, peer, Sent.retry, f"peer '{place}' is not in [[peers]]")
                else:
                    self._record(notice, peer, *self._create(assoc, notice, title, number % 65535 + 1))
                waiting.pop(int(notice["id"]))
            if assoc.usable():
                assoc.release()
        finally:
            assoc.end()

    def _retrieve_ae_title(self, place: str) -> str | None:
        if not place:
            return self._settings.node.ae_title
        peer = self._settings.peer(place)
        return peer.ae_title if peer is not None else None

    def _create(self, assoc: NodeAssociation, notice: Row, title: str, message_id: int) -> tuple[Sent, str]:
        if not assoc.usable():
            return Sent.retry, "the association was cut"
        ds = notification(str(notice["StudyInstanceUID"]), notice["instances"], title)
        try:
            status, _ = assoc.send_n_create(
                ds, InstanceAvailabilityNotification, str(notice["SOPInstanceUID"]), msg_id=message_id
            )
        except (RuntimeError, OSError) as error:
            return Sent.retry, f"the association was cut ({type(error).__name__})"
        except ValueError:
            return Sent.rejected, "the peer does not accept the Instance Availability Notification SOP class"
        return classify_status(status.Status if "Status" in status else None)

    def _record(self, notice: Row, peer: Peer, sent: Sent, cause: str) -> None:
        if sent is Sent.retry:
            self._log.warning("notification not taken", peer=peer.name, cause=cause)
            self._retry(notice, cause)
            return
        fields = {"peer": peer.name, "job": notice["job_id"], "count": len(notice["instances"]), "cause": cause}
        if sent is Sent.stored:
            self._notices.stored(notice["id"], self._owner)
            metrics.notification("stored")
            self._log.info("peer notified of results", **fields)
            return
        self._notices.reject(notice["id"], self._owner, cause)
        metrics.notification("rejected")
        self._log.error("notification rejected", **fields)
        self._events.add("error", "notification-rejected", peer.name, f"notification {notice['id']}: {cause}")

    def _retry(self, notice: Row, cause: str) -> None:
        delivery = self._settings.delivery
        metrics.notification("retried")
        self._notices.retry(
            notice["id"], self._owner, cause, first=delivery.backoff_seconds, longest=delivery.backoff_max_seconds
        )


def classify_status(status: int | None) -> tuple[Sent, str]:
    """What the status of an N-CREATE-RSP means for the sender (PS3.7 C, PS3.4 R.3.2). Pure."""
    if status is None:
        return Sent.retry, "the peer did not answer"
    name = f"status 0x{status:04X}"
    if status in (0x0000, 0x0001, 0x0107, 0x0116):
        return Sent.stored, "" if status == 0 else f"taken with warning, {name}"
    if status == 0x0111:  # duplicate SOP instance: an earlier attempt arrived
        return Sent.stored, f"was there already, {name}"
    if status in _PASSING:
        return Sent.retry, f"the peer cannot take it now, {name}"
    return Sent.rejected, f"the peer refused the notification, {name}"


def notification(study_uid: str, instances: Sequence[Mapping[str, Any]], retrieve_ae_title: str) -> Dataset:
    """The attributes of PS3.4 table R.3.2-1, and no other: further ones are forbidden.

    ``instances`` have SeriesInstanceUID, SOPClassUID and SOPInstanceUID. The study's UID is
    the modality's and is sent as it is, right or wrong.
    """
    series: dict[str, Dataset] = {}
    for one in instances:
        uid = str(one["SeriesInstanceUID"])
        if uid not in series:
            series[uid] = Dataset()
            series[uid].SeriesInstanceUID = uid
            series[uid].ReferencedSOPSequence = Items()
        item = Dataset()
        item.ReferencedSOPClassUID = str(one["SOPClassUID"])
        item.ReferencedSOPInstanceUID = str(one["SOPInstanceUID"])
        item.InstanceAvailability = "ONLINE"
        item.RetrieveAETitle = retrieve_ae_title
        series[uid].ReferencedSOPSequence.append(item)
    ds = Dataset()
    ds.ReferencedPerformedProcedureStepSequence = Items()  # type 2: no procedure step made these
    ds.add(DataElement("StudyInstanceUID", "UI", study_uid, validation_mode=pydicom_config.IGNORE))
    ds.ReferencedSeriesSequence = Items(list(series.values()))
    return ds
