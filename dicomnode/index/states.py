"""State tables as data: what may follow what, and by which event. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from dicomnode.errors import IllegalTransition


class JobState(StrEnum):
    waiting = "waiting"  # a step of a rule, for what it follows
    pending = "pending"
    running = "running"
    done = "done"
    refused = "refused"
    failed = "failed"
    superseded = "superseded"
    skipped = "skipped"  # a step whose condition does not hold
    not_run = "not-run"  # a step that follows one that failed


class JobEvent(StrEnum):
    lease = "lease"
    finish = "finish"
    refuse = "refuse"  # the input does not meet the model's contract
    retry = "retry"  # passing cause: wait, then again
    give_up = "give_up"  # attempts exhausted or a cause that cannot pass
    lose = "lose"  # the lease ran out: the worker died
    supersede = "supersede"  # late images made a newer revision
    withdraw = "withdraw"  # the modality said that the series must not be analysed
    requeue = "requeue"  # the operator wants it again
    hold = "hold"  # what it follows is open (again)
    ready = "ready"
    skip = "skip"
    bar = "bar"


class SendState(StrEnum):
    pending = "pending"
    sending = "sending"
    stored = "stored"
    committing = "committing"  # the peer was asked for storage commitment, or is about to be
    committed = "committed"
    rejected = "rejected"


class SendEvent(StrEnum):
    lease = "lease"
    store = "store"
    retry = "retry"
    reject = "reject"
    lose = "lose"
    ask = "ask"
    commit = "commit"  # the peer has accepted responsibility (PS3.4 J)
    miss = "miss"  # the peer says that it does not have it
    unanswered = "unanswered"  # no word from the peer about it
    withdraw = "withdraw"
    requeue = "requeue"


JOB_TABLE: Mapping[tuple[JobState, JobEvent], JobState] = {
    (JobState.pending, JobEvent.lease): JobState.running,
    (JobState.pending, JobEvent.supersede): JobState.superseded,
    (JobState.pending, JobEvent.withdraw): JobState.refused,
    (JobState.running, JobEvent.finish): JobState.done,
    (JobState.running, JobEvent.refuse): JobState.refused,
    (JobState.running, JobEvent.retry): JobState.pending,
    (JobState.running, JobEvent.give_up): JobState.failed,
    (JobState.running, JobEvent.lose): JobState.pending,
    (JobState.running, JobEvent.supersede): JobState.superseded,
    (JobState.running, JobEvent.withdraw): JobState.refused,
    (JobState.failed, JobEvent.requeue): JobState.pending,
    (JobState.failed, JobEvent.supersede): JobState.superseded,
    (JobState.failed, JobEvent.withdraw): JobState.refused,
    (JobState.refused, JobEvent.requeue): JobState.pending,
    (JobState.refused, JobEvent.supersede): JobState.superseded,
    (JobState.waiting, JobEvent.ready): JobState.pending,
    (JobState.waiting, JobEvent.skip): JobState.skipped,
    (JobState.waiting, JobEvent.bar): JobState.not_run,
    (JobState.waiting, JobEvent.supersede): JobState.superseded,
    (JobState.waiting, JobEvent.withdraw): JobState.refused,
    (JobState.pending, JobEvent.hold): JobState.waiting,
    (JobState.not_run, JobEvent.hold): JobState.waiting,
    (JobState.not_run, JobEvent.supersede): JobState.superseded,
    (JobState.skipped, JobEvent.supersede): JobState.superseded,
}
"""Jobs. ``done`` and ``superseded`` are final: a new revision is a new job. A step of a rule begins as ``waiting``."""

SEND_TABLE: Mapping[tuple[SendState, SendEvent], SendState] = {
    (SendState.pending, SendEvent.lease): SendState.sending,
    (SendState.pending, SendEvent.withdraw): SendState.rejected,
    (SendState.sending, SendEvent.store): SendState.stored,
    (SendState.sending, SendEvent.retry): SendState.pending,
    (SendState.sending, SendEvent.reject): SendState.rejected,
    (SendState.sending, SendEvent.lose): SendState.pending,
    (SendState.sending, SendEvent.withdraw): SendState.rejected,
    (SendState.stored, SendEvent.ask): SendState.committing,
    (SendState.stored, SendEvent.commit): SendState.committed,
    (SendState.stored, SendEvent.miss): SendState.pending,
    (SendState.stored, SendEvent.withdraw): SendState.rejected,
    (SendState.committing, SendEvent.commit): SendState.committed,
    (SendState.committing, SendEvent.miss): SendState.pending,
    (SendState.committing, SendEvent.unanswered): SendState.stored,
    (SendState.committing, SendEvent.withdraw): SendState.rejected,
    (SendState.committing, SendEvent.requeue): SendState.pending,
    (SendState.rejected, SendEvent.requeue): SendState.pending,
}
"""Deliveries to DICOM peers and items of the cloud outbox.

``committed`` is final, and ``stored`` where nobody asks for storage commitment: a peer without
it, and the cloud. A report can come late, for a ``stored`` delivery that is to be asked for again.
"""


def next_job_state(state: str, event: JobEvent) -> JobState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return JOB_TABLE[JobState(state), event]
    except (KeyError, ValueError):
        raise IllegalTransition("change job state", f"'{event}' is not possible in state '{state}'") from None


def next_send_state(state: str, event: SendEvent) -> SendState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return SEND_TABLE[SendState(state), event]
    except (KeyError, ValueError):
        raise IllegalTransition("change delivery state", f"'{event}' is not possible in state '{state}'") from None


def backoff_seconds(attempts: int, first: float, longest: float) -> float:
    """Exponential back-off: ``first`` after the first failure, doubled up to ``longest``."""
    return min(longest, first * 2.0 ** min(max(attempts - 1, 0), 30))
