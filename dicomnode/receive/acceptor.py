"""Accepts connections and runs each in a thread of its own; nothing here knows DICOM.

Several processes may accept on the same listening sockets; the kernel gives each connection
to one of them.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode.errors import OperatorError
from dicomnode.promptness import INTAKE_NANOSECONDS, ask_for_short_turns
from dicomnode.receive.guard import ConnectionCounter

BUSY_SECONDS = 0.05
"""Pause when the process has no descriptor left for a connection that waits."""


@dataclass(frozen=True, slots=True)
class Door:
    """A listening socket; ``tls`` tells its connections apart from plain ones."""

    listening: socket.socket
    tls: bool = False


YIELDS, YIELD_SECONDS = 4, 0.001
"""How often, and how long, a receiver lets a less busy one go first."""


FEW = 2
"""Associations of one receiver that have short turns: with many, they wait for each other, and the API for them."""


class Acceptor:
    """``serve(sock, address, door)`` runs in the connection's thread and owns the socket.

    ``refuse(address)`` is told of a connection that the counter did not admit, ``changed`` how many
    run; ``busier(running)`` says whether another process has fewer.
    """

    def __init__(
        self,
        doors: Sequence[Door],
        counter: ConnectionCounter,
        serve: Callable[[socket.socket, Any, Door], None],
        refuse: Callable[[str], None],
        *,
        changed: Callable[[int], None] = lambda running: None,
        busier: Callable[[int], bool] = lambda running: False,
    ) -> None:
        self._doors = {door.listening.fileno(): door for door in doors}
        self._counter = counter
        self._serve = serve
        self._refuse = refuse
        self._changed = changed
        self._busier = busier
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopped = False
        self._quiet = threading.Condition()
        self._running = 0
        self._thread = threading.Thread(target=self._accept_all, name="acceptor", daemon=True)
        for door in doors:
            door.listening.setblocking(False)  # another process may be faster

    def start(self) -> None:
        self._thread.start()

    def accepting(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Accept no more and close the doors; connections that are open go on."""
        if self._stopped:
            return
        self._stopped = True
        os.write(self._wake_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        for door in self._doors.values():
            door.listening.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def wait_quiet(self, seconds: float) -> bool:
        """Wait until no connection runs; False when the time was not enough."""
        with self._quiet:
            return self._quiet.wait_for(lambda: self._running == 0, seconds)

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for number in self._doors:
            poll.register(number, select.POLLIN)
        while not self._stopped:
            for number, _ in poll.poll():
                door = self._doors.get(number)
                if door is not None:
                    self._accept(door)

    def _leave_to_others(self, door: Door) -> bool:
        """Whether another receiver, which serves fewer than this one, took the connection."""
        waiting = select.poll()
        waiting.register(door.listening, select.POLLIN)
        for _ in range(YIELDS):
            if not self._busier(self._running):
                return False
            time.sleep(YIELD_SECONDS)
            if not waiting.poll(0):
                return True
        return False

    def _accept(self, door: Door) -> None:
        if self._leave_to_others(door):
            return
        try:
            sock, address = door.listening.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError:  # out of descriptors: the connection waits until some are free
            time.sleep(BUSY_SECONDS)
            return
        if not self._counter.admit(str(address[0])):
            sock.close()
            self._refuse(str(address[0]))
            return
        with self._quiet:
            self._running += 1
            self._changed(self._running)
        thread = threading.Thread(target=self._run, args=(sock, address, door), name="association", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            sock.close()
            self._left(address)
            time.sleep(BUSY_SECONDS)

    def _run(self, sock: socket.socket, address: Any, door: Door) -> None:
        if self._running <= FEW:
            ask_for_short_turns(INTAKE_NANOSECONDS)
        try:
            self._serve(sock, address, door)
        finally:
            sock.close()
            self._left(address)

    def _left(self, address: Any) -> None:
        self._counter.leave(str(address[0]))
        with self._quiet:
            self._running -= 1
            self._changed(self._running)
            self._quiet.notify_all()


def listen(host: str, port: int, backlog: int = 512, *, section: str = "dimse") -> socket.socket:
    """Bind and listen; ``section`` of the configuration has host and port.

    Raises OperatorError when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        hint = {
            13: f"Ports below 1024 need CAP_NET_BIND_SERVICE (see systemd/) or choose a higher {section}.port",
            98: f"Another program listens there; stop it or change {section}.port",
            99: f"This machine has no such address; change {section}.host",
        }.get(error.errno or 0, f"Check {section}.host and {section}.port")
        raise OperatorError("listen for DICOM", f"{host}:{port}: {error.strerror}", hint) from None
    return sock
