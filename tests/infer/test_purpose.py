"""A bundle for benchmarks: opened and verified, refused for studies at every door."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicomnode.cli import app
from dicomnode.errors import BundleError
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Models
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.kserve import KServe
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.places import serving_at
from dicomnode.infer.purpose import rule_findings
from dicomnode.infer.serving import ServingModels
from dicomnode.model_desk import Action, ModelDesk
from dicomnode.settings import Settings
from tests.infer.life_case import add_series, add_version, settings_of, worker_on

RULES = [{"name": "chest", "match": {"Modality": "CT"}, "models": ["ct-lung@1.1.0"]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_version(tmp_path, "1.0.0")
    add_version(tmp_path, "1.1.0", lambda m: m.update(purpose="benchmark"))
    return tmp_path


@pytest.fixture
def settings(folder: Path) -> Settings:
    return settings_of(folder, rules=RULES)


def serving(settings: Settings, db: Database) -> ServingModels:
    inference = settings.inference
    return ServingModels(
        db, OnnxRuntimeCpu(), models_dir=inference.models_dir, data_dir=settings.node.data_dir, threads=1
    )


def test_purpose_is_part_of_the_manifest_and_only_two_values_are_known(folder: Path) -> None:
    assert load_bundle(folder / "models/ct-lung/1.0.0").manifest.purpose == "clinical"
    assert load_bundle(folder / "models/ct-lung/1.1.0").manifest.purpose == "benchmark"
    other = add_version(folder, "1.2.0", lambda m: m.update(purpose="research"))
    with pytest.raises(BundleError, match="purpose"):
        load_bundle(other)


@pytest.mark.parametrize("action", ["shadow", "canary", "activate"])
def test_the_desk_refuses_it(settings: Settings, action: Action) -> None:
    db = Database(settings.node.data_dir)
    verified: list[Path] = []
    desk = ModelDesk(settings, db, verified.append)
    with pytest.raises(BundleError, match="for benchmarks only"):
        desk.change(action, "ct-lung", "1.1.0", who="op", percent=10)
    assert not verified
    assert "1.1.0" not in Models(db).active().values()
    desk.change(action, "ct-lung", "1.0.0", who="op", percent=10)
    db.close()


def test_the_worker_refuses_it_and_the_release_before_serves(settings: Settings) -> None:
    db = Database(settings.node.data_dir)
    models = serving(settings, db)
    with pytest.raises(BundleError, match=r"use ct-lung 1\.1\.0 for studies: it is for benchmarks only"):
        models.get("ct-lung@1.1.0")
    assert models.get("ct-lung").identity.version == "1.0.0"  # 1.1.0 is the newest on the disk
    db.close()


def test_an_endpoint_is_not_asked_for_it(settings: Settings) -> None:
    db = Database(settings.node.data_dir)
    endpoint = Settings(
        node={"data_dir": settings.node.data_dir},
        inference={"endpoints": [{"name": "pool", "url": "http://127.0.0.1:1"}]},
    ).inference.endpoints[0]
    models = serving_at(KServe(endpoint), settings, db)
    with pytest.raises(BundleError, match="for benchmarks only"):
        models.get("ct-lung@1.1.0")
    db.close()


def test_the_router_gives_it_no_job_whatever_the_models_say(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = Database(settings.node.data_dir)
    worker = worker_on(settings, db)
    add_series(db)
    monkeypatch.setattr("dicomnode.infer.serving.check_clinical_at", lambda _: None)
    row = Jobs(db).lease("worker", 60)
    assert row is not None
    with pytest.raises(BundleError, match="for benchmarks only"):
        worker.router.pick({**row, "model": "ct-lung@1.1.0"}, 20, lambda _: None)
    assert worker.router.pick({**row, "model": "ct-lung@1.0.0"}, 20, lambda _: None).identity.version == "1.0.0"
    db.close()


def test_check_config_refuses_a_rule_that_names_it(settings: Settings, folder: Path) -> None:
    found = list(rule_findings(settings))
    assert [f.level.value for f in found] == ["FAULT"]
    assert "chest: ct-lung@1.1.0: it is for benchmarks only" in found[0].text
    config = folder / "node.toml"
    text = (
        f'[node]\ndata_dir = "{folder}/data"\n[inference]\nmodels_dir = "{folder}/models"\n'
        '[[rules]]\nname = "chest"\nmatch = {{ Modality = "CT" }}\nmodels = ["ct-lung@{}"]\n'
    )
    config.write_text(text.format("1.1.0").replace("{{", "{").replace("}}", "}"))
    result = CliRunner().invoke(app, ["check-config", "--config", str(config)])
    assert result.exit_code == 78
    assert "for benchmarks only" in result.output.replace("\n", " ")
    config.write_text(text.format("1.0.0").replace("{{", "{").replace("}}", "}"))
    assert CliRunner().invoke(app, ["check-config", "--config", str(config)]).exit_code == 0


def test_a_step_of_a_rule_is_looked_at_too(folder: Path) -> None:
    steps = [{"name": "first", "model": "ct-lung@1.0.0"}, {"name": "second", "model": "ct-lung@1.1.0"}]
    found = list(
        rule_findings(settings_of(folder, rules=[{"name": "chest", "match": {"Modality": "CT"}, "steps": steps}]))
    )
    assert ["ct-lung@1.1.0" in f.text for f in found] == [True]
