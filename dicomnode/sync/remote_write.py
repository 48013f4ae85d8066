"""Prometheus remote-write 1.0 (prometheus.io/docs/specs/remote_write_spec): samples, and their request body. Pure.

The message is ``WriteRequest { repeated TimeSeries timeseries = 1 }``, ``TimeSeries { repeated Label
labels = 1; repeated Sample samples = 2 }``, ``Label { string name = 1, value = 2 }``, ``Sample { double
value = 1; int64 timestamp = 2 }``, in a snappy block (not the framed format).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from dicomnode import wire

OURS = "dicomnode_"
"""Only families that this node defines leave it: their labels are states, our names and names of the configuration."""

HEADERS = {
    "Content-Type": "application/x-protobuf",
    "Content-Encoding": "snappy",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}
MAX_UNPACKED_BYTES = 64 << 20

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """Every series at one moment; ``time`` in Unix milliseconds."""

    time: int
    samples: Sequence[tuple[Labels, float]]


def samples_of(families: Iterable[Metric], external: Mapping[str, str]) -> list[tuple[Labels, float]]:
    """Labels sorted by name, those without a value left out, ``external`` added where the sample has no such label."""
    found = []
    for family in families:
        if not family.name.startswith(OURS):
            continue
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = {**external, **sample.labels, "__name__": sample.name}
            found.append((tuple(sorted((k, v) for k, v in labels.items() if v)), float(sample.value)))
    return found


def pack(collection: Collection) -> bytes:
    """For the spool: compressed JSON, since labels repeat."""
    body = [collection.time, [[list(map(list, labels)), value] for labels, value in collection.samples]]
    return zlib.compress(json.dumps(body, separators=(",", ":")).encode(), 6)


def unpack(data: bytes) -> Collection:
    """Raises ValueError for what :func:`pack` did not make."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, MAX_UNPACKED_BYTES)
        if not unpacker.eof:
            raise ValueError("cut short, or too long")
        time, rows = json.loads(text)
        samples = [(tuple((str(k), str(v)) for k, v in labels), float(value)) for labels, value in rows]
        return Collection(int(time), samples)
    except (zlib.error, RecursionError, TypeError) as error:
        raise ValueError(type(error).__name__) from None


def write_request(collections: Sequence[Collection]) -> bytes:
    """The message, not compressed. ``collections`` in the order of their times: so are the samples of a series."""
    series: dict[Labels, list[bytes]] = {}
    for one in collections:
        for labels, value in one.samples:
            series.setdefault(labels, []).append(_sample(value, one.time))
    parts = []
    for labels, samples in series.items():
        head = b"".join(wire.put(1, wire.put(1, name) + wire.put(2, value)) for name, value in labels)
        parts.append(wire.put(1, head + b"".join(samples)))
    return b"".join(parts)


def _sample(value: float, time: int) -> bytes:
    """As a field of its series. Fixed64 is kind 1; both fields are written even where they are 0."""
    body = b"\x09" + struct.pack("<d", value) + b"\x10" + wire.varint(time & wire.MAX_VALUE)
    return wire.put(2, body)


def snappy(data: bytes) -> bytes:
    """The block format."""
    from imagecodecs import snappy_encode

    return bytes(snappy_encode(data))
