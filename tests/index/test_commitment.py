"""Rows of storage commitment: state tables, leases, what a report may do to a delivery."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.commitment import Reference, Report, Request, Verdict
from dicomnode.errors import IllegalTransition, OperatorError
from dicomnode.index.asks import Ask, Asks, effect
from dicomnode.index.commitment import (
    KEPT_SECONDS,
    AskEvent,
    AskState,
    Commitments,
    PromiseEvent,
    PromiseState,
    Role,
    hold,
    next_ask_state,
    next_promise_state,
)
from dicomnode.index.database import Database
from dicomnode.index.outbox import Outbox
from dicomnode.index.procedure import WITHHELD
from dicomnode.index.promises import Promise, Promises
from dicomnode.index.states import SendEvent, SendState
from tests.index.rows import CT_IMAGE, FakeClock, finished_job

# Written out by hand, so that a change of a table has to be made twice.
PROMISES = {
    "pending": {"lease": "reporting", "again": "pending"},
    "reporting": {
        "report": "reported",
        "retry": "pending",
        "reject": "rejected",
        "lose": "pending",
        "again": "reporting",
    },
    "reported": {"again": "pending", "requeue": "pending"},
    "rejected": {"again": "pending", "requeue": "pending"},
}
ASKS = {
    "pending": {"lease": "asking", "answer": "answered", "abandon": "abandoned"},
    "asking": {"accept": "waiting", "retry": "pending", "lose": "abandoned", "answer": "answered"},
    "waiting": {"answer": "answered", "abandon": "abandoned"},
    "answered": {"answer": "answered"},
    "abandoned": {"answer": "answered"},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(PromiseState, PromiseEvent)))
def test_promise_transition(state: PromiseState, event: PromiseEvent) -> None:
    wanted = PROMISES[state].get(event)
    if wanted:
        assert next_promise_state(state, event) == wanted
    else:
        with pytest.raises(IllegalTransition, match=f"'{event}' is not possible in state '{state}'"):
            next_promise_state(state, event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(AskState, AskEvent)))
def test_ask_transition(state: AskState, event: AskEvent) -> None:
    wanted = ASKS[state].get(event)
    if wanted:
        assert next_ask_state(state, event) == wanted
    else:
        with pytest.raises(IllegalTransition):
            next_ask_state(state, event)


def test_unknown_states_are_illegal() -> None:
    for function, event in ((next_promise_state, PromiseEvent.lease), (next_ask_state, AskEvent.lease)):
        with pytest.raises(IllegalTransition):
            function("on-fire", event)  # type: ignore[operator]


SAID = st.one_of(st.none(), st.sampled_from([int(v) for v in Verdict]), st.integers(1, 0xFFFF))


@given(st.sampled_from(SendState), SAID, st.booleans(), st.booleans())
def test_only_a_promise_about_this_storing_commits(state: SendState, said: Any, same: bool, latest: bool) -> None:
    event = effect(state, said, same_storing=same, latest=latest)
    at_the_peer = state in (SendState.stored, SendState.committing)
    assert (event is SendEvent.commit) == (at_the_peer and same and said == Verdict.committed)
    if event is SendEvent.miss:
        assert at_the_peer and same and latest and said
    if not same or not at_the_peer:
        assert event is None


# As SCP: what is asked of this node.


@pytest.fixture
def promises(db: Database) -> Promises:
    return Promises(db)


def wanted(transaction: str = "1.9", uids: Sequence[str] = ("1.5.1", "1.5.2")) -> Request:
    return Request(transaction, tuple(Reference(CT_IMAGE, uid) for uid in uids))


def state_of(db: Database, row_id: int) -> str:
    return str(db.value("SELECT state FROM commitments WHERE id = ?", (row_id,)))


def received(promises: Promises, *args: Any, peer: str = "mod", owner: str = "r") -> Promise:
    found = promises.receive(peer, wanted(*args), owner, 60)
    assert found is not None
    return found


def test_a_request_is_there_before_anything_else(db: Database, promises: Promises) -> None:
    promise = received(promises)
    assert (promise.request, promise.verdicts, promise.attempts) == (wanted(), None, 1)
    assert state_of(db, promise.id) == "reporting"
    assert promises.due_peers() == [], "whoever received it reports it first"
    assert promises.judged(promise.id, "r", [0, 0x0112])
    promises.reported(promise.id, "r")
    (row,) = Commitments(db).listing()
    assert (row["state"], row["instances"], row["failed"]) == ("reported", 2, 1) and row["finished_time"]
    assert Commitments(db).counts()["scp"]["reported"] == 1


def test_the_same_request_again_is_the_same_promise_judged_anew(db: Database, promises: Promises) -> None:
    first = received(promises)
    assert promises.receive("mod", wanted(), "other", 60) is None, "its report is under way"
    promises.judged(first.id, "r", [0, 0x0112])
    promises.reported(first.id, "r")
    again = received(promises, "1.9", ("1.5.2", "1.5.1"))
    assert again.id == first.id and again.verdicts is None and again.request == wanted()
    promises.reject(again.id, "r", "0x0115")
    assert received(promises).id == first.id
    assert len(Commitments(db).listing()) == 1


def test_a_transaction_uid_of_another_request_fails_as_a_whole(db: Database, promises: Promises) -> None:
    first = received(promises)
    for _ in range(2):
        other = received(promises, "1.9", ("1.5.3",))
        assert other.id != first.id and other.verdicts == (Verdict.duplicate_transaction,)
        promises.reported(other.id, "r")
    assert state_of(db, first.id) == "reporting"
    assert received(promises, "1.9", ("1.5.3",), peer="mod2").verdicts is None, "peers number by themselves"


def test_reports_are_retried_for_ever_and_a_dead_owner_loses_them(
    db: Database, promises: Promises, clock: FakeClock
) -> None:
    promise = received(promises)
    clock.move(61)
    assert promises.expire() == 1
    waits = []
    for _ in range(20):
        (leased,) = promises.lease("mod", "courier", 60, 5)
        promises.retry(leased.id, "courier", "away", first=2, longest=900)
        due = promises.next_due_in()
        assert due is not None and promises.due_peers() == []
        waits.append(due)
        clock.move(due)
    assert waits[0] == 4 and max(waits) == 900 and waits == sorted(waits)
    promises.lease("mod", "courier", 60, 5)
    assert promises.expire("courier") == 1, "a new life takes back what the former one held"
    promises.lease("mod", "new", 60, 5)
    promises.reported(promise.id, "courier")
    promises.reject(promise.id, "courier", "x")
    assert not promises.judged(promise.id, "courier", [0, 0])
    assert not promises.extend(promise.id, "courier", 10)
    assert state_of(db, promise.id) == "reporting"
    promises.reported(promise.id, "new")
    assert state_of(db, promise.id) == "reported"


def test_what_cannot_be_reported_here_is_due_for_the_courier_at_once(db: Database, promises: Promises) -> None:
    promise = received(promises)
    promises.judged(promise.id, "r", [0, 0])
    promises.hand_on(promise.id, "r", "the association ended")
    assert promises.due_peers() == ["mod"]
    (leased,) = promises.lease("mod", "courier", 60, 5)
    assert leased.verdicts == (0, 0)


def test_a_peer_that_is_away_holds_back_only_its_own(db: Database, promises: Promises, clock: FakeClock) -> None:
    for peer, transaction in (("mod", "1.1"), ("mod", "1.2"), ("other", "1.3")):
        promise = received(promises, transaction, peer=peer)
        promises.hand_on(promise.id, "r", "")
    hold(db, Role.scp, "mod", 30)
    assert promises.due_peers() == ["other"]
    clock.move(30)
    assert promises.due_peers() == ["other", "mod"]


def test_an_operator_requeues_a_report(db: Database, promises: Promises) -> None:
    promise = received(promises)
    desk = Commitments(db)
    with pytest.raises(IllegalTransition):
        desk.requeue(promise.id)  # it is under way
    promises.retry(promise.id, "r", "away", first=600, longest=900)
    assert desk.requeue(promise.id) == "pending" and promises.due_peers() == ["mod"]
    promises.lease("mod", "c", 60, 1)
    promises.reject(promise.id, "c", "0x0115")
    assert promises.due_peers() == [] and desk.listing(state="rejected")
    assert desk.requeue(promise.id) == "pending" and promises.due_peers() == ["mod"]
    with pytest.raises(OperatorError, match="there is no commitment 99"):
        desk.requeue(99)


def test_what_is_finished_is_forgotten_and_what_is_owed_is_not(
    db: Database, promises: Promises, clock: FakeClock
) -> None:
    promises.reported(received(promises, "1.1").id, "r")
    received(promises, "1.2")
    promises.reject(received(promises, "1.3").id, "r", "0x0115")
    clock.move(KEPT_SECONDS - 1)
    assert Commitments(db).forget() == 0
    clock.move(2)
    assert Commitments(db).forget() == 1
    assert {r["state"] for r in Commitments(db).listing()} == {"reporting", "rejected"}


# As SCU: what this node asks of a peer.


class Pacs:
    """Deliveries of one job to a peer with commitment, and short words for what happens to them."""

    def __init__(self, db: Database, clock: FakeClock) -> None:
        self.db, self.clock = db, clock
        self.asks, self.box = Asks(db), Outbox(db, "deliveries")
        finished_job(db)
        self.uids = [str(r["SOPInstanceUID"]) for r in db.rows("SELECT SOPInstanceUID FROM results ORDER BY id")]

    def store(self) -> None:
        for item in self.box.lease("pacs", "c", 60, 100):
            self.box.stored(item["id"], "c", commit=True)

    def ask(self) -> Ask:
        self.asks.make("pacs")
        (ask,) = self.asks.lease("pacs", "c", 60, 1)
        self.asks.accepted(ask.id, "c", 3600)
        return ask

    def tell(self, ask: Ask, committed: Sequence[str] = (), peer: str = "pacs", **failed: int) -> Any:
        reasons = {self.uids[int(k[1:])]: v for k, v in failed.items()}
        report = Report(ask.request.TransactionUID, frozenset(committed), reasons)
        return self.asks.take(peer, report, first=2, longest=900)

    def states(self) -> list[str]:
        return [r["state"] for r in self.db.rows("SELECT state FROM deliveries ORDER BY id")]


@pytest.fixture
def pacs(db: Database, clock: FakeClock) -> Pacs:
    return Pacs(db, clock)


def test_a_delivery_is_finished_by_the_report_and_not_before(pacs: Pacs, db: Database) -> None:
    pacs.store()
    assert pacs.states() == ["stored", "stored"]
    ask = pacs.ask()
    assert [r.SOPInstanceUID for r in ask.request.references] == pacs.uids
    assert pacs.states() == ["committing", "committing"]
    assert db.value("SELECT count(finished_at) FROM deliveries") == 0
    taken = pacs.tell(ask, pacs.uids)
    assert (taken.committed, taken.missing, taken.foreign) == (2, 0, 0)
    assert pacs.states() == ["committed", "committed"]
    assert db.value("SELECT count(finished_at) FROM deliveries") == 2
    assert pacs.tell(ask, pacs.uids).committed == 0, "a report that comes twice changes nothing"
    assert Commitments(db).counts()["scu"]["answered"] == 1
    assert pacs.asks.make("pacs") == 0 and pacs.box.due_destinations() == []


def test_without_commitment_stored_is_final(pacs: Pacs, db: Database) -> None:
    for item in pacs.box.lease("pacs", "c", 60, 100):
        pacs.box.stored(item["id"], "c")
    assert pacs.asks.ready_destinations() == [] and pacs.asks.make("pacs") == 0
    assert db.value("SELECT count(finished_at) FROM deliveries") == 2


def test_what_the_peer_lacks_is_sent_again_and_asked_for_again(pacs: Pacs, db: Database, clock: FakeClock) -> None:
    pacs.store()
    ask = pacs.ask()
    taken = pacs.tell(ask, [pacs.uids[0]], _1=0x0112)
    assert (taken.committed, taken.missing, dict(taken.reasons)) == (1, 1, {0x0112: 1})
    assert pacs.states() == ["committed", "pending"]
    assert "0x0112" in str(db.value("SELECT last_error FROM deliveries WHERE id = 2"))
    assert pacs.box.due_destinations() == [], "after a back-off"
    clock.move(2)
    pacs.store()
    second = pacs.ask()
    assert [r.SOPInstanceUID for r in second.request.references] == pacs.uids[1:]
    assert second.request.TransactionUID != ask.request.TransactionUID
    assert pacs.tell(ask, pacs.uids).committed == 0, "an old promise is about an object that was lost since"
    assert pacs.states() == ["committed", "committing"]
    pacs.tell(second, pacs.uids)
    assert pacs.states() == ["committed", "committed"]


def test_what_a_report_does_not_name_is_asked_for_again(pacs: Pacs, db: Database, clock: FakeClock) -> None:
    pacs.store()
    taken = pacs.tell(pacs.ask(), [pacs.uids[0], "1.2.99"])
    assert (taken.committed, taken.unanswered, taken.foreign) == (1, 1, 1)
    assert pacs.states() == ["committed", "stored"] and pacs.asks.make("pacs") == 0
    assert pacs.asks.next_due_in() == 2
    clock.move(2)
    assert [r.SOPInstanceUID for r in pacs.ask().request.references] == pacs.uids[1:]


@pytest.mark.parametrize(("reason", "wait"), [(0x0122, 900), (0x0131, 2)])
def test_what_sending_cannot_cure_is_asked_for_again(pacs: Pacs, reason: int, wait: float) -> None:
    pacs.store()
    pacs.tell(pacs.ask(), [], _0=reason, _1=reason)
    assert pacs.states() == ["stored", "stored"] and pacs.asks.next_due_in() == wait


def test_no_report_in_time_asks_again_and_a_late_one_counts(pacs: Pacs, db: Database, clock: FakeClock) -> None:
    pacs.store()
    first = pacs.ask()
    clock.move(3599)
    assert pacs.asks.expire() == [] and pacs.asks.next_due_in() == 1
    clock.move(2)
    (late,) = pacs.asks.expire()
    assert late["id"] == first.id and state_of(db, first.id) == "abandoned"
    assert pacs.states() == ["stored", "stored"] and pacs.asks.ready_destinations() == ["pacs"]
    second = pacs.ask()
    assert second.request.TransactionUID != first.request.TransactionUID
    assert pacs.tell(first, [], _0=0x0112).missing == 0, "the second question will tell"
    assert pacs.tell(first, [pacs.uids[0]]).committed == 1
    assert pacs.states() == ["committed", "committing"]
    pacs.tell(second, pacs.uids)
    assert pacs.states() == ["committed", "committed"]


def test_a_late_loss_is_sent_again(pacs: Pacs, clock: FakeClock) -> None:
    pacs.store()
    first = pacs.ask()
    clock.move(3601)
    pacs.asks.expire()
    assert pacs.tell(first, [pacs.uids[0]], _1=0x0112).missing == 1
    assert pacs.states() == ["committed", "pending"]


def test_a_report_can_overtake_the_response(pacs: Pacs, db: Database) -> None:
    pacs.store()
    pacs.asks.make("pacs")
    (ask,) = pacs.asks.lease("pacs", "c", 60, 1)
    pacs.tell(ask, pacs.uids)
    pacs.asks.accepted(ask.id, "c", 3600)
    pacs.asks.lost(ask.id, "c", "cut", 0)
    assert state_of(db, ask.id) == "answered" and pacs.states() == ["committed", "committed"]


def test_a_report_counts_only_from_the_peer_that_was_asked(pacs: Pacs) -> None:
    pacs.store()
    ask = pacs.ask()
    assert pacs.tell(ask, pacs.uids, peer="mod") is None
    unknown = Report("1.2.3", frozenset(pacs.uids), {})
    assert pacs.asks.take("pacs", unknown, first=2, longest=900) is None
    assert pacs.states() == ["committing", "committing"]


def test_a_promise_of_this_node_is_no_report_to_it(pacs: Pacs, promises: Promises) -> None:
    received(promises, "1.9", peer="pacs")
    report = Report("1.9", frozenset(pacs.uids), {})
    assert pacs.asks.take("pacs", report, first=2, longest=900) is None


def test_a_request_that_the_peer_did_not_see_is_sent_again_as_it_is(pacs: Pacs, db: Database, clock: FakeClock) -> None:
    pacs.store()
    pacs.asks.make("pacs")
    (ask,) = pacs.asks.lease("pacs", "c", 60, 5)
    pacs.asks.retry(ask.id, "c", "away", 2)
    assert pacs.asks.due_peers() == [] and pacs.states() == ["committing", "committing"]
    clock.move(2)
    (again,) = pacs.asks.lease("pacs", "c", 60, 5)
    assert again.request == ask.request and again.attempts == 2
    pacs.asks.lost(again.id, "c", "no answer", 5)
    assert state_of(db, ask.id) == "abandoned" and pacs.states() == ["stored", "stored"]
    assert pacs.asks.ready_destinations() == []
    clock.move(5)
    assert pacs.ask().request.TransactionUID != ask.request.TransactionUID


def test_a_dead_courier_s_question_is_asked_in_a_new_transaction(pacs: Pacs, db: Database) -> None:
    pacs.store()
    pacs.asks.make("pacs")
    (ask,) = pacs.asks.lease("pacs", "c", 60, 5)
    (lost,) = pacs.asks.expire("c")
    assert lost["id"] == ask.id and pacs.states() == ["stored", "stored"]
    pacs.tell(ask, pacs.uids)
    assert pacs.states() == ["committed", "committed"], "it was asked before it died, after all"


def test_a_study_is_asked_for_when_nothing_of_it_is_under_way(pacs: Pacs, db: Database) -> None:
    first, second = pacs.box.lease("pacs", "c", 60, 5)
    pacs.box.stored(first["id"], "c", commit=True)
    assert pacs.asks.make("pacs") == 0
    pacs.box.stored(second["id"], "c", commit=True)
    finished_job(db, "1.2.11")
    pacs.store()
    assert pacs.asks.make("pacs") == 2, "one transaction for each study"


def test_one_that_is_withdrawn_meanwhile_is_not_sent_again(pacs: Pacs, db: Database) -> None:
    """Somebody took the wrong patient's results out of the PACS: they must not come back."""
    pacs.store()
    ask = pacs.ask()
    with db.transaction():
        db.execute("UPDATE series SET selected_reason = ?", (WITHHELD,))
    taken = pacs.tell(ask, [], _0=0x0112, _1=0x0112)
    assert taken.withheld == 2 and pacs.states() == ["rejected", "rejected"]


def test_an_operator_turns_commitment_off(pacs: Pacs, db: Database) -> None:
    pacs.store()
    ask = pacs.ask()
    assert pacs.asks.give_up("pacs") == 2
    assert pacs.states() == ["stored", "stored"] and pacs.asks.ready_destinations() == []
    assert state_of(db, ask.id) == "abandoned" and db.value("SELECT count(finished_at) FROM deliveries") == 2


def test_an_operator_asks_again_or_sends_again(pacs: Pacs, db: Database) -> None:
    pacs.store()
    ask = pacs.ask()
    assert Commitments(db).requeue(ask.id) == "abandoned"
    assert pacs.states() == ["stored", "stored"] and pacs.asks.ready_destinations() == ["pacs"]
    second = pacs.ask()
    pacs.box.requeue(1)
    assert pacs.states() == ["pending", "committing"]
    pacs.tell(second, pacs.uids)
    assert pacs.states() == ["pending", "committed"], "the promise is not about what is sent now"
    with pytest.raises(IllegalTransition):
        Commitments(db).requeue(second.id)
    with pytest.raises(IllegalTransition):
        pacs.box.requeue(2)


def test_cloud_items_are_never_asked_for(db: Database) -> None:
    assert "committing" not in Outbox(db, "sync_items").counts()
    assert Outbox(db, "deliveries").counts()["committing"] == 0
