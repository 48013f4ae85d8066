"""Steps of rules in rows: decided with the end of what they follow, in the same transaction or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from dicomnode.chains import Needs, When
from dicomnode.errors import IllegalTransition
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Request
from dicomnode.index.procedure import Steps
from tests.index.rows import instance, outcome, select, series_row

BIG = {"measurements": [{"key": "volume_ml", "segment": None, "value": 2000.0, "unit": "ml"}]}
SMALL = {"measurements": [{"key": "volume_ml", "segment": None, "value": 20.0, "unit": "ml"}]}


def step(name: str, *after: str, when: tuple[When, ...] = ()) -> Request:
    needs = Needs(tuple(f"r/{a}" for a in after), when)
    return Request(
        f"m-{name}",
        ("r",),
        ("pacs",),
        "routine",
        names=(f"r/{name}",),
        step=f"r/{name}" if needs.any else "",
        needs=needs,
    )


LARGE = When("r/a", measurement="volume_ml", minimum=1000.0)
CHAIN = (step("a"), step("b", when=(LARGE,)), step("c", "b"), step("d"))


def make(db: Database, *chain: Request) -> dict[str, int]:
    Catalogue(db).commit([instance()])
    made = select(db, "1.2.20", *chain)
    return dict(zip([r.names[0][2:] for r in chain], made, strict=True))


def states(db: Database, ids: dict[str, int]) -> dict[str, str]:
    return {name: str(db.value("SELECT state FROM jobs WHERE id = ?", (i,))) for name, i in ids.items()}


def lease(db: Database) -> int | None:
    job = Jobs(db).lease("w", 60)
    return int(job["id"]) if job else None


def end(summary: dict[str, Any]) -> Outcome:
    return Outcome(outcome().results, summary=summary)


def test_one_after_another_and_side_by_side(db: Database) -> None:
    ids = make(db, *CHAIN)
    assert states(db, ids) == {"a": "pending", "b": "waiting", "c": "waiting", "d": "pending"}
    ran = []
    while (job := lease(db)) is not None:
        ran.append(next(name for name, i in ids.items() if i == job))
        Jobs(db).finish(job, "w", end(BIG))
    assert ran == ["a", "b", "c", "d"] and set(states(db, ids).values()) == {"done"}
    shown = Jobs(db).show(ids["b"])
    assert shown is not None
    assert [(s["name"], s["follows"], s["state"]) for s in shown["steps"]] == [
        ("r/a", True, "done"),
        ("c", False, "done"),
    ]


def test_condition_that_does_not_hold_skips_with_its_reason(db: Database) -> None:
    ids = make(db, *CHAIN)
    Jobs(db).finish(lease(db) or 0, "w", end(SMALL))
    assert states(db, ids) == {"a": "done", "b": "skipped", "c": "skipped", "d": "pending"}
    reasons = [(Jobs(db).show(ids[n]) or {})["last_error"] for n in "bc"]
    assert reasons == [
        "its condition does not hold: volume_ml of step r/a is at least 1000",
        "step r/b, which it follows, was skipped",
    ]
    with pytest.raises(IllegalTransition):
        Jobs(db).retry(ids["b"])


@pytest.mark.parametrize("how", ["refuse", "fail", "die"])
def test_what_follows_a_failure_is_not_run_until_it_is_retried(db: Database, how: str) -> None:
    jobs, ids = Jobs(db), make(db, *CHAIN)
    first = lease(db) or 0
    if how == "refuse":
        jobs.refuse(first, "w", "GAP")
    elif how == "fail":
        jobs.fail(first, "w", "x", max_attempts=1)
    else:
        jobs.expire(1, ("w",))
    ended = "refused" if how == "refuse" else "failed"
    assert states(db, ids) == {"a": ended, "b": "not-run", "c": "not-run", "d": "pending"}
    assert (jobs.show(ids["b"]) or {})["last_error"] == f"step r/a, which it follows, ended as {ended}"
    jobs.retry(first)
    assert states(db, ids) == {"a": "pending", "b": "waiting", "c": "waiting", "d": "pending"}
    assert lease(db) == first
    jobs.finish(first, "w", end(BIG))
    assert states(db, ids) == {"a": "done", "b": "pending", "c": "waiting", "d": "pending"}


def test_step_that_fails_itself_is_retried_by_hand(db: Database) -> None:
    jobs, ids = Jobs(db), make(db, *CHAIN)
    jobs.finish(lease(db) or 0, "w", end(BIG))
    assert lease(db) == ids["b"]
    jobs.fail(ids["b"], "w", "x", max_attempts=1)
    assert states(db, ids)["c"] == "not-run"
    jobs.retry(ids["b"])
    assert states(db, ids) == {"a": "done", "b": "pending", "c": "waiting", "d": "pending"}


def test_failure_that_may_pass_decides_nothing(db: Database) -> None:
    ids = make(db, *CHAIN)
    Jobs(db).fail(lease(db) or 0, "w", "x", max_attempts=2)
    assert states(db, ids)["b"] == "waiting"


def test_late_images_begin_the_chain_anew(db: Database) -> None:
    ids = make(db, *CHAIN)
    Jobs(db).finish(lease(db) or 0, "w", end(SMALL))
    again = make(db, *CHAIN)
    assert states(db, ids) == {"a": "done", "b": "superseded", "c": "superseded", "d": "superseded"}
    assert states(db, again) == {"a": "pending", "b": "waiting", "c": "waiting", "d": "pending"}
    assert {(Jobs(db).show(i) or {})["revision"] for i in again.values()} == {2}


def test_step_of_a_rule_that_came_later_uses_the_result_that_is_there(db: Database) -> None:
    """The configuration was changed, then an object came again with other bytes, and back."""
    catalogue = Catalogue(db)
    catalogue.commit([instance(sop="1.1")])
    (first,) = select(db, "1.2.20", step("a"))
    assert lease(db) == first
    Jobs(db).finish(first, "w", end(BIG))
    catalogue.commit([instance(sop="1.1", content="b")])
    catalogue.commit([instance(sop="1.1", content="a")])
    (second,) = select(db, "1.2.20", step("a"), step("b", when=(LARGE,)))
    assert states(db, {"b": second}) == {"b": "pending"}


def test_withheld_series_ends_its_steps(db: Database) -> None:
    ids = make(db, *CHAIN)
    assert Steps(db).withdraw(series_row(db, "1.2.20")["id"]).jobs == 4
    assert set(states(db, ids).values()) == {"refused"}
    Jobs(db).retry(ids["b"])
    assert states(db, ids)["b"] == "not-run", "what it follows was withdrawn, too"
    Jobs(db).retry(ids["a"])
    assert states(db, ids)["b"] == "waiting"


def test_end_and_decision_are_one_transaction(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever statement fails: either the step has ended and its followers are decided, or neither."""
    jobs, ids = Jobs(db), make(db, *CHAIN)
    assert lease(db) == ids["a"]
    real = db.execute
    result = end(SMALL)
    struck = 0
    for after in range(100):
        left = after

        def execute(sql: str, *arguments: Any) -> Any:
            nonlocal left
            left -= sql.startswith("UPDATE")
            if left < 0:
                raise RuntimeError("power cut")
            return real(sql, *arguments)

        monkeypatch.setattr(db, "execute", execute)
        try:
            jobs.finish(ids["a"], "w", result)
        except RuntimeError:
            struck += 1
            monkeypatch.undo()
            assert states(db, ids) == {"a": "running", "b": "waiting", "c": "waiting", "d": "pending"}
            continue
        break
    monkeypatch.undo()
    assert struck >= 4, "the end, its summary, and two decisions"
    assert states(db, ids) == {"a": "done", "b": "skipped", "c": "skipped", "d": "pending"}
