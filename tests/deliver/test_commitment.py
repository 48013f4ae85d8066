"""Storage commitment as SCU: a delivery is finished when the peer says so, by whichever way it says it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from pynetdicom.sop_class import StorageCommitmentPushModel

from dicomnode.deliver import courier as courier_module
from dicomnode.deliver.courier import Courier
from dicomnode.deliver.crew import Crew
from dicomnode.index.database import Database
from dicomnode.settings import Peer
from tests.commitment_case import Committer, Site, commits, told
from tests.index.rows import FakeClock
from tests.peers import free_port, wait_for


@pytest.fixture
def pacs() -> Iterator[Committer]:
    with Committer() as made:
        yield made


@pytest.fixture
def site(db: Database, pacs: Committer) -> Iterator[Site]:
    made = Site(
        db,
        [
            {"name": "pacs", "ae_title": "PACS", "port": pacs.port, "commitment": True},
            {"name": "other", "ae_title": "OTHER", "allow": ["commit"], "commitment": True},
        ],
        commitment_wait_seconds=5,
    )
    pacs.node_port = made.port
    yield made
    made.close()


def deliver(site: Site) -> list[str]:
    uids = site.results()
    site.courier.run_once()
    assert site.deliveries() == ["stored", "stored"]
    return uids


@pytest.mark.parametrize("way", ["same", "new", "without"])
def test_committed_by_a_report(site: Site, pacs: Committer, way: str) -> None:
    """On the association of the request, on a new one with role selection, and on one without it."""
    pacs.way = way
    uids = deliver(site)
    site.asker.run_once()
    assert site.deliveries() == ["committed", "committed"] and site.states() == ["answered"]
    pacs.wait(lambda: pacs.answered == [0x0000])
    ((transaction, asked_for),) = pacs.asked
    assert asked_for == uids and transaction == site.rows()[0]["TransactionUID"]


def test_the_transaction_is_stored_before_it_is_sent(site: Site, pacs: Committer) -> None:
    seen: list[object] = []

    def look(transaction: str, uids: list[str]) -> None:
        row = site.db.row("SELECT state FROM commitments WHERE TransactionUID = ?", (transaction,))
        seen.append((row and row["state"], site.deliveries()))

    pacs.answer = look
    site.settings.delivery.__dict__["commitment_wait_seconds"] = 0.1
    deliver(site)
    site.asker.run_once()
    assert seen == [("asking", ["committing", "committing"])]
    assert site.states() == ["waiting"] and site.deliveries() == ["committing", "committing"]


def test_what_the_peer_does_not_have_is_sent_again(site: Site, pacs: Committer, clock: FakeClock) -> None:
    uids = deliver(site)
    pacs.answer = lambda transaction, asked_for: told(transaction, [uids[0]], {uids[1]: 0x0112})
    site.asker.run_once()
    assert site.deliveries() == ["committed", "pending"]
    (event,) = site.db.rows("SELECT * FROM events WHERE kind = 'commitment-failed'")
    assert event["subject"] == "pacs" and "1 with 0x0112" in event["text"] and "sent again" in event["text"]
    assert not any(uid in event["text"] for uid in uids)
    clock.move(2)
    pacs.answer = commits
    site.courier.run_once()
    site.asker.run_once()
    assert site.deliveries() == ["committed", "committed"] and pacs.stored == [*uids, uids[1]]
    assert pacs.asked[1][0] != pacs.asked[0][0] and pacs.asked[1][1] == [uids[1]]


def test_no_report_asks_again_and_nothing_is_finished(site: Site, pacs: Committer, clock: FakeClock) -> None:
    pacs.way = "never"
    site.settings.delivery.__dict__["commitment_wait_seconds"] = 0.1
    deliver(site)
    site.asker.run_once()
    assert site.states() == ["waiting"] and site.deliveries() == ["committing", "committing"]
    clock.move(3601)
    site.asker.run_once()
    assert site.states() == ["abandoned", "waiting"] and len(pacs.asked) == 2
    assert site.db.rows("SELECT 1 FROM events WHERE kind = 'commitment-late'")
    pacs.way = "new"
    assert pacs.report(told(pacs.asked[0][0], pacs.asked[0][1])) == 0x0000, "late, but of the peer that was asked"
    assert site.deliveries() == ["committed", "committed"]


def test_a_peer_that_aborts_is_asked_in_a_new_transaction(site: Site, pacs: Committer, clock: FakeClock) -> None:
    pacs.status = None
    deliver(site)
    site.asker.run_once()
    assert site.deliveries() == ["stored", "stored"] and site.states() == ["abandoned"]
    site.asker.run_once()
    assert len(pacs.asked) == 1, "not at once"
    pacs.status = 0x0000
    clock.move(2)
    site.asker.run_once()
    assert site.deliveries() == ["committed", "committed"] and pacs.asked[0][0] != pacs.asked[1][0]


def test_a_peer_that_refuses_is_asked_slowly_and_told_of(site: Site, pacs: Committer, clock: FakeClock) -> None:
    pacs.status = 0x0122
    deliver(site)
    site.asker.run_once()
    clock.move(899)
    site.asker.run_once()
    assert len(pacs.asked) == 1 and site.states() == ["pending"]
    (event,) = site.db.rows("SELECT * FROM events WHERE kind = 'commitment-refused'")
    assert "0x0122" in event["text"]
    pacs.status = 0x0000
    clock.move(2)
    site.asker.run_once()
    assert site.deliveries() == ["committed", "committed"]


def test_a_peer_without_the_sop_class_is_told_of(site: Site, pacs: Committer, clock: FakeClock) -> None:
    pacs.ae.remove_supported_context(StorageCommitmentPushModel)
    pacs.stop()
    pacs.start(pacs.port)
    deliver(site)
    for _ in range(3):
        site.asker.run_once()
        clock.move(900)
    (event,) = site.db.rows("SELECT * FROM events WHERE kind = 'commitment-refused'")
    assert "presentation contexts" in event["text"]
    assert site.deliveries() == ["committing", "committing"]


def test_a_peer_that_is_away_is_asked_the_same_later(site: Site, pacs: Committer, clock: FakeClock) -> None:
    deliver(site)
    pacs.stop()
    site.asker.run_once()
    transaction = site.rows()[0]["TransactionUID"]
    assert site.states() == ["pending"] and "does not answer" in site.rows()[0]["last_error"]
    pacs.start(pacs.port)
    clock.move(2)
    site.asker.run_once()
    assert site.deliveries() == ["committed", "committed"] and pacs.asked[0][0] == transaction


def test_a_report_of_another_peer_or_transaction_changes_nothing(site: Site, pacs: Committer) -> None:
    pacs.way = "never"
    site.settings.delivery.__dict__["commitment_wait_seconds"] = 0.1
    uids = deliver(site)
    site.asker.run_once()
    pacs.way = "new"
    transaction = pacs.asked[0][0]
    assert pacs.report(told(transaction, uids), ae_title="OTHER") == 0x0115
    assert pacs.report(told("1.2.3", uids)) == 0x0115
    assert site.deliveries() == ["committing", "committing"]
    assert pacs.report(told(transaction, [uids[0], "1.2.3"])) == 0x0000
    assert site.deliveries() == ["committed", "stored"], "only what is named; the rest is asked for again"
    assert pacs.report(told(transaction, uids)) == 0x0000
    assert site.deliveries() == ["committed", "committed"], "the peer had more to say"


def test_the_same_report_twice_is_taken_twice(site: Site, pacs: Committer) -> None:
    uids = deliver(site)
    site.asker.run_once()
    pacs.wait(lambda: pacs.answered == [0x0000])
    pacs.way = "new"
    assert pacs.report(told(pacs.asked[0][0], uids)) == 0x0000
    assert site.deliveries() == ["committed", "committed"]


def test_each_study_has_its_own_transaction_on_one_association(site: Site, pacs: Committer) -> None:
    first, second = site.results("1.2.10"), site.results("1.2.11")
    site.courier.run_once()
    site.asker.run_once()
    assert [uids for _, uids in pacs.asked] == [first, second]
    assert site.deliveries() == ["committed"] * 4


def test_without_commitment_nothing_is_asked(site: Site, pacs: Committer) -> None:
    site.settings.__dict__["peers"] = (Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=pacs.port),)
    deliver(site)
    site.asker.run_once()
    assert site.deliveries() == ["stored", "stored"] and pacs.asked == []


def test_commitment_that_is_turned_off_finishes_what_was_stored(site: Site, pacs: Committer) -> None:
    deliver(site)
    site.settings.__dict__["peers"] = (Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=pacs.port),)
    site.asker.run_once()
    assert site.deliveries() == ["stored", "stored"] and pacs.asked == []
    assert site.db.value("SELECT count(finished_at) FROM deliveries") == 2


def test_a_new_life_asks_again_what_the_former_one_was_asking(site: Site, pacs: Committer) -> None:
    deliver(site)
    site.asker._asks.make("pacs")
    site.asker._asks.lease("pacs", "courier", 3600, 5)
    site.asker.run_once()
    assert pacs.asked == []
    site.asker.start()
    site.asker.run_once()
    assert site.deliveries() == ["committed", "committed"]


def test_a_peer_that_never_answers_holds_up_no_other(
    site: Site, pacs: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer takes the connection and says nothing: the others get their results meanwhile."""
    site.results()
    silent, go = threading.Event(), threading.Event()
    real = courier_module.send_batch

    def send(local: str, peer: Peer, *rest: object) -> None:
        if peer.name == "silent":
            silent.set()
            assert go.wait(30)
            return
        real(local, peer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(courier_module, "send_batch", send)
    lame = Peer(name="silent", ae_title="SILENT", host="127.0.0.1", port=free_port())
    site.settings.__dict__["peers"] = (*site.settings.peers, lame)
    with site.db.transaction():
        site.db.execute("UPDATE deliveries SET destination = 'silent' WHERE id = 1")
    crew = Crew(2)
    courier = Courier(site.settings, site.db, "courier", crew)
    courier.run_once()
    assert silent.wait(10)
    wait_for(
        lambda: site.deliveries() == ["sending", "stored"], 20, "the other is delivered", lambda: str(site.deliveries())
    )
    courier.run_once()
    go.set()
    assert crew.close(10)
