"""The node of the demo: its configuration, its processes, and when it is ready."""

from __future__ import annotations

import http.client
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from dicomnode.demo.launch import LOOPBACK, Program, free_port, wait_until
from dicomnode.demo.pacs import AE_TITLE as PACS_AE
from dicomnode.demo.workspace import Workspace
from dicomnode.settings import Settings, load_settings

NODE_AE = "DICOMNODE"
MODALITY_AE = "MODALITY"
READY_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Ports:
    """Of the node: ``dicom`` for C-STORE, ``http`` for the dashboard."""

    dicom: int
    http: int


def choose_ports(*, prefer_known: bool) -> Ports:
    """The usual ports where they are free and a person will use them, else any."""
    return Ports(free_port(11112 if prefer_known else 0), free_port(8080 if prefer_known else 0))


def write_configuration(space: Workspace, ports: Ports, pacs_port: int) -> Settings:
    """Write ``node.toml`` and ``modality.toml``; returns the node's settings."""
    models = Path(__file__).resolve().parents[2] / "models"
    space.config.write_text(
        f"""# Made by 'dicomnode demo'. config/dicomnode.toml explains every key.
[node]
ae_title = "{NODE_AE}"
data_dir = {_text(space.data_dir)}
institution = "Demo"
reserve_mb = 256

[dimse]
host = "{LOOPBACK}"
port = {ports.dicom}
journal_mb = 64

[http]
host = "{LOOPBACK}"
port = {ports.http}

[inference]
models_dir = {_text(models)}

[[peers]]                      # the scanner: it may send and ask
name = "modality"
ae_title = "{MODALITY_AE}"
host = "{LOOPBACK}"
allow = ["echo", "store", "find", "get"]

[[peers]]                      # the archive: it gets the results
name = "pacs"
ae_title = "{PACS_AE}"
host = "{LOOPBACK}"
port = {pacs_port}
allow = ["echo", "find", "move", "get", "commit"]

[[rules]]
name = "chest-ct"
match = {{ Modality = "CT" }}
models = ["ct-lung"]
send_to = ["pacs"]

[[rules]]
name = "chest-radiographs"
match = {{ Modality = ["CR", "DX"] }}
models = ["cxr-quality"]
results = ["SEG", "SR", "SC"]
send_to = ["pacs"]

[logging]
format = "json"
""",
        encoding="utf-8",
    )
    space.modality_config.write_text(
        f"""# A scanner for 'dicomnode send node PATH --config THIS'. Made by 'dicomnode demo'.
[node]
ae_title = "{MODALITY_AE}"
data_dir = {_text(space.root / "modality")}

[[peers]]
name = "node"
ae_title = "{NODE_AE}"
host = "{LOOPBACK}"
port = {ports.dicom}
""",
        encoding="utf-8",
    )
    return load_settings(space.config)


def _text(path: Path) -> str:
    """A TOML basic string: JSON's escapes are among TOML's."""
    return json.dumps(str(path), ensure_ascii=False)


def start_node(space: Workspace) -> Program:
    """``dicomnode serve`` as a child; its log is ``node.log``."""
    argv = [sys.executable, "-m", "dicomnode", "serve", "--config", str(space.config)]
    return Program("dicomnode serve", argv, space.node_log)


def wait_ready(program: Program, ports: Ports) -> None:
    """Until /ready answers 200: all processes beat, the model passed its golden cases."""
    wait_until(lambda: _ready(ports.http), READY_SECONDS, "start the node", program)


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10.0)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
