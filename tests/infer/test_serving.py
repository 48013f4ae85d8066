"""Which version serves, and what happens when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dicomnode.errors import BundleError
from dicomnode.index.database import Database
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
    before = version_before(folders, "ct-lung", "1.1.0", Models(db).previous("ct-lung"))
    assert before == "1.0.0"
    Models(db).activate("ct-lung", before)
    assert models.get("ct-lung").identity.version == "1.0.0"
    assert version_before(folders, "ct-lung", "1.0.0", Models(db).previous("ct-lung")) == "1.1.0"
    assert version_before(folders, "ct-lung", None, None) is None
    assert version_before(folders[:1], "ct-lung", "1.0.0", None) is None
