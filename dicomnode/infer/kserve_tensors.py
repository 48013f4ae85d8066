"""What a model takes and gives, by its ONNX file and by a server's word, and whether they agree. Pure.

Datatypes are those of the KServe v2 protocol ("Tensor Data Types"); binary tensors are
little-endian, row major, without padding (Triton's binary tensor data extension).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dicomnode import wire
from dicomnode.infer.engine import Array

DATATYPES: Mapping[str, str] = {
    "BOOL": "|b1", "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "|i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
"""Datatype of the protocol -> numpy dtype. BYTES and BF16 have none here."""

_NAMES = {np.dtype(code): name for name, code in DATATYPES.items()}
_ONNX = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64",
    9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64",
}  # fmt: skip
"""onnx.proto, TensorProto.DataType."""

FREE_FACTOR = 64
"""An output of which the model does not say the shape may have this many values per value of the input."""

Dim = int | str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """``shape``: a number, or a name for a free dimension (empty when it has none)."""

    name: str
    datatype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as it came: nothing of it has been checked. ``data`` is None where it was not sent as bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one inference request, unchecked."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]


def onnx_signature(onnx: bytes) -> Signature:
    """Inputs and outputs of an ONNX model (onnx.proto: ModelProto, GraphProto, ValueInfoProto).

    Raises ValueError when it is not one, or when a tensor has a type the protocol lacks.
    """
    graph = next((wire.message(v) for n, v in wire.fields(memoryview(onnx)) if n == 7), None)
    if graph is None:
        raise ValueError("it holds no ONNX graph")
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    weights: set[str] = set()
    for number, value in wire.fields(graph):
        if number == 5:  # an initializer may be listed among the inputs (IR version 3)
            weights |= {wire.text(v) for n, v in wire.fields(wire.message(value)) if n == 8}
        elif number == 11:
            inputs.append(_value_info(wire.message(value)))
        elif number == 12:
            outputs.append(_value_info(wire.message(value)))
    return Signature(tuple(i for i in inputs if i.name not in weights), tuple(outputs))


def _value_info(view: memoryview) -> TensorSpec:
    name, datatype = "", ""
    shape: list[Dim] | None = None  # a scalar has one, with no dimensions
    for number, value in wire.fields(view):
        if number == 1:
            name = wire.text(value)
        elif number == 2:
            tensor = next((wire.message(v) for n, v in wire.fields(wire.message(value)) if n == 1), None)
            if tensor is None:
                raise ValueError(f"{name} is not a tensor")
            for field, content in wire.fields(tensor):
                if field == 1 and isinstance(content, int):
                    datatype = _ONNX.get(content, "")
                elif field == 2:
                    shape = [_dim(wire.message(v)) for n, v in wire.fields(wire.message(content)) if n == 1]
    if not datatype:
        raise ValueError(f"{name} has a type that the KServe protocol does not carry")
    if shape is None:
        raise ValueError(
            f"{name} has no shape in the model file, so what an endpoint answers could not be checked;"
            " add it with onnx.shape_inference"
        )
    return TensorSpec(name, datatype, tuple(shape))


def _dim(view: memoryview) -> Dim:
    for number, value in wire.fields(view):
        if number == 1 and isinstance(value, int):
            return value
        if number == 2:
            return wire.text(value)
    return ""


def misfit(ours: Signature, theirs: Signature) -> str:
    """Why a server's model is not the bundle's, in words; empty when it may be.

    The same inputs; every output of the bundle; the same datatypes and ranks. A free
    dimension of the server (-1) takes any; a free one of the bundle must be free there too.
    """
    extra = {s.name for s in theirs.inputs} - {s.name for s in ours.inputs}
    if extra:
        return f"it wants a further input {_shown(min(extra))}"
    for kind, wanted, given in (("input", ours.inputs, theirs.inputs), ("output", ours.outputs, theirs.outputs)):
        found = {s.name: s for s in given}
        for spec in wanted:
            other = found.get(spec.name)
            if other is None:
                return f"it has no {kind} {spec.name}"
            if other.datatype != spec.datatype:
                return f"{kind} {spec.name} is {_shown(other.datatype)}, the bundle's is {spec.datatype}"
            if len(other.shape) != len(spec.shape):
                return f"{kind} {spec.name} has {len(other.shape)} dimensions, the bundle's has {len(spec.shape)}"
            for axis, (there, here) in enumerate(zip(other.shape, spec.shape, strict=True)):
                if there not in (-1, here):
                    wants = here if isinstance(here, int) else "any size"
                    return f"{kind} {spec.name}, axis {axis}: {there} there, {wants} in the bundle"
    return ""


def input_problem(signature: Signature, inputs: Mapping[str, Array]) -> str:
    """Why these arrays are not the model's inputs; empty when they are."""
    if inputs.keys() != {s.name for s in signature.inputs}:
        return f"inputs are {sorted(inputs)}, the model takes {sorted(s.name for s in signature.inputs)}"
    for spec in signature.inputs:
        array = inputs[spec.name]
        if datatype_of(array) != spec.datatype:
            return f"input {spec.name} is {array.dtype}, the model takes {spec.datatype}"
        if len(array.shape) != len(spec.shape) or any(
            isinstance(here, int) and here != size for here, size in zip(spec.shape, array.shape, strict=True)
        ):
            return f"input {spec.name} has shape {array.shape}, the model takes {spec.shape}"
    return ""


def datatype_of(array: Array) -> str:
    """The protocol's name for the array's dtype, empty where it has none."""
    return _NAMES.get(array.dtype.newbyteorder("<"), "")


def raw_bytes(array: Array) -> memoryview:
    """The array's bytes as the protocol wants them: little-endian, row major."""
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data


def output_shapes(signature: Signature, inputs: Mapping[str, Array]) -> dict[str, tuple[int | None, ...]]:
    """Shape of each output for these inputs; None for a dimension that the model leaves open."""
    known: dict[str, int] = {}
    for spec in signature.inputs:
        for dim, size in zip(spec.shape, inputs[spec.name].shape, strict=True):
            if isinstance(dim, str) and dim:
                known.setdefault(dim, size)
    return {
        spec.name: tuple(dim if isinstance(dim, int) else known.get(dim) for dim in spec.shape)
        for spec in signature.outputs
    }


def reply_bytes(signature: Signature, inputs: Mapping[str, Array]) -> int:
    """The most bytes that all outputs together may have for these inputs."""
    values = max((array.size for array in inputs.values()), default=1)
    total = 0
    for spec, shape in zip(signature.outputs, output_shapes(signature, inputs).values(), strict=True):
        count = math.prod(d for d in shape if d is not None)
        if None in shape:
            count = max(count, FREE_FACTOR * values)
        total += count * np.dtype(DATATYPES[spec.datatype]).itemsize
    return total


def checked_outputs(
    signature: Signature, inputs: Mapping[str, Array], outputs: Sequence[Tensor]
) -> tuple[dict[str, Array], str]:
    """Outputs as arrays of their own, and what is wrong with them (then there are none).

    Wrong is: an output missing, twice, or of another datatype, shape or length; a value
    that is not finite; a BOOL other than 0 and 1.
    """
    wanted = output_shapes(signature, inputs)
    specs = {s.name: s for s in signature.outputs}
    found: dict[str, Array] = {}
    for tensor in outputs:
        spec = specs.get(tensor.name)
        if spec is None:
            continue
        array, problem = _checked(spec, wanted[spec.name], tensor)
        if array is None or tensor.name in found:
            return {}, problem or f"output {spec.name} came twice"
        found[tensor.name] = array
    missing = sorted(specs.keys() - found.keys())
    return (found, "") if not missing else ({}, f"it gave no output {missing[0]}")


def _checked(spec: TensorSpec, wanted: tuple[int | None, ...], tensor: Tensor) -> tuple[Array | None, str]:
    name = spec.name
    if tensor.datatype != spec.datatype:
        return None, f"output {name} is {_shown(tensor.datatype)}, expected {spec.datatype}"
    fits = len(tensor.shape) == len(wanted) and all(
        size >= 0 and want in (None, size) for want, size in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        return None, f"output {name} has shape {tensor.shape[:8]}, expected {wanted}"
    if tensor.data is None:
        return None, f"output {name} came as text: the server lacks the binary tensor data extension"
    dtype = np.dtype(DATATYPES[spec.datatype])
    if math.prod(tensor.shape) * dtype.itemsize != len(tensor.data):
        return None, f"output {name} has {len(tensor.data)} bytes, which is not its shape {tensor.shape}"
    if dtype.kind == "b" and (np.frombuffer(tensor.data, np.uint8) > 1).any():
        return None, f"output {name} is not BOOL"
    array = np.frombuffer(tensor.data, dtype).reshape(tensor.shape).copy()
    if dtype.kind == "f" and not np.isfinite(array).all():
        return None, f"output {name} is not finite"
    return array, ""


def _shown(value: str) -> str:
    """A server's word, fit for a message."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in value[:40])
