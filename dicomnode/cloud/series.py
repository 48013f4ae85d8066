"""Prometheus remote-write 1.0 as a receiver: the newest value of each series, for the page. Pure but for the store.

A real cloud gives this to a Prometheus; here it is enough to see that figures arrive, and which.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dicomnode import wire

MAX_BODY_BYTES = 32 << 20
MAX_MESSAGE_BYTES = 64 << 20
MAX_SERIES = 20_000
"""Of one request, and of one node that are kept."""

_DOUBLE, _TIMESTAMP = 0x09, 0x10
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """``newest``: value and time in Unix milliseconds; ``samples``: how many came with it."""

    labels: Labels
    samples: int
    value: float
    time: int

    def label(self, name: str) -> str:
        return dict(self.labels).get(name, "")


def read_write_request(body: bytes) -> list[Series]:
    """A snappy block with a WriteRequest. Raises ValueError for anything else, and for what is too large."""
    from imagecodecs import SnappyError, snappy_decode

    size, _ = wire.read_varint(memoryview(body), 0)  # the length of what comes out stands in front
    if size > MAX_MESSAGE_BYTES:
        raise ValueError("too large")
    try:
        message = memoryview(snappy_decode(body))
    except SnappyError:
        raise ValueError("no snappy block") from None
    return [_series(wire.message(value)) for number, value in wire.fields(message, MAX_SERIES) if number == 1]


def _series(view: memoryview) -> Series:
    labels: list[tuple[str, str]] = []
    samples: list[tuple[int, float]] = []
    for number, value in wire.fields(view):
        if number == 1:
            parts = {n: wire.text(v) for n, v in wire.fields(wire.message(value))}
            labels.append((parts.get(1, ""), parts.get(2, "")))
        elif number == 2:
            samples.append(_sample(wire.message(value)))
    if not samples or not dict(labels).get("__name__"):
        raise ValueError("a series without a name or without a sample")
    time, newest = max(samples)
    return Series(tuple(sorted(labels)), len(samples), newest, time)


def _sample(view: memoryview) -> tuple[int, float]:
    """Time and value; a field that is left out is 0 (protobuf)."""
    found, time, at = 0.0, 0, 0
    while at < len(view):
        key, at = view[at], at + 1
        if key == _DOUBLE and len(view) - at >= 8:
            (found,), at = struct.unpack_from("<d", view, at), at + 8
        elif key == _TIMESTAMP:
            time, at = wire.read_varint(view, at)
        else:
            raise ValueError("no sample")
    return (time - (1 << 64) if time >> 63 else time), found


def shown(labels: Labels) -> str:
    """As Prometheus writes a series, without what is the same for all of a node."""
    rest = [f'{k}="{v}"' for k, v in labels if k not in ("__name__", "job", "instance")]
    name = dict(labels).get("__name__", "")
    return f"{name}{{{', '.join(rest)}}}" if rest else name


def by_node(series: list[Series], node: str) -> Iterator[tuple[str, Series]]:
    """With the node that they are of: whose token it is, else what they say."""
    for one in series:
        yield node or one.label("instance"), one
