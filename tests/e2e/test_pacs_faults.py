"""A PACS that is away, refuses, is full, or loses its answer: delivered in the end, once in effect."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from tests.e2e.harness import Node, make_series, rule
from tests.peers import ScriptedScp, StoreScp, free_port, send_items

NAMES = ("late", "full", "forgetful", "cutter", "refuser", "picky", "torn", "sleeper")


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {name: free_port() for name in NAMES}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, ports: dict[str, int]) -> Iterator[Node]:
    """One destination, and one rule for it, for each fault."""
    running = Node(
        tmp_path_factory.mktemp("faults"),
        peers=[
            {"name": name, "ae_title": name.upper(), "host": "127.0.0.1", "port": port} for name, port in ports.items()
        ],
        rules=[rule(name, {"SeriesDescription": name}, to=[name]) for name in NAMES],
        delivery={"response_seconds": 5},
    ).start()
    yield running
    assert running.stop() == 0


def send(node: Node, description: str) -> str:
    series = make_series(description)
    assert set(send_items(node.port, series.items)) == {0x0000}
    return series.series_uid


def tried(node: Node, series: str, times: int = 2) -> None:
    node.wait(
        lambda: any(d["attempts"] >= times for d in node.deliveries(series)), 40, f"delivery was tried {times} times"
    )


def kinds(files: list[Path]) -> list[str]:
    return sorted(str(pydicom.dcmread(f, stop_before_pixels=True).Modality) for f in files)


@pytest.mark.peers
def test_a_pacs_that_starts_later_gets_the_results_by_itself(node: Node, ports: dict[str, int], tmp_path: Path) -> None:
    series = send(node, "late")
    tried(node, series)
    assert {d["state"] for d in node.deliveries(series)} <= {"pending", "sending"}
    assert "does not answer" in next(d["last_error"] for d in node.deliveries(series) if d["last_error"])
    scp = StoreScp(tmp_path / "late", port=ports["late"])
    node.wait_delivered(series)
    scp.stop()
    assert kinds(scp.files()) == ["SEG", "SR"]


def test_out_of_resources_is_tried_again(node: Node, ports: dict[str, int]) -> None:
    answers = itertools.chain([0xA700, 0xA700, 0x0000, 0xA700], itertools.repeat(0x0000))
    scp = ScriptedScp(lambda number, uid: next(answers), port=ports["full"])
    series = send(node, "full")
    rows = node.wait_delivered(series)
    scp.stop()
    assert [len(times) for times in scp.stored.values()] == [1, 1]
    assert [uid for _, uid in scp.order] == [r["SOPInstanceUID"] for r in rows]  # SEG before SR
    assert {r["state"] for r in rows} == {"stored"}


def test_a_lost_answer_makes_no_second_object(node: Node, ports: dict[str, int]) -> None:
    """The PACS stores and then cuts the connection: the same bytes come again under the same UID."""
    scp = ScriptedScp(lambda number, uid: None if number in (1, 2, 4) else 0x0000, port=ports["forgetful"])
    series = send(node, "forgetful")
    rows = node.wait_delivered(series)
    scp.stop()
    assert scp.stored.keys() == {r["SOPInstanceUID"] for r in rows}
    assert sum(len(times) for times in scp.stored.values()) == 5
    assert all(len(set(times)) == 1 for times in scp.stored.values())


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "faults", "times"),
    [
        ("cutter", ["--abort-after"], 2),
        ("refuser", ["--refuse"], 2),
        ("torn", ["--abort-during"], 2),
        ("sleeper", ["--sleep-during", "60"], 1),
    ],
    ids=["abort-after", "refuse", "abort-during", "sleep-during"],
)
def test_a_storescp_with_faults_gets_them_once_it_works(
    node: Node, ports: dict[str, int], tmp_path: Path, name: str, faults: list[str], times: int
) -> None:
    bad = StoreScp(tmp_path / name, *faults, port=ports[name])
    series = send(node, name)
    tried(node, series, times)
    assert "stored" not in {d["state"] for d in node.deliveries(series)}
    bad.stop()
    good = StoreScp(tmp_path / name, port=ports[name])
    node.wait_delivered(series)
    good.stop()
    assert kinds(good.files()) == ["SEG", "SR"]
    assert len(node.jobs(series)) == 1


def test_a_refusal_for_good_is_parked_and_can_be_retried(node: Node, ports: dict[str, int]) -> None:
    willing = []
    scp = ScriptedScp(lambda number, uid: 0x0000 if willing else 0xA900, port=ports["picky"])
    series = send(node, "picky")
    node.wait(
        lambda: [d["state"] for d in node.deliveries(series)] == ["rejected", "rejected"], 40, "both are rejected"
    )
    assert all("0xA900" in d["last_error"] for d in node.deliveries(series))
    node.wait(lambda: any(e["subject"] == "picky" for e in node.events("delivery-rejected")), 20, "the event is there")
    willing.append(True)
    for delivery in node.deliveries(series):
        node.cli("deliveries", "retry", str(delivery["id"]))
    node.wait_delivered(series)
    scp.stop()
    assert len(scp.stored) == 2
