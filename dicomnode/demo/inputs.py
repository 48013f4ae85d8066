"""What the demo sends: the phantom, or a folder of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydicom

from dicomnode.deliver.files import find_files
from dicomnode.deliver.scu import Outgoing
from dicomnode.demo.phantom import EXAMPLE_TIME, Phantom, thorax, to_datasets
from dicomnode.demo.radiograph import radiograph, write_radiograph
from dicomnode.errors import OperatorError

BODY_MM = 320.0
WIDEST_SLICE_MM = 10.0
LEANING = 4.0
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""DICOMDIR is a file of media, never sent (PS3.3 F)."""


@dataclass(slots=True)
class SentSeries:
    """One series as it was read from the files; ``uids`` has its SOP instances."""

    study_uid: str
    series_uid: str
    modality: str
    number: str
    uids: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        row = asdict(self)
        row["images"] = len(row.pop("uids"))
        return row

    @property
    def name(self) -> str:
        return f"{self.modality or '?'} series {self.number or '?'}, {len(self.uids)} images"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Files in sending order, and the series that they make.

    ``uid_of``: SOPInstanceUID by the key of a file; ``skipped``: files that are no images.
    """

    folder: Path
    files: Sequence[Outgoing]
    series: Sequence[SentSeries]
    skipped: int
    uid_of: dict[int, str]
    phantom: Phantom | None = None
    leaning: float | None = None
    """Degrees by which the phantom of the radiographs leans."""

    @property
    def studies(self) -> int:
        return len({s.study_uid for s in self.series})


def slice_spacing(slices: int) -> float:
    """So that the whole chest is covered, as far as the model's contract allows."""
    return min(BODY_MM / slices, WIDEST_SLICE_MM)


def write_phantom(folder: Path, slices: int, advance: Callable[[], None]) -> Phantom:
    """Render the phantom and write its files; each run makes the same study."""
    phantom = thorax(slices=slices, slice_spacing=slice_spacing(slices))
    for ds in to_datasets(phantom, clock=EXAMPLE_TIME):
        ds.save_as(folder / f"{int(ds.InstanceNumber):05d}.dcm", enforce_file_format=True)
        advance()
    return phantom


def write_radiographs(folder: Path) -> float:
    """A DX and a CR of the phantom; returns by how many degrees it leans."""
    image = radiograph(mm=0.4, leaning=LEANING)
    write_radiograph(image, folder / "dx.dcm", "DX")
    write_radiograph(image, folder / "cr.dcm", "CR")
    return LEANING


def read_inputs(folder: Path, phantom: Phantom | None = None, leaning: float | None = None) -> Inputs:
    """Every DICOM file of a folder. Raises OperatorError when there is none."""
    found, skipped = find_files([folder])
    files = [f for f in found if f.sop_class_uid != MEDIA_DIRECTORY]
    series: dict[str, SentSeries] = {}
    uid_of: dict[int, str] = {}
    for file in files:
        tags = ["StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "SOPInstanceUID"]
        ds = pydicom.dcmread(file.path, stop_before_pixels=True, specific_tags=list(tags))
        study, uid, modality, number, instance = (str(ds.get(tag, "") or "") for tag in tags)
        series.setdefault(uid, SentSeries(study, uid, modality, number)).uids.add(instance)
        uid_of[file.key] = instance
    if not files:
        raise OperatorError(
            "read the folder", f"{folder} holds a DICOMDIR but no images", "Give the folder of the images"
        )
    return Inputs(
        folder, files, list(series.values()), len(skipped) + len(found) - len(files), uid_of, phantom, leaning
    )
