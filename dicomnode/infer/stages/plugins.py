"""Algorithms of the house in Python: installed packages with an entry point, never in a bundle.

A package declares, in its own pyproject.toml::

    [project.entry-points."dicomnode.pipelines"]
    my-lesions = "my_package.lesions:LesionPipeline"

A manifest names it under ``pipeline``; the bundle brings identity, input contract, codes,
golden cases, and a network if the algorithm runs one. What is installed is the operator's
decision: a bundle that was pulled can name a pipeline, it cannot bring one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dicomnode.errors import BundleError
from dicomnode.infer.engine import Session
from dicomnode.infer.volume import Volume

GROUP = "dicomnode.pipelines"


@dataclass(frozen=True, slots=True)
class PipelineAnswer:
    """What a pipeline found, on the grid of the volume that it was given.

    ``labels``: uint8 (slices, rows, columns), 0 or a segment number of the manifest.
    ``probabilities``: calibrated, 0..1, by key of the manifest's findings. ``maps``: float
    (slices, rows, columns) in 0..1 by key of its probability maps. Measurements, codes and
    thresholds are the manifest's: the node applies them.
    """

    labels: npt.NDArray[np.uint8] | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    maps: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class Pipeline(Protocol):
    """What the entry point is, or makes when called without arguments.

    A single image (``input.kind = "projection"``) is a volume of one slice; ``volume.projection`` says what its
    header states. ``analyse`` must be deterministic: same volume, same answer, byte by byte; results keep
    their UIDs on that ground. It runs in the worker, which has no network. It may raise
    ``dicomnode.errors.UnsuitableSeries`` for a series that it cannot analyse.
    """

    def analyse(
        self,
        volume: Volume,
        *,
        session: Session | None,
        parameters: Mapping[str, Any],
        report: Callable[[str, float], None],
    ) -> PipelineAnswer:
        """``session`` holds the bundle's network or is None; ``report("inference", 0..1)`` shows progress."""
        ...


@dataclass(frozen=True, slots=True)
class InstalledPipeline:
    """An entry point with the distribution that brought it: part of the provenance."""

    name: str
    distribution: str
    version: str
    run: Pipeline

    @property
    def label(self) -> str:
        return f"pipeline {self.name} ({self.distribution} {self.version})"


class WithoutNetwork:
    """Stands for the session of a pipeline whose bundle has no network."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    @property
    def engine(self) -> str:
        return self._engine

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Mapping[str, npt.NDArray[Any]]:
        del inputs
        raise BundleError("run model", "the bundle has no network")

    def close(self) -> None:
        """Nothing is held."""


@cache
def find_pipeline(name: str) -> InstalledPipeline:
    """The installed pipeline ``name``; the code is imported once in a process.

    Raises BundleError when it is not installed, is offered twice, or is no Pipeline.
    """
    operation = f"find pipeline {name}"
    found = entry_points(group=GROUP)
    chosen = [e for e in found if e.name == name]
    if not chosen:
        known = ", ".join(sorted({e.name for e in found})) or "none"
        raise BundleError(
            operation,
            f"no installed package offers it (entry point group {GROUP})",
            f"Install the package into the node's environment and restart the worker. Offered here: {known}",
        )
    offers = {_distribution(e) for e in chosen}
    if len(offers) > 1:
        packages = ", ".join(f"{d} {v}" for d, v in sorted(offers))
        raise BundleError(operation, f"several packages offer it: {packages}", "Remove all but one")
    try:
        target = chosen[0].load()
        run = target() if isinstance(target, type) or not isinstance(target, Pipeline) else target
    except Exception as cause:
        raise BundleError(
            operation, f"it cannot be loaded ({type(cause).__name__})", "Install the package with its dependencies"
        ) from cause
    if not isinstance(run, Pipeline):
        raise BundleError(operation, "it has no method analyse", "See dicomnode.infer.stages.plugins.Pipeline")
    distribution, version = offers.pop()
    return InstalledPipeline(name, distribution, version, run)


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "0")
