"""Key Object Selection (PS3.3 A.35.4, TID 2010): which images show the result."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode.common import Context, finish, long_string, refuse_what_the_library_refuses
from dicomnode.encode.headers import with_empty_patient
from dicomnode.encode.multiframe import name_frames
from dicomnode.encode.picture import MARK
from dicomnode.encode.sr import observer_device
from dicomnode.identity import derived_uid
from dicomnode.records import EncodedObject

SERIES_NUMBER = 6000
_OF_INTEREST = hd.sr.CodedConcept("113000", "DCM", "Of Interest")  # CID 7010


def encode_kos(keys: Sequence[int], others: Sequence[EncodedObject], context: Context) -> EncodedObject:
    """Selection of the source slices ``keys`` and of ``others``, the key images made of them."""
    headers, identity, provenance = context.headers, context.identity, context.provenance
    references = [headers.slices[index] for index in keys] + [_as_dataset(o) for o in others]
    references[0] = with_empty_patient(references[0])
    with refuse_what_the_library_refuses("encode KOS"):
        content = hd.ko.KeyObjectSelection(
            document_title=_OF_INTEREST,
            referenced_objects=references,
            observer_device_context=observer_device(provenance),
            description=f"{MARK}. Chosen by {provenance.name} {provenance.version}, not verified by a person.",
        )
        kos = hd.ko.KeyObjectSelectionDocument(
            evidence=references,
            content=content,
            series_instance_uid=derived_uid(identity.sr_uid, "KOS-series"),
            series_number=SERIES_NUMBER + max(headers.series_number, 0),
            sop_instance_uid=derived_uid(identity.sr_uid, "KOS"),
            instance_number=identity.revision,
            manufacturer=long_string(context.station.manufacturer),
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
    kos.SeriesDescription = long_string(f"AI {provenance.name} {provenance.version} key images")
    name_frames(kos, headers.frames)
    return finish(kos, "KOS", context)


def _as_dataset(encoded: EncodedObject) -> Dataset:
    ds = Dataset()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = encoded.study_instance_uid, encoded.series_instance_uid
    ds.SOPClassUID, ds.SOPInstanceUID = encoded.sop_class_uid, encoded.sop_instance_uid
    ds.Rows = ds.Columns = 1  # the library takes what has rows for an image
    return ds
