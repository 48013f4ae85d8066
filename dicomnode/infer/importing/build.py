"""``models import``: a MONAI bundle's folder becomes a bundle of schema 2 with golden cases.

Reads configs/metadata.json, configs/inference.json and the ONNX file; runs no code of the
bundle. The golden cases are what onnxruntime on the CPU answers for phantoms now: they hold
other engines to it, they do not say that the network is any good.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicomnode import durable
from dicomnode.errors import EngineError
from dicomnode.infer.bundle import MANIFEST, MAX_FILE_BYTES
from dicomnode.infer.golden import open_model
from dicomnode.infer.importing.config import read_json, refuse
from dicomnode.infer.importing.options import ImportOptions
from dicomnode.infer.importing.prove import card, golden_inputs, with_golden
from dicomnode.infer.importing.translate import Graph, manifest_of, map_config
from dicomnode.infer.onnxcheck import check_onnx
from dicomnode.infer.ort import OnnxRuntimeCpu


@dataclass(frozen=True, slots=True)
class Imported:
    """What ``models import`` made. ``notes``: where the bundle and what we do differ in words."""

    name: str
    version: str
    path: Path
    digest: str
    steps: tuple[str, ...]
    cases: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "path": str(self.path),
            "digest": self.digest,
            "steps": list(self.steps),
            "golden": list(self.cases),
            "notes": list(self.notes),
        }


def import_monai(
    folder: Path,
    options: ImportOptions,
    into: Path,
    *,
    onnx: Path | None = None,
    before_placing: Callable[[str, str], None] = lambda name, version: None,
) -> Imported:
    """Make ``into``/name/version from the MONAI bundle in ``folder`` and prove it on the CPU.

    ``onnx``: the model where it is not models/model.onnx. ``before_placing(name, version)`` is
    called when it has passed and is not yet where a worker would find it: the newest version
    serves where none was activated. Raises BundleError naming what cannot be mapped or is
    missing, EngineError when the model does not run.
    """
    config = read_json(folder / "configs" / "inference.json")
    metadata = read_json(folder / "configs" / "metadata.json")
    model = _read_model(onnx or folder / "models" / "model.onnx")
    graph = read_graph(model)
    mapped = map_config(config, options)
    base = manifest_of(metadata, options, mapped, graph)
    inputs = golden_inputs(base)
    manifest, files = with_golden(base, inputs, model, card(metadata, mapped, options))
    path = _place(into, manifest, files, before_placing)
    steps = [s["step"] for s in (*base["preprocess"], *base["activations"])]
    steps += [s["step"] for s in (base["decision"], *base["postprocess"]) if s]
    return Imported(
        name=base["identity"]["name"],
        version=base["identity"]["version"],
        path=path,
        digest=durable.sha256_file(path / MANIFEST),
        steps=tuple(steps),
        cases=tuple(inputs),
        notes=tuple(mapped.notes),
    )


def _read_model(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise refuse(f"{path.name} is larger than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except OSError as cause:
        raise refuse(
            f"{path.name} cannot be read ({cause.strerror})",
            "Export the network first: python -m monai.bundle onnx_export; or give the file with --onnx",
        ) from cause
    check_onnx(data, path.name)
    return data


def read_graph(model: bytes) -> Graph:
    """Input, its sizes, and outputs as onnxruntime sees them. Raises EngineError."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as cause:
        text = (str(cause).splitlines() or [type(cause).__name__])[0][:300]
        raise EngineError("import model", "BUILD_FAILED", text, "Export the network again") from cause
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise refuse(f"the network has {len(inputs)} inputs", "One image input is supported")
    sizes = tuple(n if isinstance(n, int) else 0 for n in inputs[0].shape or ())
    return Graph(inputs[0].name, sizes, tuple(o.name for o in session.get_outputs()))


def _place(
    into: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes], before_placing: Callable[[str, str], None]
) -> Path:
    """Write beside, prove, rename: a half-made bundle is never where models are looked for."""
    identity = manifest["identity"]
    final: Path = into / identity["name"] / identity["version"]
    if final.exists():
        raise refuse(
            f"{identity['name']} {identity['version']} is there already", "Give another version in the options"
        )
    work = into / f".import-{uuid.uuid4().hex}"
    candidate = work / identity["name"] / identity["version"]
    try:
        content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
        for name, data in {**files, MANIFEST: content}.items():
            durable.make_directory((candidate / name).parent)
            durable.write_synced(candidate / name, [data])
        for folder in {(candidate / name).parent for name in (*files, MANIFEST)}:
            durable.sync_directory(folder)
        open_model(candidate, OnnxRuntimeCpu()).close()
        durable.make_directory(final.parent)
        before_placing(identity["name"], identity["version"])
        durable.rename_into_place(candidate, final)
        durable.sync_directory(final.parent)
    finally:
        durable.remove_tree(work)
    return final
