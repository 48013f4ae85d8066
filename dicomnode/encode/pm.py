"""Parametric map (PS3.3 A.75): the probability of each voxel."""

from __future__ import annotations

import re

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode.common import (
    Context,
    clean_text,
    concept,
    creator_name,
    finish,
    long_string,
    refuse_what_the_library_refuses,
)
from dicomnode.encode.headers import with_empty_patient
from dicomnode.encode.multiframe import name_frames
from dicomnode.errors import NodeError, UnsuitableSeries
from dicomnode.identity import derived_uid
from dicomnode.records import EncodedObject, ProbabilityMap

SERIES_NUMBER = 7000
STEPS = 65535
"""Probabilities are stored as integers of 16 bits: an error of 8e-6, and half the size of FL."""
_NO_UNITS = hd.sr.CodedConcept("1", "UCUM", "no units")


def encode_pm(probabilities: ProbabilityMap, context: Context) -> EncodedObject:
    """``values`` of 0..1 as US with a Real World Value Mapping of slope 1/65535.

    Raises ``NodeError`` where they do not fit the slices, are not finite or leave 0..1,
    ``UnsuitableSeries`` (NO_GEOMETRY) for projections: the IOD demands a Frame of Reference and, of
    each frame, position and orientation (dciodvfy misses both as errors), which they do not have.
    """
    headers, identity, station = context.headers, context.identity, context.station
    values = probabilities.values
    size = (len(headers.slices), int(headers.slices[0].Rows), int(headers.slices[0].Columns))
    if values.shape != size or values.dtype.kind != "f":
        raise NodeError("encode PM", f"probabilities are {values.dtype} {values.shape} on images of {size}")
    if "ImagePositionPatient" not in headers.slices[0]:
        raise UnsuitableSeries("encode PM", "NO_GEOMETRY", "a parametric map needs images with a position in space")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN too
        raise NodeError("encode PM", "a probability is not in 0..1")
    stored = np.empty(size, np.uint16)
    for index, plane in enumerate(values):
        stored[index] = np.rint(plane.astype(np.float32) * np.float32(STEPS)).astype(np.uint16)
    mapping = hd.pm.RealWorldValueMapping(
        lut_label=re.sub(r"[^A-Z0-9]+", "_", probabilities.key.upper())[:16].strip("_") or "PROBABILITY",
        lut_explanation=long_string(f"Probability: {probabilities.name.meaning}"),
        unit=_NO_UNITS,
        value_range=(0, STEPS),
        slope=1.0 / STEPS,
        intercept=0.0,
        quantity_definition=concept(probabilities.name),
    )
    with refuse_what_the_library_refuses("encode PM"):
        pm = hd.pm.ParametricMap(
            source_images=[with_empty_patient(headers.slices[0]), *headers.slices[1:]],
            pixel_array=stored,
            series_instance_uid=derived_uid(identity.sr_uid, "PM-series"),
            series_number=SERIES_NUMBER + max(headers.series_number, 0),
            sop_instance_uid=derived_uid(identity.sr_uid, "PM", probabilities.key),
            instance_number=identity.revision,
            manufacturer=long_string(station.manufacturer),
            manufacturer_model_name=long_string(station.model_name),
            software_versions=long_string(station.software_versions),
            device_serial_number=long_string(station.serial_number),
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            window_center=STEPS / 2,
            window_width=STEPS,
            content_label="AI_PROBABILITY",
            content_description=clean_text(f"AI, not for diagnosis: {probabilities.name.meaning}")[:64],
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
    _fix_dimensions(pm, probabilities.key, context)
    pm.SeriesDescription = long_string(f"AI {context.provenance.name} {context.provenance.version} probabilities")
    pm.ContentCreatorName = creator_name(context.provenance)
    name_frames(pm, headers.frames)
    return finish(pm, "PM", context)


def _fix_dimensions(pm: Dataset, key: str, context: Context) -> None:
    uid = derived_uid(context.identity.sr_uid, "PM", key, "DimensionOrganizationUID")
    for item in (*pm.DimensionOrganizationSequence, *pm.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
