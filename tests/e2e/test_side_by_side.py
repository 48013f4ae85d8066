"""A PACS that takes connections and says nothing: the others get their results, and the node stops in time."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tests.e2e.harness import Node, make_series, rule
from tests.peers import ScriptedScp, send_items


def test_a_silent_pacs_holds_up_neither_the_others_nor_the_stop(tmp_path: Path) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel accepts for it, nobody reads
    good = ScriptedScp(lambda number, uid: 0x0000)
    here = "127.0.0.1"
    node = Node(
        tmp_path / "node",
        peers=[
            # by name it comes first
            {"name": "a-silent", "ae_title": "SILENT", "host": here, "port": silent.getsockname()[1]}
            | {"commitment": True},
            {"name": "good", "ae_title": "PACS", "host": here, "port": good.port},
        ],
        rules=[rule("both", {"SeriesDescription": "both"}, to=["a-silent", "good"])],
        completeness={"quiet_seconds": 1},
        delivery={"response_seconds": 300, "connect_seconds": 300},
    ).start()
    series = make_series("both")
    assert set(send_items(node.port, series.items)) == {0x0000}

    def states(name: str) -> set[str]:
        return {d["state"] for d in node.deliveries(series.series_uid) if d["destination"] == name}

    node.wait(lambda: states("good") == {"stored"}, 60, "the good one has its results")
    assert states("a-silent") == {"sending"} and len(good.stored) == 2
    begin = time.monotonic()
    assert node.stop(60) == 0
    assert time.monotonic() - begin < 45, "it does not wait for a peer's 300 seconds"
    good.stop()
    silent.close()
