"""Names and shapes of an ONNX model's inputs, and the shapes an engine is built for. Pure.

Reads the wire format as onnxcheck.py does (onnx.proto: GraphProto.input, ValueInfoProto,
TypeProto.Tensor, TensorShapeProto), because the key of a plan has to be known before any
library is loaded that could read the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from dicomnode import wire
from dicomnode.errors import BundleError
from dicomnode.infer.onnxcheck import fields
from dicomnode.infer.plans import InputRange

_GRAPH, _INITIALIZER, _INPUT, _TENSOR_NAME = 7, 5, 11, 8
DYNAMIC = -1
PLANE = (8, 512, 1024)
"""Least, usual and most rows or columns where a model leaves both open: matrices of CT and MR."""

SPACE = (8, 128, 256)
"""The same for each axis of a model that leaves three open: patches of a volume."""


def onnx_inputs(data: bytes) -> dict[str, tuple[int, ...]]:
    """Input name -> dimensions; -1 where the model leaves one open. Initializers are no inputs.

    Raises BundleError for bytes that are not protobuf, and names that are no UTF-8.
    """
    found: dict[str, tuple[int, ...]] = {}
    constants: set[str] = set()
    for number, graph in fields(memoryview(data), "model"):
        if number != _GRAPH or not isinstance(graph, memoryview):
            continue
        for field, value in fields(graph, "model"):
            if not isinstance(value, memoryview):
                continue
            if field == _INPUT:
                name, shape = _value_info(value)
                found[name] = shape
            elif field == _INITIALIZER:
                constants |= {_name(v) for f, v in fields(value, "model") if f == _TENSOR_NAME}
    return {name: shape for name, shape in found.items() if name not in constants}


def _name(value: int | memoryview) -> str:
    try:
        return wire.text(value)
    except ValueError:  # bytes that are no UTF-8, or no text at all
        raise BundleError("read model file", "a name in it is no text", "Export it again as one ONNX file") from None


def _only(view: memoryview, number: int) -> memoryview:
    return next((v for f, v in fields(view, "model") if f == number and isinstance(v, memoryview)), memoryview(b""))


def _value_info(view: memoryview) -> tuple[str, tuple[int, ...]]:
    shape = _only(_only(_only(view, 2), 1), 2)
    dims: list[int] = []
    for number, dim in fields(shape, "model"):
        if number == 1 and isinstance(dim, memoryview):
            size = next((v for f, v in fields(dim, "model") if f == 1 and isinstance(v, int)), 0)
            dims.append(size if size > 0 else DYNAMIC)
    return _name(_only(view, 1)), tuple(dims)


def profile_ranges(inputs: Mapping[str, tuple[int, ...]], max_batch: int) -> tuple[InputRange, ...]:
    """The range of shapes to build for. Axis 0 is the batch, 1..``max_batch`` where it is open."""
    return tuple(_range(name, dims, max_batch) for name, dims in sorted(inputs.items()))


def _range(name: str, dims: tuple[int, ...], max_batch: int) -> InputRange:
    least, usual, most = PLANE if sum(d == DYNAMIC for d in dims[1:]) <= 2 else SPACE
    columns: list[tuple[int, int, int]] = []
    for axis, size in enumerate(dims):
        if size != DYNAMIC:
            columns.append((size, size, size))
        elif axis == 0:
            columns.append((1, max_batch, max_batch))
        else:
            columns.append((least, usual, most))
    low, middle, high = zip(*columns, strict=True) if columns else ((), (), ())
    return InputRange(name, tuple(low), tuple(middle), tuple(high))
