"""One attempt at a job, from its inputs to its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dicomnode.index.database import Row
from dicomnode.infer.placing import Servable
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.infer.volume import ReadSlice
from dicomnode.records import SourceInstance


@dataclass(slots=True)
class Attempt:
    """``started``: node time. ``ahead``: slices that were read while the series arrived, ``read_ahead`` of them.

    ``more``: further series and masks by the model's names for them. ``stood``: seconds for which it stood
    still while a more urgent job was done, by step.
    """

    job: Row
    sources: Sequence[SourceInstance]
    started: float
    ahead: Mapping[str, ReadSlice] = field(default_factory=dict)
    read_ahead: int = 0
    model: Servable | None = None
    more: Mapping[str, Sequence[SourceInstance] | SegMask] = field(default_factory=dict)
    stood: dict[str, float] = field(default_factory=dict)

    @property
    def job_id(self) -> int:
        return int(self.job["id"])

    @property
    def served_by(self) -> Servable:
        """The model that does it, once it was picked."""
        assert self.model is not None
        return self.model
