"""Whom an exception blames that was raised while one item for the cloud was made ready or read. Pure.

| exception                          | what follows for the item                                     |
|------------------------------------|---------------------------------------------------------------|
| InputError                         | it is parked: the same fails the same way each time           |
| ChildEnded, any that nobody expects | counted as a process that it ended; parked after some of them |
| OSError of the disk, MemoryError, too many open files | it waits; nothing is counted against it     |

Others go on. What speaks of the node as a whole (no key, an index that cannot be written) is not judged here.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dicomnode.errors import InputError, NodeError

_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS})


class After(Enum):
    """What follows."""

    park = "park"
    count = "count"
    wait = "wait"


@dataclass(frozen=True, slots=True)
class Trouble:
    """``disk``: somebody has to look at it."""

    after: After
    cause: str
    disk: bool = False


def trouble(error: Exception, folder: Path) -> Trouble:
    """``folder``: on the disk that an OSError may blame."""
    if isinstance(error, InputError):
        return Trouble(After.park, error.cause)
    if isinstance(error, OSError) and error.errno not in _SHORT:
        return Trouble(After.wait, disk_trouble(error, folder), disk=True)
    if isinstance(error, OSError | MemoryError):
        short = (error.strerror if isinstance(error, OSError) else "") or "out of memory"
        return Trouble(After.wait, f"this machine is short of something ({short}): it is tried again")
    if isinstance(error, NodeError):
        return Trouble(After.count, error.cause)
    return Trouble(After.count, f"it cannot be made ready ({type(error).__name__})")  # its text may quote values


def disk_trouble(error: OSError, folder: Path) -> str:
    """For people: which disk, and what it says."""
    says = error.strerror or type(error).__name__
    return f"the disk of {folder} does not give the stored file ({says}): check the disk; it is tried again"
