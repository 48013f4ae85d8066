"""Batches through a session, one after another; by the session's own stream where it has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dicomnode.infer.engine import Array, Session

Arrays = Mapping[str, Array]


def stream(session: Session, batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Outputs of each batch, in order; copies of one overlap with computing another where the session can.

    At most two batches are taken ahead of the one that is yielded. What is yielded belongs to
    the caller. Raises EngineError.
    """
    own = getattr(session, "stream", None)
    if own is not None:
        yield from own(batches)
        return
    for batch in batches:
        yield session.run(batch)
