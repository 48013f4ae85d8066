"""One receiver with a few studies, and the peers that query it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.harness import Node
from tests.peers import Orthanc, StoreScp, free_port, program, send_items
from tests.serve.cases import items


@dataclass
class Site:
    node: Node
    sink_port: int
    plain_port: int
    orthanc_port: int


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    ports = [free_port() for _ in range(4)]
    every = ["echo", "find", "move", "get"]
    here = "127.0.0.1"
    node = Node(
        tmp_path_factory.mktemp("queried"),
        peers=[
            {"name": "asker", "ae_title": "ASKER", "allow": every},
            {"name": "finder", "ae_title": "FINDER", "allow": ["echo", "find"]},
            {"name": "sink", "ae_title": "SINK", "host": here, "port": ports[0]},
            {"name": "plain", "ae_title": "PLAIN", "host": here, "port": ports[1]},
            {"name": "away", "ae_title": "AWAY", "host": here, "port": ports[3]},
            {"name": "nowhere", "ae_title": "NOWHERE", "allow": ["echo"]},
            {"name": "pacs", "ae_title": "PACS", "host": here, "port": ports[2], "allow": every},
        ],
        dimse={"workers": 1, "query_max_answers": 5},
        delivery={"connect_seconds": 3, "response_seconds": 3},
    ).start("run", "receiver")
    assert set(send_items(node.port, items())) == {0x0000}
    yield Site(node, ports[0], ports[1], ports[2])
    assert node.stop() == 0  # looks for the canary in the log


@pytest.fixture
def sink(site: Site, tmp_path: Path) -> Iterator[StoreScp]:
    """storescp that takes every transfer syntax."""
    scp = StoreScp(tmp_path / "sink", port=site.sink_port, aet="SINK")
    yield scp
    scp.stop()


@pytest.fixture(scope="session")
def orthanc(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    program("Orthanc")
    peer = Orthanc(tmp_path_factory.mktemp("orthanc"), node_port=site.node.port, dicom_port=site.orthanc_port).start()
    yield peer
    peer.stop()
