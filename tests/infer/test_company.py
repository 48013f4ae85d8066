"""Who joins a batch: by version, priority, order, rows and what happened to a job before."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dicomnode.infer.company import Queued, company, sociable

jobs = st.builds(
    Queued,
    job_id=st.integers(2, 1000),
    priority=st.integers(0, 2),
    model=st.sampled_from(["m", "n"]),
    version=st.sampled_from(["1", "2"]),
    instances=st.integers(0, 20),
    attempts=st.sampled_from([0, 0, 0, 1, 2]),
    parted=st.sampled_from([False, False, False, True]),
)
queues = st.lists(jobs, max_size=30, unique_by=lambda job: job.job_id)
limits = {"studies": st.integers(1, 20), "rows": st.integers(1, 32)}
FIRST = Queued(1, 1, "m", "1", 1)


@given(first=jobs.map(lambda job: replace(job, job_id=1)), queue=queues, **limits)
def test_who_joins_is_like_the_first_and_fits(first: Queued, queue: list[Queued], studies: int, rows: int) -> None:
    chosen = company(first, queue, studies=studies, rows=rows)
    by_id = {job.job_id: job for job in queue}
    mates = [by_id[number] for number in chosen]
    assert len(mates) <= max(0, studies - 1)
    assert not mates or first.instances + sum(m.instances for m in mates) <= rows
    for mate in mates:
        assert (mate.model, mate.version, mate.priority) == (first.model, first.version, first.priority)
    for job in [first, *mates] if mates else []:
        assert job.attempts == 0 and not job.parted, "one that failed, or whose company died, is done alone"
    order = [queue.index(mate) for mate in mates]
    assert order == sorted(order)


@given(queue=queues, **limits)
def test_nobody_is_left_out_without_a_reason(queue: list[Queued], studies: int, rows: int) -> None:
    chosen = set(company(FIRST, queue, studies=studies, rows=rows))
    room = rows - FIRST.instances - sum(j.instances for j in queue if j.job_id in chosen)
    if studies < 2 or not sociable(FIRST, rows) or len(chosen) == studies - 1:
        return
    for job in queue:
        alike = (job.model, job.version, job.priority) == (FIRST.model, FIRST.version, FIRST.priority)
        if alike and sociable(job, rows) and job.job_id not in chosen:
            assert job.instances > room


@given(queue=queues, other=jobs, at=st.integers(0, 30), **limits)
def test_a_job_that_may_not_join_changes_nothing_for_others(
    queue: list[Queued], other: Queued, at: int, studies: int, rows: int
) -> None:
    stranger = replace(other, job_id=5000, version="3")
    with_it = [*queue[:at], stranger, *queue[at:]]
    assert company(FIRST, with_it, studies=studies, rows=rows) == company(FIRST, queue, studies=studies, rows=rows)


def test_the_queue_goes_on_behind_one_that_does_not_fit() -> None:
    queue = [replace(FIRST, job_id=n, instances=count) for n, count in ((2, 2), (3, 7), (4, 1), (5, 1))]
    assert company(FIRST, queue, studies=16, rows=8) == (2, 4, 5)
    assert company(FIRST, queue, studies=3, rows=8) == (2, 4)
    assert company(FIRST, queue, studies=1, rows=8) == ()


def test_the_job_itself_does_not_join_itself() -> None:
    assert company(FIRST, [FIRST, replace(FIRST, job_id=2)], studies=4, rows=8) == (2,)
