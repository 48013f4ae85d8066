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


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Create a directory and its parents durably."""
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent, mode)
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        return
    except OSError as error:
        raise _storage_error(f"create {path}", error) from error
    sync_directory(path.parent)


def write_synced(path: Path, parts: Sequence[bytes | memoryview | bytearray]) -> None:
    """Write a new file (0600) and fsync it; the name is not durable yet.

    Raises DiskFull when there is no room, SyncFailed when fsync fails, StorageError else;
    the partial file is removed.
    """
    try:
        fd = steps.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _storage_error("create file", error) from error
    try:
        try:
            _write_all(fd, parts)
        except OSError as error:
            raise _storage_error("write file", error) from error
        try:
            steps.fsync(fd)
        except OSError as error:
            if error.errno in _FULL:  # delayed allocation: no room is found out here
                raise _storage_error("fsync file", error) from error
            raise SyncFailed("fsync file", error.strerror or str(error), "Check the disk") from error
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


def rename_into_place(temporary: Path, final: Path) -> None:
    """Give a synced file its name; durable once :func:`sync_directory` has run."""
    try:
        steps.rename(temporary, final)
    except OSError as error:
        raise _storage_error("rename file", error) from error


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
        raise _storage_error("remove file", error) from error


def remove_tree(path: Path) -> None:
    """Delete a folder of derived or staged data."""
    shutil.rmtree(path, ignore_errors=True)


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    try:
        stat = os.statvfs(path)
    except OSError as error:
        raise _storage_error("look at free space", error) from error
    return stat.f_bavail * stat.f_frsize


def _storage_error(operation: str, error: OSError) -> StorageError:
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
        missing = [d for d in self.folders() if not d.is_dir()]
        for folder in missing:
            folder.mkdir(mode=0o700, exist_ok=True)
        if missing:
            sync_directory(self.root)

    def folders(self) -> Iterable[Path]:
        return (self.root / f"{i:02x}" for i in range(FANOUT))

    def new_name(self, series_uid: str) -> str:
        """A fresh relative name; instances of one series share a folder, so they share its fsync."""
        folder = hashlib.sha256(series_uid.encode()).hexdigest()[:2]
        return f"{folder}/{uuid.uuid4().hex}.dcm"

    def path(self, name: str) -> Path:
        return self.root / name

    def stage(self, name: str, parts: Sequence[bytes | memoryview | bytearray]) -> Path:
        """Write, fsync and name an object; the caller still has to sync its folder."""
        final = self.path(name)
        temporary = final.with_suffix(TEMPORARY_SUFFIX)
        write_synced(temporary, parts)
        try:
            rename_into_place(temporary, final)
        except StorageError:
            remove(temporary)
            raise
        return final
