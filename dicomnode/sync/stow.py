"""One STOW-RS request (PS3.18 10.5): a streamed multipart body, and what the reply says of each instance."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

import aiohttp

from dicomnode.errors import NodeError
from dicomnode.index.database import Row
from dicomnode.sync.faults import reason
from dicomnode.sync.http import Progress, read_bounded, watched
from dicomnode.sync.reply import (
    OUT_OF_RESOURCES,
    WITH_SEQUENCES,
    Fate,
    Reply,
    Verdict,
    judge,
    parse_reply,
    retry_after_seconds,
)
from dicomnode.sync.trouble import disk_trouble

MAX_REPLY_BYTES = 4 << 20
SLOWEST_BYTES_PER_SECOND = 125_000
"""A line of 1 Mbit/s."""
CHUNK_BYTES = 64 * 1024

Throttle = Callable[[int], Awaitable[None]]
"""Waits until the line may take so many bytes."""


@dataclass(frozen=True, slots=True)
class Part:
    """One object of a request, from ``content`` or, where there is none, from the file at ``path``.

    ``uid`` is the SOPInstanceUID under which it leaves, ``size`` what is sent, in bytes.
    """

    item: Row
    uid: str
    size: int
    path: Path
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """``verdicts`` by the key that was asked with; ``whole``: the cause, where the request failed as a whole.

    ``wait``: Retry-After in seconds. ``mendable``: an operator has to act. ``heard``: there was a good answer.
    """

    verdicts: dict[str, Verdict]
    whole: str = ""
    wait: float | None = None
    mendable: bool = False
    heard: bool = True


def answer_of(verdicts: dict[str, Verdict], wait: float | None) -> Answer:
    """An endpoint that takes nothing of a request has failed as a whole, whatever status it gives."""
    passing = [v for v in verdicts.values() if v.fate in {Fate.retry, Fate.operator}]
    if passing and len(passing) == len(verdicts):
        return Answer(verdicts, passing[0].cause, wait, passing[0].fate is Fate.operator)
    return Answer(verdicts, "", wait)


def speaks_of_each(status: int, reply: Reply | None, uids: Sequence[str]) -> bool:
    """Whether the objects are to blame, each by its reason, and not the endpoint: it is not full, and it is there."""
    if reply is None or status not in WITH_SEQUENCES:
        return False
    reasons = [reply.failed.get(uid) for uid in uids if uid not in reply.stored]
    return bool(reasons) and all(r is not None and r not in OUT_OF_RESOURCES for r in reasons)


async def store(
    session: aiohttp.ClientSession,
    url: str,
    headers: dict[str, str],
    parts: Sequence[Part],
    *,
    seconds: float,
    stall_seconds: float,
    now: datetime,
    throttle: Throttle,
) -> Answer:
    """Send ``parts`` in one request. Raises nothing for what an endpoint or the network does."""
    uids = [p.uid for p in parts]
    boundary = secrets.token_hex(24)
    head = _head(boundary)
    tail = f"--{boundary}--\r\n".encode()
    length = sum(len(head) + p.size + 2 for p in parts) + len(tail)
    progress = Progress(longest_seconds(seconds, length))
    unread: dict[str, OSError] = {}

    async def request() -> tuple[int, Reply | None, float | None]:
        await unburdened(throttle, progress)
        async with session.post(
            url,
            data=capped(_body(head, parts, tail, unread), throttle, progress),
            headers={
                "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
                "Content-Length": str(length),
                "Accept": "application/dicom+json",
                **headers,
            },
            allow_redirects=False,
            timeout=request_timeout(seconds),
        ) as response:
            wait = retry_after_seconds(response.headers.get("Retry-After"), now)
            try:
                data = await read_bounded(response, MAX_REPLY_BYTES, progress)
                reply: Reply | None = parse_reply(response.headers.get("Content-Type", ""), data)
            except (ValueError, aiohttp.ClientPayloadError):
                reply = None
            return response.status, reply, wait

    try:
        status, reply, wait = await watched(request(), progress, stall_seconds)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        for uid, fault in unread.items():  # nobody was asked for the others
            folder = next(p.path for p in parts if p.uid == uid).parent
            return Answer({uid: Verdict(Fate.retry, disk_trouble(fault, folder), disk=True)}, heard=False)
        cause = f"the endpoint cannot be reached: {reason(error)}"
        return answer_of(dict.fromkeys(uids, Verdict(Fate.retry, cause)), None)
    except NodeError as error:
        return answer_of(dict.fromkeys(uids, Verdict(Fate.retry, error.cause)), None)
    verdicts = judge(status, reply, uids)
    return Answer(verdicts, "", wait) if speaks_of_each(status, reply, uids) else answer_of(verdicts, wait)


async def _body(
    head: bytes, parts: Sequence[Part], tail: bytes, unread: dict[str, OSError]
) -> AsyncGenerator[bytes, None]:
    """``unread``: SOPInstanceUID -> what the disk said, where it does not give a file; then the request breaks off."""
    for part in parts:
        yield head
        if part.content is not None:
            for begin in range(0, len(part.content), CHUNK_BYTES):
                yield part.content[begin : begin + CHUNK_BYTES]
        else:
            async with contextlib.aclosing(_file(part)) as chunks:
                try:
                    async for chunk in chunks:
                        yield chunk
                except OSError as error:
                    unread[part.uid] = error
                    raise
        yield b"\r\n"
    yield tail


async def _opened(path: Path) -> IO[bytes]:
    """In a thread. Where the request is over meanwhile (refused by its head alone), the file is closed again."""
    opening = asyncio.get_running_loop().run_in_executor(None, path.open, "rb")
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(lambda done: None if done.exception() else done.result().close())
        raise


async def _file(part: Part) -> AsyncGenerator[bytes, None]:
    with await _opened(part.path) as file:
        left = part.size
        while left:
            chunk = await asyncio.to_thread(file.read, min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(errno.EIO, "the file became shorter while it was sent")
            left -= len(chunk)
            yield chunk


def longest_seconds(seconds: float, length: int) -> float:
    """``seconds`` and the time that ``length`` bytes take on a slow line: else a large batch would never arrive."""
    return seconds + length / SLOWEST_BYTES_PER_SECOND


def request_timeout(seconds: float) -> aiohttp.ClientTimeout:
    """For the connection; the request as a whole is watched, since waits for our own cap are no fault of the line."""
    return aiohttp.ClientTimeout(total=None, connect=min(30.0, seconds))


async def unburdened(throttle: Throttle, progress: Progress) -> None:
    """Wait for what urgent traffic borrowed before a connection is opened, which would be closed as idle."""
    with progress.held():
        await throttle(0)


async def capped(chunks: AsyncGenerator[bytes, None], throttle: Throttle, progress: Progress) -> AsyncIterator[bytes]:
    """``chunks`` under the cap; then ``progress`` waits for the reply."""
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            with progress.held():
                await throttle(len(chunk))
            yield chunk
            progress.touch(len(chunk))
    progress.waiting_for_reply()


def _head(boundary: str) -> bytes:
    """Part header (PS3.18 8.6.1.2.1.4), without the transfer-syntax parameter.

    The file's meta header says it anyway, and Orthanc's plug-in (1.7) passes over a part
    whose type has a parameter, with HTTP 200 and nothing stored.
    """
    return f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode("ascii")
