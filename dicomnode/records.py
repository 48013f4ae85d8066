"""Frozen values that pass between stages. No I/O, no behaviour beyond small look-ups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.orders import Condition


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept (PS3.3 8.8): CodeValue, CodingSchemeDesignator, CodeMeaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class SegmentDefinition:
    """One segment of a segmentation.

    ``number`` is the value in the label map, that of the manifest: a SEG numbers what it holds anew.
    ``rgb`` is the recommended display colour, 0..255. ``image``: index into ``source_uids`` of the
    image that it is on, where each image was analysed by itself.
    """

    number: int
    label: str
    category: Code
    type: Code
    type_modifier: Code | None = None
    anatomic_region: Code | None = None
    rgb: tuple[int, int, int] = (255, 0, 0)
    image: int | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number: of a segment when ``segment`` is given, of the whole series otherwise.

    ``image``: index into ``source_uids`` of the image that it is of, where each was analysed by itself.

    ``unit`` is a UCUM code. ``key`` is the stable name in JSON, e.g. ``volume_ml``.
    """

    key: str
    name: Code
    value: float
    unit: Code
    segment: int | None = None
    derivation: Code | None = None
    image: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer of a classification.

    ``key`` is the stable name in JSON and rules. ``value`` is the coded answer, such as
    Present or Absent. ``probability`` and ``threshold`` lie in 0..1. ``text``: a remark.
    ``image`` as in :class:`Measurement`.
    """

    key: str
    name: Code
    value: Code | None
    probability: float | None
    threshold: float | None
    text: str = ""
    image: int | None = None


@dataclass(frozen=True, slots=True)
class ProbabilityMap:
    """Probability of each voxel: float16 or float32 array (slices, rows, columns), 0..1."""

    key: str
    name: Code
    values: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A measurement of an analysis, and its value in an earlier study by the same model."""

    measurement: Measurement
    before: float


@dataclass(frozen=True, slots=True)
class Prior:
    """An earlier study of the patient that an analysis is compared with.

    ``study_date`` is DA. ``instances``: (SOPClassUID, SOPInstanceUID) of the series. ``model_version``
    is of its analysis, empty where there is none to compare with.
    """

    study_uid: str
    series_uid: str
    study_date: str
    modality: str
    instances: tuple[tuple[str, str], ...]
    model_version: str = ""
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What the provenance of a result names.

    ``digest`` is the SHA-256 (hex) of the verified bundle, ``device_uid`` the UID of this
    model version (Device UID, TID 1004), ``parameters`` the settings that shape the output,
    ``critical`` what its authors propose as critical: rules decide.
    """

    name: str
    version: str
    manufacturer: str
    digest: str
    device_uid: str
    description: str = ""
    intended_use: str = ""
    licence: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    critical: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a model found in one series, in the geometry of the source.

    ``labels``: uint8 array (slices, rows, columns), 0 background, else a segment's number; the
    slice axis follows ``source_uids``; ``None`` when the model makes no segmentation.
    ``segments``: all that the model looks for; those without a voxel were not found, and have
    no measurement but a volume of 0.
    ``source_uids``: SOPInstanceUID of each slice, in slice order along the normal.
    ``excluded_uids``: instances of the series that were left out, ``notes`` say why.
    ``engine``: engine name with version, e.g. ``onnxruntime-cpu 1.32.0``; ``precision``: that of
    its arithmetic, ``fp32`` or ``fp16``; empty where it is not known.
    ``seconds``: duration of each step by name (``read``, ``inference``, ``postprocess``).
    ``findings``: answers about the whole series. ``probability_maps``: in the geometry of ``labels``.
    ``others``: SeriesInstanceUID, SOPClassUID and SOPInstanceUID of further inputs in the same study.
    ``prior``: what it is compared with. ``source_frames``: frame number, from 1, of each slice within its instance of
    ``source_uids``; empty where the instances have one frame each.
    ``projection``: ``source_uids`` are single images, each analysed by itself, in the order of
    their instance numbers. They may differ in size: ``labels`` are then as large as the largest
    of each dimension, 0 beyond an image, and every segment is on one image.
    """

    labels: npt.NDArray[np.uint8] | None
    source_uids: tuple[str, ...]
    segments: tuple[SegmentDefinition, ...]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    excluded_uids: tuple[str, ...] = ()
    engine: str = ""
    precision: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    probability_maps: tuple[ProbabilityMap, ...] = ()
    source_frames: tuple[int, ...] = ()
    projection: bool = False
    prior: Prior | None = None
    others: tuple[tuple[str, str, str], ...] = ()

    def numbers_found(self) -> frozenset[int]:
        """The values other than 0 that occur in ``labels``."""
        if self.labels is None or not self.labels.size:
            return frozenset()
        missing = set(range(1, int(self.labels.max()) + 1))
        found: set[int] = set()
        for plane in self.labels:  # mostly all of them are seen long before the last plane
            data = plane.tobytes()  # a byte search is far faster and smaller than a histogram
            found |= {n for n in missing if data.find(n) >= 0}
            missing -= found
            if not missing:
                break
        return frozenset(found)


@dataclass(frozen=True, slots=True)
class ResultIdentity:
    """UIDs and time of a result, fixed and stored before anything is encoded or sent.

    ``tracking_uids`` maps a segment's number to the Tracking UID shared by SEG and SR.
    ``content_datetime`` is ISO 8601 with offset; dates and times in the objects are its
    local parts. ``predecessor_sr`` is (StudyInstanceUID, SeriesInstanceUID, SOPClassUID,
    SOPInstanceUID) of the SR that this revision replaces, ``predecessor_labelmap_sr`` the same
    of the SR that goes with a label map. UIDs of further objects derive from ``sr_uid``.
    """

    seg_series_uid: str
    seg_uid: str
    sr_series_uid: str
    sr_uid: str
    tracking_uids: Mapping[int, str]
    content_datetime: str
    revision: int = 1
    predecessor_sr: tuple[str, str, str, str] | None = None
    predecessor_labelmap_sr: tuple[str, str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class SourceInstance:
    """One stored instance that is the input of a job; ``sha256`` (hex) is over its file."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class EncodedObject:
    """A finished DICOM object as a Part 10 file in memory.

    ``kind`` is one of :data:`dicomnode.orders.KINDS`, or ``LABELMAP`` or ``LABELMAP-SR``.
    """

    kind: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    part10: bytes
    shows: str = ""
    """Of a picture, whether its source may show identity: :class:`dicomnode.burned_in.Shows`."""
