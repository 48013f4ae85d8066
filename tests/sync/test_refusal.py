"""Whom a status blames: the table as a function."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.sync.blame import MOST_UNPROVEN, one_by_one, together, weighed
from dicomnode.sync.refusal import Fault, Step, decide, fault_of
from dicomnode.sync.reply import WITH_SEQUENCES, Fate, Verdict, judge
from dicomnode.sync.stow import Answer, answer_of

STATUSES = st.integers(100, 599).filter(lambda s: s not in WITH_SEQUENCES)
FAULTS = st.sampled_from(Fault)


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        *((s, Fault.item) for s in (400, 411, 413, 414, 415, 422, 431, 451)),
        *((s, Fault.either) for s in (301, 302, 307, 401, 402, 403, 404, 405, 406, 407, 410, 421, 426)),
        *((s, Fault.passing) for s in (100, 204, 408, 425, 429, 500, 502, 503, 504, 507, 599)),
    ],
)
def test_what_a_status_may_mean(status: int, fault: Fault) -> None:
    assert fault_of(status) is fault


@pytest.mark.parametrize(
    ("fault", "together", "stored", "alike", "step"),
    [
        (Fault.item, True, False, 0, Step.each),
        (Fault.item, True, True, 5, Step.each),
        (Fault.item, False, False, 0, Step.doubt),
        (Fault.item, False, False, 1, Step.operator),
        (Fault.item, False, True, 1, Step.park),
        (Fault.either, True, True, 0, Step.operator),
        (Fault.either, False, False, 0, Step.operator),
        (Fault.either, False, True, 0, Step.strike),
        (Fault.passing, True, True, 0, Step.endpoint),
        (Fault.passing, False, False, 0, Step.endpoint),
        (Fault.passing, False, True, 0, Step.strike),
    ],
)
def test_the_table(fault: Fault, together: bool, stored: bool, alike: int, step: Step) -> None:
    assert decide(fault, together=together, stored=stored, alike=alike) is step


@given(FAULTS, st.booleans(), st.booleans(), st.integers(0, 9))
def test_an_item_is_blamed_only_alone_and_an_endpoint_never_while_it_stores(
    fault: Fault, together: bool, stored: bool, alike: int
) -> None:
    step = decide(fault, together=together, stored=stored, alike=alike)
    if together:
        assert step in (Step.each, Step.endpoint, Step.operator)
    elif stored:
        assert step in (Step.park, Step.strike)
    else:
        assert step not in (Step.park, Step.strike)
    if step is Step.park:
        assert fault is Fault.item


@given(STATUSES, st.integers(1, 5))
def test_every_status_has_a_verdict_for_each(status: int, count: int) -> None:
    uids = [f"1.2.{n}" for n in range(count)]
    verdicts = judge(status, None, uids)
    assert list(verdicts) == uids
    [verdict] = set(verdicts.values())
    assert verdict.fate is not Fate.stored and verdict.status == status
    if verdict.fate is Fate.reject:
        assert count == 1 and fault_of(status) is Fault.item


OUTCOMES = st.lists(st.sampled_from([0, 400, 413, 422]), min_size=1, max_size=12)


def _verdict(outcome: int) -> Verdict:
    return Verdict(Fate.reject, "refused", status=outcome) if outcome else Verdict(Fate.stored)


@given(OUTCOMES)
def test_without_an_item_that_is_stored_after_it_none_is_parked(outcomes: list[int]) -> None:
    """One after the other, each alone in its request: an endpoint that refuses everything parks nothing."""
    refused: dict[int, int] = {}
    for n, outcome in enumerate(outcomes):
        [verdict] = weighed({str(n): _verdict(outcome)}, proven=(), alike=refused).values()
        if verdict.fate is Fate.stored:
            refused = {}
            continue
        assert verdict.fate is (Fate.operator if refused.get(outcome) else Fate.retry)
        refused[outcome] = refused.get(outcome, 0) + 1
        [again] = weighed({str(n): _verdict(outcome)}, proven={str(n)}, alike=refused).values()
        assert again.fate is Fate.reject, "refused again, and others were stored meanwhile"


@given(st.lists(st.sampled_from([200, 400, 413, 403, 500]), min_size=2, max_size=MOST_UNPROVEN), st.booleans())
def test_of_a_batch_only_that_is_parked_behind_which_others_are_stored(
    statuses: list[int], together_first: bool
) -> None:
    """Whatever the endpoint says of each alone, after it refused the batch or while the class goes one by one."""
    wanted = {str(n): status for n, status in enumerate(statuses)}

    async def request(keys: Sequence[str]) -> Answer:
        if len(keys) > 1:
            return answer_of(judge(400, None, keys), None)
        if wanted[keys[0]] == 200:
            return Answer({keys[0]: Verdict(Fate.stored)})
        return answer_of(judge(wanted[keys[0]], None, keys), None)

    things, streams = {k: k for k in wanted}, {k: k for k in wanted}
    if together_first:
        going = together(request, things, streams, others_stored=False, proven=(), alike={})
    else:
        going = one_by_one(request, things, streams, there=True, others_stored=False, proven=(), alike={})
    answer = asyncio.run(going)
    parked = [k for k, v in answer.verdicts.items() if v.fate is Fate.reject]
    last = max((n for n, status in enumerate(statuses) if status == 200), default=-1)
    assert parked == [str(n) for n, status in enumerate(statuses) if status in (400, 413) and n < last]
    if 200 in statuses:
        assert not answer.whole
    elif set(statuses) <= {400, 413}:
        assert bool(answer.whole) == any(statuses.count(s) > 1 for s in (400, 413))
        assert answer.whole or not answer.heard, "that is no good answer"


@given(OUTCOMES, st.booleans())
def test_a_round_of_refusals_is_seen_as_one(outcomes: list[int], before: bool) -> None:
    keys = {str(n) for n in range(len(outcomes))}
    found = weighed({str(n): _verdict(o) for n, o in enumerate(outcomes)}, proven=keys if before else (), alike={})
    for n, outcome in enumerate(outcomes):
        if outcome == 0:
            fate = Fate.stored
        elif before or 0 in outcomes[n:]:
            fate = Fate.reject
        elif 0 in outcomes or outcomes.count(outcome) == 1:
            fate = Fate.retry
        else:
            fate = Fate.operator
        assert found[str(n)].fate is fate
