"""This node, started through its real command line, and what its index says of it."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import psutil

from benchmarks.tools import LOOPBACK, ROOT, BenchError, family, free_port, running, wait_for
from dicomnode.index.database import rows_of

AE_TITLE = "DICOMNODE"
CHEST_RULE = '[[rules]]\nname = "chest"\nmatch = { Modality = "CT" }\nmodels = ["ct-lung"]\nsend_to = ["pacs"]\n'
START_SECONDS = 120.0


class Node:
    """``dicomnode serve`` with a folder of its own.

    BENCH may do everything; ``targets`` are further peers with a port, by AE title in lower
    case. Limits on connections are raised, because every peer here has the same address.
    """

    def __init__(
        self, folder: Path, *, targets: Mapping[str, int] | None = None, rules: str = "", data_dir: Path | None = None
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.port, self.http = free_port(), free_port()
        self.data_dir = data_dir or folder / "data"
        self.config = folder / "node.toml"
        self.pid = 0
        self.environment: dict[str, str] = {}
        """Further variables for the processes that :meth:`serving` starts."""
        peers = "".join(
            f'[[peers]]\nname = "{name}"\nae_title = "{name.upper()}"\nhost = "{LOOPBACK}"\nport = {port}\n'
            for name, port in (targets or {}).items()
        )
        self.config.write_text(
            f'[node]\nae_title = "{AE_TITLE}"\ndata_dir = "{self.data_dir}"\nreserve_mb = 100\n'
            f'[dimse]\nhost = "{LOOPBACK}"\nport = {self.port}\nmax_connections = 300\n'
            "max_connections_per_address = 300\nidle_seconds = 600\n"
            f'[http]\nhost = "{LOOPBACK}"\nport = {self.http}\n'
            f'[inference]\nmodels_dir = "{ROOT / "models"}"\n'
            '[logging]\nformat = "json"\n'
            '[[peers]]\nname = "bench"\nae_title = "BENCH"\nallow = ["echo", "store", "find", "move", "get"]\n'
            + peers
            + rules
        )

    def argv(self, *verb: str) -> list[str]:
        """The installed command where there is one, as an operator runs it."""
        script = Path(sys.executable).with_name("dicomnode")
        front = [str(script)] if script.exists() else [sys.executable, "-m", "dicomnode"]
        return [*front, *verb, "--config", str(self.config)]

    @contextmanager
    def serving(self) -> Iterator[None]:
        with running(self.argv("serve"), self.environment, self.folder / "log") as process:
            self.pid = process.pid
            try:
                wait_for(lambda: process.poll() is not None or self._ready(), "the node to be ready", START_SECONDS)
            except BenchError as error:
                raise BenchError(f"{error}; {self._last_words()}") from None
            if process.poll() is not None:
                raise BenchError(f"the node ended with {process.returncode}; {self._last_words()}")
            yield

    def _last_words(self) -> str:
        """The end of its log, which holds no patient data, and what /ready says."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()[-5:]
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{self.http}/ready", timeout=5) as reply:
                lines.append(reply.read().decode())
        except urllib.error.HTTPError as error:
            lines.append(error.read().decode())
        except OSError as error:
            lines.append(f"/ready: {error}")
        return " | ".join(lines)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{self.http}/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Read-only look at the index."""
        connection = apsw.Connection(str(self.data_dir / "index.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            connection.set_busy_timeout(10_000)
            return rows_of(connection, sql, parameters)
        finally:
            connection.close()

    def value(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        found = self.rows(sql, parameters)
        return next(iter(found[0].values())) if found else None

    def instances(self) -> int:
        return int(self.value("SELECT count(*) FROM instances"))

    def receivers(self) -> list[psutil.Process]:
        """The processes that take associations, with what they started; not who only supervises them."""
        found = self.rows("SELECT name, pid FROM processes WHERE name LIKE 'receiver%' AND name <> 'receiver'")
        mine = {p.pid for p in family(self.pid)}
        listeners = [f for row in found if row["pid"] in mine for f in family(row["pid"])]
        return list({p.pid: p for p in listeners}.values())
