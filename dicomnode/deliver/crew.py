"""Work for several peers side by side: one that does not answer must not hold up the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from dicomnode import logs
from dicomnode.errors import NodeError

Task = Callable[[], bool]
"""Returns whether there was something to do."""


class Crew:
    """Runs tasks in at most ``most`` threads, one at a time for each key.

    ``on_work`` is called, in the task's thread, after a task that did something. The failure of
    a task is logged and ends nothing but it: what it held comes back when its lease runs out.
    With ``most = 0`` a task runs at once in the caller's thread, and raises there.
    """

    def __init__(self, most: int, on_work: Callable[[], None] = lambda: None) -> None:
        self._most = most
        self._on_work = on_work
        self._log = logs.get()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, Task]] = deque()
        self._keys: set[str] = set()
        self._threads = self._idle = 0
        self._abandoned = False
        self.stopping = threading.Event()
        """Set when the process ends: a task that waits for a peer should come to its end."""

    def take(self, key: str, task: Task) -> bool:
        """Start a task; False when one with this key runs, or as many as may."""
        if self._most == 0:
            task()
            return True
        with self._changed:
            if self.stopping.is_set() or key in self._keys or len(self._keys) >= self._most:
                return False
            self._keys.add(key)
            self._waiting.append((key, task))
            if self._idle >= len(self._waiting):
                self._changed.notify()
            else:
                try:
                    threading.Thread(target=self._run, name=f"crew-{self._threads + 1}", daemon=True).start()
                except RuntimeError:  # the system gives no more threads
                    self._waiting.pop()
                    self._keys.discard(key)
                    return False
                self._threads += 1
                self._idle += 1
        return True

    def close(self, seconds: float) -> bool:
        """Take no more and wait for what runs; False when it did not end in time."""
        self.stopping.set()
        with self._changed:
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._keys, seconds)
            self._abandoned = not ended
        return ended

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self.stopping.is_set())
                if not self._waiting:
                    return
                self._idle -= 1
                key, task = self._waiting.popleft()
            worked = self._guarded(task)
            with self._changed:
                self._keys.discard(key)
                self._idle += 1
                self._changed.notify_all()
            if worked:
                self._on_work()

    def _guarded(self, task: Task) -> bool:
        try:
            return task()
        except NodeError as error:
            if not self._abandoned:
                self._log.error("delivery failed, trying again", error=str(error))
        except Exception as error:  # noqa: BLE001 the others go on; values stay out of the log
            if not self._abandoned:
                self._log.error("delivery failed, trying again", exc_type=logs.fault(error))
        return False
