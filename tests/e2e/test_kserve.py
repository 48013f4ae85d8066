"""A whole node whose models run on KServe endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.e2e.harness import CANARY, ROOT, Node, Series, make_series, python_environment, rule
from tests.infer.kserve_double import Model, running
from tests.peers import free_port, send_items

KEY = ("ct-lung", "1.0.0")
ONNX = (ROOT / "models" / "ct-lung" / "1.0.0" / "model.onnx").read_bytes()


def node(folder: Path, engine: str, endpoints: list[dict[str, Any]], **inference: Any) -> Node:
    return Node(
        folder,
        rules=[rule("ct", {"Modality": "CT"})],
        dimse={"workers": 1},
        inference={"engine": engine, "endpoints": endpoints, "placement_max_load": 1.0, **inference},
    )


def send(served: Node, series: Series) -> None:
    assert set(send_items(served.port, series.items)) == {0}


def doctor(served: Node) -> list[dict[str, str]]:
    """What doctor finds, whatever its exit code: this machine may have faults of its own."""
    argv = [sys.executable, "-m", "dicomnode", "doctor", "--json", "--config", str(served.config)]
    environment = {**os.environ, **python_environment()}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env=environment)
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def look_at(served: Node, job_id: int) -> None:
    """What the operator sees of it on the command line."""
    text = " ".join(served.cli("jobs", "show", str(job_id)).split())
    assert "placed: gpu1" in text and "gpu1: score" in text
    told = {f["text"]: f["level"] for f in doctor(served) if f["check"] == "endpoints"}
    assert [level for text, level in told.items() if text.startswith("gpu1 at ")] == ["OK"]
    assert [level for text, level in told.items() if "dead" in text] == ["WARN"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_series_is_analysed_by_an_endpoint(tmp_path: Path, kind: str) -> None:
    """Of two the first is dead: the other one does it, the job tells why, and no patient's name leaves the node."""
    series = make_series("kserve")
    with running(kind, {KEY: Model(ONNX)}) as double:
        scheme = "grpc" if kind == "grpc" else "http"
        endpoints = [
            {"name": "dead", "url": f"{scheme}://127.0.0.1:{free_port()}", "network": "host"},
            {"name": "gpu1", "url": double.url},
        ]
        served = node(tmp_path, "kserve", endpoints).start()
        send(served, series)
        job = served.wait_job(series.series_uid)
        shown = {key: json.loads(job[key]) for key in ("summary", "placement")}
        assert shown["summary"]["engine"] == "kserve gpu1 (double 1.0)"
        kinds = served.rows("SELECT kind FROM results WHERE job_id = ? ORDER BY kind", (job["id"],))
        assert [r["kind"] for r in kinds] == ["SEG", "SR"]
        assert {m["key"] for m in shown["summary"]["measurements"]} >= {"volume_ml"}
        placement = shown["placement"]
        assert placement["chosen"] == "gpu1"
        assert "dead" in next(c["skipped"] for c in placement["candidates"] if c["name"] == "dead")
        if kind == "http":  # each is a process of its own, and slow to start
            look_at(served, job["id"])
        sent = repr(double.requests)
        for secret in (series.series_uid, series.study_uid, str(series.datasets[0].PatientID), CANARY):
            assert secret not in sent
        assert served.stop() == 0


@pytest.mark.slow
def test_with_auto_this_box_takes_over_when_the_endpoint_dies_in_the_middle(tmp_path: Path) -> None:
    series = make_series("kserve")
    with running("http", {KEY: Model(ONNX)}) as double:
        served = node(tmp_path, "auto", [{"name": "gpu1", "url": double.url, "network": "host"}]).start()
        inferences = len(double.headers)
        assert inferences > 0, "the golden cases passed through it"

        double.script = [None, lambda request, good: web.Response(status=503)]
        send(served, series)
        job = served.wait_job(series.series_uid)
        placement = json.loads(job["placement"])
        assert placement["chosen"] == "local" and placement["tried"][0]["name"] == "gpu1"
        assert json.loads(job["summary"])["engine"].startswith("onnxruntime-cpu")
        assert served.stop() == 0
