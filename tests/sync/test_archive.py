"""Archives that attack the extractor."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.errors import BundleError
from dicomnode.sync.archive import MEBIBYTE, Caps, safe_path, unpack

GOOD = {"manifest.json": b"{}", "model.onnx": b"x" * 1000, "golden/case1.npy": b"y" * 10}
SMALL = Caps(files=20, bytes=4 * MEBIBYTE, ratio=20, free_bytes=64 * 1024)


def tar_gz(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo, prefix: str = "") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return path


def zipped(path: Path, files: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def files_outside(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["", "./", "1.0.0/", "ct-lung/1.0.0/"])
def test_whole_archives(tmp_path: Path, prefix: str) -> None:
    named = {prefix + k: v for k, v in GOOD.items()}
    for number, archive in enumerate([tar_gz(tmp_path / "a.tgz", named), zipped(tmp_path / "a.zip", named)]):
        root = unpack(archive, tmp_path / f"out{number}", Caps())
        assert tree(root) == GOOD
        for path in root.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_system_tar_and_its_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, data in GOOD.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{form}.tgz"
        with tarfile.open(path, "w:gz", format=form) as tar:
            tar.add(source, arcname=".")
        assert tree(unpack(path, tmp_path / f"out{form}", Caps())) == GOOD


BAD_NAMES = [
    "../evil", "a/../../evil", "/etc/evil", "//evil", "a//b", "a/./b", "..", "C:evil", "C:\\evil", "a\\..\\evil",
    "~root", ".hidden", "a\0b", "a\nb", "ümlaut", "%2e%2e/x", "x" * 200, "/".join("abcdefghijk"), " ", "-rf",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_or_confuse(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError):
        safe_path(name)
    files = {**GOOD, name: b"evil"}
    archives = [tar_gz(tmp_path / "a.tgz", files)]
    if "\0" not in name:
        archives.append(zipped(tmp_path / "a.zip", files))
    before = files_outside(tmp_path)
    for number, archive in enumerate(archives):
        if archive.suffix == ".tgz" and "\0" in name:
            continue  # tarfile itself cuts at NUL
        out = tmp_path / f"out{number}"
        with pytest.raises(BundleError):
            unpack(archive, out, Caps())
        assert files_outside(tmp_path) == sorted([*before, out.name])
        before = files_outside(tmp_path)


@given(st.text(max_size=40))
def test_a_safe_path_stays_inside(name: str) -> None:
    try:
        path = safe_path(name)
    except BundleError:
        return
    if path is not None:
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert os.path.normpath(Path("/base") / path).startswith("/base/")


@pytest.mark.parametrize(
    "member",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.SYMTYPE, "model.onnx"),
        special("hard", tarfile.LNKTYPE, "model.onnx"),
        special("device", tarfile.CHRTYPE),
        special("block", tarfile.BLKTYPE),
        special("pipe", tarfile.FIFOTYPE),
        special("sparse", tarfile.GNUTYPE_SPARSE),
        special("contiguous", tarfile.CONTTYPE),
        special("odd", b"Z"),
    ],
    ids=lambda m: m.name + m.linkname[:3],
)
def test_only_plain_files_and_folders(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with pytest.raises(BundleError):
        unpack(tar_gz(tmp_path / "a.tgz", GOOD, member), tmp_path / "out", Caps())
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_a_symlink_cannot_redirect_what_follows(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.addfile(special("golden", tarfile.SYMTYPE, str(tmp_path / "target")))
        info = tarfile.TarInfo("golden/evil")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(BundleError):
        unpack(tmp_path / "a.tgz", tmp_path / "out", Caps())
    assert list((tmp_path / "target").iterdir()) == []


def test_zip_symlink(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        unpack(
            zipped(tmp_path / "a.zip", {"manifest.json": b"/etc/passwd"}, stat.S_IFLNK | 0o777), tmp_path / "o", Caps()
        )


@pytest.mark.parametrize("make", [tar_gz, zipped])
def test_bombs(tmp_path: Path, make: Callable[..., Path]) -> None:
    archive = make(tmp_path / "a", {**GOOD, "zeros": bytes(3 * MEBIBYTE)})
    assert archive.stat().st_size < 8000
    with pytest.raises(BundleError, match="too large"):
        unpack(archive, tmp_path / "out", SMALL)
    many = make(tmp_path / "b", {f"f{n}": b"" for n in range(30)})
    with pytest.raises(BundleError, match="more than 20"):
        unpack(many, tmp_path / "out2", SMALL)


def test_a_zip_that_lies_about_sizes(tmp_path: Path) -> None:
    """Headers say 10 bytes, the deflate stream holds 1 MiB."""
    path = zipped(tmp_path / "a.zip", {"manifest.json": bytes(MEBIBYTE)})
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<L", data, data.index(magic) + offset, 10)
    path.write_bytes(data)
    with pytest.raises(BundleError):
        unpack(path, tmp_path / "out", SMALL)
    assert sum(len(v) for v in tree(tmp_path / "out").values()) <= 10


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    """A pax header that claims 1 GiB, and zeros to fill it."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write(info.tobuf() + bytes(2 * MEBIBYTE))
    with pytest.raises(BundleError):
        unpack(tmp_path / "a.tgz", tmp_path / "out", Caps())


def test_a_zip_directory_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", GOOD)
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.rindex(b"PK\x05\x06") + 12, 1 << 30)
    path.write_bytes(data)
    with pytest.raises(BundleError):
        unpack(path, tmp_path / "out", Caps())


@pytest.mark.parametrize("make", [tar_gz, zipped])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated(tmp_path: Path, make: Callable[..., Path], keep: float) -> None:
    path = make(tmp_path / "a", {**GOOD, "noise": os.urandom(50_000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BundleError):
        unpack(path, tmp_path / "out", Caps())


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"\x1f\x8b", b"\x1f\x8b\x08\0garbage", b"PK\x03\x04" + bytes(60), b"BZh9"]
)
def test_not_an_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(BundleError):
        unpack(tmp_path / "a", tmp_path / "out", Caps())


def test_names_twice(tmp_path: Path) -> None:
    again = tarfile.TarInfo("manifest.json")
    with pytest.raises(BundleError, match="twice"):
        unpack(tar_gz(tmp_path / "a.tgz", GOOD, again), tmp_path / "out", Caps())


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        unpack(tar_gz(tmp_path / "a.tgz", {"a": b"", "b/manifest.json": b""}), tmp_path / "out", Caps())


@settings(deadline=None)
@given(data=st.binary(max_size=300), kind=st.sampled_from([b"\x1f\x8b\x08\0", b"PK\x03\x04", b"PK\x05\x06"]))
def test_any_bytes_unpack_or_raise_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a").write_bytes(kind + data)
    with pytest.raises(BundleError):
        unpack(folder / "a", folder / "out", SMALL)


@settings(deadline=None)
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_any_flip_in_a_tar_unpacks_or_raises(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo("manifest.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    data = bytearray(raw.getvalue())
    data[place] = value
    checksum = 256 + sum(data[:148]) + sum(data[156:512])
    data[148:156] = b"%06o\0 " % checksum
    (folder / "a").write_bytes(gzip.compress(bytes(data), 1))
    with contextlib.suppress(BundleError):
        unpack(folder / "a", folder / "out", SMALL)
