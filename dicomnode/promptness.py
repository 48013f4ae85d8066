"""A thread that has little to do and whose answer somebody waits for asks the kernel for short turns.

Linux gives the processor to who has the earliest deadline, and a thread that asks for a shorter
slice has an earlier one (EEVDF; sched_setattr(2), ``sched_runtime`` of SCHED_OTHER since Linux 6.12).
It gets no larger share, needs no privilege, and older kernels ignore it: between two requests
nothing changes, but an answer does not wait for the whole turns of those that receive and infer.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
"""Number of the system call; the C library has had no function for it before glibc 2.41."""

_RESET_ON_FORK = 1
"""SCHED_FLAG_RESET_ON_FORK: neither threads nor children that it starts get the same."""

_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
"""struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max."""

SLICE_NANOSECONDS = 200_000
"""The kernel's own is 1.4 ms on two cores, 2.8 on eight; it takes 0.1 to 100."""


def ask_for_short_turns() -> bool:
    """For the calling thread. False where it is not to be had, and then everything stays as it is."""
    if _SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # an operator who chose another policy knows better
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(
        _ATTRIBUTES.size, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, SLICE_NANOSECONDS, 0, 0, 0, 0
    )
    try:
        return bool(ctypes.CDLL(None, use_errno=True).syscall(_SCHED_SETATTR, 0, attributes, 0) == 0)
    except (OSError, AttributeError):
        return False
