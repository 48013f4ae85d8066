"""Engines that are built beside serving: one thread, its builds in child processes, progress for all to see."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dicomnode import logs
from dicomnode.errors import NodeError
from dicomnode.infer.choice import EngineChoice
from dicomnode.infer.golden import ReadyModel

MAX_BROKEN = 3


@dataclass(slots=True)
class _Build:
    """``what`` is being done, ``share`` of it is done."""

    than: str
    what: str = "waits"
    share: float = 0.0
    begun: float = field(default_factory=time.monotonic)


class Upgrades:
    """``want`` what could serve on a better engine, ``take`` it once it has passed its golden cases.

    ``on_ready`` is called in the thread when something can be taken, to wake the worker.
    """

    def __init__(self, choice: EngineChoice, on_ready: Callable[[], None] = lambda: None) -> None:
        self._choice, self._on_ready = choice, on_ready
        self._lock = threading.Lock()
        self._wanted: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._builds: dict[Path, _Build] = {}
        self._done: dict[Path, ReadyModel] = {}
        self._broken: Counter[Path] = Counter()
        self._thread: threading.Thread | None = None

    def want(self, path: Path, than: str) -> None:
        """Have the bundle built for an engine before ``than`` (empty: for any); at most once at a time.

        Not any more after MAX_BROKEN attempts that ended in an error which no engine accounts for.
        """
        with self._lock:
            if path in self._builds or path in self._done or self._broken[path] >= MAX_BROKEN:
                return
            self._builds[path] = _Build(than)
            self._wanted.put(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine-build", daemon=True)
                self._thread.start()

    def take(self, path: Path) -> ReadyModel | None:
        """The model on its better engine, once; the caller closes it."""
        with self._lock:
            return self._done.pop(path, None)

    def keep(self, paths: Collection[Path]) -> None:
        """Close what was built for bundles that are none of these: nobody will take it."""
        with self._lock:
            unwanted = [self._done.pop(path) for path in self._done.keys() - set(paths)]
        for model in unwanted:
            model.close()

    def report(self) -> dict[str, dict[str, Any]]:
        """``name@version`` -> what is being built, its share done in 0..1, and for how many seconds."""
        with self._lock:
            return {
                f"{path.parent.name}@{path.name}": {
                    "step": build.what,
                    "share": round(build.share, 2),
                    "seconds": round(time.monotonic() - build.begun),
                }
                for path, build in self._builds.items()
            }

    def _run(self) -> None:
        while True:
            path = self._wanted.get()
            build = self._builds[path]
            build.begun = time.monotonic()
            ready: ReadyModel | None = None
            broken = 1
            try:
                ready = self._choice.upgrade(path, build.than, partial(_note, build))
                broken = 0
            except NodeError as error:
                logs.get().error("engine not built", model=path.parent.name, version=path.name, error=str(error))
            except Exception as error:  # noqa: BLE001 what an engine does wrong must not end the builds of others
                logs.get().error("engine not built", model=path.parent.name, exc_type=type(error).__name__)
            with self._lock:
                del self._builds[path]
                self._broken[path] += broken
                if ready is not None:
                    self._done[path] = ready
            if ready is not None:
                logs.get().info("better engine is ready", model=path.parent.name, engine=ready.session.engine)
                self._on_ready()


def _note(build: _Build, what: str, share: float) -> None:
    build.what, build.share = what[:80], share
