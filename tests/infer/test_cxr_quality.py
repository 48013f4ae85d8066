"""The shipped bundle cxr-quality: its bytes, its golden cases, and its numbers on radiographs with a known truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicomnode.demo.radiograph import to_dataset
from dicomnode.encode import encode_results
from dicomnode.errors import BundleError, UnsuitableSeries
from dicomnode.identity import result_identity
from dicomnode.infer.bundle import load_bundle
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.manifest import parse_manifest
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.shadow_child import Task, run
from dicomnode.infer.summary import summary_of
from dicomnode.orders import order_for
from dicomnode.records import Analysis
from tests.encode.encode_case import STATION
from tests.encode.source_case import save
from tests.infer.infer_case import DATA, golden_report
from tests.infer.radiograph_case import BUNDLE, numbered, of_real_ct, picture, quality_model, radiograph_file, saved

REAL = DATA / "cr-chest" / "gdcm-CR-MONO1-10-chest.dcm"


@pytest.fixture(scope="module")
def model() -> ReadyModel:
    return quality_model()


def numbers(analysis: Analysis) -> dict[str, float]:
    return {m.key: m.value for m in analysis.measurements}


@pytest.fixture
def measured(model: ReadyModel, tmp_path: Path) -> Any:
    def measure(kind: str = "DX", **options: Any) -> dict[str, float]:
        return numbers(model.analyse([radiograph_file(tmp_path, kind, **options)]))

    return measure


def test_the_build_script_makes_the_very_bytes(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from scripts.build_cxr_quality import build

    folder = tmp_path / "cxr-quality" / "1.1.0"
    folder.mkdir(parents=True)
    build(folder)
    names = sorted(p.relative_to(BUNDLE) for p in BUNDLE.rglob("*") if p.is_file())
    assert sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) == names
    for name in names:
        assert (folder / name).read_bytes() == (BUNDLE / name).read_bytes(), name


def test_verify_passes_and_fails_for_another_number(tmp_path: Path) -> None:
    assert golden_report(load_bundle(BUNDLE), OnnxRuntimeCpu()).passed
    copy = tmp_path / "cxr-quality" / "1.1.0"
    shutil.copytree(BUNDLE, copy)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["golden"][0]["measurements"]["tilt"] += 5
    path.write_text(json.dumps(manifest))
    report = golden_report(load_bundle(copy), OnnxRuntimeCpu())
    assert [p for c in report.cases for p in c.problems if "tilt" in p]


@pytest.mark.parametrize("degrees", [-6.0, 3.0, 6.0])
def test_tilt_is_the_angle_by_which_the_patient_leans(measured: Any, degrees: float) -> None:
    found = measured(leaning=degrees)
    assert found["tilt"] == pytest.approx(degrees, abs=1.0)
    assert found["midline_offset"] == pytest.approx(measured()["midline_offset"], abs=0.5), "and tilt is no rotation"


def test_midline_offset_grows_with_the_turn_of_the_patient(measured: Any) -> None:
    found = [measured(turned=degrees)["midline_offset"] for degrees in (-6, 0, 6)]
    assert found == sorted(found, reverse=True)
    assert found[0] - found[2] > 3
    assert abs(found[1]) < 1
    assert abs(measured(turned=6)["tilt"]) < 2.5, "and rotation is little tilt"


@pytest.mark.skipif(not (DATA / "ct-chest-ricord").is_dir(), reason="ct-chest-ricord is not here")
def test_tilt_and_turn_of_a_real_chest(model: ReadyModel, tmp_path: Path) -> None:
    """Radiographs computed from a real CT: changes are right, whatever this patient is like when straight."""

    def found(**options: float) -> tuple[float, float]:
        values = numbers(model.analyse([saved(to_dataset(of_real_ct(**options)), tmp_path)]))
        return values["tilt"], values["midline_offset"]

    straight, leaning, turned = found(), found(leaning=5.0), found(turned=6.0)
    assert leaning[0] - straight[0] == pytest.approx(5.0, abs=0.75)
    assert leaning[1] == pytest.approx(straight[1], abs=0.5)
    assert turned[1] - straight[1] > 1
    assert turned[0] == pytest.approx(straight[0], abs=1.5)


def test_noise_follows_the_square_root_of_the_dose(measured: Any) -> None:
    found = [measured(photons=photons)["noise"] for photons in (1e4, 1e5, 1e6)]
    assert found[0] / found[1] == pytest.approx(10**0.5, rel=0.05)
    assert found[1] / found[2] == pytest.approx(10**0.5, rel=0.1), "whole grey values show"
    # Poisson: sd of log counts is 1 / sqrt(counts); the lungs' mean line integral is about 2.2 in 5.5 of the range
    inside = picture(photons=1e5).lungs
    grey = picture(photons=1e5).pixels[inside].mean() / 4095
    lines = grey * 5.5 + 0.1
    assert 0.5 < found[1] / (100 * np.exp(lines / 2) / np.sqrt(1e5) / 5.5) < 2


def test_clipping_is_the_share_of_pixels_at_the_ends(measured: Any) -> None:
    assert measured()["clipped_white"] < 0.1
    pixels = picture(gain=1.3).pixels
    field = pixels[:, np.ptp(pixels.astype(int), axis=0) > 100]
    assert measured(gain=1.3)["clipped_white"] == pytest.approx(100 * (field == 4095).mean(), rel=0.05)
    assert measured(gain=1.3)["clipped_white"] > 10


def test_a_cut_lung_has_no_margin_on_that_side(measured: Any) -> None:
    whole = measured()
    assert min(whole[f"margin_{side}"] for side in ("head", "feet", "left", "right")) > 5
    below = measured(field=(0, 0.7, 0, 1))
    assert below["margin_feet"] == 0
    assert below["field"] == pytest.approx(70, abs=0.5)
    assert min(below[f"margin_{side}"] for side in ("head", "left", "right")) > 5
    aside = measured(field=(0, 1, 0, 0.75))
    assert aside["margin_left"] == 0
    assert aside["margin_right"] > 5
    assert {"tilt", "midline_offset"}.isdisjoint(aside), "nothing is said of the symmetry of what is cut"


def test_the_kind_of_file_does_not_matter(measured: Any) -> None:
    """A CR stores black for high values."""
    found, wanted = measured("CR"), measured("DX")
    assert {"exposure_index", "deviation_index"} <= wanted.keys() - found.keys()
    for key in found:
        assert found[key] == pytest.approx(wanted[key], abs=1e-6), key


def test_an_image_that_lies_otherwise_in_its_file_gives_the_same_numbers(model: ReadyModel, tmp_path: Path) -> None:
    ds = to_dataset(picture(turned=3, leaning=3))
    wanted = numbers(model.analyse([saved(ds, tmp_path, "as-it-is.dcm")]))
    for name, turn, letters in (
        ("mirrored", lambda a: a[:, ::-1], ["R", "F"]),
        ("on-its-head", lambda a: a[::-1], ["L", "H"]),
        ("lying", lambda a: a.T, ["F", "L"]),
    ):
        plane = np.ascontiguousarray(turn(ds.pixel_array))
        other = to_dataset(picture(turned=3, leaning=3))
        other.Rows, other.Columns, other.PatientOrientation = *plane.shape, letters
        other.PixelData = plane.tobytes()
        found = numbers(model.analyse([saved(other, tmp_path, f"{name}.dcm")]))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, abs=0.6), (name, key)


def test_lung_fields_lie_on_the_lungs_and_have_their_sides(model: ReadyModel, tmp_path: Path) -> None:
    image = picture()
    analysis = model.analyse([radiograph_file(tmp_path)])
    assert analysis.labels is not None
    found = analysis.labels[0]
    assert (found[image.lungs] > 0).mean() > 0.6, "what lies behind heart and diaphragm is not seen"
    assert (image.lungs[found > 0]).mean() > 0.97
    columns = [np.flatnonzero(found == n)[:] % found.shape[1] for n in (1, 2)]
    assert columns[0].max() < columns[1].min()


def test_each_image_of_a_series_has_numbers_of_its_own(model: ReadyModel, tmp_path: Path) -> None:
    datasets = [
        numbered(to_dataset(picture(mm=mm, leaning=lean)), n) for n, (mm, lean) in enumerate([(0.8, 0), (1.0, 6)], 1)
    ]
    for ds in datasets:
        ds.SeriesInstanceUID = "1.2.3.4"
    analysis = model.analyse([saved(ds, tmp_path, f"{i}.dcm") for i, ds in enumerate(datasets)])
    assert analysis.projection
    tilts = {m.image: m.value for m in analysis.measurements if m.key == "tilt"}
    assert tilts[0] == pytest.approx(0, abs=1)
    assert tilts[1] == pytest.approx(6, abs=1)
    assert [(s.number, s.image, s.label) for s in analysis.segments] == [
        (1, 0, "Right lung field"), (2, 0, "Left lung field"),
        (3, 1, "Right lung field, image 2"), (4, 1, "Left lung field, image 2"),
    ]  # fmt: skip
    assert analysis.labels is not None
    assert analysis.labels.shape == (2, 400, 440)
    assert set(np.unique(analysis.labels[1, :320, :352])) == {0, 3, 4}
    assert not analysis.labels[1, 320:].any()
    assert any(note.startswith("Image 1: Pixel Intensity Relationship") for note in analysis.notes)


def test_an_image_without_lungs_has_numbers_and_says_what_is_missing(model: ReadyModel, tmp_path: Path) -> None:
    ds = to_dataset(picture())
    noise = np.random.default_rng(3).normal(2000, 50, (ds.Rows, ds.Columns))
    ds.PixelData = noise.astype("<u2").tobytes()
    analysis = model.analyse([saved(ds, tmp_path)])
    found = numbers(analysis)
    assert {"noise", "clipped_white", "field", "contrast"} <= found.keys()
    assert found["noise"] == pytest.approx(100 * 50 / 4095, rel=0.05)
    assert {"tilt", "margin_feet", "lung_grey"}.isdisjoint(found)
    assert any("No lung fields were found" in note for note in analysis.notes)


def test_lateral_views_and_other_parts_of_the_body_are_refused(model: ReadyModel, tmp_path: Path) -> None:
    ds = to_dataset(picture())
    ds.ViewPosition = "LL"
    with pytest.raises(UnsuitableSeries, match="view is not PA or AP"):
        model.analyse([saved(ds, tmp_path)])
    ds.ViewPosition, ds.BodyPartExamined = "PA", "FOOT"
    with pytest.raises(UnsuitableSeries, match="does not show CHEST"):
        model.analyse([saved(ds, tmp_path)])


def test_a_deviation_index_follows_from_index_and_target(model: ReadyModel, tmp_path: Path) -> None:
    ds = to_dataset(picture())
    ds.ExposureIndex, ds.TargetExposureIndex, ds.DeviationIndex = 400, 200, None
    assert numbers(model.analyse([saved(ds, tmp_path)]))["deviation_index"] == pytest.approx(3.0103, abs=1e-4)
    ds.DeviationIndex = 2.9
    assert numbers(model.analyse([saved(ds, tmp_path)]))["deviation_index"] == 2.9


def test_a_stated_collimator_is_the_field(model: ReadyModel, tmp_path: Path) -> None:
    ds = to_dataset(picture())
    ds.CollimatorShape = "RECTANGULAR"
    ds.CollimatorUpperHorizontalEdge, ds.CollimatorLowerHorizontalEdge = 1, 200
    ds.CollimatorLeftVerticalEdge, ds.CollimatorRightVerticalEdge = 1, 440
    found = numbers(model.analyse([saved(ds, tmp_path)]))
    assert (found["field"], found["margin_feet"]) == (50.0, 0.0)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not here")
def test_a_real_radiograph(model: ReadyModel) -> None:
    analysis = model.analyse([REAL])
    found = numbers(analysis)
    assert analysis.labels is not None
    shares = [float((analysis.labels == n).mean()) for n in (1, 2)]
    assert all(0.08 < share < 0.3 for share in shares), shares
    assert abs(found["tilt"]) < 3
    assert abs(found["midline_offset"]) < 4
    assert 0 < found["noise"] < 1
    assert found["clipped_white"] < 1
    assert "exposure_index" not in found
    assert any("Patient Orientation" in note for note in analysis.notes)


def test_another_version_is_compared_image_by_image(
    model: ReadyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shadow of the same model, as its process does it: every image, whatever its size, is the same."""
    datasets = [numbered(to_dataset(picture(mm=mm)), n) for n, mm in ((1, 2.0), (2, 2.5))]
    for ds in datasets:
        ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    sources = save(datasets, tmp_path)
    analysis = model.analyse(sources)
    identity = result_identity(
        inputs="i", model_digest="d", parameters="", revision=1, segment_numbers=[1, 2, 3, 4],
        content_datetime="2026-05-06T07:08:09+02:00",
    )  # fmt: skip
    order = order_for(["pacs"], ["SEG"])
    segs = []
    for item in encode_results(analysis, identity, model.identity, sources, station=STATION, order=order):
        segs.append(str(tmp_path / f"seg-{len(segs)}.dcm"))
        Path(segs[-1]).write_bytes(item.part10)
    task = Task(
        bundle=str(BUNDLE), engine="onnxruntime-cpu", data_dir=str(tmp_path), threads=1, max_batch=4,
        gpu_memory_share=0.5, memory_mb=8000, segs=segs, summary=summary_of(analysis),
        sources=[[s.sop_instance_uid, s.sop_class_uid, s.transfer_syntax_uid, str(s.path), s.sha256] for s in sources],
    )  # fmt: skip
    monkeypatch.setattr("dicomnode.infer.shadow_child.limit_data", lambda size: None)  # it would be this process's
    found = run(task)
    assert found["dice"] == dict.fromkeys((s.label for s in analysis.segments), 1.0)
    assert found["same_findings"] == 1
    assert {"image 1.tilt", "image 2.tilt"} <= found["differences"].keys()
    assert set(found["differences"].values()) == {0.0}


def change(content: dict[str, Any], *path: Any, value: Any) -> None:
    *way, last = path
    for key in way:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("preprocess",), [{"step": "resize", "size": [None, 8, 8]}, {"step": "crop_to_field"}], "put it first"),
        (("preprocess",), [{"step": "crop_to_body"}], "needs a CT volume"),
        (("more_inputs",), [{"name": "x"}], "no common space"),
        (("outputs", "image_measurements", 3, "compute", "segments"), [7], "segment that there is not"),
        (("golden", 0, "white"), None, "upper end of its grey values"),
        (
            ("outputs", "measurements"),
            [{"key": "v", "compute": {"kind": "feret_mm"}, "name": {"value": "1", "scheme": "99X", "meaning": "x"},
              "unit": {"value": "mm", "scheme": "UCUM", "meaning": "mm"}}],
            "needs_spacing",
        ),
        (("input", "kind"), "picture", "projection"),
    ],
)  # fmt: skip
def test_manifests_that_make_no_sense_for_single_images(path: tuple[Any, ...], value: Any, words: str) -> None:
    content = json.loads((BUNDLE / "manifest.json").read_text())
    change(content, *path, value=value)
    with pytest.raises(BundleError, match=words):
        parse_manifest(json.dumps(content).encode())


def test_a_volume_has_no_measurements_of_images() -> None:
    content = json.loads((BUNDLE / "manifest.json").read_text())
    unet = json.loads((BUNDLE.parents[1] / "ct-lung-unet" / "1.0.0" / "manifest.json").read_text())
    content["input"] = unet["input"]
    with pytest.raises(BundleError, match=r"input\.kind must be projection"):
        parse_manifest(json.dumps(content).encode())
