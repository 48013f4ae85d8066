"""Refuse an ONNX file that says itself that it expands beyond bounds, before a session is made.

Making a session folds constants: a file of a few hundred bytes can ask for terabytes at that
moment. What a file states is added up here without computing anything: tensors that declare more
values than they carry, dense forms of sparse tensors, constant shapes of ConstantOfShape, Expand
and the random generators, constant repeats of Tile, constant scales and sizes of Resize, strides of
ConvTranspose, constant pads of Pad and constant bounds of Range. Factors multiply along each path
through the graph, so a chain of small ones counts in full, and two decoders beside each other do
not. What makes things smaller is not credited: a stride says nothing of an axis of one. A shape
that is computed while the graph runs cannot be judged without running it: that is for the process
with limited memory (:mod:`dicomnode.infer.verification`).

Field numbers are onnx.proto's (IR version 10).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dicomnode import wire
from dicomnode.errors import BundleError
from dicomnode.infer.onnxcheck import fields

MAX_ELEMENTS = 1 << 28
"""Values of one tensor that is made from constants: 1 GiB of float32."""
MAX_TOTAL = 1 << 29
"""Values of all of them together."""
MAX_FACTOR = 1 << 20
"""Constant factors of Tile, Resize, Upsample and ConvTranspose along a path; a U-Net of depth 5 in 3-D has 2**15."""
MAX_NESTED = 8
"""Functions within functions."""
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
    functions: dict[str, float] = field(default_factory=dict)
    """How much each function of the model enlarges what it gets."""

    def made(self, elements: int, what: str) -> None:
        self.total += elements
        if elements > MAX_ELEMENTS or self.total > MAX_TOTAL:
            raise BundleError(
                "check model file",
                f"{self.name}: {what} expands to {elements} values (at most {MAX_ELEMENTS} each, {MAX_TOTAL} in all)",
                "It would not fit the memory; export the model without it",
            )

    def grown(self, before: float, factor: float, what: str) -> float:
        """``before`` times ``factor``, within the bound."""
        if not (grown := before * _enlarging(factor)) <= MAX_FACTOR:
            raise BundleError(
                "check model file",
                f"{self.name}: nodes up to a {what} enlarge what they get by {grown:.3g} (at most {MAX_FACTOR})",
                "It would not fit the memory; export the model without it",
            )
        return grown


@dataclass(frozen=True)
class _Scope:
    """What is known of the values that nodes can see: short constants, and by how much others were enlarged."""

    constants: dict[str, list[float]] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)

    def inner(self) -> _Scope:
        return _Scope(dict(self.constants), dict(self.factors))


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
    inner: float = 1.0


@dataclass
class _Attribute:
    name: str = ""
    ints: list[float] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)
    tensor: _Tensor | None = None
    inner: float = 1.0


def check_expansion(data: bytes, name: str) -> None:
    """Raise BundleError when the model ``data`` of file ``name`` asks for more than the bounds above.

    ``data`` has passed :func:`dicomnode.infer.onnxcheck.check_onnx`: its nesting is bounded.
    """
    total = _Sum(name)
    try:
        parts = [(n, v) for n, v in fields(memoryview(data), name) if isinstance(v, memoryview)]
        functions = [view for number, view in parts if number == 25]
        for _ in range(min(len(functions), MAX_NESTED)):  # one may use another that comes later
            before, total.total = dict(total.functions), 0
            for view in functions:
                _function(view, total)
            if total.functions == before:
                break
        for number, view in parts:
            if number == 7:
                _graph(view, total, _Scope())
    except ValueError as cause:  # packed numbers that are none
        raise BundleError(
            "check model file", f"{name}: it is not an ONNX model ({cause})", "Export it again as one ONNX file"
        ) from cause


def _function(view: memoryview, total: _Sum) -> None:
    """FunctionProto: its name in field 1, its nodes in field 7."""
    parts = [(n, v) for n, v in fields(view, total.name) if isinstance(v, memoryview)]
    name = next((_text(v) for n, v in parts if n == 1), "")
    total.functions[name] = _nodes([v for n, v in parts if n == 7], total, _Scope())


def _graph(view: memoryview, total: _Sum, outer: _Scope) -> float:
    """By how much any value within is enlarged at most."""
    scope, nodes = outer.inner(), []
    for number, value in fields(view, total.name):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            nodes.append(value)
        elif number == 5:
            tensor = _tensor(value, total)
            scope.constants[tensor.name] = tensor.values
        elif number == 15:
            _sparse(value, total)
    return _nodes(nodes, total, scope)


def _nodes(views: list[memoryview], total: _Sum, scope: _Scope) -> float:
    """In the order of the file, in which every value comes before it is used (onnx.proto, GraphProto)."""
    most = 1.0
    for view in views:
        node = _node(view, total, scope)
        if node.op == "Constant" and node.outputs:
            values = next((a.tensor.values if a.tensor else a.ints or a.floats for a in node.attributes.values()), [])
            scope.constants[node.outputs[0]] = values
            continue
        before = max([scope.factors.get(name, 1.0) for name in node.inputs] + [node.inner])
        factor = total.grown(before, _weigh(node, total, scope), node.op)
        scope.factors.update(dict.fromkeys(node.outputs, factor))
        most = max(most, factor)
    return most


def _weigh(node: _Node, total: _Sum, scope: _Scope) -> float:
    """What the node says that it makes; the factor by which it enlarges what it gets."""

    def constant(index: int) -> list[float]:
        return scope.constants.get(node.inputs[index], []) if index < len(node.inputs) else []

    def attribute(name: str) -> list[float]:
        found = node.attributes.get(name)
        return (found.floats or found.ints) if found else []

    if node.op in _MADE:
        total.made(_product(attribute("shape") or constant(_SHAPE_INPUT.get(node.op, 0))), node.op)
    elif node.op == "Range" and all(bounds := [constant(i) for i in range(3)]):
        start, limit, delta = (b[0] for b in bounds)
        total.made(_whole((limit - start) / delta if delta else math.inf), node.op)
    elif node.op == "Tile":
        return float(_product(constant(1)))
    elif node.op in ("Resize", "Upsample"):
        total.made(_product(constant(3)), node.op)
        # Input 1 is the region of interest from opset 11 on, and the scales before it.
        return _most(math.prod(map(_enlarging, s)) for s in (constant(1), constant(2), attribute("scales")))
    elif node.op == "ConvTranspose":
        total.made(_product(attribute("output_shape")), node.op)
        return math.prod(map(_enlarging, attribute("strides")))
    elif node.op == "Pad":
        pads = [_whole(pad) for pad in constant(1) or attribute("pads")]
        axes = len(pads) // 2  # every begin, then every end; what is padded has at least one value on each axis
        total.made(math.prod(1 + a + b for a, b in zip(pads[:axes], pads[axes:], strict=False)), node.op)
    return total.functions.get(node.op, 1.0)


def _product(dims: list[float]) -> int:
    """Number of values of a shape; 0 and -1 stand for what is not known here."""
    return math.prod(n for d in dims if (n := _whole(d))) if dims else 0


def _most(factors: Iterable[float]) -> float:
    """The greatest; what is no number wins."""
    found = list(factors)
    return next((f for f in found if math.isnan(f)), max(found, default=1.0))


def _enlarging(factor: float) -> float:
    """At least 1; what is no number stays none, and is above every bound."""
    return 1.0 if factor < 1.0 else factor


def _whole(value: float) -> int:
    """At least 0; what is no number is more than any bound."""
    return max(0, math.ceil(value)) if math.isfinite(value) else MAX_TOTAL + 1


def _node(view: memoryview, total: _Sum, scope: _Scope) -> _Node:
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
            attribute = _attribute(value, total, scope)
            node.inner = max(node.inner, attribute.inner)
            node.attributes[attribute.name] = attribute
    return node


def _attribute(view: memoryview, total: _Sum, scope: _Scope) -> _Attribute:
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
            found.inner = max(found.inner, _graph(value, total, scope))
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
