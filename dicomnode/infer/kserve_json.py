"""KServe v2 over HTTP: bodies with Triton's binary tensor data extension, metadata as JSON. Pure.

A body is a JSON object followed by the tensors' bytes in the order in which the object lists
them; the header Inference-Header-Content-Length tells where the object ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dicomnode.infer.engine import Array
from dicomnode.infer.kserve_tensors import Reply, Signature, Tensor, TensorSpec, datatype_of, raw_bytes

MAX_JSON_BYTES = 256 * 1024
"""The JSON object of a reply with binary tensors, and replies that hold no tensors."""

MAX_TENSORS = 256
MAX_RANK = 16


def infer_request(inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[bytes, list[memoryview]]:
    """The JSON object and the binary parts that follow it. No request id is sent."""
    parts = [raw_bytes(array) for array in inputs.values()]
    listed = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": datatype_of(array),
            "parameters": {"binary_data_size": len(part)},
        }
        for (name, array), part in zip(inputs.items(), parts, strict=True)
    ]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    return json.dumps({"inputs": listed, "outputs": wanted}).encode(), parts


def infer_reply(body: memoryview, header_length: int) -> Reply:
    """Split a reply; raises ValueError when it is not one. Tensors are views into ``body``."""
    if not 0 < header_length <= min(len(body), MAX_JSON_BYTES):
        raise ValueError("its header length does not fit")
    data = _object(body[:header_length])
    at = header_length
    outputs: list[Tensor] = []
    for entry in _entries(data.get("outputs")):
        spec = _spec(entry)
        parameters = entry.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        part: memoryview | None = None
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(body) - at:
                raise ValueError("a binary_data_size does not fit")
            part, at = body[at : at + size], at + size
        outputs.append(Tensor(spec.name, spec.datatype, tuple(int(d) for d in spec.shape), part))
    if at != len(body):
        raise ValueError("bytes follow the last tensor")
    return Reply(_text(data.get("model_name")), _text(data.get("model_version")), tuple(outputs))


def model_metadata(body: bytes) -> Signature:
    """The reply to GET v2/models/NAME; raises ValueError when it is not one."""
    data = _object(memoryview(body))
    return Signature(
        tuple(_spec(e) for e in _entries(data.get("inputs"))), tuple(_spec(e) for e in _entries(data.get("outputs")))
    )


def server_name(body: bytes) -> str:
    """``NAME VERSION`` from the reply to GET v2; raises ValueError."""
    data = _object(memoryview(body))
    return f"{_text(data.get('name'))} {_text(data.get('version'))}".strip()


def error_text(body: bytes) -> str:
    """What a server says of its refusal, empty where it says nothing that can be read."""
    try:
        return _text(_object(memoryview(body)).get("error"))
    except ValueError:
        return ""


def _object(view: memoryview) -> dict[str, Any]:
    try:
        data = json.loads(bytes(view))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 what came is wrong, not the program
    return data


def _entries(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MAX_TENSORS or not all(isinstance(e, dict) for e in value):
        raise ValueError("it does not list tensors")
    return value


def _spec(entry: dict[str, Any]) -> TensorSpec:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not isinstance(datatype, str) or not isinstance(shape, list):
        raise ValueError("a tensor lacks name, datatype or shape")  # noqa: TRY004 as above
    # Some servers write the numbers as text, as the JSON form of int64 does.
    if len(shape) > MAX_RANK or not all(type(d) is int or (isinstance(d, str) and _is_number(d)) for d in shape):
        raise ValueError("a shape is not a list of numbers")
    return TensorSpec(name, datatype, tuple(int(d) for d in shape))


def _is_number(value: str) -> bool:
    return len(value) < 20 and value.isascii() and value.removeprefix("-").isdigit()


def _text(value: object) -> str:
    return value[:256] if isinstance(value, str) else ""
