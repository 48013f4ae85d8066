"""Series -> volume: values, axes, and every reason to refuse."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicomnode.errors import MalformedDataSet, UnsuitableSeries
from dicomnode.infer import decode
from dicomnode.infer.decode import InlineDecoder, PoolDecoder, Undecodable, decode_frame
from dicomnode.infer.volume import plan_stack, read_header, read_volume
from dicomnode.records import SourceInstance
from tests.infer import infer_case
from tests.infer.infer_case import CONTRACT, DATA, write_series

RAMP = (np.arange(6 * 8 * 10).reshape(6, 8, 10) * 5 - 1100).astype(np.int16)


def test_values_are_hounsfield_units_in_slice_order(tmp_path: Path) -> None:
    paths = write_series(tmp_path, RAMP)
    volume = read_volume(paths[::-1], CONTRACT)
    assert volume.values.dtype == np.int16
    np.testing.assert_array_equal(volume.values, RAMP)
    assert volume.spacing == (10.0, 2.0, 2.0)
    assert volume.voxel_ml == pytest.approx(0.04)
    expected = [str(pydicom.dcmread(p).SOPInstanceUID) for p in paths]
    assert list(volume.source_uids) == expected


def test_fractional_rescale_gives_float(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path, RAMP, slope=0.5, intercept=-1000.25), CONTRACT)
    assert volume.values.dtype == np.float32
    np.testing.assert_allclose(volume.values, RAMP, atol=0.26)


def test_rescale_beyond_int16_gives_float(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path, RAMP, slope=1, intercept=0, edit=_slope_100), CONTRACT)
    assert volume.values.dtype == np.float32
    np.testing.assert_array_equal(volume.values, RAMP.astype(np.float32) * 100)


def _slope_100(index: int, ds: Dataset) -> None:
    ds.RescaleSlope = 100


@pytest.mark.parametrize(("row", "column"), [(1, 1), (-1, -1), (-1, 1), (1, -1)])
def test_affine_puts_each_voxel_at_its_place(tmp_path: Path, row: int, column: int) -> None:
    """The LPS position of a marked voxel does not depend on how the images are oriented."""
    hu = np.zeros((5, 8, 10), np.int16)
    hu[1, 2, 7] = 500
    volume = read_volume(write_series(tmp_path, hu, row_sign=row, column_sign=column), CONTRACT)
    index = np.argwhere(volume.values == 500)[0]
    position = volume.affine @ [*index, 1]
    np.testing.assert_allclose(position[:3], [(7 - 4.5) * 2, (2 - 3.5) * 2, 10.0], atol=1e-9)
    # slices follow the normal (row x column), so prone or feet-first can reverse them
    assert np.linalg.det(volume.affine[:3, [2, 1, 0]]) > 0


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)))
def test_order_of_arrival_does_not_matter(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    paths = write_series(tmp_path_factory.mktemp("s"), RAMP)
    headers = [read_header(paths[i].read_bytes()) for i in order]
    plan = plan_stack(headers, CONTRACT)
    assert [h.plane.position[2] for h in plan.headers if h.plane] == [0, 10, 20, 30, 40, 50]


def test_gantry_tilt_keeps_the_volume(tmp_path: Path) -> None:
    """Positions that move sideways evenly make a slanted affine with the same voxel volume."""

    def slant(index: int, ds: Dataset) -> None:
        ds.ImagePositionPatient[1] += 2.5 * index

    volume = read_volume(write_series(tmp_path, RAMP, edit=slant), CONTRACT)
    assert volume.affine[1, 0] == pytest.approx(2.5)
    assert volume.voxel_ml == pytest.approx(0.04)


def test_marked_localizer_is_left_out_with_a_note(tmp_path: Path) -> None:
    def edit(index: int, ds: Dataset) -> None:
        if index == 5:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
            ds.Rows, ds.Columns, ds.PixelData = 2, 2, b"\0" * 8

    volume = read_volume(write_series(tmp_path, RAMP, edit=edit), CONTRACT)
    assert volume.values.shape == (5, 8, 10)
    assert len(volume.excluded_uids) == 1
    assert "1 localizer image" in volume.notes[0]


def test_different_frames_of_reference_are_tolerated_with_a_note(tmp_path: Path) -> None:
    def edit(index: int, ds: Dataset) -> None:
        ds.FrameOfReferenceUID = f"1.2.3.{index}"

    assert "frames of reference" in read_volume(write_series(tmp_path, RAMP, edit=edit), CONTRACT).notes[0]


def test_optional_attributes_may_be_missing(tmp_path: Path) -> None:
    def edit(index: int, ds: Dataset) -> None:
        del ds.FrameOfReferenceUID, ds.ImageType, ds.StudyInstanceUID

    assert read_volume(write_series(tmp_path, RAMP, edit=edit), CONTRACT).notes == ()


def _set(keyword: str, value: object, only: int | None = None) -> Callable[[int, Dataset], None]:
    def edit(index: int, ds: Dataset) -> None:
        if only is None or index == only:
            setattr(ds, keyword, value)

    return edit


def _without(keyword: str) -> Callable[[int, Dataset], None]:
    def edit(index: int, ds: Dataset) -> None:
        if index == 2:
            delattr(ds, keyword)

    return edit


@pytest.mark.parametrize(
    ("code", "edit"),
    [
        ("WRONG_MODALITY", _set("Modality", "MR")),
        ("WRONG_SOP_CLASS", _set("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7")),
        ("MIXED_SERIES", _set("SeriesInstanceUID", "1.2.9", 2)),
        ("MULTI_FRAME", _set("NumberOfFrames", 2, 2)),
        ("NOT_GREYSCALE", _set("PhotometricInterpretation", "MONOCHROME1", 2)),
        ("SIZE_MISMATCH", _set("Rows", 4, 2)),
        ("SPACING_MISMATCH", _set("PixelSpacing", [2.0, 1.9], 2)),
        ("SPACING_OUT_OF_RANGE", _set("PixelSpacing", [5.0, 5.0])),
        ("NO_SPACING", _without("PixelSpacing")),
        ("NO_GEOMETRY", _without("ImagePositionPatient")),
        ("NO_PIXEL_DATA", _without("Rows")),
        ("NO_PIXEL_DATA", _without("PixelData")),
        ("NOT_HOUNSFIELD", _without("RescaleIntercept")),
        ("NOT_HOUNSFIELD", _set("RescaleType", "US")),
        ("DUPLICATE_INSTANCE", _set("SOPInstanceUID", "1.2.3.77")),
        ("DUPLICATE_POSITION", _set("ImagePositionPatient", [-9, -7, 10.0], 2)),
        ("GAP", _set("ImagePositionPatient", [-9, -7, 90.0], 5)),
        ("NON_UNIFORM", _set("ImagePositionPatient", [-9, -7, 22.0], 2)),
        ("NON_UNIFORM", _set("ImagePositionPatient", [-3, -7, 20.0], 2)),
        ("MIXED_ORIENTATION", _set("ImageOrientationPatient", [0, 1, 0, 0, 0, -1], 5)),
        ("TOO_LARGE", _set("Rows", 65535)),
        ("DECODE_FAILED", _set("PixelData", b"\0\0")),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, code: str, edit: Callable[[int, Dataset], None]) -> None:
    contract = CONTRACT.model_copy(update={"max_voxels": 1_000_000})
    paths = write_series(tmp_path, RAMP, edit=edit)
    with pytest.raises(UnsuitableSeries) as caught:
        read_volume(paths, contract)
    assert caught.value.code == code
    assert len(str(caught.value)) > 30


def test_sagittal_and_short_series_are_refused(tmp_path: Path) -> None:
    def sagittal(index: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        ds.ImagePositionPatient = [index * 10.0, 0, 0]

    with pytest.raises(UnsuitableSeries) as caught:
        read_volume(write_series(tmp_path / "a", RAMP, edit=sagittal), CONTRACT)
    assert caught.value.code == "NOT_AXIAL"
    with pytest.raises(UnsuitableSeries) as caught:
        read_volume(write_series(tmp_path / "b", RAMP[:2]), CONTRACT)
    assert caught.value.code == "TOO_FEW_SLICES"
    with pytest.raises(UnsuitableSeries):
        read_volume([], CONTRACT)


def test_file_of_another_instance_is_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path, RAMP)
    wrong = [SourceInstance("1.2.3.999999", "", "", p, "") for p in paths]
    with pytest.raises(MalformedDataSet):
        read_volume(wrong, CONTRACT)


def test_not_dicom_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(MalformedDataSet):
        read_volume([path], CONTRACT)


def test_pool_gives_the_same_and_survives_a_refused_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "good", RAMP)
    bad = write_series(tmp_path / "bad", RAMP, edit=_set("PixelData", b"\0\0", 3))
    with PoolDecoder(2) as pool:
        with pytest.raises(UnsuitableSeries) as caught:
            read_volume(bad, CONTRACT, decoder=pool)
        assert caught.value.code == "DECODE_FAILED"
        np.testing.assert_array_equal(read_volume(paths, CONTRACT, decoder=pool).values, RAMP)


def test_crash_of_the_codec_is_a_refusal_and_the_next_series_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_series(tmp_path, RAMP)
    with PoolDecoder(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(decode, "decode_frame", infer_case.crash)
            with pytest.raises(UnsuitableSeries) as caught:
                read_volume(paths, CONTRACT, decoder=pool)
        assert caught.value.code == "DECODER_CRASHED"
        np.testing.assert_array_equal(read_volume(paths, CONTRACT, decoder=pool).values, RAMP)


TRANSFER_SYNTAXES = sorted((DATA / "transfer-syntaxes").glob("*.dcm")) if DATA.is_dir() else []
# colour, 12-bit JPEG Extended (only GPL plug-ins read it), no Part 10 header
REFUSED = {"1.2.1", "1.2.2", "1.2.4.50", "1.2.4.51", "1.2"}


@pytest.mark.skipif(not TRANSFER_SYNTAXES, reason="shared/data/transfer-syntaxes is absent")
@pytest.mark.parametrize("path", TRANSFER_SYNTAXES, ids=lambda p: p.stem)
def test_transfer_syntaxes_decode_or_are_refused(path: Path) -> None:
    ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    data = path.read_bytes()
    if path.stem.removeprefix("1.2.840.10008.") in REFUSED:
        with pytest.raises(Undecodable):
            decode_frame(data, ds.Rows, ds.Columns)
        return
    frame = decode_frame(data, ds.Rows, ds.Columns)
    assert frame.shape == (ds.Rows, ds.Columns)
    assert frame.max() > frame.min()


@pytest.mark.skipif(not TRANSFER_SYNTAXES, reason="shared/data/transfer-syntaxes is absent")
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_never_looks_like_a_success(share: float) -> None:
    """A JPEG Lossless file that is cut: the header reader or the decoder says no."""
    data = (DATA / "transfer-syntaxes" / "1.2.840.10008.1.2.4.70.dcm").read_bytes()
    ds = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    with PoolDecoder(1) as pool, pytest.raises((Undecodable, UnsuitableSeries)):
        list(pool.frames([(data[: int(len(data) * share)], ds.Rows, ds.Columns)]))


def test_inline_decoder_keeps_order(tmp_path: Path) -> None:
    paths = write_series(tmp_path, RAMP)
    frames = list(InlineDecoder().frames((p.read_bytes(), 8, 10) for p in paths))
    np.testing.assert_array_equal(np.stack(frames).astype(int) - 1024, RAMP)
