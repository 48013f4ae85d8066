"""TLS files that change while the node runs: certificate, key, authorities, revocation lists."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dicomnode import logs
from dicomnode.certificates import PeerCertificate, now
from dicomnode.errors import OperatorError
from dicomnode.tls_context import Contexts

CHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """The files changed: ``fault`` tells why the former ones stay, None that the new ones serve."""

    own: PeerCertificate | None
    fault: OperatorError | None


def log_change(change: Change) -> None:
    if change.fault is None:
        digest = change.own.sha256 if change.own else ""
        logs.get().info("TLS files changed and were read again", digest=digest)
    else:
        cause, hint = change.fault.cause, change.fault.hint
        logs.get().error("TLS files changed and cannot be used, the former ones stay", cause=cause, hint=hint)


class Reloading:
    """The contexts of the files as they are now; a broken new file leaves the former ones.

    The contents are compared at most once a second, when a connection needs them: times and
    inodes of files say too little after a restore or on a network share. A failure is told
    once for each state of the files, to ``on_change``.
    """

    def __init__(
        self,
        build: Callable[[], Contexts],
        files: Sequence[Path],
        on_change: Callable[[Change], None] = log_change,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._build = build
        self._files = tuple(files)
        self._on_change = on_change
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._checked = float("-inf")
        self._serving: tuple[str, Contexts] | None = None
        self._refused: tuple[str, OperatorError] | None = None

    def current(self) -> Contexts:
        """Raises OperatorError while no state of the files has been usable yet."""
        with self._lock:
            if self._monotonic() - self._checked >= CHECK_SECONDS:
                self._check()
                self._checked = self._monotonic()
            if self._serving is None:
                assert self._refused is not None
                raise self._refused[1]
            return self._serving[1]

    def _check(self) -> None:
        state = self._state()
        if self._serving is not None and state == self._serving[0]:
            self._refused = None
            return
        try:
            built = self._build()
            if self._state() != state:
                return  # they change at this moment; the next check finds them whole
            self._judge(built)
        except OperatorError as fault:
            self._refuse(state, fault)
            return
        first = self._serving is None and self._refused is None
        self._serving, self._refused = (state, built), None
        if not first:
            self._on_change(Change(built.own, None))

    def _judge(self, built: Contexts) -> None:
        """A certificate that is valid now does not give way to one that is not."""
        moment = now()
        old = self._serving[1].own if self._serving else None
        if built.own is None or built.own.valid_at(moment) or old is None or not old.valid_at(moment):
            return
        cause = f"the new certificate is valid from {built.own.not_before:%Y-%m-%d} to {built.own.not_after:%Y-%m-%d}"
        raise OperatorError("read TLS files", cause, "Install one that is valid now, and check the clock")

    def _refuse(self, state: str, fault: OperatorError) -> None:
        known = self._refused is not None and self._refused[0] == state
        self._refused = (state, fault)
        if not known and self._serving is not None:
            self._on_change(Change(None, fault))

    def _state(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            try:
                content = path.read_bytes()
            except OSError as error:
                content = f"error {error.errno}".encode()
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()
