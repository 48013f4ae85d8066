"""Which images may be drawn from without a word about identity in their pixels."""

from __future__ import annotations

from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicomnode.burned_in import Shows, shows

CT, MR, PT = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in (2, 4, 128))


def image(**changes: Any) -> Dataset:
    ds = Dataset()
    values = {"SOPClassUID": CT, "Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], **changes}
    for keyword, value in values.items():
        if value is not None:
            setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"BurnedInAnnotation": ""},
        {"NumberOfFrames": "1"},
        {"ImageType": ["ORIGINAL", "PRIMARY"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]},
        {"SOPClassUID": MR, "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"]},
        {"SOPClassUID": PT, "Modality": "PT", "ImageType": ["ORIGINAL", "PRIMARY"]},
    ],
)
def test_a_plain_slice_that_says_nothing(changes: dict[str, Any]) -> None:
    assert shows(image(**changes)) is Shows.primary


@pytest.mark.parametrize("said", ["NO", "YES"])
@pytest.mark.parametrize("changes", [{}, {"Modality": "US", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}])
def test_what_an_image_says_counts(said: str, changes: dict[str, Any]) -> None:
    assert shows(image(BurnedInAnnotation=said, **changes)) is Shows(said)


@pytest.mark.parametrize(
    "changes",
    [
        {"BurnedInAnnotation": "UNKNOWN"},
        {"ImageType": None},
        {"ImageType": "ORIGINAL"},
        {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]},
        {"ImageType": ["ORIGINAL", "SECONDARY", "AXIAL"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "OTHER"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "DOSE_INFO"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]},
        {"SOPClassUID": MR, "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "CSA REPORT"]},
        {"SOPClassUID": MR, "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"Modality": "OT"},
        {"Modality": "MR"},
        {"Modality": None},
        {"ConversionType": "WSD"},
        {"NumberOfFrames": "2"},
        {"RecognizableVisualFeatures": "YES"},
        *(
            {"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{n}", "Modality": m}
            for n, m in (("1", "CR"), ("1.1", "DX"), ("6.1", "US"), ("7", "CT"), ("12.1", "XA"), ("2.1", "CT"))
        ),
    ],
)
def test_anything_else_may_show_who_it_is(changes: dict[str, Any]) -> None:
    assert shows(image(**changes)) is Shows.unsaid
