"""Who calls, by the bearer token alone: the administrator, or one node of one site.

A node gets and gives what is of its site, whatever it asks for; nothing that a caller may
choose (the name in a body, a parameter) widens that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dicomnode.cloud import shapes
from dicomnode.errors import OperatorError

MAX_TOKEN_BYTES = 4096
OPERATION = "read the token file"


@dataclass(frozen=True, slots=True)
class Caller:
    """``node`` is empty for the administrator, who may name any site."""

    site: str = ""
    node: str = ""


ADMINISTRATOR = Caller()


@dataclass(frozen=True, slots=True)
class Callers:
    """Callers by the SHA-256 of their tokens, so that looking one up takes no time that tells of another."""

    by_digest: Mapping[str, Caller] = field(default_factory=dict)

    @classmethod
    def of(cls, token: str | None, nodes: Mapping[str, Caller] | None = None) -> Callers:
        """``token``: the administrator's; ``nodes``: token -> caller."""
        known = {**(nodes or {}), **({token: ADMINISTRATOR} if token is not None else {})}
        return cls({_digest(one): caller for one, caller in known.items()})

    def __bool__(self) -> bool:
        return bool(self.by_digest)

    def find(self, authorization: str) -> Caller | None:
        scheme, _, token = authorization.partition(" ")
        return self.by_digest.get(_digest(token.strip())) if scheme.lower() == "bearer" else None


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
    for path in sorted(p for p in folder.glob("*/*") if p.is_file() and not p.name.startswith(".")):
        caller = Caller(shapes.name(path.parent.name, "a site"), shapes.name(path.name, "a node"))
        token = read_token(path) or ""
        if token in found:
            cause = f"{caller.site}/{caller.node} has the token of {found[token].site}/{found[token].node}"
            raise OperatorError("read the tokens of nodes", cause, "Give each node a token of its own")
        found[token] = caller
    if not found:
        raise OperatorError("read the tokens of nodes", "there is none", "Make SITE/NODE in it: a token per file")
    return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
