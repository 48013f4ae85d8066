"""A thread that has little to do and whose answer somebody waits for asks the kernel for short turns.

Linux gives the processor to who has the earliest deadline, and a thread that asks for a shorter
slice has an earlier one (EEVDF; sched_setattr(2), ``sched_runtime`` of SCHED_OTHER since Linux 6.12).
It gets no larger share, needs no privilege, and older kernels ignore it: between two requests
nothing changes, but an answer does not wait for the whole turns of those that infer, encode and send.
The opposite is for work that nobody waits for (:func:`giving_way`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterator

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
"""Number of the system call; the C library has had no function for it before glibc 2.41."""

_RESET_ON_FORK = 1
"""SCHED_FLAG_RESET_ON_FORK: neither threads nor children that it starts get the same."""

_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
"""struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max."""

ANSWER_NANOSECONDS = 100_000
"""Of threads that answer the API: the shortest that the kernel gives. Its own is 1.4 ms on two cores, 2.8 on eight."""

INTAKE_NANOSECONDS = 300_000
"""Of few associations, which receive more than they answer: longer than the API's, shorter than all others'.

With other work on both of two cores a C-STORE of 131 KB took 3.5 ms in the median instead of 5.5, p95 14 instead of 20
(2026-11-29, 12 turns of 300 each); turns of 1 ms gained a tenth.
"""


def ask_for_short_turns(nanoseconds: int = ANSWER_NANOSECONDS) -> bool:
    """For the calling thread. False where it is not to be had, and then everything stays as it is."""
    if _SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # an operator who chose another policy knows better
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, nanoseconds, 0, 0, 0, 0)
    try:
        return bool(ctypes.CDLL(None, use_errno=True).syscall(_SCHED_SETATTR, 0, attributes, 0) == 0)
    except (OSError, AttributeError):
        return False


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """The calling thread never takes the processor from one that runs; its share stays the same.

    SCHED_BATCH of sched(7), for this thread and what it starts meanwhile. Not a lower priority: who
    holds a lock of Python or of the index has to get on.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield  # an operator who chose another policy knows better
        return
    _schedule(os.SCHED_BATCH)
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(0))
