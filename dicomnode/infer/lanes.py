"""Several calls at once in threads, their answers in order; for work that lets go of the interpreter's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_lanes(call: Callable[[T], R], items: Iterable[T], lanes: int) -> Iterator[R]:
    """``call`` of each item, in order, up to ``lanes`` of them at a time.

    As many items as there are lanes are taken ahead of the one whose answer is yielded. What a
    call raises is raised in its turn, and nothing further is begun; a consumer that stops
    early waits for the calls that run.
    """
    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(pool.submit(call, item))
                if len(running) > lanes:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for one in running:
                one.cancel()
