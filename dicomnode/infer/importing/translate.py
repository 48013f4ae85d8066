"""Configuration, metadata and options of a MONAI bundle as a manifest of schema 2. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dicomnode.identity import derived_uid
from dicomnode.infer.importing.config import refuse, resolve
from dicomnode.infer.importing.monai import Mapped, map_inferer, map_postprocessing, map_preprocessing
from dicomnode.infer.importing.options import VOLUME, ImportOptions
from dicomnode.infer.manifest import SEMVER

SOP_CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}


@dataclass(frozen=True, slots=True)
class Graph:
    """Names and sizes of an ONNX model; a free size is 0."""

    input: str
    input_shape: tuple[int, ...]
    outputs: tuple[str, ...]


def map_config(config: Mapping[str, Any], options: ImportOptions) -> Mapped:
    """The configuration's transforms and inferer as steps. Raises BundleError for what is not known."""
    mapped = Mapped()
    for key in ("preprocessing", "inferer", "postprocessing"):
        if key not in config:
            raise refuse(f"inference.json has no {key}", "See MONAI's bundle specification")
    map_preprocessing(resolve(config["preprocessing"], config), mapped)
    map_inferer(resolve(config["inferer"], config), mapped)
    map_postprocessing(resolve(config["postprocessing"], config), mapped)
    names = [step["step"] for step in mapped.preprocess]
    if options.orientation is not None:
        if "orient" in names:
            raise refuse("the options give an orientation, and the bundle has Orientationd", "Leave it out")
        mapped.preprocess.insert(0, {"step": "orient", "axes": options.orientation})
    elif "orient" not in names:
        raise refuse(
            "the bundle does not say which orientation its network takes (no Orientationd)",
            'Give it in the options, for example orientation = "RAS"',
        )
    elif {"resample", "resize", "pad"} & set(names[: names.index("orient")]):
        raise refuse("Orientationd comes after a step that depends on the axes", "Put it first")
    return mapped


def manifest_of(metadata: Mapping[str, Any], options: ImportOptions, mapped: Mapped, graph: Graph) -> dict[str, Any]:
    """The manifest without golden cases and digests, as data. Raises BundleError for what is missing."""
    version = options.version or str(metadata.get("version", ""))
    if not SEMVER.fullmatch(version):
        raise refuse(f"the version '{version}' is no semantic version", "Give one in the options")
    formats = metadata.get("network_data_format", {})
    image, outputs = formats.get("inputs", {}), formats.get("outputs", {})
    first: Mapping[str, Any] = next(iter(image.values()), {}) if isinstance(image, Mapping) else {}
    if len(image) != 1 or first.get("num_channels") != 1:
        raise refuse("the network takes several images or channels", "One channel is supported")
    output = _output(graph, outputs)
    if len(graph.input_shape) != 5:
        raise refuse(
            f"the network takes {len(graph.input_shape)} dimensions", "Volumes (batch, 1, a, b, c) are supported"
        )
    _fit_sizes(mapped, graph)
    described: Mapping[str, Any] = outputs.get(output) or next(iter(outputs.values()), {})
    channels = described.get("channel_def", {})
    segments, decision, post = _segments(options, mapped, output, {int(k): str(v) for k, v in channels.items()})
    activation = [{"step": mapped.activation, "output": output}] if mapped.activation and not options.findings else []
    findings = [
        {
            **f.model_dump(mode="json"),
            "output": f.output or output,
            "activation": f.activation if f.activation != "none" else mapped.activation or "none",
        }
        for f in options.findings
    ]
    measurements = (
        [VOLUME] if options.measurements is None else [m.model_dump(mode="json") for m in options.measurements]
    )
    maps = [{**p.model_dump(mode="json"), "output": p.output or output} for p in options.probability_maps]
    return {
        "schema_version": 2,
        "identity": {
            "name": options.name,
            "version": version,
            "manufacturer": options.manufacturer,
            "device_uid": derived_uid("device", options.manufacturer, options.name, version),
            "description": str(metadata.get("description") or options.name),
        },
        "licence": options.licence,
        "intended_use": options.intended_use or str(metadata.get("intended_use") or "Not stated by its authors"),
        "input": _input(first, options),
        "preprocess": mapped.preprocess,
        "engine": {
            "model": "model.onnx",
            "input": graph.input,
            "outputs": [] if findings else [output],
            "scores": [output] if findings else [],
            "reach": mapped.reach,
        },
        "activations": activation,
        "decision": decision,
        "postprocess": post,
        "outputs": {
            "segments": segments,
            "measurements": measurements if segments else [],
            "findings": findings,
            "probability_maps": maps,
        },
    }


def _output(graph: Graph, outputs: Mapping[str, Any]) -> str:
    named = [name for name in graph.outputs if name in outputs]
    if len(graph.outputs) == 1:
        return graph.outputs[0]
    if len(named) == 1:
        return named[0]
    raise refuse(f"the network has the outputs {', '.join(graph.outputs)}", "Name the one that counts in metadata.json")


def _fit_sizes(mapped: Mapped, graph: Graph) -> None:
    """Sizes that the ONNX file fixes: the batch, and the window."""
    fixed = graph.input_shape
    if fixed[1] not in (0, 1):
        raise refuse(f"the network takes {fixed[1]} channels", "One channel is supported")
    if mapped.reach["kind"] != "patches":
        return
    if fixed[0]:
        mapped.reach["batch"] = fixed[0] if fixed[0] == 1 else refuse_batch(fixed[0])
    for wanted, size in zip(mapped.reach["size"], fixed[2:], strict=True):
        if size not in (0, wanted):
            raise refuse(f"the ONNX file takes windows of {fixed[2:]}, the inferer gives {mapped.reach['size']}")


def refuse_batch(size: int) -> int:
    raise refuse(f"the ONNX file takes batches of exactly {size}", "Export it with a free batch size, or with 1")


def _segments(
    options: ImportOptions, mapped: Mapped, output: str, channels: Mapping[int, str]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[dict[str, Any]]]:
    """Segments with numbers from 1 in channel order, the decision, and post-processing in those numbers."""
    if options.findings:
        if options.segments:
            raise refuse("the options name segments and findings", "A bundle of MONAI gives one of them")
        return [], None, []
    if mapped.decision is None:
        raise refuse("postprocessing has no AsDiscrete, so nothing says what belongs to a segment")
    if not channels:
        raise refuse("metadata.json has no channel_def of the output", "Add it to network_data_format.outputs")
    argmax = mapped.decision["step"] == "argmax"
    if not argmax and len(channels) > 1:
        raise refuse(
            f"AsDiscrete.threshold on {len(channels)} channels: their structures may overlap, "
            "and here each voxel belongs to one",
            "Have it ask for argmax, or import a network for each channel",
        )
    wanted = [c for c in sorted(channels) if not (argmax and c == 0)]
    entries: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}
    missing: list[str] = []
    for channel in wanted:
        chosen = options.segments.get(str(channel), options.segments.get(channels[channel]))
        if chosen is None:
            missing.append(f"{channel} ({channels[channel]})")
            continue
        numbers[channel] = len(entries) + 1
        entries.append({"number": numbers[channel], **chosen.model_dump(mode="json")})
    if missing:
        raise refuse(
            f"the options have no codes for channel {', '.join(missing)}", "Add [segments.NAME] with its codes"
        )
    unknown = set(options.segments) - {str(c) for c in wanted} - {channels[c] for c in wanted}
    if unknown:
        raise refuse(f"the options name segments that the network does not have: {', '.join(sorted(unknown))}")
    labels = [numbers.get(c, 0) for c in range(max(channels) + 1)]
    post = []
    for step in mapped.postprocess:
        given = step.get("segments")
        if given is not None:
            offset = 0 if argmax else -1  # the one channel, thresholded, is label 1
            if any(value + offset not in numbers for value in given):
                raise refuse(f"{step['step']} names labels {given} that are no segment")
            given = [numbers[value + offset] for value in given]
        post.append({k: v for k, v in {**step, "segments": given}.items() if v is not None or k == "keep"})
    return entries, {**mapped.decision, "output": output, "labels": labels}, post


def _input(image: Mapping[str, Any], options: ImportOptions) -> dict[str, Any]:
    chosen = options.input
    modality = (chosen.modality or str(image.get("modality", ""))).upper()
    modality = {"MRI": "MR"}.get(modality, modality)
    classes = chosen.sop_classes or ((SOP_CLASSES[modality],) if modality in SOP_CLASSES else None)
    if classes is None:
        raise refuse(f"no SOP class is known for the modality '{modality}'", "Give input.sop_classes in the options")
    hounsfield = chosen.hounsfield
    return {
        "modality": modality,
        "sop_classes": list(classes),
        "min_slices": chosen.min_slices,
        "slice_spacing_mm": list(chosen.slice_spacing_mm),
        "pixel_spacing_mm": list(chosen.pixel_spacing_mm),
        "hounsfield": modality == "CT" if hounsfield is None else hounsfield,
    }
