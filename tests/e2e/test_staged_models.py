"""``serve`` with models of schema 2: one imported from a MONAI bundle, one of the house in Python."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicomnode.infer.golden import open_model
from dicomnode.infer.importing.build import import_monai
from dicomnode.infer.importing.options import ImportOptions
from dicomnode.infer.ort import OnnxRuntimeCpu
from tests.e2e.harness import SEG, Node, make_series, placed_labels, rule, sr_volumes
from tests.infer.stages.bundle_case import golden, manifest, measurement, npy, segment, write
from tests.infer.stages.test_plugins import install
from tests.infer.test_models_import import INFERENCE, OPTIONS, monai_bundle
from tests.peers import send_items

CODED = {"value": "91723000", "scheme": "SCT", "meaning": "Anatomical Structure"}


def house_bundle(folder: Path) -> None:
    """The pipeline of tests/infer/stages/test_plugins.py: everything above 100 HU."""
    values = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 8)).astype(np.int16)
    mask = values > 100
    data = manifest(
        preprocess=[],
        engine=None,
        activations=[],
        decision=None,
        postprocess=[],
        pipeline={"name": "bright", "parameters": {"above": 100}},
        outputs={
            "segments": [{**segment(1, "bright"), "category": CODED, "type": CODED}],
            "measurements": [
                {
                    **measurement("volume_ml", kind="volume_ml"),
                    "unit": {"value": "ml", "scheme": "UCUM", "meaning": "ml"},
                }
            ],
            "findings": [{"key": "bright", "name": CODED, "threshold": 0.01}],
            "probability_maps": [{"key": "p", "name": CODED}],
        },
        golden=[
            golden(
                labels="golden/labels.npy",
                measurements={"bright.volume_ml": float(mask.sum()) * 0.016},
                findings={"bright": float(mask.mean())},
                probability_maps={"p": "golden/p.npy"},
            )
        ],
    )
    data["identity"]["name"] = "house"
    files = {"golden/one.npy": npy(values), "golden/labels.npy": npy(mask.astype("u1"))}
    write(folder, data, {**files, "golden/p.npy": npy(mask.astype("<f2"))})


@pytest.mark.slow
def test_imported_and_python_models_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, site = tmp_path / "models", tmp_path / "site"
    large = {**INFERENCE, "roi": [96, 96, 64]}
    import_monai(monai_bundle(tmp_path / "monai", large), ImportOptions.model_validate(OPTIONS), models)
    house_bundle(models)
    install(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    node = Node(
        tmp_path / "node",
        rules=[rule("imported", {"Modality": "CT"}, model="spleen"), rule("house", {"Modality": "CT"}, model="house")],
        inference={"engine": "onnxruntime-cpu", "models_dir": models},
    ).start()
    series = make_series("staged")
    assert set(send_items(node.port, series.items)) == {0x0000}
    node.wait(
        lambda: [j["state"] for j in node.jobs(series.series_uid)] == ["done", "done"], 60, "both analyses are done"
    )
    summaries = {j["model"]: json.loads(j["summary"]) for j in node.jobs(series.series_uid)}
    house = summaries["house"]
    assert house["engine"] == "pipeline bright (house-bright 1.2)"
    assert [(f["key"], f["answer"]) for f in house["findings"]] == [("bright", "Present")]
    assert summaries["spleen"]["segments"] == ["Spleen"]

    sources = sorted(series.datasets, key=lambda ds: float(ds.ImagePositionPatient[2]))
    hu = np.stack([ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept for ds in sources])
    results: dict[str, dict[str, pydicom.Dataset]] = {}
    for row in node.rows(
        "SELECT j.model, r.kind, i.file FROM results r JOIN jobs j ON j.id = r.job_id"
        " JOIN instances i ON i.SOPInstanceUID = r.SOPInstanceUID"
    ):
        data = (node.data_dir / "objects" / row["file"]).read_bytes()
        results.setdefault(row["model"], {})[row["kind"]] = pydicom.dcmread(io.BytesIO(data))
    assert node.stop() == 0

    seg = results["house"]["SEG"]
    assert seg.SOPClassUID == SEG
    np.testing.assert_array_equal(placed_labels(seg, sources) == 1, hu > 100)
    voxel = 2.0 * 2.0 * 10.0 / 1000
    assert sr_volumes(results["house"]["SR"])[1] == pytest.approx(float((hu > 100).sum()) * voxel, rel=1e-4)

    imported = placed_labels(results["spleen"]["SEG"], sources)
    offline = open_model(models / "spleen" / "0.5.3", OnnxRuntimeCpu())
    paths = series.write(tmp_path / "series")
    expected = offline.analyse(paths)
    np.testing.assert_array_equal(imported, expected.labels)
    assert hu[imported == 1].mean() > 90
    assert sr_volumes(results["spleen"]["SR"])[1] == pytest.approx(expected.measurements[0].value, rel=1e-4)
