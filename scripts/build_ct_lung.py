"""Build models/ct-lung/1.0.0: ONNX graph, golden cases, manifest. Same source, same bytes.

Needs the developer package ``onnx``. Usage: ``python scripts/build_ct_lung.py [FOLDER]``.
The model card is written by hand and only digested here.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dicomnode.identity import derived_uid  # noqa: E402

NAME, VERSION = "ct-lung", "1.0.0"
FOLDER = ROOT / "models" / NAME / VERSION
THRESHOLD_HU = -500.0


def build_onnx() -> bytes:
    """hu float32 (slices, 1, rows, columns) -> air uint8 of the same shape, 1 where air or lung.

    Smoothing with the binomial kernel [1 2 1] x [1 2 1] / 16 in-plane (edge values repeated),
    then ``smoothed < -500 HU``. The weights are powers of two and HU are integers, so every
    sum is exact in float32 and no engine, thread count or order of additions changes a voxel.
    """
    from onnx import TensorProto, helper, numpy_helper

    kernel = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32).reshape(1, 1, 3, 3) / 16
    shape = ["slices", 1, "rows", "columns"]
    graph = helper.make_graph(
        [
            helper.make_node("Pad", ["hu", "pads"], ["padded"], mode="edge"),
            helper.make_node("Conv", ["padded", "kernel"], ["smooth"], kernel_shape=[3, 3]),
            helper.make_node("Less", ["smooth", "threshold"], ["below"]),
            helper.make_node("Cast", ["below"], ["air"], to=TensorProto.UINT8),
        ],
        NAME,
        [helper.make_tensor_value_info("hu", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("air", TensorProto.UINT8, shape)],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "pads"),
            numpy_helper.from_array(np.array(THRESHOLD_HU, np.float32), "threshold"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="dicomnode"
    )
    return bytes(model.SerializeToString(deterministic=True))


def ellipsoid(
    grid: tuple[npt.NDArray[Any], ...], centre: tuple[float, ...], radii: tuple[float, ...]
) -> npt.NDArray[np.bool_]:
    """Voxels whose centre lies in the ellipsoid; coordinates in mm."""
    total = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True))
    return np.asarray(total <= 1.0)


def phantom(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    lung_hu: tuple[int, int] = (-850, -800),
    bridge: bool = False,
    extreme: bool = False,
    emphysema: bool = True,
) -> npt.NDArray[np.int16]:
    """Chest phantom (slices foot to head, rows front to back, columns right to left of the patient).

    An elliptic body of water (0 HU) on a table, two ellipsoid lungs (``lung_hu`` right,
    left) 30 mm apart, a trachea of -1000 HU, a stomach bubble right under the left lung,
    vessels, and in the left lung a bulla of -990 HU. ``bridge`` joins the lungs in front by
    a thin sheet, as at the anterior junction.
    ``extreme`` adds metal (the largest int16) and padding of -3024 HU.
    """
    z, y, x = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)), indexing="ij"
    )
    hu = np.full(shape, -1000, np.int16)
    hu[((x / 145) ** 2 + (y / 100) ** 2) <= 1] = 0
    hu[(np.abs(y - 125) < 8) & (np.abs(x) < 130)] = -300
    rx, height = 45.0, (shape[0] - 1) / 2 * spacing[0] * 0.85
    off = rx + 15
    right = ellipsoid((z, y, x), (0, 0, -off), (height, 70, rx))
    left = ellipsoid((z, y, x), (0, 0, off), (height, 70, rx))
    hu[right], hu[left] = lung_hu
    if emphysema:
        hu[ellipsoid((z, y, x), (height * 0.3, -10, off), (25, 20, 15))] = -990
    for k in (-1, 1):
        hu[((x - k * off - 5) ** 2 + (y - 15) ** 2 <= 36) & (np.abs(z) < height * 0.7)] = 40
    trachea = (x**2 + (y - 40) ** 2 <= 9.5**2) & (z > -0.1 * height)
    walls = (x**2 + (y - 40) ** 2 <= 13**2) & (z > -0.1 * height)
    hu[walls] = 20
    hu[trachea] = -1000
    hu[ellipsoid((z, y, x), (-height * 1.05, -30, 45), (20, 25, 30)) & (hu == 0)] = -1000
    if bridge:
        hu[(np.abs(x) < 20) & (np.abs(y + 35) < 6) & (np.abs(z) < height * 0.4)] = -800
    if extreme:
        hu[(x**2 + y**2) > (0.5 * shape[1] * spacing[1]) ** 2] = -3024
        hu[ellipsoid((z, y, x), (0, 85, 0), (40, 8, 8))] = 32767
    return hu


def npy(array: npt.NDArray[Any]) -> bytes:
    """Bytes of a .npy file, format version 1.0, little-endian."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def code(value: str, scheme: str, meaning: str) -> dict[str, str]:
    return {"value": value, "scheme": scheme, "meaning": meaning}


def segment(number: int, key: str, label: str, type_code: dict[str, str], rgb: list[int]) -> dict[str, Any]:
    return {
        "number": number,
        "key": key,
        "label": label,
        "category": code("91723000", "SCT", "Anatomical Structure"),
        "type": type_code,
        "rgb": rgb,
    }


def manifest_base() -> dict[str, Any]:
    """Everything but golden cases and digests."""
    hounsfield = code("[hnsf'U]", "UCUM", "Hounsfield unit")
    return {
        "schema_version": 1,
        "identity": {
            "name": NAME,
            "version": VERSION,
            "manufacturer": "dicomnode project",
            "device_uid": derived_uid("model", NAME, VERSION),
            "description": "Left and right lung in chest CT by density threshold and morphology; "
            "volume, mean density and share below -950 HU",
        },
        "licence": "Apache-2.0",
        "intended_use": "Reference method for running and testing this node. Not a medical device; "
        "not for diagnosis or treatment.",
        "input": {
            "modality": "CT",
            "sop_classes": ["1.2.840.10008.5.1.4.1.1.2"],
            "orientation": "axial",
            "max_tilt_degrees": 30.0,
            "min_slices": 20,
            "max_slices": 3000,
            "max_voxels": 1 << 30,
            "slice_spacing_mm": [0.3, 10.0],
            "pixel_spacing_mm": [0.3, 2.0],
            "hounsfield": True,
        },
        "preprocess": [
            {"step": "clip", "low": -1024, "high": 3071},
            {"step": "cast", "dtype": "float32"},
        ],
        "engine": {"model": "model.onnx", "input": "hu", "outputs": ["air"], "slab_slices": 16},
        "postprocess": [
            {"step": "from_output", "output": "air", "threshold": 0.5},
            {"step": "inside_body", "grid_mm": 3.0},
            {"step": "remove_airways", "wall_mm": 2.5, "max_tree_ml": 90.0, "grid_mm": 1.4},
            {
                "step": "remove_gas",
                "edge_hu": -930.0,
                "median_hu": -955.0,
                "min_ml": 3.0,
                "max_ml": 1000.0,
                "lung_share": 0.35,
            },
            {"step": "two_lungs", "min_ml": 100.0, "min_ratio": 0.1, "gas_hu": -950.0, "both_sides": 0.2},
            {"step": "close_and_fill", "radius_mm": 5.0, "max_hole_mm2": 300.0},
            {"step": "name_sides", "left": 2, "right": 1},
            {"step": "note_coverage", "min_mm2": 100.0},
        ],
        "outputs": {
            "segments": [
                segment(1, "right_lung", "Right lung", code("3341006", "SCT", "Right lung"), [128, 174, 128]),
                segment(2, "left_lung", "Left lung", code("44029006", "SCT", "Left lung"), [172, 138, 115]),
            ],
            "measurements": [
                {
                    "key": "volume_ml",
                    "compute": {"kind": "volume_ml"},
                    "name": code("118565006", "SCT", "Volume"),
                    "unit": code("ml", "UCUM", "milliliter"),
                },
                {
                    "key": "mean_hu",
                    "compute": {"kind": "mean"},
                    "name": code("112031", "DCM", "Attenuation Coefficient"),
                    "unit": hounsfield,
                    "derivation": code("373098007", "SCT", "Mean"),
                },
                {
                    "key": "percent_below_950",
                    "compute": {"kind": "percent_below", "threshold": -950.0},
                    "name": code("LAA950", "99DICOMNODE", "Share of voxels below -950 HU"),
                    "unit": code("%", "UCUM", "Percent"),
                },
            ],
        },
    }


def golden_inputs() -> dict[str, tuple[npt.NDArray[np.int16], tuple[float, float, float]]]:
    """Name -> (HU, spacing): lungs apart, lungs that touch, and the extremes of the value range."""
    usual = (10.0, 5.0, 5.0)
    return {
        "apart": (phantom((24, 64, 64), usual), usual),
        "touching": (phantom((24, 64, 64), usual, bridge=True), usual),
        "extreme": (phantom((12, 56, 64), (20.0, 5.0, 5.0), extreme=True), (20.0, 5.0, 5.0)),
    }


def build(folder: Path) -> None:
    """Write model, golden cases and manifest; expected values come from the CPU engine."""
    from dicomnode.infer.bundle import Bundle
    from dicomnode.infer.manifest import Manifest
    from dicomnode.infer.ort import OnnxRuntimeCpu
    from dicomnode.infer.pipeline import run_bundle
    from dicomnode.infer.volume import Volume

    (folder / "golden").mkdir(parents=True, exist_ok=True)
    card = FOLDER / "MODEL_CARD.md"
    if folder != FOLDER:
        shutil.copyfile(card, folder / card.name)
    contents: dict[str, bytes] = {"model.onnx": build_onnx(), card.name: card.read_bytes()}
    manifest = manifest_base()
    manifest["golden"] = []
    affines: dict[str, npt.NDArray[np.float64]] = {}
    for name, (hu, spacing) in golden_inputs().items():
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1.0
        affines[name] = affine
        contents[f"golden/{name}.input.npy"] = npy(hu.astype("<i2"))
        manifest["golden"].append(
            {
                "name": name,
                "input": f"golden/{name}.input.npy",
                "labels": f"golden/{name}.labels.npy",
                "affine": affine.tolist(),
                "measurements": {},
            }
        )
    session = OnnxRuntimeCpu().load(contents["model.onnx"], threads=1)
    draft = {**manifest, "files": {n: "0" * 64 for n in [*contents, *(c["labels"] for c in manifest["golden"])]}}
    bundle = Bundle(folder, Manifest.model_validate(draft), "")
    for case in manifest["golden"]:
        hu, spacing = golden_inputs()[case["name"]]
        uids = tuple(str(i) for i in range(len(hu)))
        analysis = run_bundle(bundle, session, Volume(hu, affines[case["name"]], spacing, uids))
        if len(analysis.segments) != 2 or analysis.labels is None:
            raise SystemExit(f"golden case {case['name']}: expected two lungs, notes {analysis.notes}")
        keys = {1: "right_lung", 2: "left_lung"}
        case["measurements"] = {f"{keys[m.segment or 0]}.{m.key}": round(m.value, 6) for m in analysis.measurements}
        contents[case["labels"]] = npy(analysis.labels)
        print(case["name"], case["measurements"], analysis.notes)
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
    for name, data in contents.items():
        if name != card.name:
            (folder / name).write_bytes(data)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the ct-lung bundle; the same bytes each time.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="where to write it")
    build(parser.parse_args().folder)
