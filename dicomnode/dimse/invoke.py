"""Normalized services as their invoker, on an association of either side (PS3.7 10.1).

pynetdicom's own methods take whatever message comes next for the answer; but the performer
may invoke an operation of its own before it answers, and may release.
"""

from __future__ import annotations

import queue
from typing import Any

from dicomnode.dimse.association import NodeAssociation


def invoke(assoc: NodeAssociation, context_id: int, request: Any, seconds: float) -> int | None:
    """The status of the response to one request primitive that has its Message ID.

    None when none came in time or the association ended. Other messages that come meanwhile
    stay queued; an answer that comes later is ignored by whoever serves the association.
    """
    if not assoc.usable():
        return None
    assoc.dimse.send_msg(request, context_id)
    messages: queue.Queue[Any] = assoc.dimse.msg_queue

    def answered() -> bool:
        return any(_answers(message, request) for _, message in tuple(messages.queue))

    if not assoc.wait(seconds, answered) and not answered():
        return None
    return _take(messages, request)


def _answers(message: Any, request: Any) -> bool:
    return isinstance(message, type(request)) and message.MessageIDBeingRespondedTo == request.MessageID


def _take(messages: queue.Queue[Any], request: Any) -> int | None:
    """The status of the answer; the other messages keep their order."""
    others, status = [], None
    while not messages.empty():
        entry = messages.get_nowait()
        if status is None and _answers(entry[1], request):
            status = entry[1].Status
        else:
            others.append(entry)
    for entry in others:
        messages.put(entry)
    return None if status is None else int(status)
