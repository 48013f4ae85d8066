"""Which version serves, and what happens when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dicomnode.errors import BundleError, EngineError
from dicomnode.index.database import Database
from dicomnode.index.life import Change, Life
from dicomnode.index.operation import Events, Models
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.serving import ServingModels, bundle_folders, version_before

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "ct-lung" / "1.0.0"


def copy_as(models: Path, version: str) -> Path:
    folder = models / "ct-lung" / version
    shutil.copytree(SHIPPED, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["version"] = version
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def db(tmp_path: Path):
    made = Database(tmp_path / "data")
    yield made
    made.close()


def serving(db: Database, tmp_path: Path) -> ServingModels:
    return ServingModels(db, OnnxRuntimeCpu(), models_dir=tmp_path / "models", data_dir=tmp_path / "data", threads=1)


def test_a_damaged_newest_version_leaves_the_last_good_one_serving(db: Database, tmp_path: Path) -> None:
    copy_as(tmp_path / "models", "1.0.0")
    models = serving(db, tmp_path)
    assert models.get("ct-lung").identity.version == "1.0.0"
    newer = copy_as(tmp_path / "models", "1.1.0")
    (newer / "model.onnx").write_bytes(b"damaged")
    assert models.get("ct-lung").identity.version == "1.0.0"
    assert "model.onnx" in Events(db).listing()[0]["text"]
    assert serving(db, tmp_path).get("ct-lung").identity.version == "1.0.0"  # also after a restart
    with pytest.raises(BundleError):
        models.get("ct-lung@1.1.0")  # a pinned version is that one or nothing


def test_a_first_activation_can_be_rolled_back(db: Database, tmp_path: Path) -> None:
    copy_as(tmp_path / "models", "1.0.0")
    models = serving(db, tmp_path)
    assert models.get("ct-lung").identity.version == "1.0.0"
    copy_as(tmp_path / "models", "1.1.0")
    Models(db).activate("ct-lung", "1.1.0")
    assert models.get("ct-lung").identity.version == "1.1.0"
    folders = bundle_folders(tmp_path / "models", tmp_path / "data")
    before = version_before(folders, "ct-lung", "1.1.0", Life(db).served_before("ct-lung"))
    assert before == "1.0.0"
    Models(db).activate("ct-lung", before)
    assert models.get("ct-lung").identity.version == "1.0.0"
    assert version_before(folders, "ct-lung", "1.0.0", Life(db).served_before("ct-lung")) == "1.1.0"
    assert version_before(folders, "ct-lung", None, []) is None
    assert version_before(folders[:1], "ct-lung", "1.0.0", []) is None
    assert version_before(folders, "ct-lung", "1.0.0", [], {"ct-lung": frozenset({"1.1.0"})}) is None
    assert version_before(folders, "ct-lung", "1.1.0", ["0.9.0", "1.0.0"]) == "1.0.0", "0.9.0 is not on this box"
    assert version_before(folders, "ct-lung", "1.1.0", ["0.9.0"]) == "0.9.0", "so that the error names it"


def test_a_faulty_version_does_not_serve_on_when_the_one_before_is_broken(db: Database, tmp_path: Path) -> None:
    """It is loaded, and what the roll-back named cannot be opened: an older one serves, or none."""
    for version in ("1.0.0", "1.1.0"):
        copy_as(tmp_path / "models", version)
    Models(db).activate("ct-lung", "1.0.0")
    Models(db).activate("ct-lung", "1.1.0")
    models = serving(db, tmp_path)
    faulty = models.get("ct-lung")
    Life(db).roll_back("ct-lung", "1.1.0", "1.0.0", Change("node", "errors", automatic=True))
    (tmp_path / "models" / "ct-lung" / "1.0.0" / "model.onnx").write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"model\.onnx"):
            models.get("ct-lung")
        models.prepare([])
    assert models.report()["ready"] == {}
    with pytest.raises(EngineError, match="closed"):
        faulty.session.run({"hu": np.zeros((1, 1, 8, 8), np.float32)})
    copy_as(tmp_path / "models", "0.9.0")
    assert models.get("ct-lung").identity.version == "0.9.0"


def test_a_model_that_a_job_holds_stays_open_when_it_is_replaced(db: Database, tmp_path: Path) -> None:
    """A more urgent job in the middle of another one may find a newer version active."""
    for version in ("1.0.0", "1.1.0"):
        copy_as(tmp_path / "models", version)
    Models(db).activate("ct-lung", "1.0.0")
    models = serving(db, tmp_path)
    outer = models.get("ct-lung")
    models.hold(outer)
    Models(db).activate("ct-lung", "1.1.0")
    inner = models.get("ct-lung")
    assert inner.identity.version == "1.1.0"
    hu = {"hu": np.zeros((1, 1, 8, 8), np.float32)}
    assert outer.session.run(hu).keys() == inner.session.run(hu).keys()
    models.let_go(outer)
    with pytest.raises(EngineError, match="closed"):
        outer.session.run(hu)
    assert inner.session.run(hu)
    models.keep([])
    with pytest.raises(EngineError, match="closed"):
        inner.session.run(hu)


def test_what_is_on_trial_or_staged_does_not_serve_for_being_newest(db: Database, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        copy_as(tmp_path / "models", version)
    models = serving(db, tmp_path)
    assert models.get("ct-lung").identity.version == "1.1.0"
    life = Life(db)
    for change in (life.stage, life.shadow, life.retire):
        change("ct-lung", "1.1.0", who="me")
        assert models.get("ct-lung").identity.version == "1.0.0"
        assert models.get("ct-lung@1.1.0").identity.version == "1.1.0"  # a rule that names it gets it
    life.activate("ct-lung", "1.1.0", who="me")
    life.roll_back("ct-lung", "1.1.0", "1.0.0", Change("node", "errors"))
    (tmp_path / "models" / "ct-lung" / "1.0.0" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError):  # what was rolled back is no way out
        serving(db, tmp_path).get("ct-lung")
