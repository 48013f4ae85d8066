"""Pixel data of one Part 10 file as an array, in this process or in a pool of processes.

The codecs (GDCM above all) are native code fed with bytes from the network, and GDCM holds
the interpreter lock while it decodes. A pool of child processes therefore both uses all
cores and turns a crash of a codec into an error of this one series.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.quick import quick_frame
from dicomnode.lifeline import die_with_parent, limit_memory

_IN_FLIGHT = 4
"""Slices handed to each process ahead of use; bounds the compressed bytes in memory."""

_MAX_CHILD_BYTES = 4 * 1024**3
"""Address space of a child. A contract limits rows and columns of the header; a code stream may name others."""

Pixels = npt.NDArray[np.integer[Any]]


class Undecodable(Exception):
    """The pixel data cannot be turned into one 2-D array: stable code and a sentence.

    Travels between processes, so both parts are the exception's arguments.
    """

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(code, text)


def decode_frame(part10: bytes, rows: int, columns: int) -> Pixels:
    """Stored values of the single frame in ``part10``: integer array (rows, columns).

    No rescale is applied. Raises Undecodable: NO_PIXEL_DATA, or DECODE_FAILED when no
    plug-in can read it or the result has not the announced shape.
    """
    from pydicom import dcmread
    from pydicom.pixels import pixel_array

    plain = quick_frame(part10, rows, columns)
    if plain is not None:
        return plain
    try:
        ds = dcmread(io.BytesIO(part10), force=False)
    except Exception as cause:
        raise Undecodable("DECODE_FAILED", f"the file cannot be read ({type(cause).__name__})") from cause
    if "PixelData" not in ds:
        raise Undecodable("NO_PIXEL_DATA", "an instance has no pixel data")
    try:
        array = pixel_array(ds)
    except Exception as cause:
        syntax = getattr(ds.file_meta, "TransferSyntaxUID", "")
        name = getattr(syntax, "name", "unknown")
        raise Undecodable(
            "DECODE_FAILED", f"pixel data in {name} cannot be decoded ({type(cause).__name__})"
        ) from cause
    if array.shape != (rows, columns) or array.dtype.kind not in "iu":
        raise Undecodable("DECODE_FAILED", f"decoded to {array.shape}, expected {(rows, columns)}")
    return np.ascontiguousarray(array)


def _begin_child() -> None:
    """Die with the worker, and stay silent: what libraries warn of quotes values, which are patients' data."""
    die_with_parent()
    limit_memory(_MAX_CHILD_BYTES)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


class Decoder(Protocol):
    """Turns (Part 10 bytes, rows, columns) into stored values, in the order given."""

    def frames(self, files: Iterable[tuple[bytes, int, int]]) -> Iterator[Pixels]: ...


class InlineDecoder:
    """Decodes in this process: for small series and tests."""

    def frames(self, files: Iterable[tuple[bytes, int, int]]) -> Iterator[Pixels]:
        for part10, rows, columns in files:
            yield decode_frame(part10, rows, columns)


class PoolDecoder:
    """Decodes in ``processes`` child processes that stay alive between series.

    Children are spawned, so they share nothing with a process that holds a GPU context. A
    child that dies (a codec crashed, or the kernel took its memory) breaks the pool: the
    series is refused with DECODER_CRASHED and the next series gets fresh processes.
    """

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise ValueError("processes must be 1 or more")
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def at_once(self) -> int:
        """Slices that keep every process busy."""
        return 2 * self._processes

    def submit(self, part10: bytes, rows: int, columns: int) -> Future[Pixels]:
        """As :func:`decode_frame`; from any thread. RuntimeError where the pool is just going."""
        return self._executor().submit(decode_frame, part10, rows, columns)

    def frames(self, files: Iterable[tuple[bytes, int, int]]) -> Iterator[Pixels]:
        pool = self._executor()
        source = iter(files)
        pending: list[Future[Pixels]] = []
        try:
            for item in islice(source, self._processes * _IN_FLIGHT):
                pending.append(pool.submit(decode_frame, *item))
            while pending:
                frame = pending.pop(0).result()
                for item in islice(source, 1):
                    pending.append(pool.submit(decode_frame, *item))
                yield frame
        except BrokenProcessPool as cause:
            self._leave(pool)
            raise UnsuitableSeries(
                "decode pixel data",
                "DECODER_CRASHED",
                "the program that decodes the images crashed on one of them",
                "One of the files is damaged or made to do harm; look at the series before sending it again",
            ) from cause
        finally:
            for future in pending:
                future.cancel()

    def warm_up(self) -> None:
        """Start the children now, so that the first series does not wait for their imports."""
        pool = self._executor()
        for future in [pool.submit(time.sleep, 0.05) for _ in range(self._processes)]:
            future.result()

    def _executor(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is not None and getattr(self._pool, "_broken", False):  # another thread's file did it
                self._pool = None
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_begin_child)
            return self._pool

    def _leave(self, broken: ProcessPoolExecutor) -> None:
        """The next use starts new children; another thread may have seen to that already."""
        with self._lock:
            if self._pool is broken:
                self._pool = None
        broken.shutdown(wait=True, cancel_futures=True)

    def kill(self) -> None:
        """End the children at once; for a process that is about to end itself."""
        for child in multiprocessing.active_children():
            child.kill()

    def close(self) -> None:
        """End the children; the next use starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PoolDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
