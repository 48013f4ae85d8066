"""How often the worker looks at open series: as the processor allows, whatever the index lets it wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dicomnode.app_worker import LOOKING_SHARE, _select


def looked(look: Callable[[], None], wait: float) -> tuple[float, float]:
    """The pause after one look, and the wait for the bell behind it."""
    pauses: list[float] = []
    waits: list[float] = []
    stop = SimpleNamespace(is_set=lambda: len(waits) == 2, wait=pauses.append)
    selector = SimpleNamespace(run_once=lambda: [look(), wait][1])
    bell: Any = SimpleNamespace(wait=waits.append)
    shell: Any = SimpleNamespace(stop=stop, log=None)
    _select(shell, selector, bell, lambda: None)
    return pauses[0], waits[1]


def test_who_waited_for_the_index_looks_again_as_soon_as_else() -> None:
    """Four times as long as a commit of others takes would be two minutes without a look."""
    pause, _ = looked(lambda: [threading.Event().wait(0.5), None][1], 1.0)
    assert pause < 0.25


def test_looks_take_their_share_of_a_core_and_a_series_is_not_late_for_it() -> None:
    def busy() -> None:
        begin = time.thread_time()
        while time.thread_time() < begin + 0.02:
            pass

    pause, wait = looked(busy, 1.0)
    assert pause >= 0.02 * (1 / LOOKING_SHARE - 1)
    assert pause + wait == pytest.approx(1.0)
