"""Decompression bombs: what a model file states is refused unseen, the rest dies in a child with little memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dicomnode.errors import BundleError, EngineError
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.engine import Limits
from dicomnode.infer.expansion import MAX_ELEMENTS, MAX_FACTOR, check_expansion
from dicomnode.infer.verification import verify_apart
from tests.infer.infer_case import MODEL, copy_bundle, edit_manifest, replace_file

HERE = {"data_dir": Path("/nonexistent"), "limits": Limits(), "threads": 1}
LIMIT = {**HERE, "memory_mb": 2048, "seconds": 60.0}


def model(*nodes: object, initializers: tuple[object, ...] = ()) -> bytes:
    graph = helper.make_graph(list(nodes), "g", [], [], list(initializers))
    return bytes(helper.make_model(graph).SerializeToString())


def ints(name: str, *values: int, raw: bool = True) -> object:
    if raw:
        return numpy_helper.from_array(np.array(values, np.int64), name)
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def constant(name: str, *values: int) -> object:
    return helper.make_node("Constant", [], [name], value=ints("v", *values))


def sparse(*dims: int) -> object:
    return helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]),
        helper.make_tensor("i", TensorProto.INT64, [1], [0]),
        dims,
    )


def with_sparse(*dims: int) -> bytes:
    graph = helper.make_graph([], "g", [], [])
    graph.sparse_initializer.append(sparse(*dims))
    return bytes(helper.make_model(graph).SerializeToString())


def declares(*dims: int) -> bytes:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    del tensor.dims[:]
    tensor.dims.extend(dims)
    return model(initializers=(tensor,))


def with_function() -> bytes:
    """A tile of 1024 behind a name, used three times in a row; the function is written behind the graph."""
    uses = [helper.make_node("Larger", [f"x{i}"], [f"x{i + 1}"]) for i in range(3)]
    tile = [constant("r", 1 << 10), helper.make_node("Tile", ["a", "r"], ["b"])]
    function = helper.make_function("", "Larger", ["a"], ["b"], tile, [helper.make_opsetid("", 17)])
    made = helper.make_model(helper.make_graph(uses, "g", [], []), functions=[function])
    return bytes(made.SerializeToString())


BOMBS = {
    "constant-of-shape": model(
        helper.make_node("ConstantOfShape", ["s"], ["y"]), initializers=(ints("s", 1 << 20, 1 << 20),)
    ),
    "shape not raw": model(
        helper.make_node("ConstantOfShape", ["s"], ["y"]), initializers=(ints("s", 1 << 40, raw=False),)
    ),
    "shape from Constant": model(constant("s", 1 << 20, 1 << 20), helper.make_node("Expand", ["x", "s"], ["y"])),
    "shape from value_ints": model(
        helper.make_node("Constant", [], ["s"], value_ints=[1 << 30, 4]), helper.make_node("Expand", ["x", "s"], ["y"])
    ),
    "many that fit each": model(
        *(helper.make_node("ConstantOfShape", ["s"], [f"y{i}"]) for i in range(9)), initializers=(ints("s", 1 << 26),)
    ),
    "tile": model(helper.make_node("Tile", ["x", "r"], ["y"]), initializers=(ints("r", 1 << 12, 1 << 12),)),
    "tiles in a chain": model(
        *(helper.make_node("Tile", [f"x{i}", "r"], [f"x{i + 1}"]) for i in range(8)), initializers=(ints("r", 10),)
    ),
    "resize": model(
        helper.make_node("Resize", ["x", "", "k"], ["y"]),
        initializers=(numpy_helper.from_array(np.array([1, 1, 4096, 4096], np.float32), "k"),),
    ),
    "resize to a size": model(
        helper.make_node("Resize", ["x", "", "", "k"], ["y"]), initializers=(ints("k", 1, 1, 1 << 20, 1 << 20),)
    ),
    "resize by nothing": model(
        helper.make_node("Resize", ["x", "", "k"], ["y"]),
        initializers=(numpy_helper.from_array(np.array([np.nan], np.float32), "k"),),
    ),
    "pad": model(helper.make_node("Pad", ["x", "p"], ["y"]), initializers=(ints("p", 0, 1 << 40),)),
    "pad on each axis": model(
        helper.make_node("Pad", ["x", "p"], ["y"]), initializers=(ints("p", *[1 << 10] * 3, *[0] * 3),)
    ),
    "pad, its axes named": model(
        helper.make_node("Pad", ["x", "p", "", "a"], ["y"]),
        initializers=(ints("p", 1 << 15, 1 << 15, 0, 0), ints("a", 2, 3)),
    ),
    "pads of opset 2": model(helper.make_node("Pad", ["x"], ["y"], pads=[1 << 15, 1 << 15, 0, 0])),
    "resize with a region of interest": model(
        helper.make_node("Resize", ["x", "roi", "k"], ["y"]),
        initializers=(
            numpy_helper.from_array(np.array([0, 0, 1, 1], np.float32), "roi"),
            numpy_helper.from_array(np.array([4096, 4096], np.float32), "k"),
        ),
    ),
    "strides of transposed convolutions": model(
        *(helper.make_node("ConvTranspose", [f"x{i}", "w"], [f"x{i + 1}"], strides=[20, 20]) for i in range(4))
    ),
    "transposed convolution to a shape": model(
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], output_shape=[1 << 15, 1 << 15])
    ),
    "in a branch and behind it": model(
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            then_branch=helper.make_graph([helper.make_node("Tile", ["x", "r"], ["z"])], "t", [], []),
        ),
        helper.make_node("Tile", ["y", "r"], ["end"]),
        initializers=(ints("r", 1 << 12),),
    ),
    "function used again and again": with_function(),
    "range": model(
        helper.make_node("Range", ["a", "b", "c"], ["y"]),
        initializers=(ints("a", 0), ints("b", 1 << 40), ints("c", 1)),
    ),
    "range of no step": model(
        helper.make_node("Range", ["a", "b", "c"], ["y"]), initializers=(ints("a", 0), ints("b", 9), ints("c", 0))
    ),
    "random": model(helper.make_node("RandomNormal", [], ["y"], shape=[1 << 20, 1 << 20])),
    "sparse": with_sparse(1 << 20, 1 << 20),
    "sparse in Constant": model(helper.make_node("Constant", [], ["y"], sparse_value=sparse(1 << 40))),
    "more than it carries": declares(1 << 30),
    "negative": declares(-1),
    "in a branch": model(
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            then_branch=helper.make_graph([helper.make_node("ConstantOfShape", ["s"], ["z"])], "t", [], []),
        ),
        initializers=(ints("s", 1 << 40),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_a_file_that_says_that_it_expands_is_refused(bomb: bytes) -> None:
    assert len(bomb) < 2000
    with pytest.raises(BundleError, match=r"m\.onnx: .*(expands|enlarge|declares|shape that cannot be)"):
        check_expansion(bomb, "m.onnx")


def test_what_models_do_is_allowed() -> None:
    check_expansion((MODEL / "model.onnx").read_bytes(), "model.onnx")
    scale = numpy_helper.from_array(np.array([1, 1, 2, 2, 2], np.float32), "k")
    ups = [helper.make_node("Resize", [f"x{i}", "", "k"], [f"x{i + 1}"]) for i in range(5)]
    beside = [  # two decoders, nested as in a U-Net++
        helper.make_node("ConvTranspose", [f"{k}{i}" if i else "x0", "w"], [f"{k}{i + 1}"], strides=[2, 2, 2])
        for k in "ab"
        for i in range(5)
    ]
    check_expansion(model(*beside, helper.make_node("Concat", ["a5", "b5"], ["y"], axis=1)), "two.onnx")
    check_expansion(
        model(helper.make_node("Pad", ["x", "p"], ["y"]), initializers=(ints("p", 0, 0, 8, 8, 0, 0, 8, 8),)), "pad.onnx"
    )
    weights = numpy_helper.from_array(np.zeros((64, 64, 3, 3, 3), np.float32), "w")
    check_expansion(model(*ups, initializers=(scale, weights)), "unet.onnx")
    computed = model(helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Expand", ["x", "s"], ["y"]))
    check_expansion(computed, "computed.onnx")


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=5), st.booleans())
def test_the_bound_is_on_the_product(dims: list[int], raw: bool) -> None:
    data = model(helper.make_node("ConstantOfShape", ["s"], ["y"]), initializers=(ints("s", *dims, raw=raw),))
    if math.prod(dims) > MAX_ELEMENTS:
        with pytest.raises(BundleError):
            check_expansion(data, "m")
    else:
        check_expansion(data, "m")


@given(st.lists(st.integers(1, 64), max_size=12))
def test_the_bound_is_on_the_factors_together(repeats: list[int]) -> None:
    nodes = [helper.make_node("Tile", [f"x{i}", f"r{i}"], [f"x{i + 1}"]) for i in range(len(repeats))]
    data = model(*nodes, initializers=tuple(ints(f"r{i}", r) for i, r in enumerate(repeats)))
    if math.prod(repeats) > MAX_FACTOR:
        with pytest.raises(BundleError):
            check_expansion(data, "m")
    else:
        check_expansion(data, "m")


@given(st.integers(0, 2000), st.integers(0, 255))
def test_it_ends_on_damaged_models(at: int, value: int) -> None:
    for original in (BOMBS["in a branch"], BOMBS["sparse"], (MODEL / "model.onnx").read_bytes()):
        data = bytearray(original)
        data[at % len(data)] = value
        try:
            check_expansion(bytes(data), "m")
        except BundleError as error:
            assert error.operation == "check model file"


def test_a_bundle_with_a_bomb_is_refused_on_loading(tmp_path: Path) -> None:
    path = copy_bundle(tmp_path)
    replace_file(path, "model.onnx", BOMBS["constant-of-shape"])
    with pytest.raises(BundleError, match="expands"):
        load_bundle(path)


def hidden_bomb() -> bytes:
    """Looks at the input before it says how large it gets: 2**36 values, 256 GiB."""
    x = helper.make_tensor_value_info("hu", TensorProto.FLOAT, ["n", 1, "r", "c"])
    y = helper.make_tensor_value_info("air", TensorProto.UINT8, ["n", 1, "r", "c"])
    nodes = [
        helper.make_node("Shape", ["hu"], ["shape"]),
        helper.make_node("Mul", ["shape", "many"], ["large"]),
        helper.make_node("Expand", ["one", "large"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["hu"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "sum"], ["g"]),
        helper.make_node("Cast", ["g"], ["air"], to=TensorProto.UINT8),
    ]
    one = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one")
    graph = helper.make_graph(nodes, "g", [x], [y], [ints("many", 1, 1, 4096, 64), one])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def test_a_hidden_bomb_dies_alone_and_is_named(tmp_path: Path) -> None:
    path = copy_bundle(tmp_path)
    replace_file(path, "model.onnx", hidden_bomb())
    load_bundle(path)  # nothing in the file says so
    with pytest.raises(BundleError, match=r"needs more than 2048 MiB|ended with code"):
        verify_apart(path, "onnxruntime-cpu", **LIMIT)


def test_verification_apart_tells_what_is_wrong(tmp_path: Path) -> None:
    assert verify_apart(MODEL, "onnxruntime-cpu", **LIMIT).startswith("onnxruntime-cpu ")
    path = copy_bundle(tmp_path)
    edit_manifest(path, lambda m: m["golden"][0]["measurements"].update({"left_lung.volume_ml": 1.0}))
    with pytest.raises(EngineError, match=r"GOLDEN_MISMATCH: .*left_lung\.volume_ml") as caught:
        verify_apart(path, "onnxruntime-cpu", **LIMIT)
    assert caught.value.code == "GOLDEN_MISMATCH"
    with pytest.raises(BundleError, match="takes more than"):
        verify_apart(MODEL, "onnxruntime-cpu", **HERE, memory_mb=2048, seconds=0.05)
