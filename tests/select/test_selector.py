"""The selector on rows: evidence is gathered, jobs are made once, hostile values stop nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dicomnode.fleet_settings import Fleet
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates
from dicomnode.index.jobs import Jobs
from dicomnode.select.selector import Selector, stack_of, stated_count
from dicomnode.settings import Settings
from tests.index.rows import FakeClock, instance, series_row

SETTINGS = Settings(rules=[{"name": "ct", "match": {"Modality": "CT"}, "models": ["m"]}])


def slices(count: int, association: str = "a", first: int = 0, **fields: Any) -> list[Any]:
    return [
        instance(
            association_id=association,
            ImagePositionPatient=f"0\\0\\{first + n}",
            ImageOrientationPatient="1\\0\\0\\0\\1\\0",
            **fields,
        )
        for n in range(count)
    ]


def opened(db: Database, name: str = "a") -> Catalogue:
    catalogue = Catalogue(db)
    catalogue.association_opened(association_id=name, receiver="r", peer="ct", ae="CT", address="::1")
    return catalogue


def test_waits_for_the_release_and_then_selects_once(db: Database, clock: FakeClock) -> None:
    rung: list[int] = []
    selector = Selector(SETTINGS, db, lambda: rung.append(1))
    catalogue = opened(db)
    catalogue.commit(slices(4))
    assert selector.run_once() <= 1.0 and rung == []
    catalogue.association_closed("a", "released")
    selector.run_once()
    selector.run_once()
    (job,) = Jobs(db).listing()
    assert "contiguous geometry: 4 slices" in job["reason"] and rung == [1]


def test_quiet_period_in_node_time(db: Database, clock: FakeClock) -> None:
    selector = Selector(SETTINGS, db)
    opened(db).commit(slices(4))
    clock.move(9.5)
    assert selector.run_once() == pytest.approx(0.5) and Jobs(db).listing() == []
    clock.moment = clock.moment.replace(year=2036)  # the wall clock says nothing
    selector.run_once()
    assert Jobs(db).listing() == []
    clock.move(0.5)
    selector.run_once()
    assert "quiet-period" in Jobs(db).listing()[0]["reason"]


def test_instances_are_read_again_only_when_the_series_is_another(
    db: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = Catalogue.series_instances
    monkeypatch.setattr(Catalogue, "series_instances", lambda self, i: [read.append(i), whole(self, i)][1])
    selector, catalogue = Selector(SETTINGS, db), opened(db)
    gap = slices(2, first=3)
    catalogue.commit(slices(2))
    catalogue.commit(gap)
    catalogue.association_closed("a", "released")
    for _ in range(5):  # a slice is missing: it waits, and each other series that grows has it looked at
        selector.run_once()
    assert len(read) == 1 and Jobs(db).listing() == []
    opened(db, "b").commit(slices(1, "b", first=2))
    catalogue.association_closed("b", "released")
    selector.run_once()
    assert len(read) == 2 and "contiguous geometry: 5 slices" in Jobs(db).listing()[0]["reason"]


def test_stated_count_ends_the_wait(db: Database) -> None:
    catalogue = opened(db)
    catalogue.commit(slices(3, NumberOfSeriesRelatedInstances="4"))
    Selector(SETTINGS, db).run_once()
    assert Jobs(db).listing() == []
    catalogue.commit(slices(1, first=3))
    Selector(SETTINGS, db).run_once()
    assert "expected-count" in Jobs(db).listing()[0]["reason"]


def test_series_without_a_rule_is_closed_without_a_job(db: Database) -> None:
    catalogue = opened(db)
    catalogue.commit(slices(3, Modality="MR"))
    catalogue.association_closed("a", "released")
    Selector(SETTINGS, db).run_once()
    assert Jobs(db).listing() == [] and catalogue.open_series() == []


def test_late_image_makes_a_revision(db: Database) -> None:
    catalogue = opened(db)
    catalogue.commit(slices(3))
    catalogue.association_closed("a", "released")
    Selector(SETTINGS, db).run_once()
    opened(db, "b").commit(slices(2, "b", first=3))
    catalogue.association_closed("b", "released")
    Selector(SETTINGS, db).run_once()
    assert [(j["revision"], j["state"]) for j in Jobs(db).listing()] == [(2, "pending"), (1, "superseded")]


HOSTILE = [
    {"NumberOfSeriesRelatedInstances": "9" * 10_000},
    {"NumberOfSeriesRelatedInstances": "²"},
    {"ImagePositionPatient": "0\\0\\inf"},
    {"ImagePositionPatient": "0\\0\\nan"},
    {"ImagePositionPatient": "0\\0\\1e308"},
    {"ImagePositionPatient": "0\\0\\-1e308"},
    {"ImageOrientationPatient": "inf\\0\\0\\0\\1\\0"},
    {"ImageOrientationPatient": "0\\0\\0\\0\\0\\0"},
    {"ImagePositionPatient": "1\\2"},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda f: "-".join(f"{k}={v[:12]}" for k, v in f.items()))
def test_hostile_values_stop_no_other_series(db: Database, clock: FakeClock, fields: dict[str, str]) -> None:
    geometry = {"ImagePositionPatient": "0\\0\\1", "ImageOrientationPatient": "1\\0\\0\\0\\1\\0"}
    catalogue = opened(db)
    catalogue.commit([instance("1.66", association_id="a", **{**geometry, **fields})])
    catalogue.commit(
        [instance("1.66", association_id="a", **{**geometry, "ImagePositionPatient": f"0\\0\\{n}"}) for n in range(3)]
    )
    catalogue.commit(slices(3))
    catalogue.association_closed("a", "released")
    selector = Selector(SETTINGS, db)
    selector.run_once()
    clock.move(11)
    selector.run_once()
    assert len(Jobs(db).listing()) == 2


def test_localizers_do_not_disturb_the_stack(db: Database) -> None:
    catalogue = Catalogue(db)
    catalogue.commit(slices(3))
    catalogue.commit(
        [
            instance(
                ImageType="ORIGINAL\\PRIMARY\\LOCALIZER",
                ImagePositionPatient="9\\9\\9",
                ImageOrientationPatient="0\\1\\0\\0\\0\\-1",
            )
        ]
    )
    report = stack_of(catalogue.series_instances(series_row(db, "1.2.20")["id"]))
    assert report is not None and report.contiguous and len(report.order) == 3


@pytest.mark.parametrize(
    ("text", "count"), [("12", 12), ("0", None), ("", None), ("-1", None), ("1.5", None), ("007", 7)]
)
def test_stated_count(text: str, count: int | None) -> None:
    assert stated_count({"NumberOfSeriesRelatedInstances": text}) == count


def test_rules_that_the_cloud_desires_are_followed_without_a_restart(db: Database) -> None:
    allowed = SETTINGS.model_copy(update={"fleet": Fleet(accept=("rules",))})
    selector, denied = Selector(allowed, db), Selector(SETTINGS, db)
    catalogue = opened(db)
    rule = {"name": "theirs", "match": {"Modality": "CT"}, "models": ["other"]}

    def model_for(number: int, by: Selector) -> str:
        catalogue.commit(slices(1, SeriesInstanceUID=f"1.2.3.{number}", NumberOfSeriesRelatedInstances="1"))
        by.run_once()
        return str(Jobs(db).listing()[0]["model"])

    assert model_for(1, selector) == "m"
    DesiredStates(db).decide(1, "d", {"rules": [rule]}, "applied")
    assert model_for(2, selector) == "other"
    assert model_for(3, denied) == "m", "where the operator does not let it, it changes nothing"
    DesiredStates(db).decide(2, "d", {"rules": []}, "refused", "wrong")
    assert model_for(4, selector) == "other", "the last good state serves"
    DesiredStates(db).decide(3, "d", {}, "applied")
    assert model_for(5, selector) == "m"
