"""Stored objects in the uncompressed default, for a peer that cannot take them as stored.

Codecs are native code fed with bytes from the network, so they run in a child process: its
crash is one failed sub-operation, not the end of the receiver.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import zlib
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dicomnode.header import DEFLATED
from dicomnode.lifeline import die_with_parent, limit_memory

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
UNCOMPRESSED = (EXPLICIT_LITTLE, IMPLICIT_LITTLE)
MAX_PIXEL_BYTES = 1024**3
MAX_INFLATED_BYTES = 1024**3
"""Of a deflated data set, which may be a thousand times its file."""
MAX_CHILD_BYTES = 6 * 1024**3
"""Address space of the child: the size that a codec finds in a code stream is the sender's word too."""
SECONDS = 120.0
_PIECE = 1024 * 1024


class NotTranscodable(Exception):
    """The object cannot be turned into the syntax; says the kind of cause, no values."""


def transcode_file(path: str, transfer_syntax_uid: str) -> bytes:
    """The data set of a Part 10 file in an uncompressed little-endian syntax; same UIDs.

    Raises NotTranscodable.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _transcode(path, transfer_syntax_uid)
        except NotTranscodable:
            raise
        except Exception as error:  # noqa: BLE001 codecs raise what they like; the object is counted as failed
            raise NotTranscodable(type(error).__name__) from None


def _transcode(path: str, transfer_syntax_uid: str) -> bytes:
    from io import BytesIO

    from pydicom import dcmread
    from pydicom.filebase import DicomIO
    from pydicom.filewriter import write_dataset
    from pydicom.uid import ExplicitVRBigEndian

    if not _inflates_within(path, MAX_INFLATED_BYTES):
        raise NotTranscodable(f"more than {MAX_INFLATED_BYTES} bytes inflated")
    ds = dcmread(path)
    stored = ds.file_meta.TransferSyntaxUID
    if stored == ExplicitVRBigEndian:
        raise NotTranscodable("big endian")
    if stored.is_compressed and not stored.is_deflated:
        frames = int(ds.get("NumberOfFrames") or 1)
        size = int(ds.Rows) * int(ds.Columns) * int(ds.SamplesPerPixel) * frames * ((int(ds.BitsAllocated) + 7) // 8)
        if size > MAX_PIXEL_BYTES:
            raise NotTranscodable(f"more than {MAX_PIXEL_BYTES} bytes of pixels")
        ds.decompress(generate_instance_uid=False)
    buffer = DicomIO(BytesIO())
    buffer.is_little_endian = True
    buffer.is_implicit_VR = transfer_syntax_uid == IMPLICIT_LITTLE
    write_dataset(buffer, ds)
    return bytes(buffer.parent.getvalue())


def _inflates_within(path: str, limit: int) -> bool:
    """Whether what ``path`` holds, where it is deflated, is at most so many bytes; counted, never held."""
    with Path(path).open("rb") as file:
        head = file.read(144)
        meta = file.read(min(int.from_bytes(head[140:144], "little"), _PIECE))
        if not any(uid.encode() in meta for uid in DEFLATED):
            return True
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := inflater.unconsumed_tail or file.read(_PIECE):
            size += len(inflater.decompress(piece, _PIECE))
            if size > limit:
                return False
    return True


def _begin_child() -> None:
    die_with_parent()
    limit_memory(MAX_CHILD_BYTES)


class Transcoder:
    """One child process, started at the first use; thread-safe.

    The child is started and fed by one thread of its own: the kernel ends a child with the
    *thread* that started it (PR_SET_PDEATHSIG), and an association's thread is gone soon.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._feeder: ThreadPoolExecutor | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, path: Path, transfer_syntax_uid: str) -> bytes:
        """Raises NotTranscodable."""
        with self._lock:
            if self._feeder is None:
                self._feeder = ThreadPoolExecutor(1, thread_name_prefix="transcode")
            waiting = self._feeder.submit(self._run, os.fspath(path), transfer_syntax_uid)
        try:
            return waiting.result()
        except CancelledError:
            raise NotTranscodable("the receiver stops") from None

    def _run(self, path: str, transfer_syntax_uid: str) -> bytes:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin_child)
        try:
            return self._pool.submit(transcode_file, path, transfer_syntax_uid).result(SECONDS)
        except BrokenProcessPool:
            self._end_child()
            raise NotTranscodable("the decoder crashed") from None
        except TimeoutError:
            self._end_child()
            raise NotTranscodable("the decoder took too long") from None

    def _end_child(self) -> None:
        """Also one that hangs in a codec; the next use starts a new one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for child in list((getattr(pool, "_processes", None) or {}).values()):
                child.kill()
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """End the child; what waits for it fails."""
        with self._lock:
            feeder, self._feeder = self._feeder, None
        if feeder is not None:
            for child in list((getattr(self._pool, "_processes", None) or {}).values()):
                child.kill()
            feeder.shutdown(wait=True, cancel_futures=True)
            self._end_child()
