"""Durable files: write, fsync, rename, fsync the directory. The only place that deletes.

An error of fsync is never retried: the kernel may have dropped the dirty pages and report
success the next time (Rebello et al., USENIX ATC 2020). The caller ends the process with
:func:`die`; what was not acknowledged is sent again by the peer.

Every step goes through :data:`steps` so that a test can make it fail.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dicomnode.errors import DiskFull, StorageError

EXIT_STORAGE = 74
"""EX_IOERR of sysexits.h: the process ended because storage failed."""

TEMPORARY_SUFFIX = ".part"
FANOUT = 256
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(slots=True)
class Steps:
    """The system calls that durability rests on; replaced one by one in fault tests."""

    open = staticmethod(os.open)
    write = staticmethod(os.writev)
    pwrite = staticmethod(os.pwrite)
    fdatasync = staticmethod(os.fdatasync)
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)


steps = Steps()


class SyncFailed(StorageError):
    """fsync reported an error: nothing written since the last success can be trusted."""


def die(error: BaseException) -> NoReturn:
    """End the process at once, without running handlers that might acknowledge something."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"dicomnode: storage failed, process ends: {error}\n")
        sys.stderr.flush()
    os._exit(EXIT_STORAGE)


def sync_directory(path: Path) -> None:
    """fsync a directory so that names made in it survive a power cut."""
    try:
        fd = steps.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SyncFailed("open directory", error.strerror or str(error)) from error
    try:
        steps.fsync(fd)
    except OSError as error:
        raise SyncFailed("fsync directory", error.strerror or str(error), "Check the disk") from error
    finally:
        os.close(fd)


_certain: set[Path] = set()
"""Directories whose names this process has seen made durable."""


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Create a directory and its parents durably.

    One that exists is not taken for certain: a former life may have died between making it and
    the fsync, and what is acknowledged in it would go with its name. So the first call syncs.
    """
    if path in _certain and path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent, mode)
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        if not path.is_dir() or not os.access(path.parent, os.R_OK | os.W_OK):  # then it is not ours to sync
            return
    except OSError as error:
        if path.is_dir():  # a read-only system above data_dir
            return
        raise storage_error(f"create {path}", error) from error
    sync_directory(path.parent)
    _certain.add(path)


def sync_file(path: Path) -> None:
    """fsync a file that was written before. Raises SyncFailed; a file that is gone is fine."""
    try:
        fd = steps.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SyncFailed("open file to fsync it", error.strerror or str(error)) from error
    try:
        steps.fsync(fd)
    except OSError as error:
        raise SyncFailed("fsync file", error.strerror or str(error), "Check the disk") from error
    finally:
        os.close(fd)


def write_synced(path: Path, parts: Sequence[bytes | memoryview | bytearray], *, sync: bool = True) -> None:
    """Write a new file (0600) and, unless ``sync`` is false, fsync it; the name is not durable yet.

    Raises DiskFull when there is no room, SyncFailed when fsync fails, StorageError else;
    the partial file is removed.
    """
    try:
        fd = steps.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error("create file", error) from error
    try:
        try:
            _write_all(fd, parts)
        except OSError as error:
            raise storage_error("write file", error) from error
        if sync:
            _sync_file(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def _write_all(fd: int, parts: Sequence[bytes | memoryview | bytearray]) -> None:
    pending = [memoryview(p).cast("B") for p in parts if len(p)]
    while pending:
        written = steps.write(fd, pending[:512])
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


class StagedFile:
    """A new file (0600) written piece by piece; its name is temporary until it is placed.

    Raises as :func:`write_synced` does. :meth:`abandon` may be called at any time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = steps.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("create file", error) from error

    def fileno(self) -> int:
        return self._fd

    def write(self, parts: Sequence[bytes | memoryview | bytearray]) -> None:
        try:
            _write_all(self._fd, parts)
        except OSError as error:
            raise storage_error("write file", error) from error

    def flush(self) -> None:
        """Have what was written on the disk: a long object must not fill the memory with dirty pages."""
        _sync_file(self._fd)

    def sync(self) -> None:
        """fsync and close; afterwards only the name is missing."""
        try:
            _sync_file(self._fd)
        finally:
            self._close()

    def abandon(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _sync_file(fd: int) -> None:
    try:
        steps.fsync(fd)
    except OSError as error:
        if error.errno in _FULL:  # delayed allocation: no room is found out here
            raise storage_error("fsync file", error) from error
        raise SyncFailed("fsync file", error.strerror or str(error), "Check the disk") from error


def rename_into_place(temporary: Path, final: Path) -> None:
    """Give a synced file its name; durable once :func:`sync_directory` has run."""
    try:
        steps.rename(temporary, final)
    except OSError as error:
        raise storage_error("rename file", error) from error


def write_durable(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that after a power cut it is whole, old or absent."""
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    write_synced(temporary, [data])
    try:
        rename_into_place(temporary, path)
    except StorageError:
        remove(temporary)
        raise
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Delete one file that no committed row names. A missing file is fine."""
    try:
        steps.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("remove file", error) from error


def remove_tree(path: Path) -> None:
    """Delete a folder of derived or staged data."""
    shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, into: Path) -> Path:
    """Move a folder out of the way in one step, durably, so that what is deleted then is never seen in part.

    The path that it has now. Raises StorageError when the disk refuses; then it is where it was.
    """
    make_directory(into)
    aside = into / uuid.uuid4().hex
    rename_into_place(folder, aside)
    sync_directory(folder.parent)
    sync_directory(into)
    return aside


def mark_of(folder: Path) -> str:
    """By which a folder is known from one that is put in its place; empty where there is none."""
    try:
        stat = folder.stat()
    except OSError:
        return ""
    return f"{stat.st_ino}.{stat.st_ctime_ns}"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; what goes meanwhile counts nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(base, name).lstat().st_size
    return total


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class ObjectHash:
    """Hex SHA-256: of a data set, and of the data set followed by its file meta information."""

    data_set: str
    whole: str


def hash_object(data_set: bytes | memoryview, meta: bytes) -> ObjectHash:
    digest = hashlib.sha256(data_set)
    alone = digest.hexdigest()
    digest.update(meta)
    return ObjectHash(alone, digest.hexdigest())


def sha256_object(path: Path) -> str:
    """SHA-256 over the data set of a Part 10 file of ours, then over what stands before it.

    In this order the hash of the data set alone is a step on the way: one pass gives both.
    """
    with path.open("rb") as file:
        head = file.read(144)
        head += file.read(int.from_bytes(head[140:144], "little"))
        digest = hashlib.file_digest(file, "sha256")
    digest.update(head)
    return digest.hexdigest()


def object_intact(path: Path, expected: str) -> bool:
    """Whether a stored object is what was indexed; objects from before 0.2 were hashed as files.

    Raises OSError when it cannot be read.
    """
    return sha256_object(path) == expected or sha256_file(path) == expected


def free_bytes(path: Path) -> int:
    try:
        stat = os.statvfs(path)
    except OSError as error:
        raise storage_error("look at free space", error) from error
    return stat.f_bavail * stat.f_frsize


def storage_error(operation: str, error: OSError) -> StorageError:
    """The error of a failed system call: DiskFull when there is no room."""
    cause = error.strerror or str(error)
    if error.errno in _FULL:
        return DiskFull(operation, cause, "Free space on the volume of data_dir")
    return StorageError(operation, cause, "Check the volume of data_dir")


class ObjectStore:
    """Files of received and made objects under ``<data_dir>/objects``.

    Names are ours: 256 folders that exist from the start, and a random UUID; nothing of
    the peer's ever becomes a path (RELIABILITY.md, path traversal).
    """

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir / "objects"

    def prepare(self) -> None:
        """Create the folders; idempotent."""
        make_directory(self.root)
        for folder in self.folders():
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
        sync_directory(self.root)  # also when all are there: who made them may not have lived to do it

    def folders(self) -> Iterable[Path]:
        return (self.root / f"{i:02x}" for i in range(FANOUT))

    def new_name(self, series_uid: str) -> str:
        """A fresh relative name; instances of one series share a folder, so they share its fsync."""
        folder = hashlib.sha256(series_uid.encode()).hexdigest()[:2]
        return f"{folder}/{uuid.uuid4().hex}.dcm"

    def path(self, name: str) -> Path:
        return self.root / name

    def begin(self) -> StagedFile:
        """A file for an object whose series is not known yet; it gets its name in :meth:`place`."""
        name = uuid.uuid4().hex
        return StagedFile(self.root / name[:2] / f"{name}{TEMPORARY_SUFFIX}")

    def place(self, staged: StagedFile, name: str) -> Path:
        """Sync a staged file and give it its name; the caller still has to sync its folder."""
        final = self.path(name)
        staged.sync()
        rename_into_place(staged.path, final)
        return final

    def sync(self, names: Iterable[str], pool: Executor) -> None:
        """fsync these objects, side by side, then their folders. Raises SyncFailed.

        fsync waits for the file system's journal; several that wait share one commit of it.
        """
        files = list(dict.fromkeys(names))
        list(pool.map(lambda name: sync_file(self.path(name)), files))
        for folder in {self.path(name).parent for name in files}:
            sync_directory(folder)

    def stage(self, name: str, parts: Sequence[bytes | memoryview | bytearray], *, sync: bool = True) -> Path:
        """Write, fsync and name an object; the caller still has to sync its folder.

        Without ``sync`` the file is whole for all who look, but nothing of it survives a power
        cut until :meth:`sync` has run.
        """
        final = self.path(name)
        temporary = final.with_suffix(TEMPORARY_SUFFIX)
        write_synced(temporary, parts, sync=sync)
        try:
            rename_into_place(temporary, final)
        except StorageError:
            remove(temporary)
            raise
        return final
