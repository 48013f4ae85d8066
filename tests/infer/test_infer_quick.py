"""Plain images are read from their bytes with the values that pydicom gives; what is not plain is left to it."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import pixel_array
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
)

from dicomnode.infer.decode import decode_frame
from dicomnode.infer.quick import quick_frame
from tests.infer.infer_case import DATA

ROWS, COLUMNS = 5, 7


def image(values: np.ndarray, syntax: str = ExplicitVRLittleEndian, **changes: object) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = values.astype("<u2").tobytes()
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


def lossless(values: np.ndarray, **changes: object) -> Dataset:
    stream = imagecodecs.jpeg8_encode(values.astype(np.uint16), lossless=True, bitspersample=16)
    return image(values, JPEGLosslessSV1, PixelData=encapsulate([stream]), **changes)


def written(ds: Dataset) -> bytes:
    ds["PixelData"].VR = "OB" if ds.file_meta.TransferSyntaxUID.is_encapsulated else "OW"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


VALUES = np.random.default_rng(4).integers(0, 65536, (ROWS, COLUMNS))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("signed", [0, 1])
def test_uncompressed(syntax: str, signed: int) -> None:
    part10 = written(image(VALUES, syntax, PixelRepresentation=signed))
    quick = quick_frame(part10, ROWS, COLUMNS)
    wanted = pixel_array(pydicom.dcmread(io.BytesIO(part10)))
    assert quick is not None and quick.dtype == wanted.dtype and np.array_equal(quick, wanted)
    assert quick.flags.writeable


@pytest.mark.parametrize("signed", [0, 1])
def test_jpeg_lossless(signed: int) -> None:
    part10 = written(lossless(VALUES, PixelRepresentation=signed))
    quick = quick_frame(part10, ROWS, COLUMNS)
    assert quick is not None and np.array_equal(quick.view(np.uint16), VALUES)
    assert quick.dtype == (np.int16 if signed else np.uint16)


@pytest.mark.parametrize(
    "ds",
    [
        image(VALUES, ExplicitVRBigEndian),
        image(VALUES, Rows=ROWS + 1),
        image(VALUES % 4096, BitsStored=12, HighBit=15),
        image(VALUES, BitsStored=12, HighBit=11),  # bits above the stored ones
        image(VALUES % 4096, BitsStored=12, HighBit=11, PixelRepresentation=1),
        image(VALUES % 256, BitsAllocated=8, BitsStored=8, HighBit=7),
        image(VALUES, NumberOfFrames=2),
        image(VALUES, SamplesPerPixel=3),
        image(VALUES, PhotometricInterpretation="PALETTE COLOR"),
        image(VALUES, PixelData=b"\0\0" * (ROWS * COLUMNS - 1)),
    ],
)
def test_what_is_not_plain_is_left_to_pydicom(ds: Dataset) -> None:
    big = ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    buffer = io.BytesIO()
    ds["PixelData"].VR = "OW"
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True, little_endian=not big, implicit_vr=False)
    assert quick_frame(buffer.getvalue(), ROWS, COLUMNS) is None


def test_twelve_bits_in_order() -> None:
    quick = quick_frame(written(image(VALUES % 4096, BitsStored=12, HighBit=11)), ROWS, COLUMNS)
    assert quick is not None and np.array_equal(quick, VALUES % 4096)


def test_a_stream_without_its_end_or_in_two_fragments_is_not_plain() -> None:
    ds = lossless(VALUES)
    stream = next(generate_frames(ds.PixelData, number_of_frames=1)).rstrip(b"\0")
    for odd in ([stream[:-2]], [stream[: len(stream) // 2]]):
        ds.PixelData = encapsulate(odd)
        assert quick_frame(written(ds), ROWS, COLUMNS) is None
    ds.PixelData = encapsulate([stream], fragments_per_frame=2)
    assert quick_frame(written(ds), ROWS, COLUMNS) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_raise(data: st.DataObject) -> None:
    part10 = bytearray(written(lossless(VALUES) if data.draw(st.booleans()) else image(VALUES)))
    for _ in range(data.draw(st.integers(1, 4))):
        part10[data.draw(st.integers(0, len(part10) - 1))] = data.draw(st.integers(0, 255))
    del part10[data.draw(st.integers(len(part10) // 2, len(part10))) :]
    frame = quick_frame(bytes(part10), ROWS, COLUMNS)
    assert frame is None or frame.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("folder", ["transfer-syntaxes", "ct-chest-ricord", "cr-chest", "charsets"])
def test_real_images(folder: str) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA / folder} is not here")
    quick = 0
    for path in sorted((DATA / folder).rglob("*"))[:60]:
        if not path.is_file():
            continue
        part10 = path.read_bytes()
        try:
            ds = pydicom.dcmread(io.BytesIO(part10))
            wanted = pixel_array(ds)
        except Exception:  # noqa: BLE001 what pydicom cannot read is not looked at here
            continue
        frame = quick_frame(part10, int(ds.Rows), int(ds.Columns))
        if frame is not None:
            quick += 1
            assert frame.dtype == wanted.dtype and np.array_equal(frame, wanted), path.name
            assert np.array_equal(decode_frame(part10, *frame.shape), wanted)
    assert quick or folder != "ct-chest-ricord"
