"""C-MOVE to DCMTK's storescp with its faults switched on, and DCMTK's cancels: counted, told, survived."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.peers import StoreScp, item_of, run_program
from tests.serve.cases import STUDY_A, UIDS, items
from tests.serve.conftest import Site

pytestmark = pytest.mark.peers
SENT = {item.sop_instance_uid: item.data for item in items()}
STUDY = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY_A}")


def move(site: Site, *options: object) -> str:
    done = run_program(
        "movescu", "-d", "-S", "-aet", "ASKER", "-aec", "DICOMNODE", "-aem", "SINK", *options, *STUDY,
        "127.0.0.1", site.node.port,
    )  # fmt: skip
    return done.stderr + done.stdout


def final(output: str) -> tuple[int, dict[str, int]]:
    """Status of the last C-MOVE-RSP, and its counts (PS3.7 9.3.4.2)."""
    last = output[output.rindex("Message Type                  : C-MOVE RSP") :]
    status = int(re.search(r"DIMSE Status +: (0x[0-9a-f]{4})", last)[1], 16)  # type: ignore[index]
    counts = re.findall(r"(Remaining|Completed|Failed|Warning) Suboperations +: (\d+)", last)
    return status, {name: int(number) for name, number in counts}


@pytest.mark.parametrize(
    ("faults", "status", "stored"),
    [
        (["--refuse"], 0xA702, 0),
        (["--abort-after"], 0xA702, None),  # it may have kept the one that it did not answer
        (["--abort-during"], 0xA702, 0),
        (["--sleep-during", "60"], 0xA702, 0),
        (["--reject"], 0x0000, 4),  # it turns away who has no implementation class UID; this node has one
        (["--ignore"], 0x0000, 0),
    ],
    ids=["refuse", "abort-after", "abort-during", "sleep-during", "reject", "ignore"],
)
def test_a_target_with_faults(site: Site, tmp_path: Path, faults: list[str], status: int, stored: int | None) -> None:
    scp = StoreScp(tmp_path / "bad", *faults, port=site.sink_port, aet="SINK")
    try:
        answer, counts = final(move(site))
    finally:
        scp.stop()
    assert answer == status
    assert counts["Completed"] + counts["Failed"] == len(UIDS[:4])
    assert counts["Completed"] == (4 if status == 0x0000 else 0)
    if stored is not None:
        assert len(scp.files()) == stored
    assert site.node.running


def test_after_a_fault_the_next_move_is_whole(site: Site, tmp_path: Path) -> None:
    bad = StoreScp(tmp_path / "bad", "--abort-after", port=site.sink_port, aet="SINK")
    try:
        move(site)
    finally:
        bad.stop()
    good = StoreScp(tmp_path / "good", port=site.sink_port, aet="SINK")
    try:
        assert final(move(site))[0] == 0x0000
    finally:
        good.stop()
    got = {item.sop_instance_uid: item.data for item in map(item_of, good.files())}
    assert got == {uid: SENT[uid] for uid in UIDS[:4]}


def test_movescu_cancels_in_the_middle(site: Site, tmp_path: Path) -> None:
    """The target takes a second for each object, so that the cancel comes in time."""
    slow = StoreScp(tmp_path / "slow", "--sleep-after", "1", port=site.sink_port, aet="SINK")
    try:
        status, counts = final(move(site, "--cancel", 1))
    finally:
        slow.stop()
    assert status == 0xFE00
    assert 1 <= counts["Completed"] < 4
    assert counts["Completed"] + counts["Remaining"] == 4  # PS3.4 C.4.2.3.1: what was not begun remains


def test_movescu_that_aborts_instead_of_releasing(site: Site, tmp_path: Path) -> None:
    scp = StoreScp(tmp_path / "sink", port=site.sink_port, aet="SINK")
    try:
        move(site, "--abort")
        assert final(move(site))[0] == 0x0000
    finally:
        scp.stop()
