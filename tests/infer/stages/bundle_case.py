"""A bundle of schema 2 on disk with small ONNX graphs of known behaviour."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

CODE = {"value": "T-1", "scheme": "99TEST", "meaning": "Test"}


def onnx_bytes(nodes: list[Any], outputs: list[str], dimensions: int, constants: dict[str, np.ndarray]) -> bytes:
    """A graph on the input ``x`` with free sizes."""
    free = [f"d{i}" for i in range(dimensions)]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, free)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString(deterministic=True))


def two_channels(threshold: float = 0.0, slope: float = 1.0, dimensions: int = 5) -> bytes:
    """Logits y = (0, slope * (x - threshold)): channel 1 wins above the threshold."""
    return onnx_bytes(
        [
            helper.make_node("Sub", ["x", "t"], ["d"]),
            helper.make_node("Mul", ["d", "k"], ["m"]),
            helper.make_node("Mul", ["d", "zero"], ["z"]),
            helper.make_node("Concat", ["z", "m"], ["y"], axis=1),
        ],
        ["y"],
        dimensions,
        {"t": np.float32(threshold), "k": np.float32(slope), "zero": np.float32(0)},
    )


def one_channel(threshold: float = 0.0, slope: float = 1.0, dimensions: int = 5) -> bytes:
    """One logit y = slope * (x - threshold)."""
    return onnx_bytes(
        [helper.make_node("Sub", ["x", "t"], ["d"]), helper.make_node("Mul", ["d", "k"], ["y"])],
        ["y"],
        dimensions,
        {"t": np.float32(threshold), "k": np.float32(slope)},
    )


def mean_score(dimensions: int = 5) -> bytes:
    """Scores s = (mean, -mean) of the whole input."""
    return onnx_bytes(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=list(range(1, dimensions)), keepdims=0),
            helper.make_node("Unsqueeze", ["m", "one"], ["u"]),
            helper.make_node("Neg", ["u"], ["n"]),
            helper.make_node("Concat", ["u", "n"], ["s"], axis=1),
        ],
        ["s"],
        dimensions,
        {"one": np.array([1], np.int64)},
    )


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def segment(number: int, key: str) -> dict[str, Any]:
    return {"number": number, "key": key, "label": key, "category": CODE, "type": CODE}


def measurement(key: str, **compute: Any) -> dict[str, Any]:
    return {"key": key, "compute": compute, "name": CODE, "unit": {"value": "1", "scheme": "UCUM", "meaning": "one"}}


def manifest(**changes: Any) -> dict[str, Any]:
    """A valid manifest of a segmentation in 3-D; top-level keys may be replaced."""
    base: dict[str, Any] = {
        "schema_version": 2,
        "identity": {
            "name": "staged",
            "version": "1.0.0",
            "manufacturer": "tests",
            "device_uid": "2.25.1",
            "description": "test",
        },
        "licence": "Apache-2.0",
        "intended_use": "tests",
        "input": {
            "modality": "CT",
            "sop_classes": ["1.2.840.10008.5.1.4.1.1.2"],
            "min_slices": 2,
            "slice_spacing_mm": [0.1, 20],
            "pixel_spacing_mm": [0.1, 20],
            "hounsfield": True,
        },
        "preprocess": [
            {"step": "orient", "axes": "RAS"},
            {"step": "resample", "spacing_mm": [2.0, 2.0, 2.0]},
            {"step": "scale_range", "low": -1000, "high": 1000, "out_low": -1, "out_high": 1},
        ],
        "engine": {
            "model": "model.onnx",
            "input": "x",
            "outputs": ["y"],
            "reach": {"kind": "patches", "size": [16, 16, 16], "overlap": 0.25},
        },
        "activations": [{"step": "softmax", "output": "y"}],
        "decision": {"step": "argmax", "output": "y"},
        "postprocess": [{"step": "largest_components"}],
        "outputs": {
            "segments": [segment(1, "lesion")],
            "measurements": [
                measurement("volume_ml", kind="volume_ml"),
                measurement("mean_hu", kind="mean"),
                measurement("feret_mm", kind="feret_mm"),
                measurement("diameter_mm", kind="diameter_in_plane_mm"),
            ],
        },
        "golden": [],
        "files": {},
    }
    return {**base, **changes}


def golden(name: str = "one", **more: Any) -> dict[str, Any]:
    affine = [[0.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    return {"name": name, "input": f"golden/{name}.npy", "affine": affine, **more}


def write(folder: Path, data: dict[str, Any], files: dict[str, bytes]) -> Path:
    """``folder``/name/version with the files and their digests in the manifest."""
    target = folder / data["identity"]["name"] / data["identity"]["version"]
    files = {"MODEL_CARD.md": b"# Test\n", **files}
    for name, content in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    listed = {**data, "files": {n: hashlib.sha256(c).hexdigest() for n, c in files.items()}}
    (target / "manifest.json").write_text(json.dumps(listed))
    return target
