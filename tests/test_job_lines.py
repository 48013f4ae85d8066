"""What a person reads about steps of rules: of a job, and of the configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dicomnode.chains import Needs, When
from dicomnode.cli_jobs import job_lines
from dicomnode.config_summary import summary
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Request
from dicomnode.priors import Wish
from dicomnode.settings import Settings
from tests.index.rows import instance, outcome, select


def test_jobs_show_tells_what_is_around_a_step_and_why_it_was_skipped(db: Database) -> None:
    Catalogue(db).commit([instance()])
    needs = Needs(when=(When("r/a", measurement="volume_ml", minimum=1000.0),))
    wants = Needs(("r/a",), prior=Wish())
    first, second, third = select(
        db,
        "1.2.20",
        Request("m", ("r",), (), "routine", names=("r/a",)),
        Request("n", ("r",), (), "routine", names=("r/b",), step="r/b", needs=needs),
        Request("o", ("r",), (), "routine", names=("r/c",), step="r/c", needs=wants),
    )
    Jobs(db).lease("w", 60)
    Jobs(db).finish(first, "w", outcome())

    def told(job_id: int) -> list[str]:
        job: dict[str, Any] | None = Jobs(db).show(job_id)
        assert job is not None
        return [line.strip() for line in job_lines(job)]

    assert f"followed by b: job {second}, n, skipped" in told(first)
    lines = told(second)
    assert "step r/b" in lines and f"follows r/a: job {first}, m, done" in lines
    assert "why: its condition does not hold: volume_ml of step r/a is at least 1000" in lines
    assert "earlier study: none, the study has no date" in told(third)


def test_check_config_tells_the_steps_in_order(tmp_path: Path) -> None:
    settings = Settings(
        node={"data_dir": tmp_path},
        rules=[
            {
                "name": "r",
                "steps": [
                    {"name": "b", "model": "n", "when": [{"step": "a", "segment": "Nodule"}], "masks": {"lung": "a"}},
                    {"name": "a", "model": "m", "prior": {"from": ["index"]}},
                ],
            }
        ],
    )
    lines = [line for line in summary(settings, []) if line.startswith("  step")]
    assert lines == [
        "  step a: m, earlier study from index",
        "  step b: n, after a, when segment Nodule of step a was found, inputs lung (mask of a)",
    ]


def test_a_finding_without_a_probability_is_told(db: Database) -> None:
    Catalogue(db).commit([instance()])
    [job_id] = select(db, "1.2.20")
    Jobs(db).lease("w", 60)
    answers = [
        {"key": "rotated", "answer": "Present", "probability": None},
        {"key": "nodule", "answer": None, "probability": 0.25},
    ]
    made = outcome()
    Jobs(db).finish(job_id, "w", replace(made, summary={**made.summary, "findings": answers}))
    job = Jobs(db).show(job_id)
    assert job is not None
    lines = [line.strip() for line in job_lines(job)]
    assert "rotated: Present" in lines and "nodule: -, probability 0.250" in lines
