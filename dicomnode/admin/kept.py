"""Figures that are dear to get are kept for as long as their price allows.

Counting what a node has done in years reads years of rows. What took 15 ms of processor time or more
is therefore shown again for fifty times as long as it took, so that however often somebody looks, a
figure takes at most 2 % of one processor; what is quicker is always as the index has it now.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from dicomnode.index.database import Database

T = TypeVar("T")
DEAR_SECONDS = 0.015
TIMES = 50.0
LONGEST_SECONDS = 5.0

_lock = threading.Lock()
_kept: WeakKeyDictionary[Database, dict[str, _Figure]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Figure:
    value: Any
    until: float


def kept(db: Database, name: str, look: Callable[[], T]) -> T:
    """What ``look`` gives, or gave a moment ago under that ``name``; callers do not change it. Blocking."""
    with _lock:
        known = _kept.get(db, {}).get(name)
    if known is not None and time.monotonic() < known.until:
        value: T = known.value
        return value
    begin = time.thread_time()
    value = look()
    price = time.thread_time() - begin
    with _lock:
        figures = _kept.setdefault(db, {})
        if price >= DEAR_SECONDS:
            figures[name] = _Figure(value, time.monotonic() + min(TIMES * price, LONGEST_SECONDS))
        else:
            figures.pop(name, None)
    return value
