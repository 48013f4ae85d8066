"""A small U-Net with seeded random weights, for engines: convolutions, pooling, upsampling, skip, softmax."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def unet(channels: int = 16) -> bytes:
    """x float32 (n, 1, rows, columns), sides multiples of 2 -> p float32 (n, 2, rows, columns), sums to 1."""
    rng = np.random.default_rng(7)
    nodes, weights = [], []

    def conv(name: str, source: str, inward: int, outward: int, size: int = 3) -> str:
        kernel = (rng.normal(size=(outward, inward, size, size)) / np.sqrt(inward * size * size)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.w"))
        weights.append(numpy_helper.from_array(rng.normal(size=outward).astype(np.float32) * 0.1, f"{name}.b"))
        pads = [size // 2] * 4
        nodes.append(helper.make_node("Conv", [source, f"{name}.w", f"{name}.b"], [name], pads=pads))
        return name

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}.r"]))
        return f"{source}.r"

    top = relu(conv("c1", "x", 1, channels))
    nodes.append(helper.make_node("MaxPool", [top], ["down"], kernel_shape=[2, 2], strides=[2, 2]))
    low = relu(conv("c2", "down", channels, channels * 2))
    weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    nodes.append(helper.make_node("Resize", [low, "", "scales"], ["up"], mode="nearest"))
    nodes.append(helper.make_node("Concat", [top, "up"], ["joined"], axis=1))
    last = conv("c4", relu(conv("c3", "joined", channels * 3, channels)), channels, 2, 1)
    nodes.append(helper.make_node("Softmax", [last], ["p"], axis=1))
    graph = helper.make_graph(
        nodes,
        "unet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, "rows", "columns"])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 2, "rows", "columns"])],
        weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return model.SerializeToString()
