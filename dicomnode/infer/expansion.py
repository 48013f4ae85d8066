"""Refuse an ONNX file that says itself that it expands beyond bounds, before a session is made.

Making a session folds constants: a file of a few hundred bytes can ask for terabytes at that
moment. What a file states is added up here without computing anything: tensors that declare more
values than they carry, dense forms of sparse tensors, constant shapes of ConstantOfShape, Expand
and the random generators, constant repeats of Tile, constant scales and sizes of Resize, constant
pads of Pad and constant bounds of Range. Factors multiply along the graph, so a chain of small
ones counts in full. A shape that is computed while the graph runs cannot be judged without running
it: that is for the process with limited memory (:mod:`dicomnode.infer.verification`).

Field numbers are onnx.proto's (IR version 10).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from dicomnode.errors import BundleError
from dicomnode.infer import wire
from dicomnode.infer.onnxcheck import fields

MAX_ELEMENTS = 1 << 28
"""Values of one tensor that is made from constants: 1 GiB of float32."""
MAX_TOTAL = 1 << 29
"""Values of all of them together."""
MAX_FACTOR = 1 << 20
"""All constant factors of Tile, Resize and Upsample of a graph multiplied; a U-Net of depth 5 in 3-D has 2**15."""
MAX_DIMS = 64
_PER_BYTE = 4
"""Values in a byte of the narrowest type (2 bits)."""

_FLOAT, _INT32, _INT64, _DOUBLE = 1, 6, 7, 11
_MADE = frozenset({"ConstantOfShape", "Expand", "RandomNormal", "RandomUniform"})
_SHAPE_INPUT = {"ConstantOfShape": 0, "Expand": 1}
_GRAPH_ATTRIBUTES = {6, 11}


@dataclass
class _Sum:
    """What a model asks for as far as it says so."""

    name: str
    total: int = 0
    factor: float = 1.0
    nodes: int = 0

    def made(self, elements: int, what: str) -> None:
        self.total += elements
        if elements > MAX_ELEMENTS or self.total > MAX_TOTAL:
            raise BundleError(
                "check model file",
                f"{self.name}: {what} expands to {elements} values (at most {MAX_ELEMENTS} each, {MAX_TOTAL} in all)",
                "It would not fit the memory; export the model without it",
            )

    def grown(self, factor: float, what: str) -> None:
        self.factor *= _enlarging(factor)
        if not self.factor <= MAX_FACTOR:
            raise BundleError(
                "check model file",
                f"{self.name}: its {what} nodes enlarge what they get by {self.factor:.3g} (at most {MAX_FACTOR})",
                "It would not fit the memory; export the model without it",
            )


@dataclass
class _Tensor:
    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    carried: int = 0
    values: list[float] = field(default_factory=list)

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


@dataclass
class _Node:
    op: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, _Attribute] = field(default_factory=dict)


@dataclass
class _Attribute:
    name: str = ""
    ints: list[float] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)
    tensor: _Tensor | None = None


def check_expansion(data: bytes, name: str) -> None:
    """Raise BundleError when the model ``data`` of file ``name`` asks for more than the bounds above.

    ``data`` has passed :func:`dicomnode.infer.onnxcheck.check_onnx`: its nesting is bounded.
    """
    total = _Sum(name)
    try:
        for number, value in fields(memoryview(data), name):
            if number == 7 and isinstance(value, memoryview):
                _graph(value, total, {})
            elif number == 25 and isinstance(value, memoryview):  # FunctionProto: its nodes are in field 7
                _nodes([v for n, v in fields(value, name) if n == 7 and isinstance(v, memoryview)], total, {})
    except ValueError as cause:  # packed numbers that are none
        raise BundleError(
            "check model file", f"{name}: it is not an ONNX model ({cause})", "Export it again as one ONNX file"
        ) from cause


def _graph(view: memoryview, total: _Sum, outer: dict[str, list[float]]) -> None:
    constants, nodes = dict(outer), []
    for number, value in fields(view, total.name):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            nodes.append(value)
        elif number == 5:
            tensor = _tensor(value, total)
            constants[tensor.name] = tensor.values
        elif number == 15:
            _sparse(value, total)
    _nodes(nodes, total, constants)


def _nodes(views: list[memoryview], total: _Sum, constants: dict[str, list[float]]) -> None:
    for view in views:
        node = _node(view, total, constants)
        if node.op == "Constant" and node.outputs:
            values = next((a.tensor.values if a.tensor else a.ints or a.floats for a in node.attributes.values()), [])
            constants[node.outputs[0]] = values
            continue
        _weigh(node, total, constants)


def _weigh(node: _Node, total: _Sum, constants: dict[str, list[float]]) -> None:
    def constant(index: int) -> list[float]:
        return constants.get(node.inputs[index], []) if index < len(node.inputs) else []

    if node.op in _MADE:
        shape = node.attributes.get("shape")
        dims = shape.ints if shape else constant(_SHAPE_INPUT.get(node.op, 0))
        total.made(_product(dims), node.op)
    elif node.op == "Range" and all(bounds := [constant(i) for i in range(3)]):
        start, limit, delta = (b[0] for b in bounds)
        total.made(_whole((limit - start) / delta if delta else math.inf), node.op)
    elif node.op == "Tile":
        total.grown(float(_product(constant(1))), node.op)
    elif node.op in ("Resize", "Upsample"):
        scales = next((c for i in (1, 2) if (c := constant(i))), [])
        attribute = node.attributes.get("scales")
        total.grown(math.prod(_enlarging(s) for s in scales or (attribute.floats if attribute else [])), node.op)
        total.made(_product(constant(3)), node.op)
    elif node.op == "Pad":
        attribute = node.attributes.get("pads")
        for pad in constant(1) or (attribute.ints if attribute else []):
            total.made(_whole(pad), node.op)


def _product(dims: list[float]) -> int:
    """Number of values of a shape; 0 and -1 stand for what is not known here."""
    return math.prod(n for d in dims if (n := _whole(d))) if dims else 0


def _enlarging(factor: float) -> float:
    """At least 1; what is no number stays none, and is above every bound."""
    return 1.0 if factor < 1.0 else factor


def _whole(value: float) -> int:
    """At least 0; what is no number is more than any bound."""
    return max(0, math.ceil(value)) if math.isfinite(value) else MAX_TOTAL + 1


def _node(view: memoryview, total: _Sum, constants: dict[str, list[float]]) -> _Node:
    node = _Node()
    for number, value in fields(view, total.name):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 2:
            node.outputs.append(_text(value))
        elif number == 4:
            node.op = _text(value)
        elif number == 5:
            attribute = _attribute(value, total, constants)
            node.attributes[attribute.name] = attribute
    return node


def _attribute(view: memoryview, total: _Sum, constants: dict[str, list[float]]) -> _Attribute:
    found = _Attribute()
    for number, value in fields(view, total.name):
        if (number == 8 and not isinstance(value, memoryview)) or (number == 3 and not isinstance(value, memoryview)):
            found.ints.append(wire.signed(value))
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            found.name = _text(value)
        elif number == 8:
            found.ints += _ints(value)
        elif number == 7:
            found.floats += struct.unpack(f"<{len(value) // 4}f", value[: len(value) // 4 * 4])
        elif number == 5:
            found.tensor = _tensor(value, total)
        elif number == 10:
            _tensor(value, total)
        elif number in (22, 23):
            _sparse(value, total)
        elif number in _GRAPH_ATTRIBUTES:
            _graph(value, total, constants)
    return found


def _tensor(view: memoryview, total: _Sum) -> _Tensor:
    """Name, shape and, of short tensors, the values. Raises BundleError for one that carries less than it declares."""
    found = _Tensor()
    strings = 0
    data: dict[int, memoryview] = {}
    for number, value in fields(view, total.name):
        if number == 1:
            found.dims += _ints(value)
        elif number == 2 and not isinstance(value, memoryview):
            found.kind = value & 0xFFFF_FFFF  # an int32
        elif number == 6:
            strings += 1
        elif not isinstance(value, memoryview):
            found.carried += 8  # one value that is not packed
        elif number == 8:
            found.name = _text(value)
        elif number in (4, 5, 7, 9, 10, 11):
            found.carried += len(value)
            data[number] = value
    if len(found.dims) > MAX_DIMS or any(d < 0 for d in found.dims):
        raise BundleError("check model file", f"{total.name}: a tensor has a shape that cannot be", "Export it again")
    if found.elements > max(found.carried * _PER_BYTE, strings):
        raise BundleError(
            "check model file",
            f"{total.name}: a tensor declares {found.elements} values and carries {found.carried} bytes",
            "Export the model again as one ONNX file",
        )
    if found.elements <= MAX_DIMS:
        found.values = list(_values(found, data))
    return found


def _values(tensor: _Tensor, data: dict[int, memoryview]) -> Iterator[float]:
    formats = {_FLOAT: ("f", 4), _INT32: ("i", 4), _INT64: ("q", 8), _DOUBLE: ("d", 8)}
    if tensor.kind not in formats:
        return
    letter, size = formats[tensor.kind]
    if 9 in data:
        yield from struct.unpack(f"<{len(data[9]) // size}{letter}", data[9][: len(data[9]) // size * size])
    for number, packed in ((4, "f"), (10, "d")):
        if number in data:
            width = 4 if packed == "f" else 8
            count = len(data[number]) // width
            yield from struct.unpack(f"<{count}{packed}", data[number][: count * width])
    for number in (5, 7):
        if number in data:
            yield from _ints(data[number])


def _sparse(view: memoryview, total: _Sum) -> None:
    """SparseTensorProto: engines make it dense when they load it."""
    dims: list[int] = []
    for number, value in fields(view, total.name):
        if number == 3:
            dims += _ints(value)
        elif number in (1, 2) and isinstance(value, memoryview):
            _tensor(value, total)
    total.made(math.prod(max(0, d) for d in dims[: MAX_DIMS + 1]), "a sparse tensor")


def _ints(value: int | memoryview) -> list[int]:
    return wire.integers(value, MAX_DIMS + 1)  # longer ones are no shape


def _text(view: memoryview) -> str:
    return bytes(view[:256]).decode("utf-8", "replace")
