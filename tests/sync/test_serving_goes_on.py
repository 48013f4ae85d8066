"""Whatever happens to the way in of models, studies are analysed by the version that is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dicomnode.cloud.publish import pack
from dicomnode.errors import BundleError
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Models
from dicomnode.index.trust import Trust
from dicomnode.infer.golden import ReadyModel
from dicomnode.settings import Settings
from dicomnode.sync.prune import Pruner
from dicomnode.sync.pull import ModelPuller
from dicomnode.sync.repository import ModelRepository
from tests.e2e.harness import make_series
from tests.infer.life_case import add_series, add_version, boxes, settings_of, worker_on
from tests.sync.cloud_fake import served
from tests.sync.index_case import FakeClock
from tests.sync.tuf_case import Line, TufRepository, later

NAME = "ct-lung"


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        add_version(folder, "1.0.0")
        self.clock = FakeClock(start=datetime.now(UTC))
        self.db = Database(folder / "data", self.clock)
        self.repository = TufRepository()
        self.offer("1.1.0")
        (folder / "root.json").write_bytes(self.repository.trusted_root)
        self.verdict: Exception | None = None
        self.mode = "auto"
        self.policy = "activate"
        self.jobs = 0

    def offer(self, version: str) -> None:
        self.repository.add(f"{NAME}/{version}.tar.gz", pack(add_version(self.folder / "made", version)))
        self.repository.publish()

    def settings(self, base: str = "http://127.0.0.1:1") -> Settings:
        repository = {"metadata_url": f"{base}/metadata", "root_file": self.folder / "root.json"}
        cloud = {
            "models": [{"name": NAME, "policy": self.policy}],
            "repository": repository,
            "timeout_seconds": 20,
            "keep_retired": 0,
        }
        return settings_of(self.folder, cloud=cloud, sync={"offline_mode": self.mode})

    def verify(self, _: Path) -> None:
        if self.verdict is not None:
            raise self.verdict

    def look(self, *, alive: bool = True) -> None:
        """Refresh and pull once."""

        async def main() -> None:
            async with served(self.repository.handle, "/{path:.*}") as url:
                settings = self.settings(url.removesuffix("/{path:.*}") if alive else "http://127.0.0.1:1")
                followed = ModelRepository(settings, self.db)
                followed._trust.repository = "here"  # the port changes
                puller = ModelPuller(settings, self.db, self.verify, followed.offered)
                puller.start()
                await followed.run_once()
                await puller.run_once()
                await Pruner(settings, self.db).run_once()

        asyncio.run(main())
        self.clock.now += 7200.0

    def analysed_by(self, worker: Any, version: str) -> None:
        self.jobs += 1
        job_id = add_series(self.db, make_series(f"goes-on-{self.jobs}"))
        worker.run_once()
        job = Jobs(self.db).show(job_id)
        assert job is not None
        assert (job["state"], job["model_version"]) == ("done", version), job["reason"]

    @property
    def state(self) -> str:
        row = Trust(self.db, "here").row()
        assert row is not None
        return str(row["state"])


def tampered(site: Site) -> None:
    site.offer("2.0.0")
    where = site.repository.where(f"{NAME}/2.0.0.tar.gz")
    site.repository.files[where] = site.repository.files[where][:-8] + bytes(8)


def truncated(site: Site) -> None:
    site.offer("3.0.0")
    site.repository.script["3.0.0"] = Line().cut(1000)


def endless(site: Site) -> None:
    site.offer("4.0.0")
    site.repository.script["4.0.0"] = Line().endless


def failing_golden_case(site: Site) -> None:
    site.offer("5.0.0")
    site.verdict = BundleError("verify bundle", "golden case 1 differs")


def wrong_signature(site: Site) -> None:
    site.offer("6.0.0")
    site.repository.put("targets", site.repository.targets, *TufRepository().keys["targets"])


def rolled_back(site: Site) -> None:
    site.repository.timestamp.version = 1
    site.repository.files["metadata/timestamp.json"] = site.repository.sign(site.repository.timestamp)


def expired(site: Site) -> None:
    site.repository.timestamp.version = 1000
    site.repository.timestamp.expires = later(-1)
    site.repository.files["metadata/timestamp.json"] = site.repository.sign(site.repository.timestamp)


TROUBLES: list[tuple[Callable[[Site], None], set[str]]] = [
    (tampered, {"current"}),
    (truncated, {"current"}),
    (endless, {"current"}),
    (failing_golden_case, {"current"}),
    (wrong_signature, {"refused"}),
    (rolled_back, {"refused"}),
    (expired, {"expired"}),
]


def test_no_trouble_of_the_way_in_stops_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    site = Site(tmp_path)
    worker = worker_on(site.settings(), site.db)
    site.analysed_by(worker, "1.0.0")
    site.look()
    assert Models(site.db).active() == {NAME: "1.1.0"}
    site.analysed_by(worker, "1.1.0")
    for trouble, states in TROUBLES:
        trouble(site)
        site.look()
        assert site.state in states, trouble.__name__
        assert Models(site.db).active() == {NAME: "1.1.0"}, trouble.__name__
        site.analysed_by(worker, "1.1.0")
    site.look(alive=False)
    site.clock.now += 400 * 86_400  # all that is known has run out, and the cloud is away
    site.look(alive=False)
    assert site.state == "expired"
    site.analysed_by(worker, "1.1.0")
    site.mode = "always"
    site.look()
    site.analysed_by(worker_on(site.settings(), site.db), "1.1.0")  # also after a restart
    assert [v.name for v in (tmp_path / "data" / "models" / NAME).iterdir()] == ["1.1.0"]
    site.db.close()


@pytest.mark.parametrize("policy", ["stage", "activate"])
def test_a_repository_that_offers_what_serves_by_default_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The first thing that is published is what the node came with; staged, nobody would be left to serve."""
    monkeypatch.setattr(ReadyModel, "analyse", boxes)
    site = Site(tmp_path)
    site.policy = policy
    site.repository = TufRepository()
    site.repository.add(f"{NAME}/1.0.0.tar.gz", pack(tmp_path / "models" / NAME / "1.0.0"))
    site.repository.publish()
    (tmp_path / "root.json").write_bytes(site.repository.trusted_root)
    worker = worker_on(site.settings(), site.db)
    site.analysed_by(worker, "1.0.0")
    site.look()
    site.analysed_by(worker, "1.0.0")
    [pull] = Models(site.db).pulls()
    assert pull["state"] == ("placed" if policy == "stage" else "activated")
    assert not (tmp_path / "data" / "models" / NAME).exists(), "there are not two of it"
    text = site.db.value("SELECT text FROM events WHERE kind = 'model' ORDER BY id DESC LIMIT 1")
    assert "in inference.models_dir already" in str(text)
    site.db.close()
