"""One file over a line that breaks: into ``part``, going on where a former attempt ended, within length and time.

The entity tag of what was begun lies beside it (``.etag``), so that a process that was killed
goes on with the same object or begins anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dicomnode import durable
from dicomnode.errors import BundleError
from dicomnode.sync.source import Again, Answer, Source, Unfit

MEBIBYTE = 1 << 20
LEAST_BYTES_PER_SECOND = 16 * 1024
"""A line that is slower for a whole attempt is given up until the next one; what came stays."""


class WrongDigest(BundleError):
    """What came is not what was announced."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to come: ``length`` bytes where it is known, never more than ``most``."""

    sha256: str
    length: int | None
    most: int

    @property
    def cap(self) -> int:
        return self.most if self.length is None else min(self.most, self.length)


def allowed_seconds(left: int, timeout: float) -> float:
    """Absolute time for one attempt at ``left`` bytes. Pure."""
    return timeout + left / LEAST_BYTES_PER_SECOND


def etag_file(part: Path) -> Path:
    return part.with_suffix(".etag")


async def fetch(
    source: Source, url: str, goal: Goal, part: Path, *, check_room: Callable[[], None], timeout: float
) -> None:
    """Bring the file to ``part`` and check its digest.

    Raises WrongDigest (it is removed then), BundleError above the cap, Again for what passes,
    and what ``check_room`` raises.
    """
    await asyncio.to_thread(durable.make_directory, part.parent)
    have = part.stat().st_size if part.exists() else 0
    if have and await asyncio.to_thread(durable.sha256_file, part) == goal.sha256:
        return  # complete from before a restart
    if have >= goal.cap:
        drop(part)
        have = 0
    seconds = allowed_seconds(goal.cap - have, timeout)
    resumed = False
    try:
        async with asyncio.timeout(seconds) as limit, source.open(url, have, _tag(part) if have else "") as answer:
            resumed = answer.start > 0
            check_room()
            _check_total(goal, answer)
            await _receive(part, goal, answer, check_room)
    except (Unfit, WrongDigest):
        drop(part)
        raise
    except TimeoutError:
        if not limit.expired():
            raise Again(f"the server was silent for {timeout:g} s") from None
        here = part.stat().st_size if part.exists() else 0
        raise Again(f"no end within {seconds:.0f} s; {here} bytes are kept for the next attempt") from None
    await asyncio.to_thread(_check_digest, part, goal, resumed)


def drop(part: Path) -> None:
    """Forget what was loaded."""
    durable.remove(part)
    durable.remove(etag_file(part))


def _check_total(goal: Goal, answer: Answer) -> None:
    if answer.total is None:
        return
    if goal.length is not None and answer.total != goal.length:
        raise WrongDigest("pull model", f"the server has {answer.total} bytes, {goal.length} were announced")
    _check_size(goal, answer.total)


def _check_size(goal: Goal, size: int) -> None:
    if size > goal.most:
        raise BundleError(
            "pull model",
            f"the archive is larger than {goal.most // MEBIBYTE} MiB",
            "Raise cloud.max_bundle_mb if that is meant",
        )
    if goal.length is not None and size > goal.length:
        raise WrongDigest("pull model", f"more than the announced {goal.length} bytes came")


async def _receive(part: Path, goal: Goal, answer: Answer, check_room: Callable[[], None]) -> None:
    size = answer.start
    if not size:
        await asyncio.to_thread(_begin, part, answer.etag)
    with await asyncio.to_thread(part.open, "r+b" if size else "wb") as file:
        file.seek(size)
        async for chunk in answer.chunks:
            size += len(chunk)
            _check_size(goal, size)
            check_room()
            await asyncio.to_thread(_append, file, chunk)
    if goal.length is not None and size < goal.length:
        raise Again(f"it ended after {size} of {goal.length} bytes; it is continued")


def _begin(part: Path, etag: str) -> None:
    """The old bytes go before the new tag comes: never new tag and old bytes together."""
    drop(part)
    if etag:
        durable.write_durable(etag_file(part), etag.encode())


def _append(file: IO[bytes], chunk: bytes) -> None:
    """Out of our hands at once, so that a cut leaves what came before it."""
    file.write(chunk)
    file.flush()


def _tag(part: Path) -> str:
    try:
        return etag_file(part).read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _check_digest(part: Path, goal: Goal, resumed: bool) -> None:
    digest = durable.sha256_file(part)
    if digest == goal.sha256:
        return
    drop(part)
    if resumed:
        raise Again("the archive changed between two attempts; it is loaded anew", 0.0)
    raise WrongDigest(
        "pull model",
        f"the archive has the SHA-256 {digest[:16]}…, not {goal.sha256[:16]}…",
        "Check url and sha256 of this entry of cloud.models",
    )
