"""KServe v2 over gRPC: the few messages of grpc_predict_v2.proto / grpc_service.proto that are used. Pure.

Field numbers are those of package ``inference``, service ``GRPCInferenceService``; tensors
travel as raw_input_contents and raw_output_contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dicomnode import wire
from dicomnode.infer.engine import Array
from dicomnode.infer.kserve_tensors import Reply, Signature, Tensor, TensorSpec, datatype_of, raw_bytes

SERVICE = "/inference.GRPCInferenceService/"
OVERHEAD_BYTES = 64 * 1024
"""What a reply may hold besides its tensors."""

MAX_TENSORS = 256
MAX_RANK = 16


def name_version(name: str, version: str) -> bytes:
    """ModelReadyRequest and ModelMetadataRequest."""
    return wire.put(1, name) + wire.put(2, version)


def infer_request(name: str, version: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> bytes:
    """ModelInferRequest. No request id is sent."""
    parts: list[bytes | memoryview] = [wire.put(1, name), wire.put(2, version)]
    for key, array in inputs.items():
        entry = wire.put(1, key) + wire.put(2, datatype_of(array)) + wire.put_integers(3, array.shape)
        parts.append(wire.put(5, entry))
    parts += [wire.put(6, wire.put(1, key)) for key in outputs]
    for array in inputs.values():
        raw = raw_bytes(array)
        parts += [wire.head(7, len(raw)), raw]
    return b"".join(parts)


def infer_reply(data: bytes) -> Reply:
    """ModelInferResponse; raises ValueError. Tensors are views into ``data``."""
    model = version = ""
    specs: list[TensorSpec] = []
    raw: list[memoryview] = []
    for number, value in wire.fields(memoryview(data)):
        if number == 1:
            model = wire.text(value)[:256]
        elif number == 2:
            version = wire.text(value)[:256]
        elif number == 5:
            specs.append(_tensor(wire.message(value)))
        elif number == 6:
            raw.append(wire.message(value))
        if len(specs) > MAX_TENSORS or len(raw) > MAX_TENSORS:
            raise ValueError("too many tensors")
    if raw and len(raw) != len(specs):
        raise ValueError("it has other contents than outputs")
    contents: Sequence[memoryview | None] = raw or [None] * len(specs)
    outputs = tuple(
        Tensor(s.name, s.datatype, tuple(int(d) for d in s.shape), part)
        for s, part in zip(specs, contents, strict=True)
    )
    return Reply(model, version, outputs)


def model_metadata(data: bytes) -> Signature:
    """ModelMetadataResponse; raises ValueError."""
    found: dict[int, list[TensorSpec]] = {4: [], 5: []}
    for number, value in wire.fields(memoryview(data)):
        if number in found:
            found[number].append(_tensor(wire.message(value)))
    return Signature(tuple(found[4]), tuple(found[5]))


def is_true(data: bytes) -> bool:
    """ServerReadyResponse and ModelReadyResponse; raises ValueError."""
    return any(number == 1 and value == 1 for number, value in wire.fields(memoryview(data)))


def server_name(data: bytes) -> str:
    """``NAME VERSION`` from a ServerMetadataResponse; raises ValueError."""
    found = {n: wire.text(v)[:256] for n, v in wire.fields(memoryview(data)) if n in (1, 2)}
    return f"{found.get(1, '')} {found.get(2, '')}".strip()


def _tensor(view: memoryview) -> TensorSpec:
    name = datatype = ""
    shape: list[int] = []
    for number, value in wire.fields(view):
        if number == 1:
            name = wire.text(value)
        elif number == 2:
            datatype = wire.text(value)
        elif number == 3:
            shape += wire.integers(value)
            if len(shape) > MAX_RANK:
                raise ValueError("a shape has too many dimensions")
    return TensorSpec(name, datatype, tuple(shape))
