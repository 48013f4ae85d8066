"""Pixel padding (PS3.3 C.7.5.1.1.2) is outside the picture, in whatever way it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from dicomnode.infer.rescale import padding_in
from dicomnode.infer.slice_header import read_header
from dicomnode.infer.volume import read_volume
from tests.infer.infer_case import CONTRACT, write_series

HU = np.linspace(-900, 900, 6 * 8 * 10).reshape(6, 8, 10).round()


def padded(folder: Path, value: object, stored: int, limit: object = None, *, signed: bool = True) -> list[Path]:
    def edit(index: int, ds: Dataset) -> None:
        pixels = np.frombuffer(ds.PixelData, "<i2").reshape(8, 10).copy()
        pixels[:2] = np.int64(stored).astype(np.int16)
        ds.PixelRepresentation = int(signed)
        ds.PixelData = pixels.tobytes()
        if value is not None:
            ds.add_new("PixelPaddingValue", "SS" if isinstance(value, int) and value < 0 else "US", value)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS", limit)

    return write_series(folder, HU, edit=edit)


@pytest.mark.parametrize(
    ("value", "stored", "limit", "signed"),
    [(-2000, -2000, None, True), (63536, -2000, None, True), (65535, 65535, None, False), (-2000, -1900, -1800, True),
     (-1800, -1900, -2000, True)],
)  # fmt: skip
def test_padding_is_air(tmp_path: Path, value: int, stored: int, limit: int | None, signed: bool) -> None:
    volume = read_volume(padded(tmp_path, value, stored, limit, signed=signed), CONTRACT)
    assert volume.values.dtype == np.int16
    assert (volume.values[:, :2] == -1024).all()
    np.testing.assert_array_equal(volume.values[:, 2:], HU[:, 2:])


def test_what_is_not_declared_is_kept(tmp_path: Path) -> None:
    assert (read_volume(padded(tmp_path, None, -2000), CONTRACT).values[:, :2] == -3024).all()


def test_without_hounsfield_units_padding_is_the_least_value_of_the_picture(tmp_path: Path) -> None:
    contract = CONTRACT.model_copy(update={"hounsfield": False})
    values = read_volume(padded(tmp_path, -2000, -2000), contract).values
    for plane in values:
        assert (plane[:2] == plane[2:].min()).all()


def test_a_slice_of_nothing_but_padding_has_none() -> None:
    frame = np.full((4, 4), 7, np.uint16)
    assert padding_in(frame, (7, 7)) is None and padding_in(frame, (8, 8)) is None


def test_padding_of_a_file_without_vrs_is_read(tmp_path: Path) -> None:
    import pydicom

    for path in padded(tmp_path, -2000, -2000):
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        pydicom.dcmwrite(path, ds, implicit_vr=True, little_endian=True, enforce_file_format=True)
        first, last = read_header(path.read_bytes()).padding or (0, 0)
        assert first == last == 63536
        volume = read_volume([p for p in tmp_path.iterdir()], CONTRACT)
        assert (volume.values[0, :2] == -1024).all() or path.name != "0000.dcm"


def test_bytes_of_a_decoded_value(tmp_path: Path) -> None:
    (path, *_) = padded(tmp_path, None, 0)
    part10 = path.read_bytes()
    assert read_header(part10).bytes_per_pixel == 2
    for bits, size in ((8, 1), (12, 2), (32, 4), (0, 4), (64, 4)):
        changed = part10.replace(
            b"\x28\x00\x00\x01US\x02\x00\x10\x00", b"\x28\x00\x00\x01US\x02\x00" + bytes([bits, 0])
        )
        assert read_header(changed).bytes_per_pixel == size
