"""What the two ways to a KServe endpoint, HTTP and gRPC, have in common: interface, errors, token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dicomnode.errors import EngineError, OperatorError, PeerAway
from dicomnode.infer.engine import Array
from dicomnode.infer.kserve_tensors import Reply, Signature

MAX_TOKEN_BYTES = 64 * 1024


class Transport(Protocol):
    """One endpoint. Not shared between threads. Each call ends within its deadline.

    All calls are idempotent, inference too: a model is a function of its inputs. So a
    connection that turns out to be dead is tried once more on a new one, within the same
    deadline. Raises PeerAway for what passes (no connection, silence, busy) and EngineError
    for an answer that would be the same again.
    """

    def ready(self, seconds: float) -> str:
        """The server's name and version, when it says that it is ready."""
        ...

    def model_ready(self, name: str, version: str, seconds: float) -> bool: ...

    def metadata(self, name: str, version: str, seconds: float) -> Signature:
        """Inputs and outputs of a model as the server describes them."""
        ...

    def infer(
        self, name: str, version: str, inputs: Mapping[str, Array], outputs: Sequence[str], *, limit: int
    ) -> Reply:
        """One inference; a reply whose tensors have more than ``limit`` bytes is not read."""
        ...

    def close(self) -> None: ...


class Unusable(EngineError):
    """The endpoint answered, and not with what was asked for; the same again would not help."""


def away(operation: str, endpoint: str, cause: str) -> PeerAway:
    return PeerAway(operation, f"endpoint {endpoint} {cause}", "Is it up, and may this node reach it?")


def unusable(operation: str, endpoint: str, cause: str, hint: str = "") -> Unusable:
    return Unusable(operation, "ENDPOINT_REFUSED", f"endpoint {endpoint} {cause}", hint)


def mismatch(operation: str, endpoint: str, cause: str) -> Unusable:
    hint = "Install the bundle's model on the server under this name, or map it with inference.endpoints.models"
    return Unusable(operation, "MODEL_MISMATCH", f"endpoint {endpoint}: {cause}", hint)


def shown(text: str) -> str:
    """A server's own words, fit for a log: printable ASCII, at most 200 characters."""
    return "".join(c if c.isascii() and c.isprintable() else " " for c in text[:200]).strip()


def read_token(path: Path | None) -> str:
    """The bearer token, read anew each time so that it can be rotated; empty without a file. Never logged.

    Raises OperatorError when the file cannot be read or holds no token.
    """
    if path is None:
        return ""
    operation = "read token_file of an inference endpoint"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES)
    except OSError as error:
        raise OperatorError(operation, error.strerror or "unreadable", "Check the file") from None
    token = data.decode("ascii", errors="replace").strip()
    if not token or not token.isprintable() or "�" in token or " " in token:
        raise OperatorError(operation, "it does not hold one token", "Put the bare token in the file")
    return token
