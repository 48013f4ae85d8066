"""Refuse an ONNX file that reaches outside itself, without the ``onnx`` package.

A bounded walk over the protobuf wire format (onnx.proto: ModelProto, GraphProto, NodeProto,
TensorProto). Two things are refused: tensors kept in external files (a path that the model's
author chose would be opened on this box) and operators of domains other than the standard
ones (they need a library of native code). Only the field numbers that lead to those two are
followed; everything else is skipped by its length.
"""

from __future__ import annotations

from collections.abc import Iterator

from dicomnode import wire
from dicomnode.errors import BundleError

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
MAX_DEPTH = 32
MAX_FIELDS = 5_000_000

_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "Opset", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 9: "Opset", 11: "Attribute"},
    "Opset": {},
    "Tensor": {},
}
_DOMAIN_FIELD = {"Node": 7, "Opset": 1, "Function": 10}
_OPERATOR = 4
_TENSOR_EXTERNAL_DATA = 13
_TENSOR_DATA_LOCATION = 14


def check_onnx(data: bytes, name: str) -> None:
    """Raise BundleError when the model ``data`` of file ``name`` is not self-contained.

    Guarantees: well-formed nesting of at most MAX_DEPTH, at least one graph, no external
    data, no operator set outside ALLOWED_DOMAINS. Says nothing of the graph's meaning.
    """
    budget = [MAX_FIELDS]
    seen: set[str] = set()
    _walk(memoryview(data), "Model", 0, budget, seen, name)
    if "Graph" not in seen:
        raise _bad(name, "it holds no ONNX graph")


def operators(data: bytes, name: str) -> frozenset[str]:
    """What its nodes do, in all of its graphs and functions. Of a model that ``check_onnx`` has passed."""
    found: set[str] = set()
    left: list[tuple[memoryview, str]] = [(memoryview(data), "Model")]
    while left:
        view, kind = left.pop()
        for number, value in fields(view, name):
            if kind == "Node" and number == _OPERATOR and isinstance(value, memoryview):
                found.add(str(value[:80], "utf-8", "replace"))
            below = _CHILDREN[kind].get(number)
            if below is not None and below not in ("Tensor", "Sparse") and isinstance(value, memoryview):
                left.append((value, below))
    return frozenset(found)


def _bad(name: str, cause: str) -> BundleError:
    return BundleError("check model file", f"{name}: {cause}", "Export the model again as one ONNX file")


def _walk(view: memoryview, kind: str, depth: int, budget: list[int], seen: set[str], name: str) -> None:
    if depth > MAX_DEPTH:
        raise _bad(name, f"messages are nested deeper than {MAX_DEPTH}")
    seen.add(kind)
    children = _CHILDREN[kind]
    for number, value in fields(view, name):
        budget[0] -= 1
        if budget[0] < 0:
            raise _bad(name, f"more than {MAX_FIELDS} fields")
        if kind == "Tensor" and (number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and _is_1(value))):
            raise _bad(name, "a tensor is kept in an external file")
        if _DOMAIN_FIELD.get(kind) == number and isinstance(value, memoryview):
            domain = bytes(value[:80]).decode("utf-8", "replace")
            if domain not in ALLOWED_DOMAINS:
                raise _bad(name, f"it uses the custom operator domain {domain!r}")
        if number in children:
            if not isinstance(value, memoryview):
                raise _bad(name, "it is not an ONNX model")
            _walk(value, children[number], depth + 1, budget, seen, name)


def _is_1(value: int | memoryview) -> bool:
    """As an enumeration is read: of its 32 lower bits."""
    return isinstance(value, int) and value & 0xFFFF_FFFF == 1


def fields(view: memoryview, name: str) -> Iterator[wire.Field]:
    """``wire.fields`` of a file ``name``; raises BundleError. What may be wrong in all is bounded by the caller."""
    try:
        yield from wire.fields(view, MAX_FIELDS)
    except ValueError as cause:
        raise _bad(name, f"it is not an ONNX model ({cause})") from cause
