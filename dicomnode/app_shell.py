"""What every process of the node has: logs, single instance, index, stop flag and heartbeat."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dicomnode import durable, lifeline, logs, metrics
from dicomnode.errors import NodeError
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates
from dicomnode.index.operation import BEAT_SECONDS, Processes
from dicomnode.index.seen import SeenCertificates
from dicomnode.settings import Settings


class LogLevel:
    """The level that the cloud desires, where it may, else that of the configuration; followed at each heartbeat."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._states = DesiredStates(db)
        self._allowed = "log_level" in settings.fleet.accept
        self._configured: str = settings.logging.level
        self._now: str = self._configured

    def follow(self) -> None:
        level = (self._states.log_level() if self._allowed else None) or self._configured
        if level != self._now:
            self._now = level
            logs.set_level(level)
            logs.get().warning("log level changed", state=level)


class Shell:
    """What every process has: logs, single instance, index, stop flag and heartbeat.

    The heartbeat row, and systemd's watchdog, are served from a thread that first asks
    ``healthy``.
    """

    def __init__(self, settings: Settings, name: str, *, lock: bool = True) -> None:
        logs.configure(name, settings.logging.level, settings.logging.format)
        metrics.prepare(name)
        self.settings = settings
        self.name = name
        self.log = logs.get()
        warnings.showwarning = self._show_warning
        self.stop = lifeline.StopFlag()
        durable.make_directory(settings.node.data_dir)
        self._lock = lifeline.hold_single_instance(settings.node.data_dir, name) if lock else -1
        self.db = Database(settings.node.data_dir)
        self._level = LogLevel(settings, self.db)
        self._seen = SeenCertificates(self.db, name.partition("-")[0], [peer.name for peer in settings.peers])
        self.detail: Callable[[], dict[str, Any]] = dict
        self.healthy: Callable[[], bool] = lambda: True
        self._state = "starting"
        self._beat = threading.Thread(target=self._beat_loop, name="heartbeat", daemon=True)
        self._wake = threading.Event()

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Libraries quote values in their warnings, and values are patients' data: the kind and place only."""
        del message, file, line
        self.log.debug("library warning", exc_type=category.__name__, source=f"{Path(filename).name}:{lineno}")

    def ready(self) -> None:
        """Tell the index and systemd that this process does its work now."""
        lifeline.loaded()
        self._state = "ready"
        self.beat()
        if not self._beat.is_alive():
            self._beat.start()
        lifeline.notify("READY=1")
        self.log.info("ready", pid=os.getpid())

    def beat(self) -> None:
        seen = metrics.peer_certificates()
        metrics.peer_certificates_known(self._seen.exchange(seen), seen)
        Processes(self.db).beat(self.name, self._state, self.detail(), metrics.snapshot())
        self._level.follow()

    def _beat_loop(self) -> None:
        while not self._wake.wait(BEAT_SECONDS):
            try:
                if not self.healthy():
                    self.log.error("process is not healthy, it will be restarted")
                    os._exit(1)
                self.beat()
                lifeline.notify("WATCHDOG=1")
            except NodeError as error:
                self.log.warning("heartbeat not written", error=str(error))
            except Exception as error:  # noqa: BLE001 without this thread the process would look dead for ever
                self.log.error("heartbeat not written", exc_type=type(error).__name__)

    def close(self) -> None:
        lifeline.notify("STOPPING=1")
        self._wake.set()
        self._state = "stopping"
        try:
            self.beat()
        except NodeError as error:
            self.log.warning("heartbeat not written", error=str(error))
        self.db.close()
        self.log.info("stopped")
