"""Start and stop: clean on SIGTERM, one node per data folder, a wrong configuration says so."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from tests.e2e.harness import Node, alive, make_series, rule
from tests.peers import Association, accepts, send_items


def test_sigterm_ends_everything_in_a_few_seconds(tmp_path: Path) -> None:
    node = Node(tmp_path, rules=[rule("ct", {"Modality": "CT"})]).start()
    series = make_series("stop")
    assert set(send_items(node.port, series.items)) == {0x0000}
    node.wait_job(series.series_uid)
    family = node.family()
    assert len(family) >= 6
    begin = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - begin < 10
    assert not [p for p in family if alive(p.pid)]
    socket.create_server(("127.0.0.1", node.port)).close()


def test_sigterm_does_not_wait_for_an_open_association(tmp_path: Path) -> None:
    node = Node(tmp_path).start()
    item = make_series("open").items[0]
    assoc = Association(node.port)
    assert assoc.store(item) == 0x0000
    begin = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - begin < 10
    assoc.sock.close()
    assert node.instance(item.sop_instance_uid) is not None


def test_killed_supervisor_leaves_no_orphans_and_the_next_start_goes_on(tmp_path: Path) -> None:
    node = Node(tmp_path, rules=[rule("ct", {"Modality": "CT"})]).start()
    family = node.family()
    series = make_series("supervisor")
    assert set(send_items(node.port, series.items)) == {0x0000}
    os.kill(node.pid, signal.SIGKILL)
    node.wait(lambda: not [p for p in family if alive(p.pid)], 10, "every child died with its parent")
    node.stop()
    node.start()
    assert node.wait_job(series.series_uid)["revision"] == 1
    assert node.stop() == 0


def test_a_second_node_on_the_same_folder_refuses(tmp_path: Path) -> None:
    node = Node(tmp_path / "one").start()
    second = Node(tmp_path / "two", data_dir=node.data_dir)
    text = second.cli("serve", code=78)
    assert f"another serve runs on {node.data_dir}" in text
    assert "use another node.data_dir" in text
    with Association(node.port) as assoc:
        assert assoc.echo() == 0x0000
    assert node.stop() == 0


def test_a_port_that_is_taken_ends_with_a_message(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with socket.create_server(("127.0.0.1", node.port)):
        text = node.cli("serve", code=78)
    assert f"127.0.0.1:{node.port}" in text
    assert "Another program listens there" in text


def test_a_wrong_configuration_ends_with_78_and_names_the_key(tmp_path: Path) -> None:
    node = Node(tmp_path, completeness={"quiet_secs": 3})
    text = node.cli("serve", code=78)
    assert "completeness.quiet_secs" in text
    assert "did you mean 'quiet_seconds'?" in text
    assert not accepts(node.port)
    node = Node(tmp_path, rules=[rule("ct", {"Modality": "CT"}, to=["nobody"])])
    assert "nobody" in node.cli("check-config", code=78)
