"""One small encoding before the first real one: the libraries load their tables of the standard then.

That is half a second of processor time which the first study would wait for.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomnode.encode.results import encode_results
from dicomnode.encode.station import Station
from dicomnode.identity import derived_uid, result_identity
from dicomnode.records import Analysis, Code, Measurement, ModelIdentity, SegmentDefinition, SourceInstance

_THING = Code("123037004", "SCT", "Anatomical Structure")
_ROWS = 8


def warm_up(station: Station) -> None:
    """Encode a result of nothing: two empty slices in memory, and forget it."""
    labels = np.zeros((2, _ROWS, _ROWS), np.uint8)
    labels[0, 0, 0] = 1
    with contextlib.ExitStack() as files:
        sources = [files.enter_context(_slice(number)) for number in range(2)]
        analysis = Analysis(
            labels=labels,
            source_uids=tuple(s.sop_instance_uid for s in sources),
            segments=(SegmentDefinition(1, "warm", _THING, _THING),),
            measurements=(Measurement("v", Code("118565006", "SCT", "Volume"), 1.0, Code("ml", "UCUM", "ml"), 1),),
            engine="none",
        )
        identity = result_identity(
            inputs="warm",
            model_digest="warm",
            parameters="",
            revision=1,
            segment_numbers=[1],
            content_datetime="2000-01-01T00:00:00+00:00",
            predecessor_sr=None,
        )
        model = ModelIdentity("warm", "0.0.0", "dicomnode", "0" * 64, derived_uid("warm", "model"))
        encode_results(analysis, identity, model, sources, station=station)


@contextlib.contextmanager
def _slice(number: int) -> Iterator[SourceInstance]:
    """An empty CT slice in a file that has no place on a disk (memfd_create(2))."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("warm", "slice", str(number))
    ds.StudyInstanceUID, ds.SeriesInstanceUID = derived_uid("warm", "study"), derived_uid("warm", "series")
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = derived_uid("warm", "frame"), ""
    ds.Modality, ds.SeriesNumber = "CT", 1
    ds.Rows = ds.Columns = _ROWS
    ds.PixelSpacing, ds.SliceThickness = [1, 1], 1
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, number]
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    descriptor = os.memfd_create("warm", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, buffer.getvalue())
        path = Path(f"/proc/self/fd/{descriptor}")
        yield SourceInstance(str(ds.SOPInstanceUID), str(CTImageStorage), str(ExplicitVRLittleEndian), path, "")
    finally:
        os.close(descriptor)
