"""Objects that are small on disk and huge when decoded: a retrieve counts them as failed, and goes on."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, generate_uid

from dicomnode.lifeline import limit_memory
from dicomnode.serve import transcode
from dicomnode.serve.transcode import EXPLICIT_LITTLE, NotTranscodable, Transcoder, transcode_file
from tests.serve.cases import dataset


def saved(ds: Dataset, path: Path) -> str:
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return str(path)


def image() -> Dataset:
    return dataset(str(generate_uid()), str(generate_uid()), str(generate_uid()))


def deflated(path: Path, megabytes: int) -> str:
    """Part 10 with ``megabytes`` of zeros as pixels, written without holding them."""
    ds = image()
    name = saved(ds, path)
    whole = path.read_bytes()
    start = 144 + int.from_bytes(whole[140:144], "little")
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    saved(ds, path)
    head = path.read_bytes()
    head = head[: 144 + int.from_bytes(head[140:144], "little")]
    pixels = whole.index(b"\xe0\x7f\x10\x00OW", start)
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    with path.open("wb") as file:
        file.write(head + squeezer.compress(whole[start:pixels]))
        file.write(squeezer.compress(b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", megabytes << 20)))
        for _ in range(megabytes):
            file.write(squeezer.compress(bytes(1 << 20)))
        file.write(squeezer.flush())
    return name


def test_a_deflate_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb, fine = deflated(tmp_path / "bomb.dcm", 300), deflated(tmp_path / "fine.dcm", 1)
    assert Path(bomb).stat().st_size < 1 << 20
    monkeypatch.setattr(transcode, "MAX_INFLATED_BYTES", 100 << 20)
    with pytest.raises(NotTranscodable, match="inflated"):
        transcode_file(bomb, EXPLICIT_LITTLE)
    assert len(transcode_file(fine, EXPLICIT_LITTLE)) > 1 << 20


@pytest.mark.parametrize(
    ("rows", "frames"), [(65535, 1), (65535, 2**31 - 1), (16, 2**31 - 1)], ids=["one frame", "both", "frames"]
)
def test_rows_times_columns_times_frames(tmp_path: Path, rows: int, frames: int) -> None:
    ds = image()
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.Rows = ds.Columns = rows
    ds.NumberOfFrames = frames
    with pytest.raises(NotTranscodable, match="bytes of pixels"):
        transcode_file(saved(ds, tmp_path / "bomb.dcm"), EXPLICIT_LITTLE)


def test_a_code_stream_that_names_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SOF3 of 65535 x 65535 samples of 16 bits in a data set of 16 x 16: 8 GB for a codec that believes it."""
    ds = image()
    frame = b"\xff\xd8\xff\xc3" + struct.pack(">HBHHBBBB", 11, 16, 65535, 65535, 1, 1, 0x11, 0)
    frame += b"\xff\xc4" + struct.pack(">HB", 20, 0) + bytes([1]) + bytes(15) + b"\0"
    frame += b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0) + bytes(500) + b"\xff\xd9"
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    name = saved(ds, tmp_path / "bomb.dcm")
    coder = Transcoder()
    try:
        with pytest.raises(NotTranscodable):
            coder(Path(name), EXPLICIT_LITTLE)
        rle = image()
        rle.compress(RLELossless, generate_instance_uid=False)
        assert coder(Path(saved(rle, tmp_path / "next.dcm")), EXPLICIT_LITTLE), "the next one works"
    finally:
        coder.close()


def test_memory_of_a_child_has_a_limit() -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=limit_memory, initargs=(2 << 30,)) as pool:
        assert pool.submit(bytearray, 1 << 20).result(60)
        with pytest.raises(MemoryError):
            pool.submit(bytearray, 3 << 30).result(60)
