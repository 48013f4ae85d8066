"""Networks for benchmarks only, with seeded random weights: ``bench-unet3d`` and ``bench-densenet121``.

They have the shape and cost of networks that are in use, and no meaning. Their bundles say
``purpose = "benchmark"``, so that a node refuses them for studies. ``half`` graphs compute in
float16 but for normalisation and what follows the last convolution.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.identity import derived_uid

VERSION = "1.0.0"
UNET3D, DENSENET = "bench-unet3d", "bench-densenet121"
PATCH = 64
SIDE = 224

Array = npt.NDArray[Any]


class Net:
    """Collects nodes and weights; every method returns the name of its output."""

    def __init__(self, seed: int, *, half: bool) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.half = half
        self._rng = np.random.default_rng(seed)

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, values: Array, *, narrow: bool) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        kind = np.float16 if narrow and self.half else np.float32
        self.weights.append(numpy_helper.from_array(values.astype(kind), name))
        return name

    def cast(self, source: str, *, narrow: bool) -> str:
        from onnx import TensorProto

        if not self.half:
            return source
        return self.node("Cast", [source], to=TensorProto.FLOAT16 if narrow else TensorProto.FLOAT)

    def conv(self, source: str, inward: int, outward: int, kernel: tuple[int, ...], **attributes: Any) -> str:
        """He initialisation; padding keeps the size where the stride is 1."""
        fan = inward * int(np.prod(kernel))
        weight = self._rng.normal(size=(outward, inward, *kernel)) * np.sqrt(2 / fan)
        pads = [k // 2 for k in kernel] * 2
        return self.node("Conv", [source, self.weight(weight, narrow=True)], pads=pads, **attributes)

    def widen(self, source: str, inward: int, outward: int) -> str:
        """Transposed convolution of stride 2 in 3-D."""
        weight = self._rng.normal(size=(inward, outward, 2, 2, 2)) * np.sqrt(2 / inward)
        return self.node("ConvTranspose", [source, self.weight(weight, narrow=True)], strides=[2, 2, 2])

    def instance_norm(self, source: str, channels: int) -> str:
        scale, bias = (self.weight(v, narrow=False) for v in (np.ones(channels), np.zeros(channels)))
        wide = self.node("InstanceNormalization", [self.cast(source, narrow=False), scale, bias], epsilon=1e-5)
        return self.cast(wide, narrow=True)

    def batch_norm(self, source: str, channels: int) -> str:
        values = (
            self._rng.uniform(0.8, 1.2, channels),
            self._rng.normal(0, 0.1, channels),
            self._rng.normal(0, 0.1, channels),
            self._rng.uniform(0.8, 1.2, channels),
        )
        names = [self.weight(v, narrow=False) for v in values]
        wide = self.node("BatchNormalization", [self.cast(source, narrow=False), *names], epsilon=1e-5)
        return self.cast(wide, narrow=True)

    def dense(self, source: str, inward: int, outward: int) -> str:
        weight = self._rng.normal(size=(outward, inward)) / np.sqrt(inward)
        return self.node(
            "Gemm",
            [source, self.weight(weight, narrow=False), self.weight(np.zeros(outward), narrow=False)],
            transB=1,
        )

    def onnx(self, name: str, shape: Sequence[Any], answer: str, answer_shape: Sequence[Any]) -> bytes:
        """input ``x``, output ``y``, both float32."""
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [answer], ["y"], name="y"))
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(answer_shape))],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="dicomnode")
        return bytes(model.SerializeToString(deterministic=True))


def unet3d(channels: Sequence[int] = (16, 32, 64, 128), *, half: bool = False) -> bytes:
    """x (n, 1, a, b, c), sides multiples of 8 -> y (n, 2, a, b, c): a 3-D U-Net (Çiçek 2016, with nnU-Net's norms)."""
    net = Net(31, half=half)

    def block(source: str, inward: int, outward: int) -> str:
        for width in (inward, outward):
            made = net.conv(source, width, outward, (3, 3, 3))
            source = net.node("LeakyRelu", [net.instance_norm(made, outward)], alpha=0.01)
        return source

    value = net.cast("x", narrow=True)
    skips: list[str] = []
    inward = 1
    for level, outward in enumerate(channels):
        if level:
            value = net.node("MaxPool", [value], kernel_shape=[2, 2, 2], strides=[2, 2, 2])
        value = block(value, inward, outward)
        skips.append(value)
        inward = outward
    skips.pop()
    for outward in list(channels[:-1])[::-1]:
        joined = net.node("Concat", [skips.pop(), net.widen(value, inward, outward)], axis=1)
        value = block(joined, 2 * outward, outward)
        inward = outward
    value = net.cast(net.conv(value, inward, 2, (1, 1, 1)), narrow=False)
    return net.onnx(UNET3D, ["n", 1, "a", "b", "c"], value, ["n", 2, "a", "b", "c"])


def densenet(
    blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32, classes: int = 14, *, half: bool = False
) -> bytes:
    """x (n, 3, rows, columns) -> y (n, classes): DenseNet-121 (Huang 2017) for three slices as channels."""
    net = Net(37, half=half)
    width = 2 * growth
    value = net.conv(net.cast("x", narrow=True), 3, width, (7, 7), strides=[2, 2])
    value = net.node("Relu", [net.batch_norm(value, width)])
    value = net.node("MaxPool", [value], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for number, layers in enumerate(blocks):
        for _ in range(layers):
            part = net.node("Relu", [net.batch_norm(value, width)])
            part = net.conv(part, width, 4 * growth, (1, 1))
            part = net.node("Relu", [net.batch_norm(part, 4 * growth)])
            part = net.conv(part, 4 * growth, growth, (3, 3))
            value = net.node("Concat", [value, part], axis=1)
            width += growth
        if number < len(blocks) - 1:
            part = net.node("Relu", [net.batch_norm(value, width)])
            value = net.conv(part, width, width // 2, (1, 1))
            width //= 2
            value = net.node("AveragePool", [value], kernel_shape=[2, 2], strides=[2, 2])
    value = net.cast(net.node("Relu", [net.batch_norm(value, width)]), narrow=False)
    value = net.node("Flatten", [net.node("GlobalAveragePool", [value])])
    return net.onnx(DENSENET, ["n", 3, "rows", "columns"], net.dense(value, width, classes), ["n", classes])


def write_bundles(folder: Path, *, small: bool = False) -> dict[str, Path]:
    """Both bundles under ``folder``/<name>/1.0.0; by name. Their golden cases come from the CPU engine.

    ``small``: networks of a few weights, for tests of what is done with such a bundle.
    """
    channels, side = ((2, 4), 16) if small else ((16, 32, 64, 128), PATCH)
    blocks, growth = ((1, 1), 4) if small else ((6, 12, 24, 16), 32)
    patches = {"kind": "patches", "size": [side] * 3, "overlap": 0.25, "batch": 1}
    unet_parts = {
        "preprocess": [
            {"step": "orient", "axes": "SPL"},
            {"step": "window", "center": 40.0, "width": 400.0, "out_low": -1.0, "out_high": 1.0},
        ],
        "engine": {"model": "model.onnx", "input": "x", "outputs": ["y"], "reach": patches},
        "activations": [{"step": "softmax", "output": "y"}],
        "decision": {"step": "argmax", "output": "y"},
        "outputs": {"segments": [_segment()]},
    }
    slices = {"kind": "neighbours", "channels": 3, "axis": 0, "batch": 8}
    dense_parts = {
        "preprocess": [
            {"step": "orient", "axes": "SPL"},
            {"step": "resize", "size": [None, 32, 32] if small else [None, SIDE, SIDE]},
            {"step": "window", "center": -600.0, "width": 1600.0, "out_low": 0.0, "out_high": 1.0},
        ],
        "engine": {"model": "model.onnx", "input": "x", "scores": ["y"], "reach": slices},
        "outputs": {"findings": [_finding(i) for i in range(2)]},
    }
    return {
        UNET3D: _write(folder, UNET3D, unet_parts, lambda half: unet3d(channels, half=half)),
        DENSENET: _write(folder, DENSENET, dense_parts, lambda half: densenet(blocks, growth, half=half)),
    }


def _code(value: str, meaning: str) -> dict[str, str]:
    return {"value": value, "scheme": "99DICOMNODE", "meaning": meaning}


def _segment() -> dict[str, Any]:
    kind = _code("BENCH", "Benchmark without meaning")
    return {"number": 1, "key": "one", "label": "One", "category": kind, "type": kind}


def _finding(index: int) -> dict[str, Any]:
    name = _code(f"BENCH{index}", "Benchmark without meaning")
    return {"key": f"class_{index}", "name": name, "output": "y", "index": index, "activation": "softmax"}


def golden_input() -> npt.NDArray[np.int16]:
    """20 x 64 x 64 HU: noise that varies slowly, from air to bone."""
    rng = np.random.default_rng(41)
    coarse = np.kron(rng.normal(0, 300, (5, 8, 8)), np.ones((4, 8, 8)))
    return np.clip(coarse + rng.normal(0, 60, coarse.shape), -1024, 3071).astype("<i2")


def _npy(values: Array) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _write(folder: Path, name: str, parts: dict[str, Any], graph: Callable[[bool], bytes]) -> Path:
    from dicomnode.infer.ort import OnnxRuntimeCpu
    from dicomnode.infer.stages.golden import case_volume, measured
    from dicomnode.infer.stages.manifest import StagedManifest
    from dicomnode.infer.stages.run import run_staged

    target = folder / name / VERSION
    (target / "golden").mkdir(parents=True, exist_ok=True)
    case: dict[str, Any] = {
        "name": "noise",
        "input": "golden/noise.input.npy",
        "affine": [[0, 0, 2.0, 0], [0, 2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1.0]],
    }
    contents = {
        "model.onnx": graph(False),
        "fp16mixed.onnx": graph(True),
        "MODEL_CARD.md": b"# For benchmarks only\n\nSeeded random weights. It finds nothing.\n",
        case["input"]: _npy(golden_input()),
    }
    segments = "segments" in parts["outputs"]
    if segments:
        case["labels"] = "golden/noise.labels.npy"
    else:
        case["findings"] = {f["key"]: 0.0 for f in parts["outputs"]["findings"]}
    manifest = {
        "schema_version": 2,
        "identity": {
            "name": name,
            "version": VERSION,
            "manufacturer": "dicomnode project",
            "device_uid": derived_uid("model", name, VERSION),
            "description": "Seeded random weights, for benchmarks only",
        },
        "licence": "Apache-2.0",
        "intended_use": "Benchmarks only: its weights are random.",
        "purpose": "benchmark",
        "input": {
            "modality": "CT",
            "sop_classes": ["1.2.840.10008.5.1.4.1.1.2"],
            "min_slices": 2,
            "slice_spacing_mm": [0.1, 20.0],
            "pixel_spacing_mm": [0.1, 20.0],
            "hounsfield": True,
        },
        **parts,
        "golden": [case],
        "files": dict.fromkeys([*contents, *([case["labels"]] if segments else [])], "0" * 64),
    }
    draft = StagedManifest.model_validate(manifest)
    session = OnnxRuntimeCpu().load(contents["model.onnx"])
    analysis = run_staged(draft, session, case_volume(draft.golden[0], contents.__getitem__))
    session.close()
    if segments:
        assert analysis.labels is not None
        contents[case["labels"]] = _npy(analysis.labels)
        case["measurements"] = measured(draft, analysis)
        case["max_disagreement"] = 0.01  # random weights decide by a hair
        case["min_dice"] = 0.99
    else:
        case["findings"] = {f.key: f.probability for f in analysis.findings}
    manifest["files"] = {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()}
    for file, data in contents.items():
        (target / file).write_bytes(data)
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return target
