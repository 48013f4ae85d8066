"""Bursts of one-image studies through a whole node: they share batches, and each comes back with its own answer."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest

from dicomnode.infer.golden import ReadyModel, open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from tests.e2e.harness import CANARY, Node, Series, rule
from tests.infer.sharing_case import study, triage
from tests.peers import StoreScp, run_program

pytestmark = [pytest.mark.peers, pytest.mark.slow]

BURST = 12


@dataclass
class Site:
    node: Node
    pacs: StoreScp
    model: ReadyModel
    """The same model, in this process and without a node around it."""

    def send(self, folder: Path, burst: dict[int, Series]) -> None:
        """All on one association: when it is released all of them are complete."""
        paths = [path for number, series in burst.items() for path in series.write(folder / str(number))]
        run_program("storescu", "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", self.node.port, *paths)

    def sampled(self, name: str) -> float:
        """Of the worker's metric, over all its lives."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.node.http_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def assert_its_own(self, number: int, series: Series, tmp_path: Path) -> None:
        """One job, one SEG and one SR at the PACS; what they say is what the model says of this image alone."""
        self.node.wait_delivered(series.series_uid, 2)
        (job,) = self.node.jobs(series.series_uid)
        (finding,) = self.model.analyse(series.write(tmp_path / f"again-{number}")).findings
        [told] = json.loads(job["summary"])["findings"]
        assert told["probability"] == pytest.approx(finding.probability, abs=1e-6)
        deliveries = self.node.deliveries(series.series_uid)
        assert sorted(d["kind"] for d in deliveries) == ["SEG", "SR"]
        came = [ds for ds in map(pydicom.dcmread, self.pacs.files()) if ds.StudyInstanceUID == series.study_uid]
        assert sorted(str(ds.SOPInstanceUID) for ds in came) == sorted(d["SOPInstanceUID"] for d in deliveries)
        image = str(series.datasets[0].SOPInstanceUID)
        assert all(ds.PatientID == f"P{number}" and image in ds.to_json() for ds in came)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("shared-batches")
    bundle = triage(folder / "models")
    pacs = StoreScp(folder / "pacs")
    running = Node(
        folder / "node",
        peers=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port}],
        rules=[rule("dx", {"Modality": "DX"}, to=["pacs"], model="triage")],
        inference={"models_dir": folder / "models", "batch_studies": 16, "threads": 1, "lease_seconds": 10},
    ).start()
    yield Site(running, pacs, open_model(bundle, OnnxRuntimeCpu(), threads=1))
    assert running.stop() == 0
    pacs.stop()


def burst_of(first: int, **bad: int) -> dict[int, Series]:
    """``BURST`` studies with numbers from ``first``; ``processing``: of one that is refused."""
    name = f"{CANARY}^Burst"
    return {
        n: study(n, PatientName=name, **({"PresentationIntentType": "FOR PROCESSING"} if n in bad.values() else {}))
        for n in range(first, first + BURST)
    }


def test_a_burst_shares_batches_and_one_bad_study_is_refused_alone(site: Site, tmp_path: Path) -> None:
    burst = burst_of(100, processing=105)
    before = site.sampled("dicomnode_inference_batch_studies_count")
    site.send(tmp_path, burst)
    refused = site.node.wait_job(burst[105].series_uid, state="refused")
    assert "FOR_PROCESSING" in refused["last_error"]
    for number, series in burst.items():
        if number != 105:
            site.assert_its_own(number, series, tmp_path)
    jobs = [job for series in burst.values() for job in site.node.jobs(series.series_uid)]
    assert len(jobs) == BURST
    shared = [j["batch_studies"] for j in jobs if j["state"] == "done"]
    assert max(shared) > 1 and len(shared) == BURST - 1
    example = next(j for j in jobs if j["batch_studies"] > 1 and j["state"] == "done")
    assert f"shared batches with {example['batch_studies'] - 1} other series" in site.node.cli(
        "jobs", "show", str(example["id"])
    )
    site.node.wait(
        lambda: site.sampled("dicomnode_inference_batch_studies_sum") >= BURST - 1, 30, "the metric counts each of them"
    )
    assert site.sampled("dicomnode_inference_batch_studies_count") - before < BURST - 1, "several went at once"


def test_a_worker_that_is_killed_with_a_shared_batch_loses_and_parks_none(site: Site, tmp_path: Path) -> None:
    burst = burst_of(200)
    site.send(tmp_path, burst)
    worker = site.node.pids()["worker"]
    site.node.wait(
        lambda: site.node.rows("SELECT 1 FROM jobs WHERE state = 'running' AND batch_studies > 1"), 60, "they share"
    )
    os.kill(worker, signal.SIGKILL)
    for number, series in burst.items():
        site.assert_its_own(number, series, tmp_path)
    jobs = [job for series in burst.values() for job in site.node.jobs(series.series_uid)]
    assert [(j["state"], j["attempts"]) for j in jobs] == [("done", 1)] * BURST, "a death in company counts for none"
    assert site.node.events("job-failed") == []
