"""What an error of the device means, and what to try next: a table. Pure.

Order of the remedies (issue "Inference", Engines): a smaller batch, another engine, later.
A sticky error spoils the context of the whole process: every later call fails too, so the
process ends once the lease of its job was given back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum


class Fault(StrEnum):
    """Kinds of failure; each is the value of an EngineError's ``code``, all others are ``RUN_FAILED``."""

    oom = "OOM"
    lost = "DEVICE_LOST"
    shape = "SHAPE"  # outside the shapes that the engine was built for
    failed = "RUN_FAILED"


class Remedy(StrEnum):
    smaller_batch = "smaller batch"
    other_engine = "other engine"
    later = "later"
    end_process = "end process"


_SMALLER, _OTHER, _LATER, _END = Remedy.smaller_batch, Remedy.other_engine, Remedy.later, Remedy.end_process

REMEDIES: Mapping[tuple[Fault, bool, bool], Remedy] = {
    # fault, batch can shrink, another engine is there
    (Fault.oom, True, True): _SMALLER,
    (Fault.oom, True, False): _SMALLER,
    (Fault.oom, False, True): _OTHER,
    (Fault.oom, False, False): _LATER,
    (Fault.shape, True, True): _OTHER,
    (Fault.shape, True, False): _LATER,
    (Fault.shape, False, True): _OTHER,
    (Fault.shape, False, False): _LATER,
    (Fault.failed, True, True): _OTHER,
    (Fault.failed, True, False): _LATER,
    (Fault.failed, False, True): _OTHER,
    (Fault.failed, False, False): _LATER,
    (Fault.lost, True, True): _END,
    (Fault.lost, True, False): _END,
    (Fault.lost, False, True): _END,
    (Fault.lost, False, False): _END,
}
"""A batch that is too wide or an engine that computes wrongly is not mended by halving; only memory is."""


def remedy(code: str, *, can_shrink: bool, has_other: bool) -> Remedy:
    """What to try after an EngineError of ``code``."""
    return REMEDIES[fault_of(code), can_shrink, has_other]


def fault_of(code: str) -> Fault:
    """The kind of an EngineError's ``code``."""
    return next((fault for fault in Fault if fault == code), Fault.failed)


def golden_code(code: str) -> str:
    """What a golden case that failed with an error of ``code`` says: of the device, or of model and engine."""
    return code if fault_of(code) in (Fault.oom, Fault.lost) else "GOLDEN_MISMATCH"


def leave_engine(attempts: int, last_error: str | None) -> bool:
    """Whether a job starts on the next engine: its last attempt ended the process with a sticky error."""
    return attempts > 1 and f"{Fault.lost}:" in (last_error or "")


OUT_OF_MEMORY = 2
STICKY = frozenset({46, 100, 101, 201, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 803, 911, 999})
"""CUresult values after which the process has to end (CUDA Driver API, "Data types used by CUDA driver").

Unavailable, missing or invalid device; invalid context; uncorrectable ECC and NVLink errors;
illegal address, launch time-out, destroyed context, assert, hardware stack, illegal instruction,
misaligned address, invalid address space, invalid program counter, launch failure, containment,
driver mismatch, external device, unknown.
"""

_NUMBER = re.compile(r"cuda (?:failure|error)[ :]*(\d+)", re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|failed to allocate|bad_alloc|alloc_failed|(?:insufficient|not enough).{0,20}memory"
    r"|arena.{0,40}limit",
    re.IGNORECASE,
)
_STICKY_WORDS = re.compile(
    r"illegal memory access|illegal address|unspecified launch failure|launch timed out|device-side assert"
    r"|misaligned address|illegal instruction|invalid program counter|hardware stack error|uncorrectable"
    r"|no cuda-capable device|context is destroyed|device is lost|fallen off the bus|device not ready for use",
    re.IGNORECASE,
)


def classify(text: str, number: int = 0) -> Fault:
    """The fault behind a library's words; ``number`` is the CUresult or cudaError where it is known.

    The runtime and the driver use the same values for the sticky errors.
    """
    found = _NUMBER.search(text)
    code = number or (int(found.group(1)) if found else 0)
    if code == OUT_OF_MEMORY or (not code and _MEMORY.search(text)):
        return Fault.oom
    if code in STICKY or _STICKY_WORDS.search(text):
        return Fault.lost
    return Fault.oom if _MEMORY.search(text) else Fault.failed
