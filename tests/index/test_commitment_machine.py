"""Deliveries with storage commitment in any order of events (Hypothesis): nothing stands still, nothing is made up."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dicomnode.commitment import Report
from dicomnode.index.asks import Asks
from dicomnode.index.database import Database
from dicomnode.index.outbox import Outbox
from tests.index.rows import FakeClock, finished_job

PICK = st.integers(0, 30)
SAYS = st.sampled_from([None, 0, 0, 0x0112, 0x0122, 0x0131, 0x0110])


class Commitment(RuleBasedStateMachine):
    """``storings`` counts how often the peer stored each object; a transaction remembers the numbers it asks about."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = FakeClock()
        self.db = Database(self.folder, self.clock)
        self.asks, self.box = Asks(self.db), Outbox(self.db, "deliveries")
        finished_job(self.db)
        finished_job(self.db, "1.2.11")
        self.uids = {
            int(r["id"]): str(r["SOPInstanceUID"])
            for r in self.db.rows(
                "SELECT d.id, r.SOPInstanceUID FROM deliveries d JOIN results r ON r.id = d.result_id"
            )
        }
        self.storings = dict.fromkeys(self.uids.values(), 0)
        self.about: dict[str, dict[str, int]] = {}
        self.promised: set[tuple[str, int]] = set()

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    @rule(reached=st.booleans())
    def send(self, reached: bool) -> None:
        for item in self.box.lease("pacs", "c", 60, 3):
            if reached:
                self.box.stored(item["id"], "c", commit=True)
                self.storings[item["SOPInstanceUID"]] += 1
            else:
                self.box.retry(item["id"], "c", "away", first=1, longest=4)

    @rule(how=st.sampled_from(["accept", "retry", "lost", "die"]))
    def ask(self, how: str) -> None:
        self.asks.make("pacs")
        for ask in self.asks.lease("pacs", "c", 60, 5):
            uid = ask.request.TransactionUID
            self.about.setdefault(
                uid, {r.SOPInstanceUID: self.storings[r.SOPInstanceUID] for r in ask.request.references}
            )
            if how == "accept":
                self.asks.accepted(ask.id, "c", 100)
            elif how == "retry":
                self.asks.retry(ask.id, "c", "away", 2)
            elif how == "lost":
                self.asks.lost(ask.id, "c", "cut", 2)

    @precondition(lambda self: self.about)
    @rule(pick=PICK, says=st.lists(SAYS, min_size=4, max_size=4))
    def report(self, pick: int, says: list[int | None]) -> None:
        """About any transaction, however old, and as often as it likes."""
        uid = list(self.about)[pick % len(self.about)]
        said = dict(zip(self.about[uid], says, strict=False))
        committed = {u for u, v in said.items() if v == 0}
        failed = {u: v for u, v in said.items() if v}
        assert self.asks.take("pacs", Report(uid, frozenset(committed), failed), first=1, longest=4) is not None
        self.promised |= {(u, self.about[uid][u]) for u in committed}

    @rule(seconds=st.sampled_from([1.0, 5.0, 61.0, 101.0]), died=st.booleans())
    def time_passes(self, seconds: float, died: bool) -> None:
        self.clock.move(seconds)
        self.box.expire("c" if died else None)
        self.asks.expire("c" if died else None)

    @invariant()
    def committed_is_what_the_peer_promised(self) -> None:
        for row in self.db.rows("SELECT id, state, finished_at FROM deliveries"):
            uid = self.uids[row["id"]]
            if row["state"] == "committed":
                assert (uid, self.storings[uid]) in self.promised, "about the object as it was stored last"
            assert (row["finished_at"] is not None) == (row["state"] == "committed")

    @invariant()
    def nothing_stands_still(self) -> None:
        for row in self.db.rows(
            "SELECT d.state, d.commit_wanted, c.state AS question FROM deliveries d"
            " LEFT JOIN commitments c ON c.id = d.commitment_id"
        ):
            if row["state"] == "committing":
                assert row["question"] in ("pending", "asking", "waiting")
            elif row["state"] == "stored":
                assert row["commit_wanted"]
            else:
                assert row["state"] in ("pending", "sending", "committed")


Commitment.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCommitment = Commitment.TestCase
