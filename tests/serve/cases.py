"""Objects that the query tests store, and what a running receiver knows of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import RLELossless, generate_uid

from tests.e2e.harness import CANARY, item_from
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, Item

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def dataset(series: str, study: str, sop: str, **tags: Any) -> Dataset:
    """A tiny image that any program can decode."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT_LITTLE
    ds.SOPClassUID, ds.SOPInstanceUID = CT_IMAGE, sop
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.PatientID, ds.PatientName = "P1", f"{CANARY}^Anna"
    ds.PatientBirthDate, ds.PatientSex = "19700102", "F"
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "20240105", "101530.5", "A_1%", "S1"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription, ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "Thorax", "CT", 1, 1
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.Rows = ds.Columns = 16
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 0, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelData = np.arange(256, dtype="<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def rle_item(ds: Dataset) -> Item:
    ds.compress(RLELossless, generate_instance_uid=False)
    return Item(str(ds.SOPClassUID), str(ds.SOPInstanceUID), str(RLELossless), item_from(ds).data)


_FIXED = [str(generate_uid(entropy_srcs=["tests/serve", str(n)])) for n in range(18)]  # names of tests hold some
STUDY_A, STUDY_B, STUDY_C, STUDY_D = _FIXED[:4]
SERIES_A1, SERIES_A2, SERIES_B, SERIES_C, SERIES_D = _FIXED[4:9]
UIDS = _FIXED[9:]


def items() -> list[Item]:
    """Study A: CT (3) and MR (1). B: Japanese name. C: one RLE image, German name. D: one RLE, one plain."""
    found = [item_from(dataset(SERIES_A1, STUDY_A, UIDS[n], InstanceNumber=n + 1)) for n in range(3)]
    mr = dataset(SERIES_A2, STUDY_A, UIDS[3], Modality="MR", SeriesNumber=2, SOPClassUID=MR_IMAGE)
    found.append(Item(MR_IMAGE, UIDS[3], EXPLICIT_LITTLE, item_from(mr).data))
    japanese = dataset(
        SERIES_B,
        STUDY_B,
        UIDS[4],
        SpecificCharacterSet=["", "ISO 2022 IR 87"],
        PatientID="P2",
        PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう",
        StudyDate="20240210",
        TimezoneOffsetFromUTC="+0900",
        AccessionNumber="A21",
    )
    found.append(item_from(japanese))
    german = dataset(
        SERIES_C,
        STUDY_C,
        UIDS[5],
        SpecificCharacterSet="ISO_IR 100",
        PatientID="P3",
        PatientName="Müller^Jörg",
        StudyDate="20230101",
        AccessionNumber="A31",
        Modality="MR",
    )
    found.append(rle_item(german))
    mixed = {"PatientID": "P4", "StudyDate": "20220101", "AccessionNumber": "A41"}
    found.append(rle_item(dataset(SERIES_D, STUDY_D, UIDS[6], **mixed)))
    found.append(item_from(dataset(SERIES_D, STUDY_D, UIDS[7], **mixed)))
    return found
