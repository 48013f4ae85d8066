"""What procedure steps say together, and the selector on their rows in any order of arrival."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.cloud_settings import CloudPlan
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.notices import Notices
from dicomnode.index.outbox import Outbox
from dicomnode.index.procedure import WITHHELD, PerformedSeries, Step, Steps, StepState
from dicomnode.select.selector import Selector
from dicomnode.select.steps import FORGOTTEN_SECONDS, Standing, StepEvidence, judge, referenced_steps
from dicomnode.settings import Settings
from tests.index.rows import FakeClock, instance, outcome, series_row

HELD = frozenset("abc")
DONE, RUNS, STOPPED = StepState.completed, StepState.in_progress, StepState.discontinued


def says(state: StepState, listed: str = "", **more: Any) -> StepEvidence:
    return StepEvidence(state, more.pop("age", 5.0), listed=frozenset(listed), **more)


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ([], Standing()),
        ([says(DONE, "abc")], Standing(exact=True, states=("COMPLETED",))),
        ([says(STOPPED, "abc")], Standing(exact=True, states=("DISCONTINUED",))),
        ([says(DONE, "ab")], Standing(states=("COMPLETED",))),  # more is here than it lists: disproved
        ([says(DONE, "abcde")], Standing(missing=2, states=("COMPLETED",))),
        ([says(DONE, "xyz")], Standing(missing=3, states=("COMPLETED",))),
        ([says(DONE)], Standing(ended=True, states=("COMPLETED",))),
        ([says(DONE, "ab"), says(DONE, "c")], Standing(exact=True, states=("COMPLETED",))),
        ([says(DONE, "ab"), says(STOPPED, "c")], Standing(exact=True, states=("COMPLETED", "DISCONTINUED"))),
        ([says(DONE, "abc"), says(DONE)], Standing(states=("COMPLETED",))),  # the other made we know not what
        ([says(DONE, "abc"), says(RUNS)], Standing(running=True, states=("COMPLETED", "IN PROGRESS"))),
        ([says(RUNS, "abc")], Standing(running=True, states=("IN PROGRESS",))),
        ([says(RUNS, "abcd")], Standing(running=True, missing=1, states=("IN PROGRESS",))),
        ([says(RUNS, names=False)], Standing(running=True)),
        ([says(RUNS, names=False, age=FORGOTTEN_SECONDS)], Standing()),
        ([says(DONE, names=False)], Standing()),
        ([says(STOPPED, "abc", wrong_entry=True)], Standing(withheld=True)),
        ([says(STOPPED, wrong_entry=True, names=False)], Standing(withheld=True)),
        ([says(STOPPED, "abx", wrong_entry=True), says(DONE, "abc")], Standing(exact=True, states=("COMPLETED",))),
        ([says(STOPPED, wrong_entry=True), says(RUNS, "abc")], Standing(withheld=True, states=("IN PROGRESS",))),
    ],
)
def test_judgement(steps: list[StepEvidence], wanted: Standing) -> None:
    found = judge(steps, HELD)
    age = min((s.age_seconds for s in steps), default=0.0)
    assert found == Standing(
        **{f: getattr(wanted, f) for f in Standing.__slots__ if f != "age_seconds"}, age_seconds=age
    )


STEPS = st.builds(
    StepEvidence,
    state=st.sampled_from(StepState),
    age_seconds=st.floats(0, 2 * FORGOTTEN_SECONDS),
    names=st.booleans(),
    listed=st.frozensets(st.sampled_from("abcd"), max_size=4),
    wrong_entry=st.booleans(),
).map(
    lambda s: StepEvidence(
        s.state,
        s.age_seconds,
        s.names,
        s.listed if s.names else frozenset(),
        s.wrong_entry and s.state is STOPPED,
    )
)
UIDS = st.frozensets(st.sampled_from("abcd"), max_size=4)


@given(st.lists(STEPS, max_size=3), UIDS)
def test_order_does_not_matter(steps: list[StepEvidence], held: frozenset[str]) -> None:
    assert len({judge(list(order), held) for order in itertools.permutations(steps)}) == 1


@given(st.lists(STEPS, max_size=3), UIDS)
def test_exact_means_exactly(steps: list[StepEvidence], held: frozenset[str]) -> None:
    found = judge(steps, held)
    if found.exact:
        assert frozenset().union(*(s.listed for s in steps if not s.wrong_entry)) == held and held
        assert not (found.missing or found.running or found.withheld)
    assert not (found.exact and found.ended and found.missing)


@given(
    st.text()
    | st.recursive(st.none() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)).map(json.dumps)
)
def test_any_reference_is_safe(value: str) -> None:
    assert referenced_steps({"ReferencedPerformedProcedureStepSequence": value}) == ()


def test_reference() -> None:
    value = json.dumps([{"ReferencedSOPInstanceUID": "1.2.3"}, {"ReferencedSOPInstanceUID": "x"}])
    assert referenced_steps({"ReferencedPerformedProcedureStepSequence": value}) == ("1.2.3",)
    assert referenced_steps({}) == ()


# On rows

SETTINGS = Settings(
    rules=[{"name": "ct", "match": {"Modality": "CT"}, "models": ["m"], "send_to": ["pacs"], "notify": ["ris"]}],
    peers=[
        {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 1},
        {"name": "ris", "ae_title": "RIS", "host": "127.0.0.1", "port": 2},
    ],
    completeness={"quiet_seconds": 10, "step_seconds": 60},
)
STUDY, SERIES = "1.2.10", "1.2.20"
SLICES = [f"1.9.{n}" for n in range(5)]


class Site:
    """An index with a selector, and what a modality does to it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.steps, self.catalogue, self.jobs = Steps(db), Catalogue(db), Jobs(db)
        self.selector = Selector(SETTINGS, db)
        self.catalogue.association_opened(association_id="a", receiver="r", peer="ct", ae="CT", address="::1")

    def begin(self, uid: str = "1.7.1", modality: str = "CT", study: str = STUDY) -> None:
        assert self.steps.create(uid, Step(RUNS, (study,), modality, False, (), b"x"), "ct")

    def end(
        self, state: StepState = DONE, listed: Sequence[str] = SLICES, *, uid: str = "1.7.1", wrong: bool = False
    ) -> None:
        row = self.steps.read(uid)
        assert row is not None
        series = (PerformedSeries(SERIES, tuple(listed)),)
        assert self.steps.replace(row["id"], row["version"], Step(state, (STUDY,), "CT", wrong, series, b"x"))

    def store(self, *uids: str, **fields: Any) -> None:
        place = {"ImageOrientationPatient": "1\\0\\0\\0\\1\\0", **fields}
        self.catalogue.commit(
            [
                instance(
                    SERIES, STUDY, uid, association_id="a", ImagePositionPatient=f"0\\0\\{SLICES.index(uid)}", **place
                )
                for uid in uids
            ]
        )

    def release(self) -> None:
        self.catalogue.association_closed("a", "released")

    def look(self) -> list[dict[str, Any]]:
        self.selector.run_once()
        return self.jobs.listing()


@pytest.fixture
def site(db: Database) -> Site:
    return Site(db)


def test_complete_as_soon_as_the_last_listed_instance_is_here(site: Site) -> None:
    site.begin()
    site.store(*SLICES[:-1])
    site.end()
    site.release()  # contiguous and released, but one is known to be missing
    assert site.look() == []
    site.store(SLICES[-1])
    assert site.look()[0]["reason"] == "procedure-step: it is completed, and the 5 instance(s) that it lists are here"


def test_missing_instances_are_waited_for_and_then_told(site: Site, clock: FakeClock) -> None:
    site.begin()
    site.store(*SLICES[:-1])
    site.end()
    clock.move(59.0)
    assert site.selector.run_once() == 1.0 and site.jobs.listing() == []
    clock.move(1.0)
    assert "1 instance(s) that the procedure step lists did not arrive" in site.look()[0]["reason"]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_running_step_of_the_study_holds_the_quiet_period(site: Site, clock: FakeClock, modality: str) -> None:
    site.begin(modality=modality)
    site.store(*SLICES)
    clock.move(10.0)
    assert bool(site.look()) is (modality == "MR")  # a step of another modality says nothing
    clock.move(50.0)
    reason = site.look()[0]["reason"]
    assert ("still in progress" in reason) is (modality == "CT")


def test_images_name_their_step(site: Site, clock: FakeClock) -> None:
    site.begin("1.7.1", study="1.2.99")  # its scheduled step has another study
    site.begin("1.7.2")
    site.end(uid="1.7.2")
    reference = json.dumps([{"ReferencedSOPInstanceUID": "1.7.1"}])
    site.store(*SLICES, ReferencedPerformedProcedureStepSequence=reference)
    clock.move(10.0)
    assert site.look() == []  # the step that made the images runs, whatever another lists
    clock.move(50.0)
    assert "still in progress" in site.look()[0]["reason"]


def withheld(site: Site) -> bool:
    row = series_row(site.db, SERIES)
    return row["selected_reason"] == WITHHELD and row["selected_generation"] == row["generation"]


def test_wrong_worklist_entry_before_and_after_the_images(site: Site) -> None:
    site.begin()
    site.end(STOPPED, SLICES, wrong=True)
    site.store(*SLICES)
    site.release()
    assert site.look() == [] and withheld(site)
    (event,) = site.db.rows("SELECT * FROM events")
    assert event["kind"] == "procedure-step" and "0 job(s)" in event["text"] and STUDY not in event["text"]


@pytest.mark.parametrize("so_far", ["pending", "running", "done", "sent"])
def test_wrong_worklist_entry_stops_what_is_under_way(site: Site, so_far: str) -> None:
    site.begin()
    site.store(*SLICES)
    site.release()
    (job,) = site.look()
    outbox, notices = Outbox(site.db, "deliveries"), Notices(site.db)
    if so_far != "pending":
        assert site.jobs.lease("w", 60) is not None
    if so_far in ("done", "sent"):
        site.jobs.finish(job["id"], "w", outcome(STUDY), cloud=CloudPlan("cloud"))
    if so_far == "sent":
        for item in outbox.lease("pacs", "c", 60, 10):
            outbox.stored(item["id"], "c")
        assert notices.release() == 1
    site.end(STOPPED, SLICES, wrong=True)
    (job,) = site.look()
    assert job["state"] == ("done" if so_far in ("done", "sent") else "refused")
    assert outbox.counts()["rejected"] == (2 if so_far == "done" else 0)
    assert Outbox(site.db, "sync_items").counts()["rejected"] == (2 if so_far in ("done", "sent") else 0)
    assert notices.counts()["rejected"] == (1 if so_far in ("done", "sent") else 0)
    assert outbox.due_destinations() == [] == notices.due_destinations() and withheld(site)
    (event,) = site.db.rows("SELECT * FROM events")
    assert event["severity"] == ("error" if so_far == "sent" else "warning")
    if so_far in ("pending", "running"):  # the operator has the last word
        site.jobs.retry(job["id"])
        assert site.jobs.lease("w", 60) is not None


def test_a_completed_step_takes_the_withholding_back(site: Site) -> None:
    site.begin("1.7.1")
    site.end(STOPPED, SLICES, wrong=True)
    site.store(*SLICES)
    assert site.look() == []
    site.begin("1.7.2")
    site.end(DONE, SLICES, uid="1.7.2")
    assert "procedure-step: it is completed" in site.look()[0]["reason"]


def test_a_decision_made_before_the_wrong_entry_was_told_is_void(site: Site) -> None:
    site.begin()
    site.store(*SLICES)
    generation = series_row(site.db, SERIES)["generation"]  # as a selector reads it
    site.end(STOPPED, SLICES, wrong=True)
    assert site.jobs.select(series_row(site.db, SERIES)["id"], generation, "early", []) == []
    assert site.look() == [] and withheld(site)


def test_step_without_list_that_images_refer_to(site: Site) -> None:
    site.begin()
    reference = json.dumps([{"ReferencedSOPInstanceUID": "1.7.1"}])
    site.store(*SLICES, ReferencedPerformedProcedureStepSequence=reference)
    site.release()
    assert len(site.look()) == 1
    row = site.steps.read("1.7.1")
    assert site.steps.replace(row["id"], row["version"], Step(STOPPED, (STUDY,), "CT", True, (), b"x"))
    assert site.look()[0]["state"] == "refused" and withheld(site)


ACTIONS = ["end", *SLICES]


@settings(max_examples=25)
@given(st.permutations(ACTIONS), st.sets(st.integers(0, len(ACTIONS)), max_size=4), st.sampled_from([DONE, STOPPED]))
def test_any_order_of_arrival_gives_one_job_with_everything(
    order: list[str], looks: set[int], state: StepState
) -> None:
    """Never before the last listed instance, at once after it, and always the same inputs."""
    with tempfile.TemporaryDirectory() as folder:
        db = Database(Path(folder), FakeClock())
        try:
            site = Site(db)
            site.begin()
            for number, action in enumerate(order):
                if number in looks:
                    assert site.look() == []
                if action == "end":
                    site.end(state)
                else:
                    site.store(action)
            (job,) = site.look()
            assert site.jobs.input_count(job["id"]) == len(SLICES) and job["revision"] == 1
            assert job["reason"].startswith(f"procedure-step: it is {state.lower()}")
        finally:
            db.close()
