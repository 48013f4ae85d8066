"""The ONNX graph of ct-lung-unet from its folded weights, in single and in half precision; needs ``onnx``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[np.float32]]
INPUT, OUTPUT = "slab", "logits"


def build(weights: Weights, *, half: bool = False) -> bytes:
    """slab float32 (slices, 3, rows, columns), 0..1, sides multiples of 16 -> logits float32 of the same shape.

    Channels: background, right, left. ``half``: weights and convolutions in float16, the last
    convolution in float32. The same weights give the same bytes.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    tensors: list[Any] = []
    narrow = np.float16 if half else np.float32

    def conv(name: str, source: str, *, relu: bool = True, dtype: type = narrow) -> str:
        weight = weights[f"{name}.w"]
        tensors.append(numpy_helper.from_array(weight.astype(dtype), f"{name}.w"))
        tensors.append(numpy_helper.from_array(weights[f"{name}.b"].astype(dtype), f"{name}.b"))
        size = weight.shape[2]
        made = f"{name}.conv" if relu else OUTPUT
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{name}.w", f"{name}.b"],
                [made],
                name=name,
                kernel_shape=[size, size],
                pads=[size // 2] * 4,
            )
        )
        if not relu:
            return made
        nodes.append(helper.make_node("Relu", [made], [name], name=f"{name}.relu"))
        return name

    levels = sum(name.startswith("down") and name.endswith(".0.w") for name in weights)
    value = INPUT
    if half:
        nodes.append(helper.make_node("Cast", [INPUT], ["narrow"], name="narrow", to=TensorProto.FLOAT16))
        value = "narrow"
    skips = []
    for level in range(levels):
        if level:
            pooled = f"pool{level}"
            nodes.append(
                helper.make_node("MaxPool", [value], [pooled], name=pooled, kernel_shape=[2, 2], strides=[2, 2])
            )
            value = pooled
        value = conv(f"down{level}.1", conv(f"down{level}.0", value))
        skips.append(value)
    skips.pop()
    tensors.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice"))
    for step in range(levels - 1):
        wide, joined = f"wide{step}", f"joined{step}"
        nodes.append(
            helper.make_node(
                "Resize",
                [value, "", "twice"],
                [wide],
                name=wide,
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        )
        nodes.append(helper.make_node("Concat", [skips.pop(), wide], [joined], name=joined, axis=1))
        value = conv(f"up{step}.1", conv(f"up{step}.0", joined))
    if half:
        nodes.append(helper.make_node("Cast", [value], ["single"], name="single", to=TensorProto.FLOAT))
        value = "single"
    conv("last.0", value, relu=False, dtype=np.float32)
    shape = ["slices", 3, "rows", "columns"]
    graph = helper.make_graph(
        nodes,
        "ct-lung-unet",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape)],
        tensors,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="dicomnode"
    )
    return bytes(model.SerializeToString(deterministic=True))


def weights_of(onnx: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """The folded weights out of a graph that :func:`build` made in single precision."""
    from onnx import ModelProto, numpy_helper

    model = ModelProto.FromString(onnx)
    return {
        tensor.name: np.array(numpy_helper.to_array(tensor), np.float32)
        for tensor in model.graph.initializer
        if tensor.name.endswith((".w", ".b"))
    }
