"""An ONNX graph run operator by operator in eager PyTorch, as the reference of what training code gives.

Only the operators of the networks that are measured; needs ``onnx`` and ``torch``, which is no
dependency of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from dicomnode.infer.engine import Array

Op = Callable[[list[Any], dict[str, Any]], Any]


class EagerTorch:
    """Weights on ``device``; ``run`` copies in, computes, and copies out, as an engine of the node does."""

    def __init__(self, onnx: bytes, device: str) -> None:
        from onnx import ModelProto, helper, numpy_helper

        torch: Any = import_module("torch")
        graph = ModelProto.FromString(onnx).graph
        self._torch = torch
        self._device = device
        self._weights = {
            t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))).to(device) for t in graph.initializer
        }
        self._nodes = [
            (n.op_type, list(n.input), n.output[0], {a.name: helper.get_attribute_value(a) for a in n.attribute})
            for n in graph.node
        ]
        self._outputs = [o.name for o in graph.output]
        self._ops = operators(torch)
        unknown = {kind for kind, *_ in self._nodes} - self._ops.keys()
        if unknown:
            raise ValueError(f"no eager operator for {', '.join(sorted(unknown))}")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        torch = self._torch
        with torch.inference_mode():
            values: dict[str, Any] = {k: torch.from_numpy(v).to(self._device) for k, v in inputs.items()}
            values.update(self._weights)
            values[""] = None
            for kind, names, output, attributes in self._nodes:
                values[output] = self._ops[kind]([values[n] for n in names], attributes)
            return {name: values[name].cpu().numpy() for name in self._outputs}

    def memory(self) -> int:
        """Most bytes that PyTorch held on the device; 0 on a CPU."""
        return int(self._torch.cuda.max_memory_allocated()) if self._device.startswith("cuda") else 0


def operators(torch: Any) -> dict[str, Op]:
    """ONNX operator -> what it is in PyTorch, for the attributes that these networks use."""
    nn = torch.nn.functional

    def pads(given: dict[str, Any], rank: int) -> list[int]:
        found = list(given.get("pads", [0] * 2 * rank))
        if found[:rank] != found[rank:]:
            raise ValueError("padding differs between the two ends of an axis")
        return found[:rank]

    def rank(x: Any) -> int:
        return int(x.dim()) - 2

    def conv(x: list[Any], a: dict[str, Any]) -> Any:
        n = rank(x[0])
        call = (nn.conv1d, nn.conv2d, nn.conv3d)[n - 1]
        return call(x[0], x[1], x[2] if len(x) > 2 else None, stride=a.get("strides", [1] * n), padding=pads(a, n))

    def transposed(x: list[Any], a: dict[str, Any]) -> Any:
        return nn.conv_transpose3d(x[0], x[1], stride=a["strides"])

    def max_pool(x: list[Any], a: dict[str, Any]) -> Any:
        n = rank(x[0])
        call = (nn.max_pool1d, nn.max_pool2d, nn.max_pool3d)[n - 1]
        return call(x[0], a["kernel_shape"], a["strides"], pads(a, n))

    def cast(x: list[Any], a: dict[str, Any]) -> Any:
        return x[0].to({1: torch.float32, 10: torch.float16, 2: torch.uint8}[a["to"]])

    def gemm(x: list[Any], a: dict[str, Any]) -> Any:
        return nn.linear(x[0], x[1] if a.get("transB") else x[1].T, x[2])

    return {
        "Conv": conv,
        "ConvTranspose": transposed,
        "MaxPool": max_pool,
        "AveragePool": lambda x, a: nn.avg_pool2d(x[0], a["kernel_shape"], a["strides"]),
        "GlobalAveragePool": lambda x, a: x[0].mean(dim=tuple(range(2, x[0].dim())), keepdim=True),
        "Relu": lambda x, a: torch.relu(x[0]),
        "LeakyRelu": lambda x, a: nn.leaky_relu(x[0], a["alpha"]),
        "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
        "Resize": lambda x, a: nn.interpolate(x[0], scale_factor=[float(s) for s in x[2][2:]], mode="nearest"),
        "InstanceNormalization": lambda x, a: nn.instance_norm(x[0], weight=x[1], bias=x[2], eps=a["epsilon"]),
        "BatchNormalization": lambda x, a: nn.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a["epsilon"]),
        "Flatten": lambda x, a: x[0].flatten(a.get("axis", 1)),
        "Gemm": gemm,
        "Cast": cast,
        "Identity": lambda x, a: x[0],
    }
