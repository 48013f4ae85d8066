"""How a process lives with its supervisor: parent death, single instance, systemd, stop signals."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import multiprocessing
import os
import resource
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from dicomnode.errors import OperatorError

SUPERVISED = "DICOMNODE_SUPERVISED"
"""In the environment of processes that must die with the one that started them: its process id."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that nothing is orphaned.

    It may have died already, while this process was loading its modules: who it was is known from
    the environment or from multiprocessing, and getppid() tells of another one then.
    """
    pool = multiprocessing.parent_process()
    parent = pool.pid if pool is not None else int(os.environ.get(SUPERVISED) or os.getppid())
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def loaded() -> None:
    """Call when everything is loaded that stays: garbage is no longer looked for in it.

    Otherwise the interpreter goes through all of it now and then, which takes 0.1 s for the
    libraries of the worker, in the middle of a job.
    """
    gc.collect()
    gc.freeze()


def limit_memory(size: int) -> None:
    """The address space of this process: what a codec asks for beyond it fails here, not on the whole box."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_data(size: int) -> None:
    """The private memory of this process (RLIMIT_DATA, Linux 4.7): allocations beyond it fail.

    Not the address space, of which GPU libraries reserve far more than they use.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def hold_single_instance(data_dir: Path, name: str) -> int:
    """Lock ``run/<name>.lock`` for the life of this process; leases carry the same name.

    Raises OperatorError when another process of that name runs on this data folder.
    """
    folder = data_dir / "run"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise OperatorError(
            f"start {name}", f"another {name} runs on {data_dir}", "Stop the other node, or use another node.data_dir"
        ) from None
    return fd


def notify(message: str) -> None:
    """Tell systemd (sd_notify(3)); nothing when it did not start us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def on_stop(action: Callable[[], None]) -> None:
    """Run ``action`` on SIGTERM and SIGINT; it must be quick and safe in a signal handler."""

    def handle(_: int, __: FrameType | None) -> None:
        action()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


class StopFlag:
    """An event that signal handlers set; ``wait`` returns True when it is time to end.

    No ``threading.Event``: a handler runs between two instructions of the main thread, also while
    that one holds the event's lock in ``wait``, and would wait for it forever. A counter of the
    kernel (eventfd(2)) has no lock; once set it stays readable for all who wait.
    """

    def __init__(self) -> None:
        self._set = False
        self._counter = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        on_stop(self.set)

    def set(self) -> None:
        self._set = True
        with contextlib.suppress(BlockingIOError):  # it is at its limit, so it is set
            os.eventfd_write(self._counter, 1)

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> bool:
        """Raises nothing on a signal: it waits on (PEP 475)."""
        if not self._set:
            poll = select.poll()
            poll.register(self._counter, select.POLLIN)
            poll.poll(max(0.0, seconds) * 1000)
        return self._set
