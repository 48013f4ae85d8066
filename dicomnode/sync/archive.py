"""Unpacking a model archive that nobody should trust yet: .tar.gz and .zip.

Only plain files and folders come out, under names of a small alphabet, within caps on
count, size and ratio that count the bytes that really come, not those that a header
claims. Nothing is unpacked over something that exists. The archive's digest has been
checked before; this holds even when it was not.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from dicomnode import durable
from dicomnode.errors import BundleError, StorageError

MEBIBYTE = 1 << 20
CHUNK_BYTES = 256 * 1024
MAX_DEPTH = 8
MAX_DIRECTORY_BYTES = 4 * MEBIBYTE
MANIFEST = "manifest.json"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_ZIP_END = struct.Struct("<4s4H2LH")


@dataclass(frozen=True, slots=True)
class Caps:
    """``ratio`` is unpacked over packed bytes; the first ``free_bytes`` are not counted for it."""

    files: int = 512
    bytes: int = 4096 * MEBIBYTE
    ratio: int = 100
    free_bytes: int = 16 * MEBIBYTE

    def total(self, packed: int) -> int:
        """Most bytes that an archive of ``packed`` bytes may become."""
        return min(self.bytes, self.free_bytes + packed * self.ratio)


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def safe_path(name: str) -> PurePosixPath | None:
    """The relative path of a member; None for the folder that holds all. Raises BundleError."""
    plain = name.removeprefix("./").rstrip("/")
    if plain in {"", "."}:
        return None
    parts = plain.split("/")
    if len(parts) > MAX_DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise _bad("a member's name is not a plain relative path")
    return PurePosixPath(plain)


def unpack(archive: Path, into: Path, caps: Caps) -> Path:
    """Unpack and return the folder that holds ``manifest.json``; all of it is synced to disk.

    ``into`` must not exist. Raises BundleError for an archive that is damaged or unsafe,
    StorageError when the disk refuses.
    """
    into.mkdir(mode=0o700, parents=True)
    packed = archive.stat().st_size
    try:
        with archive.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == b"\x1f\x8b":
                _extract(_tar_members(file, caps.total(packed)), into, caps, packed)
            elif magic == b"PK\x03\x04":
                _extract(_zip_members(file, packed, caps), into, caps, packed)
            else:
                raise _bad("it is neither .tar.gz nor .zip")
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _bad(f"it is damaged ({type(error).__name__})") from error
    except (ValueError, NotImplementedError, RuntimeError, struct.error, RecursionError) as error:
        raise _bad(f"it cannot be read ({type(error).__name__})") from error
    except OSError as error:
        raise StorageError(
            "unpack model archive", error.strerror or str(error), "Check the volume of data_dir"
        ) from error
    return _root(into)


@dataclass(frozen=True, slots=True)
class Member:
    """``content`` is None for a folder."""

    path: PurePosixPath
    size: int
    content: Readable | None


def _extract(members: Iterator[Member], into: Path, caps: Caps, packed: int) -> None:
    left = caps.total(packed)
    folders = {into}
    for count, member in enumerate(members, 1):
        if count > caps.files:
            raise _bad(f"it has more than {caps.files} members")
        target = into / member.path
        folder = target if member.content is None else target.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folders.update(p for p in (folder, *folder.parents) if p.is_relative_to(into))
        if member.content is not None:
            if member.size > left:
                raise _bad("it becomes too large when unpacked")
            left -= _copy(member, target)
    for folder in sorted(folders, reverse=True):
        durable.sync_directory(folder)


def _copy(member: Member, target: Path) -> int:
    """Write one file; reads one byte more than declared to notice a lie."""
    content = member.content
    assert content is not None
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise _bad("a name occurs twice") from None
    with os.fdopen(fd, "wb") as out:
        done = 0
        while chunk := content.read(min(CHUNK_BYTES, member.size - done + 1)):
            done += len(chunk)
            if done > member.size:
                raise _bad("a member is longer than its header says")
            out.write(chunk)
        if done != member.size:
            raise _bad("a member is shorter than its header says")
        out.flush()
        durable.steps.fsync(out.fileno())
    return done


class _Forward:
    """A decompressed stream with a byte cap that only goes forward.

    tarfile reads extension headers in one piece of a size that the archive chose, hence
    the cap on a single read.
    """

    def __init__(self, file: gzip.GzipFile, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MEBIBYTE:
            raise _bad("a header is too large")
        data = self._file.read(size)
        self._position += len(data)
        if self._position > self._limit:
            raise _bad("it becomes too large when unpacked")
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise _bad("it is not in order")
        while self._position < position and self.read(min(MEBIBYTE, position - self._position)):
            pass
        return self._position


class _TarContent:
    """The bytes of one tar member, straight from the stream."""

    def __init__(self, stream: _Forward, member: tarfile.TarInfo) -> None:
        stream.seek(member.offset_data)
        self._stream = stream
        self._left = member.size

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        return data


def _tar_members(file: IO[bytes], limit: int) -> Iterator[Member]:
    # Headers and padding come on top of the contents: 1 KiB each and the end mark.
    with gzip.GzipFile(fileobj=file, mode="rb") as plain:
        stream = _Forward(plain, limit + 2 * MEBIBYTE)
        with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]  # only read, seek and tell are used
            for member in tar:
                path = safe_path(member.name)
                if member.isdir():
                    if path is not None:
                        yield Member(path, 0, None)
                elif member.type in {tarfile.REGTYPE, tarfile.AREGTYPE} and not member.issparse() and path is not None:
                    if member.size < 0:
                        raise _bad("a member has a negative size")
                    yield Member(path, member.size, _TarContent(stream, member))
                else:
                    raise _bad("a member is a link, a device or another special file")


def _zip_members(file: IO[bytes], packed: int, caps: Caps) -> Iterator[Member]:
    _check_zip_end(file, packed, caps)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            path = safe_path(info.orig_filename)
            mode = info.external_attr >> 16
            if info.flag_bits & 0x1:
                raise _bad("a member is encrypted")
            if stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
                raise _bad("a member is a link, a device or another special file")
            if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise _bad("a member has an unusual compression")
            if path is None or info.orig_filename.endswith("/"):
                if path is not None:
                    yield Member(path, 0, None)
                continue
            with archive.open(info) as content:
                yield Member(path, info.file_size, content)


def _check_zip_end(file: IO[bytes], packed: int, caps: Caps) -> None:
    """zipfile reads the central directory in one piece: look at its size first."""
    tail_size = min(packed, _ZIP_END.size + 0xFFFF)
    file.seek(packed - tail_size)
    tail = file.read(tail_size)
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < _ZIP_END.size:
        raise _bad("it is damaged (no end of central directory)")
    _, _, _, _, entries, directory_bytes, _, _ = _ZIP_END.unpack_from(tail, place)
    if entries > caps.files or directory_bytes > MAX_DIRECTORY_BYTES or b"PK\x06\x06" in tail:
        raise _bad(f"it has more than {caps.files} members")
    file.seek(0)


def _root(into: Path) -> Path:
    """The folder with the manifest: the top, or below folders that hold nothing else."""
    folder = into
    for _ in range(3):
        if (folder / MANIFEST).is_file():
            return folder
        entries = list(folder.iterdir())
        if len(entries) != 1 or not entries[0].is_dir():
            break
        folder = entries[0]
    if (folder / MANIFEST).is_file():
        return folder
    raise _bad(f"it holds no {MANIFEST}")


def _bad(cause: str) -> BundleError:
    return BundleError("unpack model archive", cause, "Make the archive anew from the bundle's folder")
