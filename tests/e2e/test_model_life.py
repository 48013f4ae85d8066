"""A whole node: a version swapped there and back while studies come in, and one that runs in the shadow."""

from __future__ import annotations

import json
import os
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Node, make_series, rule
from tests.infer.life_case import add_version
from tests.peers import send_items

pytestmark = pytest.mark.slow


def post(node: Node, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{node.http_port}/api/v1/models/{path}",
        data=json.dumps(body or {}).encode(),
        headers={"X-Dicomnode": "1"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.timeout(240)
def test_swapped_under_load_and_killed(tmp_path: Path) -> None:
    """No study is lost and none is analysed twice in effect; each result names one version, whole."""
    for version in ("1.0.0", "1.1.0"):
        add_version(tmp_path, version)
    node = Node(
        tmp_path / "node",
        rules=[rule("ct", {"Modality": "CT"})],
        completeness={"quiet_seconds": 0.5},
        inference={"models_dir": tmp_path / "models", "lease_seconds": 10},
        dimse={"workers": 1},
    ).start()
    assert post(node, "ct-lung/1.0.0/activate", {"why": "start"})["state"] == "active"
    series = [make_series(f"swap {n}") for n in range(4)]
    codes: list[int] = []
    sender = threading.Thread(target=lambda: [codes.extend(send_items(node.port, s.items)) for s in series])
    sender.start()
    node.wait_job(series[0].series_uid, seconds=90)
    assert post(node, "ct-lung/1.1.0/activate")["state"] == "active"
    node.kill("worker")
    assert post(node, "ct-lung/rollback", {"why": "and back"})["version"] == "1.0.0"
    assert post(node, "ct-lung/1.1.0/activate")["state"] == "active"
    sender.join(60)
    assert set(codes) == {0x0000}
    for one in series:
        node.wait_job(one.series_uid, seconds=90)
    digests = {}
    for one in series:
        [job] = node.jobs(one.series_uid)
        digests.setdefault(job["model_version"], set()).add(job["model_digest"])
        results = node.rows("SELECT kind, SOPInstanceUID FROM results WHERE job_id = ? ORDER BY id", (job["id"],))
        identity = json.loads(job["identity"])
        assert [r["SOPInstanceUID"] for r in results] == [identity["seg_uid"], identity["sr_uid"]]
    assert all(len(found) == 1 for found in digests.values())
    assert node.jobs(series[0].series_uid)[0]["model_version"] == "1.0.0"
    # In the shadow: compared, and nothing else.
    assert post(node, "ct-lung/1.0.0/stage")["state"] == "staged"
    assert post(node, "ct-lung/1.0.0/shadow")["state"] == "shadow"
    last = make_series("shadowed")
    assert set(send_items(node.port, last.items)) == {0x0000}
    job = node.wait_job(last.series_uid, seconds=90)
    assert job["model_version"] == "1.1.0"
    query = "SELECT * FROM model_comparisons WHERE state != 'running'"
    [row] = node.wait(lambda: node.rows(query), 90, "the comparison is done")
    assert (row["job_id"], row["version"], row["state"], row["least_dice"]) == (job["id"], "1.0.0", "done", 1.0)
    assert len(node.rows("SELECT 1 FROM results WHERE job_id = ?", (job["id"],))) == 2
    told = json.loads(node.cli("models", "history", "ct-lung", "--json"))
    assert [h["event"] for h in told[:3]] == ["shadow", "stage", "activate"]
    if os.environ.get("LIFE_PAGE"):
        import shutil
        import subprocess

        for language in ("en", "zh"):
            subprocess.run(
                [
                    shutil.which("chromium") or "chromium",
                    "--headless",
                    "--no-sandbox",
                    "--window-size=1500,3000",
                    f"--screenshot={os.environ['LIFE_PAGE']}/{language}.png",
                    f"http://127.0.0.1:{node.http_port}/?lang={language}",
                ],
                check=False,
                timeout=60,
            )
    assert node.stop() == 0
