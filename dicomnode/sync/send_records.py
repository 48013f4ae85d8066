"""Records by POST (config/cloud-api.yaml): an outcome for each, and what it means here."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime
from typing import Any

import aiohttp

from dicomnode.errors import NodeError
from dicomnode.sync.faults import reason
from dicomnode.sync.http import Progress, read_bounded, watched
from dicomnode.sync.reply import Fate, Verdict, judge, retry_after_seconds
from dicomnode.sync.stow import (
    CHUNK_BYTES,
    Answer,
    Throttle,
    answer_of,
    capped,
    longest_seconds,
    request_timeout,
    unburdened,
)

MAX_REPLY_BYTES = 4 << 20
_SETTLED = frozenset({"stored", "duplicate", "conflict"})


async def send_records(
    session: aiohttp.ClientSession,
    url: str,
    headers: dict[str, str],
    node: str,
    records: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    stall_seconds: float,
    now: datetime,
    throttle: Throttle,
) -> Answer:
    """Verdicts by ``idempotency_key``. A conflict is settled as far as sending goes: the cloud keeps both sides."""
    keys = [str(r["idempotency_key"]) for r in records]
    body = json.dumps({"node": node, "records": list(records)}, ensure_ascii=False).encode()
    progress = Progress(longest_seconds(seconds, len(body)))

    async def request() -> tuple[int, bytes | None, float | None]:
        await unburdened(throttle, progress)
        async with session.post(
            f"{url}/records",
            data=capped(_chunks(body), throttle, progress),
            headers={"Content-Type": "application/json", "Content-Length": str(len(body)), **headers},
            allow_redirects=False,
            timeout=request_timeout(seconds),
        ) as response:
            wait = retry_after_seconds(response.headers.get("Retry-After"), now)
            try:
                data: bytes | None = await read_bounded(response, MAX_REPLY_BYTES, progress)
            except aiohttp.ClientPayloadError:
                data = None
            return response.status, data, wait

    try:
        status, data, wait = await watched(request(), progress, stall_seconds)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        cause = f"the endpoint cannot be reached: {reason(error)}"
        return answer_of(dict.fromkeys(keys, Verdict(Fate.retry, cause)), None)
    except NodeError as error:
        return answer_of(dict.fromkeys(keys, Verdict(Fate.retry, error.cause)), None)
    return answer_of(judge_records(status, data, keys), wait)


async def _chunks(body: bytes) -> AsyncGenerator[bytes, None]:
    for begin in range(0, len(body), CHUNK_BYTES):
        yield body[begin : begin + CHUNK_BYTES]


def judge_records(status: int, data: bytes | None, keys: Sequence[str]) -> dict[str, Verdict]:
    """A verdict for each key; pure. What the reply does not name is tried again."""
    if status == 200:
        outcomes = _outcomes(data)
        return {key: _verdict(outcomes, key) for key in keys}
    if 200 < status < 300:
        return dict.fromkeys(keys, Verdict(Fate.retry, f"HTTP {status} was not expected"))
    return judge(status, None, keys)


def _verdict(outcomes: Mapping[str, Mapping[str, Any]] | None, key: str) -> Verdict:
    if outcomes is None:
        return Verdict(Fate.retry, "HTTP 200 with a reply that could not be read whole")
    found = outcomes.get(key)
    if found is None:
        return Verdict(Fate.retry, "the reply does not name the record")
    outcome = found.get("outcome")
    if outcome in _SETTLED:
        return Verdict(Fate.stored, conflict="conflict" in (outcome, found.get("was")))
    if outcome == "rejected":
        # Its reason may quote what was sent, so it stays out of our rows.
        return Verdict(Fate.reject, "the cloud refused the record for good")
    return Verdict(Fate.retry, "the outcome of the record is unknown")


def _outcomes(data: bytes | None) -> dict[str, Mapping[str, Any]] | None:
    try:
        found = json.loads(data or b"")
        return {str(o["idempotency_key"]): o for o in found["outcomes"]}
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
