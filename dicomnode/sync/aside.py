"""De-identification in a child process: parsing must not hold the interpreter that answers the API."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dicomnode.deidentify import Departure, deidentify
from dicomnode.errors import MalformedDataSet
from dicomnode.lifeline import die_with_parent
from dicomnode.pseudonyms import Pseudonyms

NICE = 5


def leave(path: Path, key: bytes) -> Departure:
    """What leaves in place of the file at ``path``. Raises MalformedDataSet; OSError and MemoryError pass."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MalformedDataSet("de-identify", f"the stored file cannot be read ({error.strerror})") from None
    return deidentify(content, Pseudonyms(key))


class Aside:
    """One child, started with the first object; a dead one is replaced."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def leave(self, path: Path, key: bytes) -> Departure:
        """As :func:`leave`. Raises MemoryError where two children died: most likely they were killed for memory."""
        for _ in range(2):
            pool = self._executor()
            try:
                return pool.submit(leave, path, key).result()
            except BrokenProcessPool:
                self._drop(pool)
        raise MemoryError("the process that de-identifies died")

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _executor(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
            return self._pool

    def _drop(self, broken: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is broken:
                self._pool = None
        broken.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """The child ends with the sidecar, gives way to intake, and is silent: libraries' warnings quote values."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
