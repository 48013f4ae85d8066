"""File meta information, read back by pydicom."""

from __future__ import annotations

import io

import pydicom
import pytest

from dicomnode.receive.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, file_meta


@pytest.mark.parametrize("sop", ["1.2", "1.2.3", "1." + "2" * 62])
@pytest.mark.parametrize("source", ["CT1", "CT", "SIXTEEN CHARS XX"])
def test_pydicom_reads_it(sop: str, source: str) -> None:
    meta = file_meta(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=sop,
        transfer_syntax_uid="1.2.840.10008.1.2",
        source_ae=source,
    )
    assert meta[:128] == bytes(128) and meta[128:132] == b"DICM"
    patient_id = b"\x10\x00\x20\x00\x02\x00\x00\x00ID"
    ds = pydicom.dcmread(io.BytesIO(meta + patient_id))
    info = ds.file_meta
    assert info.FileMetaInformationVersion == b"\x00\x01"
    assert info.MediaStorageSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert info.MediaStorageSOPInstanceUID == sop
    assert info.TransferSyntaxUID == "1.2.840.10008.1.2"
    assert info.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert info.ImplementationVersionName == IMPLEMENTATION_VERSION_NAME
    assert info.SourceApplicationEntityTitle == source
    assert int(info.FileMetaInformationGroupLength) == len(meta) - 144
    assert ds.PatientID == "ID"
