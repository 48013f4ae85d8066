"""Golden cases and model card of an imported bundle: what the CPU engine answers for phantoms now."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dicomnode.errors import EngineError, UnsuitableSeries
from dicomnode.infer.bundle import CARD
from dicomnode.infer.importing.config import refuse
from dicomnode.infer.importing.monai import Mapped
from dicomnode.infer.importing.options import ImportOptions
from dicomnode.infer.importing.phantom import body
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.stages.golden import measured, statistics
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.network import Answers
from dicomnode.infer.stages.run import run_staged
from dicomnode.infer.volume import Volume
from dicomnode.records import Analysis

_PATIENT_AXIS = {"S": 0, "I": 0, "A": 1, "P": 1, "L": 2, "R": 2}
_WHOLE_EXTENT = 64
_GOLDEN_MM = 2.0
"""Voxel size of a golden case along an axis that is not resampled."""


def golden_inputs(base: Mapping[str, Any]) -> dict[str, tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]]:
    """Three phantoms by name: smaller than a window, larger than one, and with extreme values.

    (int16 values, affine) of axial slices, 1.5 times coarser than the network's grid.
    """
    axes = next(s["axes"] for s in base["preprocess"] if s["step"] == "orient")
    target = next((s["spacing_mm"] for s in base["preprocess"] if s["step"] == "resample"), [None] * 3)
    window = base["engine"]["reach"].get("size", [_WHOLE_EXTENT] * 3)
    fine, size = [0.0] * 3, [0] * 3
    for letter, mm, voxels in zip(axes, target, window, strict=True):
        fine[_PATIENT_AXIS[letter]] = _GOLDEN_MM / 1.5 if mm is None else mm
        size[_PATIENT_AXIS[letter]] = voxels
    coarse = [1.5 * mm for mm in fine]
    cases = {}
    for seed, (name, share) in enumerate({"small": (0.7, 0.7), "large": (1.3, 0.9), "extreme": (0.7, 0.8)}.items()):
        shares = (share[0], share[1], share[1])
        a, b, c = (max(8, round(s * n / 1.5)) for s, n in zip(shares, size, strict=True))
        affine = np.eye(4)
        affine[:3, :3] = [[0, 0, coarse[2]], [0, coarse[1], 0], [coarse[0], 0, 0]]
        hounsfield = bool(base["input"]["hounsfield"])
        cases[name] = (body((a, b, c), seed, hounsfield=hounsfield, extreme=name == "extreme"), affine)
    return cases


def with_golden(
    base: Mapping[str, Any],
    inputs: Mapping[str, tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]],
    model: bytes,
    model_card: str,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The finished manifest and all files of the bundle but the manifest."""
    files = {"model.onnx": model, CARD: model_card.encode()}
    cases = []
    session = OnnxRuntimeCpu().load(model)
    try:
        for name, (values, affine) in inputs.items():
            case: dict[str, Any] = {"name": name, "input": f"golden/{name}.input.npy", "affine": affine.tolist()}
            files[case["input"]] = npy(values)
            answers: list[dict[str, Any]] = []

            def inspect(found: Answers, seen: list[dict[str, Any]] = answers) -> None:
                seen.append(statistics(found))

            manifest = _validated(base, case)
            lengths = np.linalg.norm(affine[:3, :3], axis=0)
            spacing = (float(lengths[0]), float(lengths[1]), float(lengths[2]))
            volume = Volume(values, affine, spacing, tuple(f"2.25.{i + 1}" for i in range(len(values))))
            analysis = run_staged(manifest, session, volume, inspect=inspect)
            _record(case, manifest, analysis, files)
            case["statistics"] = answers[0]
            cases.append(case)
    except (EngineError, UnsuitableSeries) as cause:
        raise refuse(f"the imported steps do not run: {cause.cause}") from cause
    finally:
        session.close()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {**base, "golden": cases, "files": digests}, files


def _record(case: dict[str, Any], manifest: StagedManifest, analysis: Analysis, files: dict[str, bytes]) -> None:
    """What a sound engine gives, written down in the case."""
    if analysis.labels is not None:
        case["labels"] = f"golden/{case['name']}.labels.npy"
        files[case["labels"]] = npy(analysis.labels)
        case["measurements"] = measured(manifest, analysis)
    case["findings"] = {f.key: f.probability for f in analysis.findings}
    case["probability_maps"] = {}
    for found in analysis.probability_maps:
        name = f"golden/{case['name']}.{found.key}.npy"
        case["probability_maps"][found.key] = name
        files[name] = npy(found.values)


def _validated(base: Mapping[str, Any], case: Mapping[str, Any]) -> StagedManifest:
    """The manifest with a stand-in for what the case will hold. Raises BundleError."""
    outputs = base["outputs"]
    name = case["input"]
    stand_in = {
        **case,
        "labels": name if outputs["segments"] else None,
        "findings": {f["key"]: 0.5 for f in outputs["findings"]},
        "probability_maps": {p["key"]: name for p in outputs["probability_maps"]},
    }
    files = {name: "0" * 64, "model.onnx": "0" * 64}
    try:
        return StagedManifest.model_validate({**base, "golden": [stand_in], "files": files})
    except ValidationError as cause:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors()[:5])
        raise refuse(f"the mapped steps make no valid manifest: {details}") from cause


def npy(array: npt.NDArray[Any]) -> bytes:
    """Bytes of a .npy file, format version 1.0."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def card(metadata: Mapping[str, Any], mapped: Mapped, options: ImportOptions) -> str:
    """MODEL_CARD.md from what the bundle says of itself."""
    lines = [f"# {options.name}", "", str(metadata.get("description") or ""), ""]
    lines += [
        "Imported from a MONAI bundle by `dicomnode models import`. Golden cases are phantoms with the answers of"
    ]
    lines += ["onnxruntime on the CPU: they compare engines, they say nothing of clinical quality.", ""]
    for title, key in (
        ("Task", "task"),
        ("Authors", "authors"),
        ("Copyright", "copyright"),
        ("Data", "data_source"),
        ("Intended use", "intended_use"),
        ("MONAI version", "monai_version"),
    ):
        if metadata.get(key):
            lines.append(f"- {title}: {metadata[key]}")
    metrics = metadata.get("eval_metrics")
    if isinstance(metrics, Mapping):
        lines += [f"- {name} (stated by the authors): {value}" for name, value in metrics.items()]
    references = metadata.get("references")
    if isinstance(references, list) and references:
        lines += ["", "References:", "", *(f"- {r}" for r in references)]
    lines += ["", *(f"Note: {note}" for note in mapped.notes)]
    return "\n".join(lines).rstrip() + "\n"
