"""A real Prometheus (Debian) that takes remote-write, on a free loopback port."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.peers import Process, free_port, program, wait_for

CONFIG = "storage: {tsdb: {out_of_order_time_window: 9d}}\n"


class Prometheus:
    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.address}/api/v1/write"

    @contextlib.contextmanager
    def running(self) -> Iterator[Prometheus]:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "prometheus.yml"
        config.write_text(CONFIG)
        process = Process(
            [
                program("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={self.folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--web.enable-remote-write-receiver",
            ],
            self.folder / "prometheus.log",
        )
        try:
            wait_for(self._ready, 30, "Prometheus is ready", process.output)
            yield self
        finally:
            process.stop()

    def _ready(self) -> bool:
        try:
            with urlopen(f"{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def series(self, selector: str, at: float, seconds: int) -> list[dict[str, Any]]:
        """Raw samples of the ``seconds`` before Unix time ``at``: ``metric`` and ``values`` of each series."""
        query = urlencode({"query": f"{selector}[{seconds}s]", "time": f"{at:.3f}"})
        with urlopen(f"{self.address}/api/v1/query?{query}", timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])
