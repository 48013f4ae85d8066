"""N-EVENT-REPORT as its invoker, on an association of either side (PS3.7 10.1.1).

pynetdicom's own method takes whatever message comes next for the answer; but the performer
may invoke an operation of its own before it answers, and may release.
"""

from __future__ import annotations

import io
import queue
from typing import Any

from pynetdicom.dimse_primitives import N_EVENT_REPORT

from dicomnode.dimse.association import NodeAssociation


def send_event_report(
    assoc: NodeAssociation,
    context_id: int,
    *,
    message_id: int,
    sop_class_uid: str,
    sop_instance_uid: str,
    event_type: int,
    information: bytes,
    seconds: float,
) -> int | None:
    """The status of the response; None when none came in time or the association ended.

    Other messages that come meanwhile stay queued. An answer that comes later is ignored by
    whoever serves the association.
    """
    request = N_EVENT_REPORT()
    request.MessageID = message_id
    request.AffectedSOPClassUID = sop_class_uid
    request.AffectedSOPInstanceUID = sop_instance_uid
    request.EventTypeID = event_type
    request.EventInformation = io.BytesIO(information)
    if not assoc.usable():
        return None
    assoc.dimse.send_msg(request, context_id)
    messages: queue.Queue[Any] = assoc.dimse.msg_queue

    def answered() -> bool:
        return any(_answers(message, message_id) for _, message in tuple(messages.queue))

    if not assoc.wait(seconds, answered) and not answered():
        return None
    return _take(messages, message_id)


def _answers(message: Any, message_id: int) -> bool:
    return isinstance(message, N_EVENT_REPORT) and message.MessageIDBeingRespondedTo == message_id


def _take(messages: queue.Queue[Any], message_id: int) -> int | None:
    """The status of the answer; the other messages keep their order."""
    others, status = [], None
    while not messages.empty():
        entry = messages.get_nowait()
        if status is None and _answers(entry[1], message_id):
            status = entry[1].Status
        else:
            others.append(entry)
    for entry in others:
        messages.put(entry)
    return None if status is None else int(status)
