"""Jobs and outbox against a plain model, in any order of events (Hypothesis)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dicomnode.errors import IllegalTransition, LeaseLost
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.outbox import Outbox
from tests.index.rows import FakeClock, job, outcome

OWNERS = st.sampled_from(["w1", "w2"])
LEASE, ATTEMPTS = 60.0, 3
PICK = st.integers(0, 20)


class Work(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = FakeClock()
        self.db = Database(self.folder, self.clock)
        self.jobs, self.box = Jobs(self.db), Outbox(self.db, "deliveries")
        self.model: dict[int, dict[str, Any]] = {}
        self.sends: dict[int, dict[str, Any]] = {}

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    @rule()
    def arrive(self) -> None:
        if len(self.model) < 4:
            new = {"state": "pending", "owner": None, "until": 0.0, "tries": 0, "waits": 0, "due": 0.0}
            self.model[job(self.db)] = new

    @rule(owner=OWNERS)
    def lease(self, owner: str) -> None:
        ready = [i for i, j in self.model.items() if j["state"] == "pending" and j["due"] <= self.clock.now]
        leased = self.jobs.lease(owner, LEASE)
        assert (leased["id"] if leased else None) == (min(ready) if ready else None)
        if leased:
            known = self.model[leased["id"]]
            known.update(state="running", owner=owner, until=self.clock.now + LEASE, tries=known["tries"] + 1)

    def change(self, pick: int, owner: str, action: Any) -> dict[str, Any] | None:
        """Do it with a job of the model; exactly the owner of a running one may."""
        job_id = list(self.model)[pick % len(self.model)]
        known = self.model[job_id]
        if known["state"] == "running" and known["owner"] == owner:
            action(job_id)
            return known
        with pytest.raises(LeaseLost):
            action(job_id)
        return None

    @precondition(lambda self: self.model)
    @rule(pick=PICK, owner=OWNERS)
    def finish(self, pick: int, owner: str) -> None:
        known = self.change(pick, owner, lambda i: self.jobs.finish(i, owner, outcome()))
        if known is not None:
            known.update(state="done", owner=None)
            for row in self.db.rows("SELECT id FROM deliveries"):
                self.sends.setdefault(row["id"], {"state": "pending", "owner": None, "until": 0.0})

    @precondition(lambda self: self.model)
    @rule(pick=PICK, owner=OWNERS)
    def refuse(self, pick: int, owner: str) -> None:
        known = self.change(pick, owner, lambda i: self.jobs.refuse(i, owner, "gap"))
        if known is not None:
            known.update(state="refused", owner=None)

    @precondition(lambda self: self.model)
    @rule(pick=PICK, owner=OWNERS)
    def fail(self, pick: int, owner: str) -> None:
        known = self.change(pick, owner, lambda i: self.jobs.fail(i, owner, "x", max_attempts=ATTEMPTS))
        if known is not None:
            given_up = known["tries"] >= ATTEMPTS
            due = self.clock.now + 2.0 * 2 ** (known["tries"] - 1)
            known.update(state="failed" if given_up else "pending", owner=None, due=due)

    @precondition(lambda self: self.model)
    @rule(pick=PICK, owner=OWNERS)
    def wait(self, pick: int, owner: str) -> None:
        known = self.change(pick, owner, lambda i: self.jobs.wait(i, owner, "away"))
        if known is not None:
            waits = known["waits"] + 1
            due = self.clock.now + 2.0 * 2 ** (waits - 1)
            known.update(state="pending", owner=None, tries=known["tries"] - 1, waits=waits, due=due)

    @precondition(lambda self: self.model)
    @rule(pick=PICK)
    def requeue(self, pick: int) -> None:
        job_id = list(self.model)[pick % len(self.model)]
        known = self.model[job_id]
        if known["state"] in ("failed", "refused"):
            self.jobs.retry(job_id)
            known.update(state="pending", tries=0, waits=0, due=0.0)
        else:
            with pytest.raises(IllegalTransition):
                self.jobs.retry(job_id)

    @rule(seconds=st.sampled_from([1.0, 5.0, 61.0]), dead=st.sampled_from([(), ("w1",)]))
    def time_passes(self, seconds: float, dead: tuple[str, ...]) -> None:
        self.clock.move(seconds)
        lost = {
            i
            for i, j in self.model.items()
            if j["state"] == "running" and (j["until"] < self.clock.now or j["owner"] in dead)
        }
        assert {j["id"] for j in self.jobs.expire(ATTEMPTS, dead)} == lost
        for job_id in lost:
            known = self.model[job_id]
            known.update(state="failed" if known["tries"] >= ATTEMPTS else "pending", owner=None)
        own = dead[0] if dead else None
        late = [
            s
            for s in self.sends.values()
            if s["state"] == "sending" and (s["until"] < self.clock.now or s["owner"] == own)
        ]
        assert self.box.expire(own) == len(late)
        for known in late:
            known.update(state="pending", owner=None)

    @rule(owner=OWNERS, limit=st.integers(1, 3))
    def send(self, owner: str, limit: int) -> None:
        for item in self.box.lease("pacs", owner, LEASE, limit):
            known = self.sends[item["id"]]
            assert known["state"] == "pending", "one owner at a time"
            older = [s for i, s in self.sends.items() if i < item["id"]]
            assert all(s["state"] != "sending" or s["owner"] == owner for s in older), "order within the study"
            known.update(state="sending", owner=owner, until=self.clock.now + LEASE)

    @precondition(lambda self: self.sends)
    @rule(pick=PICK, owner=OWNERS, how=st.sampled_from(["stored", "retry", "reject", "requeue"]))
    def sent(self, pick: int, owner: str, how: str) -> None:
        item = sorted(self.sends)[pick % len(self.sends)]
        known = self.sends[item]
        ours = known["state"] == "sending" and known["owner"] == owner
        if how == "requeue":
            if known["state"] in ("pending", "rejected"):
                self.box.requeue(item)
                known["state"] = "pending"
            else:
                with pytest.raises(IllegalTransition):
                    self.box.requeue(item)
        elif how == "stored":
            self.box.stored(item, owner)
            known.update({"state": "stored", "owner": None} if ours else {})
        elif how == "reject":
            self.box.reject(item, owner, "x")
            known.update({"state": "rejected", "owner": None} if ours else {})
        else:
            self.box.retry(item, owner, "x", first=1, longest=1)
            known.update({"state": "pending", "owner": None} if ours else {})

    @invariant()
    def rows_agree(self) -> None:
        rows = self.db.rows("SELECT id, state, lease_owner FROM jobs")
        assert {r["id"]: (r["state"], r["lease_owner"]) for r in rows} == {
            i: (j["state"], j["owner"]) for i, j in self.model.items()
        }
        assert {r["id"]: r["state"] for r in self.db.rows("SELECT id, state FROM deliveries")} == {
            i: s["state"] for i, s in self.sends.items()
        }
        done = sum(j["state"] == "done" for j in self.model.values())
        assert self.db.value("SELECT count(*) FROM results") == 2 * done


Work.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestWork = Work.TestCase
