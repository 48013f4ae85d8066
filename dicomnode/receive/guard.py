"""How many connections there may be, in total and by address; complaints that do not flood."""

from __future__ import annotations

import threading
import time
from collections import Counter

REPEAT_SECONDS = 10.0


class ConnectionCounter:
    """Connections in total and by address; a cap on one address leaves room for the others."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._lock = threading.Lock()
        self._by_address: Counter[str] = Counter()

    def admit(self, address: str) -> bool:
        with self._lock:
            if self._by_address.total() >= self._most or self._by_address[address] >= self._most_per_address:
                return False
            self._by_address[address] += 1
            return True

    def leave(self, address: str) -> None:
        with self._lock:
            self._by_address[address] -= 1
            if self._by_address[address] <= 0:
                del self._by_address[address]

    def total(self) -> int:
        with self._lock:
            return self._by_address.total()


class Throttle:
    """Lets the same complaint through once in a while: a flood must not become a flood of rows."""

    def __init__(self, seconds: float = REPEAT_SECONDS, most: int = 1000) -> None:
        self._seconds = seconds
        self._most = most
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}

    def passes(self, key: tuple[str, str]) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(key, -self._seconds) < self._seconds:
                return False
            if len(self._last) >= self._most:
                self._last.clear()
            self._last[key] = now
            return True
