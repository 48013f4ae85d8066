"""One attempt at a job, from its inputs to its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dicomnode.index.database import Row
from dicomnode.infer.begun import BegunSeries
from dicomnode.infer.pipeline import Progress
from dicomnode.infer.placing import Servable
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.infer.volume import ReadSlice
from dicomnode.records import SourceInstance


@dataclass(slots=True, eq=False)
class Attempt:
    """``started``: node time. ``ahead``: slices that were read while the series arrived, ``read_ahead`` of them.

    ``more``: further series and masks by the model's names for them. ``stood``: seconds for which it stood
    still while a more urgent job was done, by step.

    ``begun``: the first half of an analysis whose network shares batches with other jobs', since ``begun_at``
    (seconds of ``perf_counter``); ``shared``: how many series did, 0 where each of its calls was one by itself;
    ``waited``: seconds for the others of them.
    """

    job: Row
    sources: Sequence[SourceInstance]
    started: float
    ahead: Mapping[str, ReadSlice] = field(default_factory=dict)
    read_ahead: int = 0
    model: Servable | None = None
    more: Mapping[str, Sequence[SourceInstance] | SegMask] = field(default_factory=dict)
    stood: dict[str, float] = field(default_factory=dict)
    begun: BegunSeries | None = None
    begun_at: float = 0.0
    shared: int = 0
    waited: float = 0.0

    @property
    def job_id(self) -> int:
        return int(self.job["id"])

    @property
    def company(self) -> int:
        """Series that shared batches, itself among them; 0 for one that was done alone."""
        return self.shared if self.shared > 1 else 0

    @property
    def size(self) -> int:
        """Bytes that wait in memory for the network."""
        return self.begun.size if self.begun is not None else 0

    def reports_to(self, between: Callable[[Attempt, str], None]) -> Progress:
        """What an analysis reports its progress to: ``between`` is called with its step."""
        return lambda step, _: between(self, step)

    @property
    def served_by(self) -> Servable:
        """The model that does it, once it was picked."""
        assert self.model is not None
        return self.model
