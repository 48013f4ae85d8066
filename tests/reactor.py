"""A cure for a race in pynetdicom 3.0.4 that costs one response in about a thousand.

Its requestor pauses the association's reactor by clearing a checkpoint and waiting for
``_is_paused``. A reactor that has just passed the checkpoint still shows that flag, goes on,
and takes the response off the queue; the requestor then waits for its whole time-out. A
fast peer makes it happen.
"""

from __future__ import annotations

import threading
import time
from typing import Any


def park(assoc: Any) -> None:
    """Return when the reactor really stands at its checkpoint; call right before a request.

    pynetdicom lets it go again after the response. Nothing to do in the reactor's own thread.
    """
    if threading.current_thread() is assoc:
        return
    checkpoint = assoc._reactor_checkpoint
    checkpoint.clear()
    while assoc.is_alive() and not checkpoint._cond._waiters:
        time.sleep(0.0002)
