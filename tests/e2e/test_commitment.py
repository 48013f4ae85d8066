"""Storage commitment of a whole node, in both roles, with Orthanc and with a PACS that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.commitment_case import Committer, Requester, asked, commits, told
from tests.e2e.harness import Node, Series, make_series, rule
from tests.peers import CT_IMAGE, Orthanc, free_port, program, send_items, wait_for


@pytest.fixture(scope="module")
def odd() -> Iterator[Committer]:
    """A PACS whose script decides about each report."""
    with Committer(ae_title="ODD") as made:
        yield made


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {"pacs": free_port(), "mod": free_port()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, odd: Committer, ports: dict[str, int]) -> Iterator[Node]:
    here = "127.0.0.1"
    node = Node(
        tmp_path_factory.mktemp("committing"),
        peers=[
            {"name": "pacs", "ae_title": "PACS", "host": here, "port": ports["pacs"], "allow": ["echo", "commit"]}
            | {"commitment": True},
            {"name": "odd", "ae_title": "ODD", "host": here, "port": odd.port, "commitment": True},
            {"name": "mod", "ae_title": "MOD1", "host": here, "port": ports["mod"], "allow": ["store", "commit"]},
        ],
        rules=[
            rule("orthanc", {"SeriesDescription": "orthanc"}, to=["pacs"]),
            rule("odd", {"SeriesDescription": "odd"}, to=["odd"]),
        ],
        completeness={"quiet_seconds": 1},
        delivery={"backoff_seconds": 0.2, "backoff_max_seconds": 1, "commitment_wait_seconds": 0.5},
    ).start()
    odd.node_port = node.port
    yield node
    assert node.stop() == 0


@pytest.fixture(scope="module")
def orthanc(site: Node, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    program("Orthanc")
    folder = tmp_path_factory.mktemp("orthanc")
    peer = Orthanc(folder, node_port=site.port, dicom_port=ports["pacs"]).start()
    yield peer
    peer.stop()


def send(node: Node, description: str) -> Series:
    series = make_series(description)
    assert set(send_items(node.port, series.items)) == {0x0000}
    return series


def wait_states(node: Node, series: Series, *states: str) -> list[dict[str, Any]]:
    def done() -> Any:
        rows = node.deliveries(series.series_uid)
        return rows if [r["state"] for r in rows] == list(states) else None

    found: list[dict[str, Any]] = node.wait(done, 60, f"deliveries are {states}")
    return found


@pytest.mark.peers
def test_orthanc_commits_to_the_results(site: Node, orthanc: Orthanc) -> None:
    """It stores SEG and SR, is asked, and reports on an association of its own."""
    series = send(site, "orthanc")
    rows = wait_states(site, series, "committed", "committed")
    assert all(r["finished_time"] for r in rows)
    (question,) = [r for r in site.rows("SELECT * FROM commitments") if r["peer"] == "pacs" and r["role"] == "scu"]
    assert (question["state"], question["instances"], question["failed"]) == ("answered", 2, 0)


@pytest.mark.peers
def test_orthanc_asks_for_commitment(site: Node, orthanc: Orthanc) -> None:
    series = make_series("asked")
    assert set(send_items(site.port, series.items[:3])) == {0x0000}
    held = [item.sop_instance_uid for item in series.items[:3]]
    absent = series.items[3].sop_instance_uid

    def ask(*uids: str) -> Any:
        body = {"DicomInstances": [{"SOPClassUID": CT_IMAGE, "SOPInstanceUID": uid} for uid in uids]}
        answer = orthanc.post("/modalities/node/storage-commitment", body)
        return wait_for(
            lambda: (r := orthanc.get(answer["Path"]))["Status"] != "Pending" and r,
            30,
            "the report is there",
            site.tail,
        )

    report = ask(*held)
    assert report["Status"] == "Success" and {i["SOPInstanceUID"] for i in report["Success"]} == set(held)
    report = ask(held[0], absent)
    assert report["Status"] == "Failure" and [i["SOPInstanceUID"] for i in report["Success"]] == [held[0]]
    (failure,) = report["Failures"]
    assert (failure["SOPInstanceUID"], failure["FailureReason"]) == (absent, 0x0112), failure


def test_a_pacs_that_lost_a_result_gets_it_again(site: Node, odd: Committer) -> None:
    missing: list[str] = []

    def lose_one(transaction: str, uids: list[str]) -> Any:
        if missing:
            return commits(transaction, uids)
        missing.append(uids[-1])
        return told(transaction, uids[:-1], {uids[-1]: 0x0112})

    odd.answer, odd.way = lose_one, "same"
    series = send(site, "odd")
    rows = wait_states(site, series, "committed", "committed")
    assert [odd.stored.count(r["SOPInstanceUID"]) for r in rows] == [1, 2]
    site.wait(lambda: [e for e in site.events("commitment-failed") if e["subject"] == "odd"], 20, "the event is there")
    (event,) = [e for e in site.events("commitment-failed") if e["subject"] == "odd"]
    assert "1 with 0x0112" in event["text"]


def test_a_courier_killed_before_the_report_finishes_nothing_by_itself(site: Node, odd: Committer) -> None:
    odd.answer, odd.way, before = commits, "never", len(odd.asked)
    series = send(site, "odd")
    odd.wait(lambda: len(odd.asked) > before, 60)
    former = site.kill("courier")
    site.wait(lambda: site.pids().get("courier") not in (None, former), 30, "the courier is back")
    site.wait(
        lambda: site.rows("SELECT state FROM commitments WHERE peer = 'odd' ORDER BY id DESC")[0]["state"] == "waiting",
        30,
        "the report is owed, in this transaction or in one of the new courier",
    )
    wait_states(site, series, "committing", "committing")
    receiver = site.kill("receiver-1")
    site.wait(lambda: site.pids().get("receiver-1") not in (None, receiver), 30, "the receiver is back")
    assert {r["finished_at"] for r in site.deliveries(series.series_uid)} == {None}
    assert odd.report(told(*odd.asked[-1])) == 0x0000
    wait_states(site, series, "committed", "committed")


def test_a_modality_that_went_away_gets_its_report(site: Node, ports: dict[str, int]) -> None:
    series = make_series("asked")
    assert set(send_items(site.port, series.items[:2], calling="MOD1")) == {0x0000}
    uids = [item.sop_instance_uid for item in series.items[:2]]
    with Requester() as modality:
        modality.open(site.port).ask(asked(uids, "1.9.1"))
        modality.assoc.abort()
    with Requester(port=ports["mod"]) as modality:
        assert modality.aside.wait() == [(1, "1.9.1", set(uids), {})]
    state = "SELECT state FROM commitments WHERE TransactionUID = '1.9.1'"
    site.wait(lambda: site.rows(state) == [{"state": "reported"}], 20, "its answer to the report is committed")


def test_transactions_are_shown_without_uids_of_objects(site: Node, odd: Committer) -> None:
    odd.answer, odd.way = commits, "without"
    wait_states(site, send(site, "odd"), "committed", "committed")
    text = site.log.read_text(errors="replace")
    known = {r["SOPInstanceUID"] for r in site.rows("SELECT SOPInstanceUID FROM instances")}
    shown = site.cli("commitments", "list", "--json") + "".join(e["text"] for e in site.events())
    assert known and '"answered"' in shown
    assert not any(uid in shown or uid in text for uid in known)
