"""Build models/cxr-quality/1.1.0: ONNX graph, golden cases, manifest. Same source, same bytes.

Needs the developer package ``onnx``. Usage: ``python scripts/build_cxr_quality.py [FOLDER]``.
The model card is written by hand and only digested here.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dicomnode.demo.radiograph import WHITE, Radiograph, radiograph  # noqa: E402
from dicomnode.identity import derived_uid  # noqa: E402
from dicomnode.infer.projections import CONVENTION, projection_affine  # noqa: E402
from scripts.build_ct_lung import code, npy, segment  # noqa: E402

NAME, VERSION = "cxr-quality", "1.1.0"
FOLDER = ROOT / "models" / NAME / VERSION
GRID, NEAR, FAR = 256, 5, 129
PATIENT, AIR = 0.25, 0.3
"""Shares of the mean grey value: above the first lies the patient, for the mean; below the second is air."""

RIGHT, LEFT = 1, 2


def build_onnx() -> bytes:
    """grey float32 (images, 1, rows, columns), 0 black -> darkness of the same shape; fixed filters, no weights.

    How much darker a place (mean of 5 x 5) is than its surroundings (mean of 129 x 129, air left out), as a
    share of the patient's mean grey value; -1 in air. Independent of the scale of the grey values.
    """
    from onnx import TensorProto, helper, numpy_helper

    def pool(source: str, out: str, rows: int, columns: int) -> Any:
        pads = [rows // 2, columns // 2] * 2
        return helper.make_node(
            "AveragePool", [source], [out], kernel_shape=[rows, columns], pads=pads, strides=[1, 1], count_include_pad=0
        )

    make = helper.make_node
    nodes = [
        make("ReduceMean", ["grey"], ["mean"], axes=[2, 3], keepdims=1),
        make("Mul", ["mean", "patient"], ["least"]),
        make("Greater", ["grey", "least"], ["is_patient"]),
        make("Cast", ["is_patient"], ["one_in_patient"], to=TensorProto.FLOAT),
        make("Mul", ["grey", "one_in_patient"], ["of_patient"]),
        make("ReduceMean", ["of_patient"], ["total"], axes=[2, 3], keepdims=1),
        make("ReduceMean", ["one_in_patient"], ["count"], axes=[2, 3], keepdims=1),
        make("Max", ["count", "small"], ["some"]),
        make("Div", ["total", "some"], ["mean_of_patient"]),
        make("Max", ["mean_of_patient", "small"], ["unit"]),
        pool("grey", "near", NEAR, NEAR),
        make("Div", ["near", "unit"], ["place"]),
        make("Greater", ["place", "air"], ["is_body"]),
        make("Cast", ["is_body"], ["body"], to=TensorProto.FLOAT),
        make("Mul", ["place", "body"], ["place_in_body"]),
        pool("place_in_body", "sum_rows", FAR, 1),
        pool("sum_rows", "sum", 1, FAR),
        pool("body", "body_rows", FAR, 1),
        pool("body_rows", "share", 1, FAR),
        make("Max", ["share", "small"], ["least_share"]),
        make("Div", ["sum", "least_share"], ["surroundings"]),
        make("Sub", ["surroundings", "place"], ["darker"]),
        make("Where", ["is_body", "darker", "nothing"], ["darkness"]),
    ]
    shape = ["images", 1, "rows", "columns"]
    constants = {"patient": PATIENT, "air": AIR, "small": 1e-3, "nothing": -1.0}
    graph = helper.make_graph(
        nodes,
        NAME,
        [helper.make_tensor_value_info("grey", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("darkness", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="dicomnode"
    )
    return bytes(model.SerializeToString(deterministic=True))


PERCENT = code("%", "UCUM", "Percent")
NO_UNITS = code("1", "UCUM", "no units")
MEDIAN = code("373099004", "SCT", "Median")


def own(value: str, meaning: str) -> dict[str, str]:
    """A concept that no standard scheme has; see the model card."""
    return code(value, "99DICOMNODE", meaning)


def image_measurements() -> list[dict[str, Any]]:
    def entry(key: str, name: dict[str, str], unit: dict[str, str], kind: str, **parameters: Any) -> dict[str, Any]:
        return {"key": key, "compute": {"kind": kind, **parameters}, "name": name, "unit": unit}

    sides = {"right": RIGHT, "left": LEFT}
    lungs = [RIGHT, LEFT]
    grey = entry(
        "lung_grey", own("CXRLUNGGREY", "Grey value of lung fields, share of grey scale"), PERCENT, "grey_percent",
        percentile=50.0, segments=lungs,
    )  # fmt: skip
    return [
        entry("exposure_index", code("113845", "DCM", "Exposure Index"), NO_UNITS, "stated", attribute="ExposureIndex"),
        entry(
            "target_exposure_index", code("113846", "DCM", "Target Exposure Index"), NO_UNITS, "stated",
            attribute="TargetExposureIndex",
        ),
        entry("deviation_index", code("113847", "DCM", "Deviation Index"), NO_UNITS, "deviation_index"),
        {**grey, "derivation": MEDIAN},
        entry("contrast", own("CXRCONTRAST", "Grey values from 5 to 95 percent of field"), PERCENT, "contrast_percent"),
        entry(
            "clipped_black", own("CXRCLIPBLACK", "Share of lung fields at darkest grey value"), PERCENT,
            "clipped_percent", end="low", segments=lungs,
        ),
        entry(
            "clipped_white", own("CXRCLIPWHITE", "Share of field at brightest grey value"), PERCENT,
            "clipped_percent", end="high",
        ),
        entry("noise", own("CXRNOISE", "Noise, standard deviation, share of grey scale"), PERCENT, "noise_percent"),
        entry("field", own("CXRFIELD", "Share of image within the field"), PERCENT, "field_percent"),
        *(
            entry(
                f"margin_{side}", own(f"CXRMARGIN{side.upper()}", f"Distance of lung fields to border, {side}"),
                PERCENT, "margin_percent", side=side,
            )
            for side in ("head", "feet", "right", "left")
        ),
        entry(
            "midline_offset", own("CXRMIDOFFSET", "Spine and mediastinum off middle of chest, left"), PERCENT,
            "midline_offset_percent", **sides,
        ),
        entry(
            "tilt", own("CXRTILT", "Tilt of chest in image, head to the left"), code("deg", "UCUM", "degree"),
            "tilt_degrees", **sides,
        ),
    ]  # fmt: skip


def image_findings() -> list[dict[str, Any]]:
    return [
        {
            "key": f"{side}_to_front",
            "compute": {"kind": "rotation", "forward": side, "right": RIGHT, "left": LEFT},
            "name": own(f"CXRROT{side.upper()}", f"Patient turned, {side} side to the front"),
        }
        for side in ("right", "left")
    ]


def manifest_base() -> dict[str, Any]:
    """Everything but golden cases and digests."""
    return {
        "schema_version": 2,
        "identity": {
            "name": NAME,
            "version": VERSION,
            "manufacturer": "dicomnode project",
            "device_uid": derived_uid("model", NAME, VERSION),
            "description": "Image quality of frontal chest radiographs: exposure, clipping, noise, rotation, coverage",
        },
        "licence": "Apache-2.0",
        "intended_use": "Analytic measures of image quality for running and testing this node. Not a medical device; "
        "not for diagnosis or treatment.",
        "purpose": "clinical",
        "input": {
            "kind": "projection",
            "modalities": ["CR", "DX"],
            "sop_classes": ["1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"],
            "intents": ["FOR PRESENTATION"],
            "views": ["PA", "AP"],
            "body_parts": ["CHEST", "THORAX", "LUNG"],
            "values": "modality",
            "min_side": 64,
            "max_images": 32,
        },
        "preprocess": [{"step": "crop_to_field"}, {"step": "resize", "size": [None, GRID, GRID], "order": "linear"}],
        "engine": {
            "model": "model.onnx",
            "input": "grey",
            "outputs": ["darkness"],
            "reach": {"kind": "slices", "axis": 0, "batch": 1},
        },
        "decision": {"step": "from_output", "output": "darkness", "threshold": 0.045},
        "postprocess": [
            {
                "step": "lung_fields",
                "output": "darkness",
                "right": RIGHT,
                "left": LEFT,
                "air_below": -0.5,
                "most_air": 0.1,
                "min_share": 0.015,
                "min_ratio": 0.2,
                "grid": GRID,
            }
        ],
        "outputs": {
            "segments": [
                segment(RIGHT, "right_lung", "Right lung field", code("3341006", "SCT", "Right lung"), [128, 174, 128]),
                segment(LEFT, "left_lung", "Left lung field", code("44029006", "SCT", "Left lung"), [172, 138, 115]),
            ],
            "image_measurements": image_measurements(),
            "image_findings": image_findings(),
        },
    }


def golden_inputs() -> dict[str, tuple[Radiograph, dict[str, float]]]:
    """Name -> picture and what its header states."""
    return {
        "upright": (radiograph(mm=2.5), {"ExposureIndex": 250.0, "TargetExposureIndex": 200.0}),
        "turned": (radiograph(mm=2.5, turned=12.0, leaning=6.0, photons=1e4), {}),
        "cut": (radiograph(mm=2.5, gain=1.25, field=(0.05, 0.75, 0.1, 0.8)), {"DeviationIndex": 2.5}),
    }


def build(folder: Path) -> None:
    """Write model, golden cases and manifest; expected values come from the CPU engine."""
    from dicomnode.infer.ort import OnnxRuntimeCpu
    from dicomnode.infer.stages.golden import case_volume, measured
    from dicomnode.infer.stages.manifest import StagedManifest
    from dicomnode.infer.stages.run import run_staged

    (folder / "golden").mkdir(parents=True, exist_ok=True)
    card = FOLDER / "MODEL_CARD.md"
    if folder != FOLDER:
        shutil.copyfile(card, folder / card.name)
    contents: dict[str, bytes] = {"model.onnx": build_onnx(), card.name: card.read_bytes()}
    manifest = manifest_base()
    manifest["golden"] = []
    for name, (image, facts) in golden_inputs().items():
        contents[f"golden/{name}.input.npy"] = npy(image.pixels[np.newaxis].astype("<i2"))
        manifest["golden"].append(
            {
                "name": name,
                "input": f"golden/{name}.input.npy",
                "labels": f"golden/{name}.labels.npy",
                "affine": projection_affine(CONVENTION, (image.mm, image.mm)).tolist(),
                "white": float(WHITE),
                "facts": facts,
                "measurements": {},
                "answers": {},
            }
        )
    session = OnnxRuntimeCpu().load(contents["model.onnx"], threads=1)
    draft = {**manifest, "files": {n: "0" * 64 for n in [*contents, *(c["labels"] for c in manifest["golden"])]}}
    unchecked = {
        **draft,
        "golden": [{**c, "answers": {f["key"]: "" for f in image_findings()}} for c in draft["golden"]],
    }
    parsed = StagedManifest.model_validate(unchecked)
    for case, entry in zip(parsed.golden, manifest["golden"], strict=True):
        analysis = run_staged(parsed, session, case_volume(case, contents.__getitem__))
        assert analysis.labels is not None
        contents[entry["labels"]] = npy(analysis.labels)
        entry["measurements"] = {
            key: float(f"{value:.9g}") for key, value in sorted(measured(parsed, analysis).items())
        }
        entry["answers"] = {f.key: f.value.value for f in analysis.findings if f.value is not None}
    session.close()
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
    StagedManifest.model_validate(manifest)
    for name, data in contents.items():
        if folder == FOLDER and name == card.name:
            continue
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    build(parser.parse_args().folder)
