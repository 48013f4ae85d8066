"""From a volume to an Analysis by a manifest of schema 2. Deterministic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.errors import EngineError
from dicomnode.infer.contract import InputContract
from dicomnode.infer.engine import Loads, Session
from dicomnode.infer.measure import VolumeSpec
from dicomnode.infer.stages.classify import probability
from dicomnode.infer.stages.decide import Argmax, MaskFrom, Threshold
from dicomnode.infer.stages.frame import Frame, Undo, frame_of, restore
from dicomnode.infer.stages.image_measures import ImageView, measure_image, rotations, view_of
from dicomnode.infer.stages.inputs import further_channels
from dicomnode.infer.stages.manifest import Outputs, StagedManifest
from dicomnode.infer.stages.measures import AreaSpec, measure_segment
from dicomnode.infer.stages.network import Answers, Arrays, Network, calls, gather, run_network
from dicomnode.infer.stages.orient import Straighten, tilt_degrees
from dicomnode.infer.stages.plugins import PipelineAnswer, WithoutNetwork, find_pipeline
from dicomnode.infer.volume import Volume
from dicomnode.records import Analysis, Finding, Measurement, ProbabilityMap, SegmentDefinition

Report = Callable[[str, float], None]
Inspect = Callable[[Answers], None]
Array = npt.NDArray[Any]
NONE_MORE: Mapping[str, Volume] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Found:
    """What either way (network or Python) comes to, on the source grid.

    ``labels`` covers ``box`` only, in the numbers of the manifest.
    """

    labels: npt.NDArray[np.uint8] | None = None
    box: tuple[slice, ...] = (slice(None), slice(None), slice(None))
    probabilities: Mapping[str, float] = field(default_factory=dict)
    maps: Mapping[str, Array] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _silent(step: str, share: float) -> None:
    """Report to nobody."""
    del step, share


def run_staged(
    manifest: StagedManifest,
    session: Session,
    volume: Volume,
    report: Report | None = None,
    inspect: Inspect | None = None,
    more: Mapping[str, Volume] = NONE_MORE,
) -> Analysis:
    """Analyse ``volume``; ``session`` holds the manifest's network. ``more``: its further series by name.

    ``inspect`` sees the network's answers before anything is made of them. Raises
    UnsuitableSeries for a volume that would take too much memory or time, EngineError for
    answers of another shape than the manifest says.
    """
    report = report or _silent
    began = time.perf_counter()
    if manifest.pipeline is not None:
        found, engine = _by_pipeline(manifest, session, volume, report)
        inferred = time.perf_counter()
    else:
        assert manifest.engine is not None
        frame, answers = prepare_and_run(manifest, manifest.engine, session, volume, report, more)
        inferred = time.perf_counter()
        if inspect:
            inspect(answers)
        found, engine = _by_steps(manifest, volume, frame, answers, report), session.engine
    analysis = _analysis(manifest, volume, found, report)
    seconds = {"inference": inferred - began, "postprocess": time.perf_counter() - inferred}
    return replace(analysis, engine=engine, precision=_precision(session), seconds=seconds)


@dataclass(frozen=True, slots=True)
class Begun:
    """A volume whose network is still to be called, by whomever: its ``calls``, and what is needed to go on.

    ``shape``: of the grid; ``seconds``: that it took so far.
    """

    manifest: StagedManifest
    volume: Volume
    frame: Frame
    shape: tuple[int, ...]
    calls: tuple[Arrays, ...]
    seconds: float


def begin_staged(
    manifest: StagedManifest, volume: Volume, report: Report | None = None, more: Mapping[str, Volume] = NONE_MORE
) -> Begun:
    """The first half of :func:`run_staged`, for a manifest with a network: all inputs of its calls are in memory."""
    report = report or _silent
    began = time.perf_counter()
    assert manifest.engine is not None
    report("inference", 0.0)
    frame = prepare(manifest, volume)
    values, further = further_channels(manifest.more_inputs, more, frame)
    given = tuple(calls(manifest.engine, [values, *further]))
    return Begun(manifest, volume, _emptied(frame), values.shape, given, time.perf_counter() - began)


def finish_staged(
    begun: Begun, session: Session, results: Iterable[Arrays], report: Report | None = None, seconds: float = 0.0
) -> Analysis:
    """The second half: ``results`` are what ``session`` gave for the calls, in their order and in ``seconds``."""
    report = report or _silent
    began = time.perf_counter()
    network = begun.manifest.engine
    assert network is not None
    answers = gather(network, begun.shape, results, _silent)
    found = _by_steps(begun.manifest, begun.volume, begun.frame, answers, report)
    analysis = _analysis(begun.manifest, begun.volume, found, report)
    took = {"inference": begun.seconds + seconds, "postprocess": time.perf_counter() - began}
    return replace(analysis, engine=session.engine, precision=_precision(session), seconds=took)


def _precision(session: Session) -> str:
    """An engine that does not compute in single precision says so."""
    return str(getattr(session, "precision", "fp32"))


def _analysis(manifest: StagedManifest, volume: Volume, found: _Found, report: Report) -> Analysis:
    segments, measurements, labels = _measured(manifest.outputs, volume, found)
    findings = tuple(_finding(manifest.outputs, key, found.probabilities) for key in _keys(manifest.outputs.findings))
    if volume.projection is not None and (manifest.outputs.image_measurements or manifest.outputs.image_findings):
        view = view_of(volume, labels)
        measurements += _of_image(manifest.outputs, view)
        findings += _answers(manifest.outputs, view)
    maps = tuple(_map(manifest.outputs, key, found.maps, volume) for key in _keys(manifest.outputs.probability_maps))
    report("postprocess", 1.0)
    return Analysis(
        labels=labels,
        source_uids=volume.source_uids,
        source_frames=volume.source_frames,
        segments=segments,
        measurements=measurements,
        notes=(*volume.notes, *found.notes),
        excluded_uids=volume.excluded_uids,
        findings=findings,
        probability_maps=maps,
    )


def prepare(manifest: StagedManifest, volume: Volume) -> Frame:
    """The grid and values that the network sees.

    A network that looks across slices gets a stack of a tilted gantry straightened, whether its
    manifest says so or not: it was never shown a slanted patient.
    """
    frame = frame_of(volume)
    contract = manifest.input
    straightened = any(step.step == "straighten" for step in manifest.preprocess)
    if isinstance(contract, InputContract) and not straightened and _looks_across_slices(manifest):
        fill = Straighten.model_fields["fill"].default if contract.hounsfield else float(volume.values.min())
        straight = Straighten(step="straighten", fill=fill).apply(frame)
        if straight is not frame:
            note = (
                f"The gantry was tilted by {tilt_degrees(volume.affine):.0f} degrees: the model saw the slices moved "
                "onto a straight grid; its findings are on the images as they were made"
            )
            frame = replace(straight, notes=(*straight.notes, note))
    for step in manifest.preprocess:
        frame = step.apply(frame)
    return frame


def _looks_across_slices(manifest: StagedManifest) -> bool:
    """False for a network of single slices that nothing before it turns or resamples."""
    assert manifest.engine is not None
    turned = any(step.step in ("orient", "resample", "resize") for step in manifest.preprocess)
    return turned or manifest.engine.reach.kind != "slices" or manifest.engine.reach.axis != 0


def prepare_and_run(
    manifest: StagedManifest,
    network: Network,
    session: Session,
    volume: Volume,
    report: Report,
    more: Mapping[str, Volume] = NONE_MORE,
) -> tuple[Frame, Answers]:
    """The frame behind the last step (its values let go of) and the network's answers on it."""
    report("inference", 0.0)
    frame = prepare(manifest, volume)
    values, further = further_channels(manifest.more_inputs, more, frame)
    answers = run_network(network, session, values, report, further)
    return _emptied(frame), answers


def _emptied(frame: Frame) -> Frame:
    """Its values let go of."""
    return Frame(np.zeros((0, 0, 0), np.float32), frame.affine, undo=frame.undo, notes=frame.notes)


def _by_steps(manifest: StagedManifest, volume: Volume, frame: Frame, answers: Answers, report: Report) -> _Found:
    dense = answers.dense
    for activation in manifest.activations:
        dense[activation.output] = activation.apply(dense[activation.output])
    probabilities = {}
    for entry in manifest.outputs.findings:
        scores = answers.scores[entry.output]
        if entry.index >= len(scores):
            raise EngineError(
                "post-process", "GOLDEN_MISMATCH", f"output {entry.output} has {len(scores)} classes, not {entry.index}"
            )
        try:
            probabilities[entry.key] = probability(scores, entry.index, entry.activation, entry.calibration)
        except ValueError as cause:
            raise EngineError("post-process", "GOLDEN_MISMATCH", f"finding {entry.key}: {cause}") from cause
    maps = {
        entry.key: _channel(dense[entry.output], entry.channel, frame.undo)
        for entry in manifest.outputs.probability_maps
    }
    decision = manifest.decision
    if decision is None:
        return _Found(probabilities=probabilities, maps=maps, notes=frame.notes)
    channels = dense.pop(decision.output)
    dense.clear()
    if isinstance(decision, MaskFrom):
        state = decision.begin(volume, channels, frame.undo)
    else:
        assert isinstance(decision, Argmax | Threshold)
        state = decision.apply(volume, channels, frame.undo)
    del channels
    for index, step in enumerate(manifest.postprocess):
        report("postprocess", index / len(manifest.postprocess))
        state = step.apply(state)
    return _Found(state.labels, state.box, probabilities, maps, (*frame.notes, *state.notes))


def _channel(channels: Array, index: int, undo: tuple[Undo, ...]) -> Array:
    if index >= len(channels):
        raise EngineError("post-process", "GOLDEN_MISMATCH", f"the output has {len(channels)} channels, not {index}")
    return restore(undo, channels[index], "linear")


def _by_pipeline(manifest: StagedManifest, session: Session, volume: Volume, report: Report) -> tuple[_Found, str]:
    assert manifest.pipeline is not None
    installed = find_pipeline(manifest.pipeline.name)
    network = None if isinstance(session, WithoutNetwork) else session
    answer = installed.run.analyse(volume, session=network, parameters=manifest.pipeline.parameters, report=report)
    labels = _checked(installed.label, answer, volume, manifest.outputs)
    engine = installed.label if network is None else f"{installed.label}, {session.engine}"
    return _Found(labels, probabilities=answer.probabilities, maps=answer.maps, notes=answer.notes), engine


def _checked(who: str, answer: PipelineAnswer, volume: Volume, outputs: Outputs) -> npt.NDArray[np.uint8] | None:
    """The labels of a pipeline, refused when they are not what its manifest says."""
    labels = answer.labels
    if (labels is not None) != bool(outputs.segments):
        raise EngineError("run pipeline", "GOLDEN_MISMATCH", f"{who} must give labels exactly where there are segments")
    if labels is not None:
        if labels.dtype != np.uint8 or labels.shape != volume.values.shape:
            raise EngineError("run pipeline", "GOLDEN_MISMATCH", f"{who} gave labels {labels.dtype} {labels.shape}")
        if int(labels.max(initial=0)) > len(outputs.segments):
            raise EngineError("run pipeline", "GOLDEN_MISMATCH", f"{who} gave a label that is no segment")
    for kind, given, wanted in (
        ("probabilities", answer.probabilities.keys(), set(_keys(outputs.findings))),
        ("maps", answer.maps.keys(), set(_keys(outputs.probability_maps))),
    ):
        if given != wanted:
            raise EngineError("run pipeline", "GOLDEN_MISMATCH", f"{who} must give {kind} for {sorted(wanted)}")
    return labels


def _keys(entries: tuple[Any, ...]) -> list[str]:
    return [entry.key for entry in entries]


def _measured(
    outputs: Outputs, volume: Volume, found: _Found
) -> tuple[tuple[SegmentDefinition, ...], tuple[Measurement, ...], npt.NDArray[np.uint8] | None]:
    """Every segment of the manifest, with the measurements of those that occur; others have a volume or area of 0."""
    from dicomnode.infer.stages.components import segments_in

    if found.labels is None:
        return (), (), None
    boxes = dict(segments_in(found.labels, None))
    undefined = boxes.keys() - {s.number for s in outputs.segments}
    if undefined:
        raise EngineError("post-process", "GOLDEN_MISMATCH", f"label {min(undefined)} is no segment of the manifest")
    measurements: list[Measurement] = []
    values = volume.values[found.box]
    nowhere = (slice(0, 0),) * 3
    for segment in outputs.segments:
        box = boxes.get(segment.number, nowhere)
        mask = found.labels[box] == segment.number
        measurements += [
            Measurement(
                key=entry.key,
                name=entry.name.code(),
                value=measure_segment(entry.compute, values[box], mask, volume.affine),
                unit=entry.unit.code(),
                segment=segment.number,
                derivation=entry.derivation.code() if entry.derivation else None,
            )
            for entry in outputs.measurements
            if mask.size or isinstance(entry.compute, VolumeSpec | AreaSpec)
        ]
    labels = np.zeros(volume.values.shape, np.uint8)
    labels[found.box] = found.labels
    return tuple(s.definition() for s in outputs.segments), tuple(measurements), labels


def _of_image(outputs: Outputs, view: ImageView) -> tuple[Measurement, ...]:
    """Measurements of a single image as a whole; those that it does not have what it takes for are not made."""
    values = measure_image([entry.compute for entry in outputs.image_measurements], view)
    return tuple(
        Measurement(
            key=entry.key,
            name=entry.name.code(),
            value=value,
            unit=entry.unit.code(),
            derivation=entry.derivation.code() if entry.derivation else None,
        )
        for entry, value in zip(outputs.image_measurements, values, strict=True)
        if value is not None
    )


def _answers(outputs: Outputs, view: ImageView) -> tuple[Finding, ...]:
    """Answers about a single image, with their reasons."""
    found = rotations([entry.compute for entry in outputs.image_findings], view)
    answers = []
    for entry, turned in zip(outputs.image_findings, found, strict=True):
        if turned.forward is None:
            value = entry.undetermined
        else:
            value = entry.present if turned.forward == entry.compute.forward else entry.absent
        answers.append(Finding(entry.key, entry.name.code(), value.code(), None, None, turned.reason))
    return tuple(answers)


def _finding(outputs: Outputs, key: str, probabilities: Mapping[str, float]) -> Finding:
    entry = next(f for f in outputs.findings if f.key == key)
    value = float(probabilities[key])
    if not 0.0 <= value <= 1.0:
        raise EngineError("post-process", "GOLDEN_MISMATCH", f"finding {key} is no probability")
    answer = None
    if entry.threshold is not None:
        answer = (entry.present if value >= entry.threshold else entry.absent).code()
    return Finding(key, entry.name.code(), answer, value, entry.threshold, entry.text)


def _map(outputs: Outputs, key: str, maps: Mapping[str, Array], volume: Volume) -> ProbabilityMap:
    entry = next(p for p in outputs.probability_maps if p.key == key)
    values = maps[key]
    if values.shape != volume.values.shape:
        raise EngineError("post-process", "GOLDEN_MISMATCH", f"map {key} has shape {values.shape}")
    if not (float(values.min()) >= -1e-4 and float(values.max()) <= 1 + 1e-4):
        raise EngineError(
            "post-process", "GOLDEN_MISMATCH", f"map {key} is no probability", "Add its activation to the manifest"
        )
    # C order: the encoder takes slices
    return ProbabilityMap(key, entry.name.code(), np.clip(values, 0, 1).astype(entry.dtype, order="C"))


def open_session(manifest: StagedManifest, engine: Loads, read: Callable[[str], bytes], threads: int) -> Session:
    """The session for the manifest's network; for a pipeline without one a stand-in.

    Raises BundleError when the pipeline is not installed, EngineError for the network.
    """
    label = find_pipeline(manifest.pipeline.name).label if manifest.pipeline else ""
    if manifest.engine is None:
        return WithoutNetwork(label)
    return engine.load(read(manifest.engine.model), threads=threads)


def provenance(manifest: StagedManifest) -> dict[str, Any]:
    """The parameters of the manifest, with distribution and version of an installed pipeline."""
    parameters = manifest.parameters()
    if manifest.pipeline is not None:
        installed = find_pipeline(manifest.pipeline.name)
        parameters["installed"] = {"distribution": installed.distribution, "version": installed.version}
    return parameters
