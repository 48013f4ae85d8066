"""From a volume to an Analysis: steps, network, steps, measurements. Deterministic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.errors import NodeError, UnsuitableSeries
from dicomnode.infer.bundle import Bundle
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.decode import Decoder
from dicomnode.infer.engine import Session
from dicomnode.infer.filling import Answers, calls, fill
from dicomnode.infer.manifest import Manifest
from dicomnode.infer.measure import VolumeSpec, measure
from dicomnode.infer.projections import Images, read_projections
from dicomnode.infer.several import merge
from dicomnode.infer.slabs import Slabs
from dicomnode.infer.stages.inputs import SegMask, mask_volume
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.run import NONE_MORE, run_staged
from dicomnode.infer.steps import start
from dicomnode.infer.volume import ReadSlice, Volume, read_volume
from dicomnode.records import Analysis, Measurement, SourceInstance

Progress = Callable[[str, float], None]
"""Called with the step (``read``, ``inference``, ``postprocess``) and the share done, 0..1."""

Array = npt.NDArray[Any]
NO_SERIES: Mapping[str, Sequence[SourceInstance] | SegMask] = MappingProxyType({})


def _silent(step: str, share: float) -> None:
    """Report to nobody."""
    del step, share


def run_bundle(
    bundle: Bundle,
    session: Session,
    volume: Volume,
    progress: Progress | None = None,
    more: Mapping[str, Volume] = NONE_MORE,
) -> Analysis:
    """Analyse ``volume``; ``session`` must hold the bundle's model.

    ``labels`` of the result has the volume's shape; every segment of the manifest is named,
    under its number there, whether it was found or not. Raises EngineError when the network
    fails or gives something other than one finite value per voxel.
    """
    report: Progress = progress or _silent
    manifest = bundle.manifest
    if isinstance(manifest, StagedManifest):
        return run_staged(manifest, session, volume, report, more=more)
    began = time.perf_counter()
    outputs = infer(manifest, session, volume, report)
    inferred = time.perf_counter()
    state = start(volume, outputs)
    for index, step in enumerate(manifest.postprocess):
        report("postprocess", index / len(manifest.postprocess))
        state = step.apply(state)
    if state.labels is None:
        raise NodeError("post-process", "no step of the bundle makes labels", "Add one to the manifest")
    labels = np.zeros(volume.values.shape, np.uint8)
    labels[state.box] = state.labels
    measurements: list[Measurement] = []
    for segment in manifest.outputs.segments:
        values = state.values[state.labels == segment.number]
        measurements += [
            Measurement(
                key=entry.key,
                name=entry.name.code(),
                value=measure(entry.compute, values, volume.voxel_ml),
                unit=entry.unit.code(),
                segment=segment.number,
                derivation=entry.derivation.code() if entry.derivation else None,
            )
            for entry in manifest.outputs.measurements
            if values.size or isinstance(entry.compute, VolumeSpec)  # what is not there still has a volume: none
        ]
    report("postprocess", 1.0)
    return Analysis(
        labels=labels,
        source_uids=volume.source_uids,
        source_frames=volume.source_frames,
        segments=tuple(s.definition() for s in manifest.outputs.segments),
        measurements=tuple(measurements),
        notes=(*volume.notes, *state.notes),
        excluded_uids=volume.excluded_uids,
        engine=session.engine,
        precision=str(getattr(session, "precision", "fp32")),  # an engine that computes otherwise says so
        seconds={"inference": inferred - began, "postprocess": time.perf_counter() - inferred},
    )


def infer(manifest: Manifest, session: Session, volume: Volume, report: Progress | None = None) -> Mapping[str, Array]:
    """Network outputs by name, each of the volume's shape, computed slab by slab."""
    report = report or _silent
    spec = manifest.engine
    answers = Answers(spec.outputs, volume.values.shape)
    todo = calls(spec.input, volume.values, spec.slab_slices, Slabs(manifest.preprocess), answers)
    for index, _ in enumerate(fill(session, todo)):
        report("inference", index / len(todo))
    report("inference", 1.0)
    return answers.whole


def analyse_series(
    bundle: Bundle,
    session: Session,
    instances: Sequence[SourceInstance | Path],
    *,
    decoder: Decoder | None = None,
    read_bytes: Callable[[Path], bytes] = Path.read_bytes,
    progress: Progress | None = None,
    ahead: Mapping[str, ReadSlice] | None = None,
    more: Mapping[str, Sequence[SourceInstance] | SegMask] = NO_SERIES,
) -> Analysis:
    """Read the series, then ``run_bundle``; ``seconds`` has ``read`` as well.

    ``ahead``: slices that were read while the series arrived (``volume.read_volume``). ``more``:
    the further series and masks of a network with several inputs, by the names in its manifest.

    Raises UnsuitableSeries or MalformedDataSet for the input, EngineError for the engine.
    """
    read = read_series(
        bundle, instances, decoder=decoder, read_bytes=read_bytes, progress=progress, ahead=ahead, more=more
    )
    if read.images is not None:
        return _analyse_images(bundle, session, read.images, read.seconds, progress)
    (volume,) = read.volumes
    analysis = run_bundle(bundle, session, volume, progress, read.more)
    return replace(analysis, seconds={"read": read.seconds, **analysis.seconds})


@dataclass(frozen=True, slots=True)
class ReadSeries:
    """``volumes``: of one slice for each of ``images``, where the model takes single images; else one.

    ``more``: the further series and masks by their names in the manifest. ``seconds``: of reading.
    """

    volumes: tuple[Volume, ...]
    images: Images | None
    more: Mapping[str, Volume]
    seconds: float


def read_series(
    bundle: Bundle,
    instances: Sequence[SourceInstance | Path],
    *,
    decoder: Decoder | None = None,
    read_bytes: Callable[[Path], bytes] = Path.read_bytes,
    progress: Progress | None = None,
    ahead: Mapping[str, ReadSlice] | None = None,
    more: Mapping[str, Sequence[SourceInstance] | SegMask] = NO_SERIES,
) -> ReadSeries:
    """As :func:`analyse_series`, which begins with it. Raises UnsuitableSeries or MalformedDataSet."""
    began = time.perf_counter()
    if progress:
        progress("read", 0.0)
    contract = bundle.manifest.input
    if isinstance(contract, ProjectionContract):
        _check_names(bundle, more)
        images = read_projections(instances, contract, decoder=decoder, read_bytes=read_bytes, ahead=ahead)
        return ReadSeries(images.images, images, NONE_MORE, time.perf_counter() - began)
    volume = read_volume(instances, contract, decoder=decoder, read_bytes=read_bytes, ahead=ahead)
    specs = bundle.manifest.more_inputs if isinstance(bundle.manifest, StagedManifest) else ()
    _check_names(bundle, more)
    further = {
        s.name: mask_volume(given, volume)
        if isinstance(given := more[s.name], SegMask)
        else read_volume(given, s.input or contract, decoder=decoder)
        for s in specs
        if s.name in more
    }
    return ReadSeries((volume,), None, further, time.perf_counter() - began)


def _check_names(bundle: Bundle, more: Mapping[str, Sequence[SourceInstance] | SegMask]) -> None:
    """Raises UnsuitableSeries for a further input that the model does not have."""
    specs = bundle.manifest.more_inputs if isinstance(bundle.manifest, StagedManifest) else ()
    kinds = {spec.name: spec.input is None for spec in specs}
    unknown = {name for name, given in more.items() if kinds.get(name) is not isinstance(given, SegMask)}
    if unknown:
        raise UnsuitableSeries(
            "read inputs",
            "UNKNOWN_INPUT",
            f"the model has no input {', '.join(sorted(unknown))} of this kind",
            "Correct inputs and masks in the rule's step",
        )


def _analyse_images(
    bundle: Bundle, session: Session, images: Images, read_seconds: float, progress: Progress | None
) -> Analysis:
    """Each image by itself, one after another."""
    parts = shares_of(progress, len(images.images))
    analyses = [run_bundle(bundle, session, *pair) for pair in zip(images.images, parts, strict=True)]
    merged = merge(analyses, images)
    return replace(merged, seconds={"read": read_seconds, **merged.seconds})


def shares_of(progress: Progress | None, count: int) -> list[Progress]:
    """What each of ``count`` parts that are done one after another reports to."""

    def share_of(index: int) -> Progress:
        return lambda step, share: progress(step, (index + share) / count) if progress else None

    return [share_of(index) for index in range(count)]
