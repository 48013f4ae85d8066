"""Earlier studies fetched from Orthanc and from dcmqrscp by a whole node, analysed, and compared in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.harness import Node, Series, make_series
from tests.peers import Orthanc, free_port, program, send_items
from tests.serve.test_archives import QrScp

pytestmark = pytest.mark.peers
HERE = "127.0.0.1"


@dataclass
class Clinic:
    node: Node
    ports: dict[str, int]
    orthanc: Orthanc


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    program("Orthanc")
    program("dcmqrscp")
    ports = {"pacs": free_port(), "qrscp": free_port(), "deaf": free_port()}
    peers = [
        {"name": name, "ae_title": name.upper(), "host": HERE, "port": port, "allow": ["echo", "store"]}
        for name, port in ports.items()
    ]

    def rule(name: str, *sources: str, wait: float = 60.0) -> dict[str, Any]:
        return {
            "name": name,
            "match": {"SeriesDescription": name},
            "models": ["ct-lung"],
            "send_to": ["pacs"],
            "prior": {"from": list(sources), "wait_seconds": wait, "max_age_days": 3650},
        }

    node = Node(
        tmp_path_factory.mktemp("clinic"),
        peers=peers,
        rules=[rule("now-pacs", "index", "pacs"), rule("now-qrscp", "qrscp"), rule("now-deaf", "deaf", wait=2.0)],
        completeness={"quiet_seconds": 1},
    ).start()
    orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), node_port=node.port, dicom_port=ports["pacs"]).start()
    archive = QrScp(tmp_path_factory.mktemp("archive"), ports["qrscp"], {"node": ("DICOMNODE", node.port)}, aet="QRSCP")
    yield Clinic(node, ports, orthanc)
    archive.stop()
    orthanc.stop()
    assert node.stop() == 0


def two_studies(name: str, number: str = "1") -> tuple[Series, Series]:
    """An earlier and the current study of one patient; the earlier one has smaller pixels, so all is smaller in it."""

    def smaller(ds: Any, _: int) -> None:
        ds.PixelSpacing = [round(float(v) * 0.9, 6) for v in ds.PixelSpacing]

    patient = {"PatientID": f"PRIOR-{name}-{number}", "IssuerOfPatientID": "KH"}
    earlier = make_series("earlier", change=smaller, StudyDate="20250110", **patient)
    return earlier, make_series(f"now-{name}", StudyDate="20260112", **patient)


@pytest.mark.parametrize("source", ["pacs", "qrscp"])
def test_fetched_analysed_and_compared(clinic: Clinic, source: str) -> None:
    node = clinic.node
    earlier, current = two_studies(source)
    assert set(send_items(clinic.ports[source], earlier.items, called=source.upper())) == {0x0000}
    assert set(send_items(node.port, current.items)) == {0x0000}
    job = node.wait_job(current.series_uid)
    (wish,) = node.rows("SELECT * FROM priors WHERE job_id = ?", (job["id"],))
    assert (wish["state"], wish["source"]) == ("found", source)
    (before,) = node.jobs(earlier.series_uid)
    assert (before["step"], before["state"]) == ("prior", "done"), before["last_error"]
    (series,) = node.rows("SELECT selected_reason FROM series WHERE SeriesInstanceUID = ?", (earlier.series_uid,))
    assert series["selected_reason"].startswith("fetched as an earlier study, not analysed by itself")
    node.wait_delivered(current.series_uid)
    assert node.deliveries(earlier.series_uid) == [], "nothing of it is sent back"
    shown = json.loads(node.cli("jobs", "show", str(job["id"]), "--json"))
    changes = {(c["segment"], c["key"]): c for c in shown["summary"]["changes"]}
    for side in ("Left lung", "Right lung"):
        change = changes[side, "volume_ml"]
        assert change["before"] / change["value"] == pytest.approx(0.81, rel=0.03)
    assert (shown["prior"]["days"], shown["prior"]["source"]) == (367, source)


def test_courier_killed_while_it_fetches(clinic: Clinic) -> None:
    """What it asked for is asked again by the next one, and taken once."""
    node = clinic.node
    earlier, current = two_studies("pacs", "2")
    assert set(send_items(clinic.ports["pacs"], earlier.items, called="PACS")) == {0x0000}
    assert set(send_items(node.port, current.items)) == {0x0000}
    node.wait(
        lambda: node.rows(
            "SELECT 1 FROM priors p JOIN jobs j ON j.id = p.job_id JOIN series s ON s.id = j.series_id"
            " WHERE s.SeriesInstanceUID = ? AND p.attempts > 0",
            (current.series_uid,),
        ),
        30,
        "the courier asks",
    )
    node.kill("courier")
    job = node.wait_job(current.series_uid)
    (wish,) = node.rows("SELECT * FROM priors WHERE job_id = ?", (job["id"],))
    assert wish["state"] == "found"
    assert [j["state"] for j in node.jobs(earlier.series_uid)] == ["done"]
    assert len(node.wait_delivered(current.series_uid)) == 2


def test_peer_that_is_away_holds_nothing_up_for_longer_than_the_rule_says(clinic: Clinic) -> None:
    _, current = two_studies("deaf")
    assert set(send_items(clinic.node.port, current.items)) == {0x0000}
    job = clinic.node.wait_job(current.series_uid)
    (wish,) = clinic.node.rows("SELECT * FROM priors WHERE job_id = ?", (job["id"],))
    assert wish["state"] == "none" and "not there within the time set: peer 'deaf'" in wish["last_error"]
    assert "No earlier study to compare with" in job["notes"]
