"""Who calls, by the bearer token alone: the administrator, or one node of one site.

A node gets and gives what is of its site, whatever it asks for; nothing that a caller may
choose (the name in a body, a parameter) widens that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dicomnode import logs
from dicomnode.cloud import shapes
from dicomnode.errors import OperatorError

MAX_TOKEN_BYTES = 4096
OPERATION = "read the token file"
LOOK_SECONDS, UNKNOWN_SECONDS = 1.0, 0.1
"""Between two looks at a folder of tokens, and for a token that is not known."""
SETTLED_NS = 2_000_000_000
Stamps = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: path, times of its last change (content, inode), bytes, inode."""


@dataclass(frozen=True, slots=True)
class Caller:
    """``node`` is empty for the administrator, who may name any site."""

    site: str = ""
    node: str = ""


ADMINISTRATOR = Caller()


class Callers:
    """Callers by the SHA-256 of their tokens, so that looking one up takes no time that tells of another.

    A ``folder`` of tokens is followed: a file that is new, changed or gone counts within :data:`LOOK_SECONDS`, a
    token that is not known is looked for at once. While there is a folder nobody is served without a token, whatever
    is in it.
    """

    def __init__(
        self,
        token: str | None = None,
        nodes: Mapping[str, Caller] | None = None,
        folder: Path | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``token``: the administrator's; ``nodes``: token -> caller, of ``folder`` where there is one."""
        self._token, self._folder, self._monotonic = token, folder, monotonic
        self._closed = token is not None or folder is not None or bool(nodes)
        self._stamps: Stamps | None = None
        self._looked_at = float("-inf")
        self._faults: list[str] = []
        self._take(nodes or {})

    def __bool__(self) -> bool:
        """Whether callers need a token."""
        return self._closed

    def find(self, token: str) -> Caller | None:
        return self._by_digest.get(_digest(token)) if token else None

    async def follow(self, token: str) -> None:
        """Look whether the folder has changed, where it is time to; before ``token`` is looked up."""
        pause = UNKNOWN_SECONDS if token and self.find(token) is None else LOOK_SECONDS
        now = self._monotonic()
        if self._folder is None or now - self._looked_at < pause:
            return
        self._looked_at = now
        await asyncio.to_thread(self._look, self._folder)

    def _look(self, folder: Path) -> None:
        log = logs.get()
        try:
            stamps = _stamps(folder)
        except OSError as error:  # the disk's trouble takes the right from nobody
            log.warning("tokens of nodes cannot be looked at", cause=error.strerror)
            return
        if stamps == self._stamps:
            return
        newest = max((changed for _, changed, *_ in stamps), default=0)
        settled = time.time_ns() - newest > SETTLED_NS  # else it may change once more without showing it
        self._stamps = stamps if settled else None
        nodes, faults = _read(folder)
        if self._token is not None and self._token in nodes:
            del nodes[self._token]
            faults.append("the administrator's token is also that of a node")
        before = self._by_digest
        self._take(nodes)
        if self._by_digest != before:
            log.info("tokens of nodes were read again", nodes=len(nodes))
        if faults != self._faults:
            for fault in faults:
                log.warning("a token of a node does not count", cause=fault)
        self._faults = faults

    def _take(self, nodes: Mapping[str, Caller]) -> None:
        known = {**nodes, **({self._token: ADMINISTRATOR} if self._token is not None else {})}
        self._by_digest: Mapping[str, Caller] = {_digest(one): caller for one, caller in known.items()}


def read_token(path: Path | None) -> str | None:
    """The one bearer token of a file. Raises OperatorError when the file holds none."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES).decode("ascii", errors="replace").strip()
    except OSError as error:
        raise OperatorError(OPERATION, error.strerror or "unreadable", "Check the file") from None
    if len(token) < 16 or " " in token or not token.isprintable() or "\ufffd" in token:
        raise OperatorError(OPERATION, "it does not hold one token of 16 characters", "Make a longer one")
    return token


def read_nodes(folder: Path | None) -> dict[str, Caller]:
    """Token -> caller of ``folder/SITE/NODE``. Raises OperatorError for what is no token, or one given twice."""
    found: dict[str, Caller] = {}
    if folder is None:
        return found
    if not folder.is_dir():
        raise OperatorError("read the tokens of nodes", "it is no folder", "Make SITE/NODE in it: a token per file")
    found, faults = _read(folder)
    if faults:
        raise OperatorError(
            "read the tokens of nodes", faults[0], "Give each node a token of its own, a file with each"
        )
    if not found:
        raise OperatorError("read the tokens of nodes", "there is none", "Make SITE/NODE in it: a token per file")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*/*") if p.is_file() and not p.name.startswith("."))


def _stamps(folder: Path) -> Stamps:
    """By which a change of the folder shows. Raises OSError, but not for what is not there."""
    found = []
    if not folder.is_dir():
        return ()
    next(folder.iterdir(), None)  # glob says nothing of one that may not be read
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((str(path), stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def _read(folder: Path) -> tuple[dict[str, Caller], list[str]]:
    """Token -> caller, and what is wrong with files that do not count. A token that two have is nobody's."""
    by_token: dict[str, list[Caller]] = {}
    faults: list[str] = []
    for path in _files(folder):
        try:
            caller = Caller(shapes.name(path.parent.name, "a site"), shapes.name(path.name, "a node"))
            by_token.setdefault(read_token(path) or "", []).append(caller)
        except OperatorError as error:
            faults.append(f"{path.parent.name}/{path.name}: {error.cause}")
    for first, *others in by_token.values():
        faults += [f"{o.site}/{o.node} has the token of {first.site}/{first.node}" for o in others]
    return {token: callers[0] for token, callers in by_token.items() if len(callers) == 1}, faults


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
