"""From files to results: a bundle that marks what is bright, run and encoded as the worker does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from dicomnode.encode import encode_results
from dicomnode.identity import result_identity
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.run import run_staged
from dicomnode.infer.volume import read_volume
from dicomnode.orders import KINDS, Order, order_for
from dicomnode.records import Analysis, EncodedObject, SourceInstance
from tests.encode.encode_case import MODEL, STATION
from tests.infer.stages.bundle_case import golden, manifest, measurement, segment, two_channels

EVERYTHING = order_for(["pacs"], KINDS, "labelmap")
CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
STRUCTURE = {"value": "91723000", "scheme": "SCT", "meaning": "Anatomical Structure"}
LUNG = {"value": "39607008", "scheme": "SCT", "meaning": "Lung"}
VOLUME = {"value": "118565006", "scheme": "SCT", "meaning": "Volume"}
MILLILITRE = {"value": "ml", "scheme": "UCUM", "meaning": "milliliter"}


def marker(modality: str = "CT", **changes: Any) -> StagedManifest:
    """Segment 2 is what is brighter than 0, segment 1 what the network never finds; with a probability map."""
    both = [{**segment(n, key), "category": STRUCTURE, "type": LUNG} for n, key in ((1, "never"), (2, "bright"))]
    volume = {**measurement("volume_ml", kind="volume_ml"), "name": VOLUME, "unit": MILLILITRE}
    data = manifest(
        preprocess=[],
        engine={
            "model": "model.onnx",
            "input": "x",
            "outputs": ["y"],
            "reach": {"kind": "patches", "size": [32, 64, 64]},
        },
        decision={"step": "argmax", "output": "y", "labels": [0, 2]},
        postprocess=[],
        outputs={
            "segments": both,
            "measurements": [volume, {**measurement("mean", kind="mean"), "name": {**VOLUME, "meaning": "Mean"}}],
            "probability_maps": [{"key": "p_bright", "name": LUNG, "output": "y", "channel": 1}],
        },
        files={n: "0" * 64 for n in ("model.onnx", "golden/one.npy")},
        golden=[golden(labels="golden/one.npy", probability_maps={"p_bright": "golden/one.npy"})],
    )
    data["input"] |= {"modality": modality, "sop_classes": [CLASSES[modality]], "hounsfield": modality == "CT"}
    return StagedManifest.model_validate({**data, **changes})


def analyse(
    sources: Sequence[SourceInstance], parsed: StagedManifest, threshold: float = 0.0, slope: float = 0.01
) -> Analysis:
    """As the worker does it: files -> volume -> network on ONNX Runtime -> analysis."""
    session = OnnxRuntimeCpu().load(two_channels(threshold, slope))
    return run_staged(parsed, session, read_volume(sources, parsed.input))


def results(
    analysis: Analysis, sources: Sequence[SourceInstance], order: Order = EVERYTHING
) -> tuple[EncodedObject, ...]:
    identity = result_identity(
        inputs="proof",
        model_digest=MODEL.digest,
        parameters="",
        revision=1,
        segment_numbers=[s.number for s in analysis.segments],
        content_datetime="2026-05-06T07:08:09.123456+02:00",
    )
    return encode_results(analysis, identity, MODEL, sources, station=STATION, order=order)


def brightness(datasets: Sequence[Dataset]) -> np.ndarray:
    """Rescaled values as numpy sees the uncompressed source, slices in the order given."""
    return np.stack(
        [ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0)) for ds in datasets]
    )
