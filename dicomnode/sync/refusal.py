"""Whom an HTTP status blames that answers a whole request: one item, or the endpoint. Pure.

| status                            | in a batch       | alone, others stored   | alone, nothing stored               |
|-----------------------------------|------------------|------------------------|-------------------------------------|
| 400 413 415 422, other 4xx        | each by itself   | the item is parked     | a doubt of the item; where others   |
|                                   | (413: in halves) |                        | were refused so, too: endpoint, mend |
| 3xx 401 403 404 405 407 and alike | endpoint, mend   | a strike of the item   | endpoint, mend                      |
| 408 425 429 5xx, no answer        | endpoint, passes | a strike of the item   | endpoint, passes                    |

"Stored": of the same kind (objects or records) at the same endpoint. For a strike: in the same round, or since the
item failed last. For parking at once: **after** the item was refused, later in the round or before it was refused
again. What was stored before proves nothing: something before the endpoint may refuse everything from one moment on.
So nothing is parked because evidence was lost, as it is with a restart: without any, an item waits.

Whatever is in the endpoint's column waits for it and nothing of it is parked. 200, 202 and 409 speak
of each instance by itself (:mod:`dicomnode.sync.reply`).
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus


class Fault(StrEnum):
    """What a status may mean."""

    item = "item"  # what was sent: its form, its size
    either = "either"  # address, token or rights; or one item that something before the endpoint does not like
    passing = "passing"


class Step(StrEnum):
    """What follows."""

    each = "each"
    park = "park"
    doubt = "doubt"  # it waits by itself until others were stored, and is asked for again
    strike = "strike"  # it waits by itself; after some of them it is parked
    endpoint = "endpoint"
    operator = "operator"  # the endpoint, and somebody has to mend something


_EITHER = frozenset(
    [
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.PAYMENT_REQUIRED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.NOT_ACCEPTABLE,
        HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
        HTTPStatus.GONE,
        HTTPStatus.MISDIRECTED_REQUEST,
        HTTPStatus.UPGRADE_REQUIRED,
    ]
)
_PASSING = frozenset([HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS])


def fault_of(status: int) -> Fault:
    """Of any status that does not speak of each instance; one that nobody expects passes."""
    if status in _EITHER or 300 <= status < 400:
        return Fault.either
    if 400 <= status < 500 and status not in _PASSING:
        return Fault.item
    return Fault.passing


def decide(fault: Fault, *, together: bool, stored: bool, alike: int) -> Step:
    """``together``: the request had several items. ``stored``: others were, see above.

    ``alike``: other items that were refused with the same status, alone, since anything was stored.
    """
    if together:
        return Step.each if fault is Fault.item else _endpoint(fault)
    if fault is Fault.item:
        return Step.park if stored else Step.operator if alike else Step.doubt
    return Step.strike if stored else _endpoint(fault)


def _endpoint(fault: Fault) -> Step:
    return Step.endpoint if fault is Fault.passing else Step.operator
