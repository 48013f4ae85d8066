"""Requests of the fleet part of config/cloud-api.yaml: small JSON, each answered or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from dicomnode.errors import PeerAway
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.faults import reason
from dicomnode.sync.http import read_bounded
from dicomnode.sync.reply import retry_after_seconds

MAX_REPLY_BYTES = 1 << 20
TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Reply:
    """``skew``: seconds that this node's clock is ahead of the cloud's, ``doubt`` how much it may be off."""

    status: int
    body: Any
    etag: str
    skew: float | None
    doubt: float


def clock_skew(date: str | None, sent: datetime, seconds: float) -> float | None:
    """Of the Date header (RFC 9110 6.6.1, whole seconds) of a reply ``seconds`` after ``sent``. Pure."""
    if not date:
        return None
    try:
        told = parsedate_to_datetime(date)
    except ValueError:
        return None
    if told.tzinfo is None:
        return None
    # On average the cloud's clock was half a second past what it told, half of the way back.
    return round((sent - told).total_seconds() + seconds / 2 - 0.5, 2)


async def call(
    endpoints: Endpoints, method: str, path: str, body: Mapping[str, Any] | None = None, etag: str = ""
) -> Reply | None:
    """To the endpoint that is in use; None while there is none.

    Raises PeerAway when it cannot be reached, answers 5xx or 429, or asked to be left alone (Retry-After) for longer;
    PeerError for a reply without end, OperatorError where files or addresses are unusable.
    """
    number = endpoints.current()
    if number is None:
        return None
    if left := endpoints.left_alone_seconds(number):
        raise PeerAway("ask the cloud", f"it asked to be left alone (Retry-After), for {left:.0f} s more")
    base = endpoints.all[number].records_url
    headers = await endpoints.headers(number)
    if etag:
        headers["If-None-Match"] = etag
    data = None if body is None else json.dumps(dict(body)).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"
        await endpoints.line.wait(len(data))
    begin, sent = time.monotonic(), datetime.now(UTC)
    try:
        async with (
            endpoints.session(number) as session,
            session.request(
                method,
                f"{base}{path}",
                headers=headers,
                data=data,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
            ) as response,
        ):
            answer = await read_bounded(response, MAX_REPLY_BYTES)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise PeerAway("ask the cloud", f"it cannot be reached ({reason(error)})") from None
    seconds = time.monotonic() - begin
    if response.status >= 500 or response.status == 429:
        wait = retry_after_seconds(response.headers.get("Retry-After"), sent)
        if wait:
            endpoints.leave_alone(number, wait)
        raise PeerAway("ask the cloud", f"HTTP {response.status}")
    try:
        parsed = json.loads(answer) if answer else None
    except (ValueError, RecursionError):
        raise PeerAway("ask the cloud", f"HTTP {response.status} with a body that is no JSON") from None
    skew = clock_skew(response.headers.get("Date"), sent, seconds)
    return Reply(response.status, parsed, response.headers.get("ETag", ""), skew, 0.5 + seconds / 2)
