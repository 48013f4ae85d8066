"""An analysis in two halves, before and behind the network, so that several studies can share its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dicomnode.errors import EngineError
from dicomnode.infer.batching import Arrays
from dicomnode.infer.bundle import Bundle
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.decode import Decoder
from dicomnode.infer.engine import Session
from dicomnode.infer.joint import call_of
from dicomnode.infer.pipeline import NO_SERIES, Progress, ReadSeries, read_series, shares_of
from dicomnode.infer.several import merge
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.network import Patches, Whole
from dicomnode.infer.stages.run import Begun, begin_staged, finish_staged
from dicomnode.infer.volume import ReadSlice
from dicomnode.records import Analysis, SourceInstance


def halves(manifest: object) -> StagedManifest | None:
    """The manifest, if its analyses come in two halves and need few rows: about one for each image. Pure.

    A Python pipeline calls its network itself; patches are many of one volume, and a whole volume is a row
    that is as large as a batch of slices.
    """
    if not isinstance(manifest, StagedManifest) or manifest.pipeline is not None or manifest.engine is None:
        return None
    reach = manifest.engine.reach
    single = isinstance(manifest.input, ProjectionContract)
    return None if isinstance(reach, Patches) or (isinstance(reach, Whole) and not single) else manifest


@dataclass(frozen=True, slots=True)
class BegunSeries:
    """A series that was read and prepared; ``parts``: its images, or one for the whole of it."""

    read: ReadSeries
    parts: tuple[Begun, ...]

    @property
    def calls(self) -> list[Arrays]:
        """What the network is to be called with, in order."""
        return [inputs for part in self.parts for inputs in part.calls]

    @property
    def rows(self) -> int:
        """Of all calls."""
        return sum(call_of(inputs).rows for inputs in self.calls)

    @property
    def size(self) -> int:
        """Bytes that it holds in memory."""
        calls = sum(array.nbytes for inputs in self.calls for array in inputs.values())
        return calls + sum(part.volume.values.nbytes for part in self.parts)

    def finish(
        self, session: Session, results: Sequence[Arrays], *, progress: Progress | None = None, seconds: float = 0.0
    ) -> Analysis:
        """``results``: what ``session`` gave for the calls, ``seconds``: this series' share of the time for it.

        Raises EngineError for answers of another shape than the manifest says.
        """
        if len(results) != sum(len(part.calls) for part in self.parts):
            raise EngineError("run model", "BUILD_FAILED", "the calls and the answers of the network differ in number")
        analyses, first = [], 0
        for part, report in zip(self.parts, shares_of(progress, len(self.parts)), strict=True):
            own = results[first : first + len(part.calls)]
            first += len(part.calls)
            analyses.append(finish_staged(part, session, own, report, seconds / len(self.parts)))
        merged = merge(analyses, self.read.images) if self.read.images is not None else analyses[0]
        return replace(merged, seconds={"read": self.read.seconds, **merged.seconds})


def begin_series(
    bundle: Bundle,
    instances: Sequence[SourceInstance | Path],
    *,
    decoder: Decoder | None = None,
    progress: Progress | None = None,
    ahead: Mapping[str, ReadSlice] | None = None,
    more: Mapping[str, Sequence[SourceInstance] | SegMask] = NO_SERIES,
) -> BegunSeries:
    """The first half of ``pipeline.analyse_series``, for a bundle of ``halves``. Raises for the input as that does."""
    manifest = halves(bundle.manifest)
    assert manifest is not None
    read = read_series(bundle, instances, decoder=decoder, progress=progress, ahead=ahead, more=more)
    parts = zip(read.volumes, shares_of(progress, len(read.volumes)), strict=True)
    return BegunSeries(read, tuple(begin_staged(manifest, volume, report, read.more) for volume, report in parts))
