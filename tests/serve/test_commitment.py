"""Storage commitment as SCP: what is durable is committed to, and the peer hears of it in the end."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
from pynetdicom.dimse_primitives import C_ECHO, N_ACTION, N_EVENT_REPORT

from dicomnode import logs
from dicomnode.commitment import SOP_CLASS, SOP_INSTANCE
from dicomnode.deliver.reporter import Reporter
from dicomnode.durable import ObjectStore
from dicomnode.errors import StorageError
from dicomnode.index import durability
from dicomnode.index.database import Database
from dicomnode.index.reports import LEASE_SECONDS
from dicomnode.serve import Commitment
from dicomnode.serve import commitment as module
from dicomnode.settings import Peer, Settings
from tests.commitment_case import EXPLICIT_LITTLE, Heard, Requester, Site, asked, encoded, reference, told
from tests.index.rows import FakeClock
from tests.peers import free_port

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _short_wait_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not held is looked for again for a while; these tests know that it will not come."""
    monkeypatch.setattr(durability, "LATE_SECONDS", 0.5)


@pytest.fixture
def port() -> int:
    """Where the modality listens for reports."""
    return free_port()


@pytest.fixture
def site(db: Database, port: int) -> Iterator[Site]:
    every = ["store", "commit"]
    made = Site(
        db,
        [
            {"name": "mod1", "ae_title": "MOD1", "port": port, "allow": every},
            {"name": "mod2", "ae_title": "MOD2", "allow": every},
            {"name": "storer", "ae_title": "STORER", "allow": ["store"], "commitment": True},
        ],
        commitment_wait_seconds=5,
    )
    yield made
    made.close()


# The report on the association of the request.


def test_what_is_durable_is_committed_to_on_the_same_association(site: Site) -> None:
    uids = site.store()
    with Requester().open(site.port) as modality:
        assert modality.ask(asked(uids, "1.9")).Status == 0x0000
        ((event_type, transaction, committed, failed),) = modality.heard.wait()
        site.wait_state("reported")
    assert (event_type, transaction, committed, failed) == (1, "1.9", set(uids), {})
    ds = modality.heard.data[0]
    assert ds.RetrieveAETitle == "DICOMNODE" and "StorageMediaFileSetUID" not in ds


def test_each_failure_has_its_reason(site: Site) -> None:
    uids = site.store(3)
    row = site.db.row("SELECT file FROM instances WHERE SOPInstanceUID = ?", (uids[2],))
    assert row is not None
    path = ObjectStore(site.db.data_dir).path(row["file"])
    path.write_bytes(path.read_bytes()[:-2])
    wanted = [uids[0], reference(uids[1], SEG), uids[2], "1.2.99", reference("1.2.98", "1.2.840.10008.5.1.1.9")]
    with Requester().open(site.port) as modality:
        assert modality.ask(asked(wanted)).Status == 0x0000
        ((event_type, _, committed, failed),) = modality.heard.wait()
    assert event_type == 2 and committed == {uids[0]}
    assert failed == {uids[1]: 0x0119, uids[2]: 0x0110, "1.2.99": 0x0112, "1.2.98": 0x0122}
    (event,) = site.db.rows("SELECT * FROM events WHERE kind = 'object-damaged'")
    assert event["subject"] == "mod1" and "1 stored object" in event["text"]


def test_several_requests_on_one_association_each_get_their_report(site: Site) -> None:
    uids = site.store(3)
    with Requester().open(site.port) as modality:
        for number, uid in enumerate(uids):
            assert modality.ask(asked([uid], f"1.9.{number}")).Status == 0x0000
        reports = modality.heard.wait(3)
    assert [(r[1], r[2]) for r in reports] == [(f"1.9.{n}", {uid}) for n, uid in enumerate(uids)]


def test_the_same_request_again_is_answered_again(site: Site) -> None:
    uids = site.store(1)
    with Requester().open(site.port) as modality:
        for _ in range(2):
            assert modality.ask(asked([*uids, "1.2.99"], "1.9")).Status == 0x0000
            modality.heard.wait(1)
            site.wait_state("reported")
        reports = modality.heard.wait(2)
    assert reports[0] == reports[1] and len(site.rows()) == 1


def test_a_transaction_uid_in_use_fails_as_a_whole(site: Site) -> None:
    first, second = site.store(2)
    with Requester().open(site.port) as modality:
        modality.ask(asked([first], "1.9"))
        modality.heard.wait(1)
        assert modality.ask(asked([second], "1.9")).Status == 0x0000
        reports = modality.heard.wait(2)
    assert reports[1] == (2, "1.9", set(), {second: 0x0131})


@pytest.mark.parametrize(("status", "state"), [(0x0115, "rejected"), (0x0110, "pending"), (0x0000, "reported")])
def test_the_peers_answer_to_the_report_decides(site: Site, status: int, state: str) -> None:
    uids = site.store(1)
    with Requester(status=status).open(site.port) as modality:
        modality.ask(asked(uids))
        modality.heard.wait()
        site.wait_state(state)
    assert bool(site.db.rows("SELECT 1 FROM events WHERE kind = 'commitment-rejected'")) == (state == "rejected")


# The report on an association of its own.


def test_a_peer_that_released_gets_the_report_on_a_new_association(site: Site, port: int) -> None:
    uids = site.store()
    with Requester(port=port) as modality:
        modality.open(site.port).ask(asked([*uids, "1.2.99"], "1.9"))
        modality.assoc.release()
        site.wait_state("pending")
        assert modality.aside.reports == [] and modality.heard.reports == []
        site.reporter.run_once()
        ((event_type, transaction, committed, failed),) = modality.aside.wait()
    assert (event_type, transaction, committed, failed) == (2, "1.9", set(uids), {"1.2.99": 0x0112})
    assert modality.proposed == [(False, True)], "this node proposes to be the SCP"
    assert site.states() == ["reported"]


def test_a_peer_that_answers_no_role_selection_gets_its_report(site: Site, port: int) -> None:
    uids = site.store(1)
    with Requester(port=port, roles=False) as modality:
        modality.open(site.port).ask(asked(uids))
        modality.assoc.abort()
        site.wait_state("pending")
        site.reporter.run_once()
        assert modality.aside.wait()[0][2] == set(uids)
    assert site.states() == ["reported"]


def test_a_peer_that_is_away_gets_the_report_when_it_is_back(site: Site, port: int, clock: FakeClock) -> None:
    uids = site.store(1)
    with Requester() as modality:
        for number in range(2):
            modality.open(site.port).ask(asked(uids, f"1.9.{number}"))
            modality.assoc.abort()
        site.wait_state("pending", "pending")
        for _ in range(3):
            site.reporter.run_once()
            assert "does not answer" in site.rows()[0]["last_error"]
            clock.move(900)
        (event,) = site.db.rows(
            "SELECT * FROM events WHERE kind = 'commitment-unreported' AND text LIKE 'commitment 1 %'"
        )
        assert event["subject"] == "mod1"
        modality._ae.add_supported_context(SOP_CLASS, [EXPLICIT_LITTLE], scu_role=False, scp_role=True)
        modality.listen(port)
        site.reporter.run_once()
        reports = modality.aside.wait(2)
        assert len(modality.proposed) == 1, "both on one association"
    assert {r[1] for r in reports} == {"1.9.0", "1.9.1"} and site.states() == ["reported", "reported"]


def test_a_peer_that_stays_and_does_not_answer_is_told_again(site: Site, port: int) -> None:
    site.settings.delivery.__dict__["commitment_wait_seconds"] = 0.2
    uids = site.store(1)

    class Deaf(Heard):
        def add(self, event: Any) -> None:
            super().add(event)
            event.assoc.dimse.send_msg = lambda *_: None  # the answer is never sent

    with Requester(port=port) as modality:
        modality.heard = Deaf()
        modality.open(site.port).ask(asked(uids))
        modality.heard.wait()
        site.wait_state("pending")
        assert "did not answer" in site.rows()[0]["last_error"]
        site.reporter.run_once()
        assert modality.aside.wait()[0][2] == set(uids)


def test_a_peer_without_an_address_waits_for_the_operator(site: Site) -> None:
    uids = site.store(1, "MOD2")
    with Requester("MOD2") as modality:
        modality.open(site.port).ask(asked(uids))
        modality.assoc.abort()
    site.wait_state("pending")
    site.reporter.run_once()
    assert "lacks host and port" in site.rows()[0]["last_error"]


def test_a_long_judgement_is_left_to_the_courier(site: Site, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JUDGE_SECONDS", 0.0)
    uids = site.store(1)
    with Requester(port=port).open(site.port) as modality:
        modality.ask(asked(uids))
        site.wait_state("pending")
        site.reporter.run_once()
        assert modality.aside.wait()[0][2] == set(uids) and modality.heard.reports == []


# What is refused.


def test_requests_that_are_refused(site: Site) -> None:
    with Requester().open(site.port) as modality:
        assert modality.ask(asked(["1.5"]), action=2).Status == 0x0123
        assert modality.ask(asked(["1.5"]), sop_instance="1.2.3").Status == 0x0112
        answer = modality.ask(asked([]))
        assert answer.Status == 0x0115 and "Sequence" in answer.ErrorComment
        assert modality.ask(asked(["1.5"], TransactionUID=None)).Status == 0x0115
        status, _ = modality.assoc.send_n_event_report(told("1.9", ["1.5"]), 1, SOP_CLASS, SOP_INSTANCE)
        assert status.Status == 0x0110, "this peer is not asked"
        assert modality.ask(asked(["1.2.99"])).Status == 0x0000
        assert modality.heard.wait()[0][3] == {"1.2.99": 0x0112}
        site.wait_state("reported")


def test_who_may_not_ask_is_refused(site: Site) -> None:
    with Requester("STORER").open(site.port) as modality:
        assert modality.ask(asked(["1.5"])).Status == 0x0124
    assert site.rows() == []


def test_roles() -> None:
    service = Commitment.__new__(Commitment)
    both = Peer(name="a", ae_title="A", allow=("commit",), commitment=True)
    asks, gives, none = (
        Peer(name="a", ae_title="A", allow=("commit",)),
        Peer(name="a", ae_title="A", commitment=True),
        Peer(name="a", ae_title="A", allow=("store",)),
    )
    assert [service.roles(SOP_CLASS, p) for p in (both, asks, gives, none)] == [
        (True, True),
        (True, False),
        (True, True),  # not every PACS proposes the SCP role for its reports
        (False, False),
    ]


# Order and faults, without a network.


class Line:
    """An association as the service sees it; ``on_send`` is called with each message."""

    def __init__(self, peer: str, on_send: Callable[[Any], None]) -> None:
        self.node_peer = Peer(name=peer, ae_title=peer.upper(), allow=("commit",))
        self.dimse = SimpleNamespace(send_msg=lambda message, context_id: on_send(message))
        self.wire = SimpleNamespace(waiting=lambda: False)
        self.open = True

    def usable(self) -> bool:
        return self.open

    def wait(self, seconds: float, until: Callable[[], bool]) -> bool:
        self.open = False
        return False


def serve(service: Commitment, line: Line, request: Any) -> None:
    request.MessageID = 7
    context = SimpleNamespace(context_id=1, abstract_syntax=SOP_CLASS, transfer_syntax=[EXPLICIT_LITTLE])
    service.serve(line, request, context)


def action(transaction: str = "1.9", data: bytes | None = None) -> N_ACTION:
    request = N_ACTION()
    request.RequestedSOPClassUID, request.RequestedSOPInstanceUID, request.ActionTypeID = SOP_CLASS, SOP_INSTANCE, 1
    request.ActionInformation = io.BytesIO(encoded(asked(["1.5"], transaction)) if data is None else data)
    return request


def test_success_is_answered_after_the_commit_and_the_report_after_success(db: Database) -> None:
    seen: list[tuple[str, int, list[str]]] = []
    other = apsw.Connection(str(db.path), flags=apsw.SQLITE_OPEN_READONLY)

    def look(message: Any) -> None:
        rows = [str(state) for (state,) in other.execute("SELECT state FROM commitments")]
        seen.append((type(message).__name__, message.Status or 0, rows))

    line = Line("mod1", look)
    serve(Commitment(Settings(node={"data_dir": db.data_dir}), db), line, action())
    other.close()
    assert seen == [("N_ACTION", 0x0000, ["reporting"])], "then the peer was gone"
    assert db.value("SELECT state FROM commitments") == "pending"


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from dicomnode.index.database import Database
from dicomnode.serve import Commitment
from dicomnode.settings import Settings
from tests.serve.test_commitment import Line, action, serve
folder = Path(sys.argv[1])
service = Commitment(Settings(node={"data_dir": folder}), Database(folder))
serve(service, Line("mod1", lambda message: os._exit(9)), action())
"""


def test_a_receiver_that_dies_at_the_response_still_owes_the_report(tmp_path: Path) -> None:
    """The peer may have got the response: it must get its report, from the row alone."""
    folder, port = tmp_path / "data", free_port()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(ROOT)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 9, done.stderr
    settings = Settings(
        node={"data_dir": folder}, peers=[{"name": "mod1", "ae_title": "MOD1", "host": "127.0.0.1", "port": port}]
    )
    clock = FakeClock()
    with Requester(port=port) as modality:
        db = Database(folder)
        clock.now = db.clock.ticks() + LEASE_SECONDS + 1
        db.clock = clock
        Reporter(settings, db, "courier").run_once()
        assert modality.aside.wait() == [(2, "1.9", set(), {"1.5": 0x0112})]
        assert db.value("SELECT state FROM commitments") == "reported"
        db.close()


def test_what_cannot_be_committed_is_not_answered_with_success(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []
    service = Commitment(Settings(node={"data_dir": db.data_dir}), db)

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("commit to the index", "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(db, "insert", full)
        serve(service, Line("mod1", answers.append), action())
    assert [a.Status for a in answers] == [0x0213] and db.rows("SELECT 1 FROM commitments") == []


def test_hostile_requests_are_refused_and_quoted_nowhere(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("test", "debug", "json")
    answers: list[Any] = []
    service = Commitment(Settings(node={"data_dir": db.data_dir}), db)
    deep = (b"\x08\x00\x99\x11SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 500
    canary = encoded(asked(["1.9.99"])).replace(b"1.9.99", b"Xyloca")
    for data in (b"", deep, b"\x08\x00\x99\x11SQ\0\0\xff\xff\xff\x7f", canary):
        serve(service, Line("mod1", answers.append), action(data=data))
    serve(service, Line("mod1", answers.append), C_ECHO())
    odd = N_EVENT_REPORT()
    odd.AffectedSOPClassUID, odd.AffectedSOPInstanceUID, odd.EventTypeID = SOP_CLASS, SOP_INSTANCE, 1
    serve(service, Line("mod1", answers.append), odd)
    assert [a.Status for a in answers] == [0x0115, 0x0115, 0x0115, 0x0115, 0x0211, 0x0110]
    output = capsys.readouterr()
    assert "Xyloca" not in output.err + output.out + "".join(str(a.__dict__) for a in answers[:4] if a)
    assert "1.9.99" not in output.err
