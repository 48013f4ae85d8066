"""Build models/ct-lung-unet/1.0.0 from trained weights: ONNX graphs, golden cases, manifest. Same weights, same bytes.

Needs the developer package ``onnx``. Usage: ``python scripts/build_ct_lung_unet.py [FOLDER]
[--weights FILE]``. Without ``--weights`` (what ``train_ct_lung_unet.py`` wrote) the weights are
taken out of the model that ships. The model card is written by hand and only digested here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dicomnode.demo.phantom import thorax  # noqa: E402
from dicomnode.identity import derived_uid  # noqa: E402
from scripts.build_ct_lung import manifest_base as ct_lung  # noqa: E402
from scripts.build_ct_lung import npy  # noqa: E402
from scripts.lungnet import graph  # noqa: E402

NAME, VERSION = "ct-lung-unet", "1.0.0"
FOLDER = ROOT / "models" / NAME / VERSION
MODEL, HALF = "model.onnx", "fp16mixed.onnx"

Affine = npt.NDArray[np.float64]


def manifest_base() -> dict[str, Any]:
    """Everything but golden cases and digests."""
    base = ct_lung()
    return {
        "schema_version": 2,
        "identity": {
            "name": NAME,
            "version": VERSION,
            "manufacturer": "dicomnode project",
            "device_uid": derived_uid("model", NAME, VERSION),
            "description": "Left and right lung in chest CT by a compact 2.5-D U-Net trained on procedural phantoms; "
            "volume, mean density and share below -950 HU",
        },
        "licence": "Apache-2.0",
        "intended_use": "Example of a learned model for running and testing this node. Not a medical device; "
        "not for diagnosis or treatment.",
        "purpose": "clinical",
        "input": base["input"],
        "preprocess": [
            {"step": "orient", "axes": "SPL"},
            {"step": "resample", "spacing_mm": [3.0, 2.5, 2.5]},
            {"step": "window", "center": -600.0, "width": 1600.0, "out_low": 0.0, "out_high": 1.0},
            {"step": "pad", "multiple": [1, 16, 16], "value": 0.25},
        ],
        "engine": {
            "model": MODEL,
            "input": graph.INPUT,
            "outputs": [graph.OUTPUT],
            "reach": {"kind": "neighbours", "channels": 3, "axis": 0, "batch": 8},
        },
        "decision": {"step": "argmax", "output": graph.OUTPUT, "labels": [0, 1, 2]},
        "postprocess": [
            {"step": "largest_components", "keep": 1},
            {"step": "fill_holes", "mode": "in_plane"},
        ],
        "outputs": base["outputs"],
    }


def golden_inputs() -> dict[str, tuple[npt.NDArray[np.int16], Affine]]:
    """Name -> (HU, affine): head first, feet first with the extremes of the value range, and thin slices of a part."""
    first = thorax(slices=40, rows=60, columns=72, pixel_spacing=5.0, slice_spacing=8.0, seed=7)
    second = thorax(slices=32, rows=56, columns=68, pixel_spacing=5.2, slice_spacing=10.0, seed=8)
    part = thorax(slices=24, rows=60, columns=72, pixel_spacing=5.0, slice_spacing=2.0, seed=9)
    extreme = second.hu[::-1].copy()
    extreme[:, :3] = -3024
    extreme[10:14, 50:52, 30:36] = 32767
    return {
        "head-first": (first.hu, _affine(first.spacing)),
        "extreme": (extreme, _affine((-10.0, 5.2, 5.2))),
        "part": (part.hu, _affine(part.spacing)),
    }


def _affine(steps: tuple[float, float, float]) -> Affine:
    """Index to LPS mm of a stack whose slices, rows and columns grow by ``steps`` along z, y and x."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *steps, 1.0
    return affine


def build(folder: Path, weights: graph.Weights) -> None:
    """Write both graphs, golden cases and manifest; expected values come from the CPU engine in FP32."""
    from dicomnode.infer.ort import OnnxRuntimeCpu
    from dicomnode.infer.stages.golden import case_volume, measured, statistics
    from dicomnode.infer.stages.manifest import StagedManifest
    from dicomnode.infer.stages.run import run_staged

    (folder / "golden").mkdir(parents=True, exist_ok=True)
    card = FOLDER / "MODEL_CARD.md"
    if folder != FOLDER:
        shutil.copyfile(card, folder / card.name)
    contents = {MODEL: graph.build(weights), HALF: graph.build(weights, half=True), card.name: card.read_bytes()}
    manifest = manifest_base()
    manifest["golden"] = []
    for name, (hu, affine) in golden_inputs().items():
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
    session = OnnxRuntimeCpu().load(contents[MODEL], threads=1)
    names = [*contents, *(case["labels"] for case in manifest["golden"])]
    draft = StagedManifest.model_validate({**manifest, "files": dict.fromkeys(names, "0" * 64)})
    for case, entry in zip(draft.golden, manifest["golden"], strict=True):
        seen: list[Any] = []
        volume = case_volume(case, contents.__getitem__)
        analysis = run_staged(
            draft, session, volume, inspect=lambda answers, seen=seen: seen.append(statistics(answers))
        )
        if len(analysis.segments) != 2 or analysis.labels is None:
            raise SystemExit(f"golden case {case.name}: expected two lungs, notes {analysis.notes}")
        entry["measurements"] = {key: round(value, 6) for key, value in measured(draft, analysis).items()}
        entry["statistics"] = {
            output: [[float(f"{mean:.6g}"), float(f"{std:.6g}")] for mean, std in channels]
            for output, channels in seen[0].items()
        }
        contents[entry["labels"]] = npy(analysis.labels)
        print(case.name, entry["measurements"], analysis.notes)
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
    for name, data in contents.items():
        if name != card.name:
            (folder / name).write_bytes(data)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def weights_from(path: Path | None) -> graph.Weights:
    """Of a training (.npz), or of the model that ships."""
    if path is None:
        return graph.weights_of((FOLDER / MODEL).read_bytes())
    with np.load(path) as held:
        return {name: held[name].astype(np.float32) for name in held.files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the ct-lung-unet bundle; the same weights give the same bytes.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="where to write it")
    parser.add_argument("--weights", type=Path, help="weights.npz of train_ct_lung_unet.py")
    given = parser.parse_args()
    build(given.folder, weights_from(given.weights))
