"""Bundles: what is accepted, what is refused, and the golden gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from dicomnode.errors import BundleError, EngineError
from dicomnode.infer.bundle import compare_versions, find_bundles, load_bundle
from dicomnode.infer.golden import open_model
from dicomnode.infer.onnxcheck import check_onnx
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.serving import resolve
from tests.infer.infer_case import (
    MODEL,
    FakeEngine,
    build_script,
    copy_bundle,
    edit_manifest,
    golden_report,
    replace_file,
)

CPU = OnnxRuntimeCpu()


def test_shipped_bundle_is_valid_and_passes_its_gate() -> None:
    bundle = load_bundle(MODEL)
    report = golden_report(bundle, CPU)
    assert report.passed
    assert len(report.cases) == 3
    assert all(case.disagreement == 0 for case in report.cases)
    identity = bundle.identity
    assert (identity.name, identity.version, len(identity.digest)) == ("ct-lung", "1.0.0", 64)
    assert identity.parameters["postprocess"][0]["step"] == "from_output"
    assert "Not a medical device" in identity.intended_use


def test_rebuild_gives_identical_bytes(tmp_path: Path) -> None:
    build_script().build(tmp_path)
    files = sorted(p.relative_to(MODEL) for p in MODEL.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_bundle_is_small() -> None:
    assert sum(p.stat().st_size for p in MODEL.rglob("*") if p.is_file()) < 1_000_000


@pytest.mark.parametrize("name", ["model.onnx", "golden/apart.input.npy", "MODEL_CARD.md"])
def test_one_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    bundle = copy_bundle(tmp_path)
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} does not match its digest"):
        load_bundle(bundle)


def test_change_after_loading_is_seen_by_the_next_read(tmp_path: Path) -> None:
    path = copy_bundle(tmp_path)
    bundle = load_bundle(path)
    (path / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="digest"):
        golden_report(bundle, CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("extra.txt", "not listed"),
        ("run.py", "not allowed"),
        ("golden/lib.so", "not allowed"),
        ("model.pkl", "not allowed"),
        (".hidden.md", "not allowed"),
        ("noextension", "not allowed"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    bundle = copy_bundle(tmp_path)
    (bundle / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_python_is_refused_even_when_listed(tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path)
    replace_file(bundle, "step.py", b"print()")
    with pytest.raises(BundleError, match="not allowed"):
        load_bundle(bundle)


def test_missing_file_and_missing_card_are_refused(tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "a")
    (bundle / "golden" / "apart.labels.npy").unlink()
    with pytest.raises(BundleError, match="is missing"):
        load_bundle(bundle)
    bundle = copy_bundle(tmp_path / "b")
    (bundle / "MODEL_CARD.md").unlink()
    edit_manifest(bundle, lambda m: m["files"].pop("MODEL_CARD.md"))
    with pytest.raises(BundleError, match=r"MODEL_CARD\.md"):
        load_bundle(bundle)


@pytest.mark.parametrize("target", ["model.onnx", "manifest.json", "golden"])
def test_symlinks_are_refused(tmp_path: Path, target: str) -> None:
    bundle = copy_bundle(tmp_path)
    moved = tmp_path / "elsewhere"
    (bundle / target).rename(moved)
    (bundle / target).symlink_to(moved)
    with pytest.raises(BundleError):
        load_bundle(bundle)


def _rename(manifest: dict[str, Any]) -> None:
    manifest["identity"]["name"] = "other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["input"].update(surprise=1), "input.surprise"),
        (lambda m: m["postprocess"][1].update(surprise=1), "surprise"),
        (lambda m: m["postprocess"][1].update(step="run_python"), "run_python"),
        (lambda m: m.update(schema_version=3), "schema_version"),
        (lambda m: m["identity"].update(version="1.0"), "semantic version"),
        (lambda m: m["files"].update({"../escape.md": "0" * 64}), "files"),
        (lambda m: m["files"].update({"/etc/x.md": "0" * 64}), "files"),
        (lambda m: m["files"].update({"a/../b.md": "0" * 64}), "files"),
        (lambda m: m["engine"].update(model="absent.onnx"), "not listed"),
        (lambda m: m["golden"].clear(), "golden"),
        (lambda m: m["golden"][0].update(max_disagreement=0.5), "max_disagreement"),
        (lambda m: m["outputs"]["segments"][0].update(number=3), "without holes"),
        (lambda m: m.pop("intended_use"), "intended_use"),
        (_rename, "says other"),
    ],
)
def test_manifest_mistakes_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    bundle = copy_bundle(tmp_path)
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"a":1,"a":2}', b"\xff\xfe", b"NaN", b"3"])
def test_manifest_that_is_no_object(tmp_path: Path, text: bytes) -> None:
    bundle = copy_bundle(tmp_path)
    (bundle / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError):
        load_bundle(bundle)


def _model(domain: str = "", external: bool = False, subgraph: bool = False) -> bytes:
    value = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    if external:
        value.data_location = TensorProto.EXTERNAL
        value.external_data.add(key="location", value="../../etc/passwd")
    node = helper.make_node("Add", ["x", "w"], ["y"], domain=domain)
    graph = helper.make_graph([node], "g", [], [], [value])
    if subgraph:
        outer = helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([outer], "o", [], [])
    return bytes(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("subgraph", [False, True])
def test_onnx_that_reaches_outside_is_refused(tmp_path: Path, subgraph: bool) -> None:
    check_onnx(_model(subgraph=subgraph), "m.onnx")
    with pytest.raises(BundleError, match="custom operator domain"):
        check_onnx(_model(domain="com.evil", subgraph=subgraph), "m.onnx")
    with pytest.raises(BundleError, match="external file"):
        check_onnx(_model(external=True, subgraph=subgraph), "m.onnx")
    bundle = copy_bundle(tmp_path)
    replace_file(bundle, "model.onnx", _model(external=True))
    with pytest.raises(BundleError, match="external file"):
        load_bundle(bundle)


@given(st.binary(max_size=200))
def test_onnx_check_ends_on_any_bytes(data: bytes) -> None:
    try:
        check_onnx(data, "m")
    except BundleError:
        return
    onnx.ModelProto().graph  # noqa: B018 - accepted bytes must at least name a graph


@given(st.integers(0, 440), st.integers(0, 255))
def test_onnx_check_ends_on_damaged_models(at: int, value: int) -> None:
    data = bytearray((MODEL / "model.onnx").read_bytes())
    data[at % len(data)] = value
    try:
        check_onnx(bytes(data), "m")
    except BundleError as error:
        assert str(error).startswith("check model file: m: ")


def test_deep_nesting_is_refused() -> None:
    graph = helper.make_graph([], "g", [], [])
    for _ in range(20):
        graph = helper.make_graph([helper.make_node("If", [], [], then_branch=graph)], "g", [], [])
    with pytest.raises(BundleError, match="nested"):
        check_onnx(bytes(helper.make_model(graph).SerializeToString()), "m")


def _normal(hu: np.ndarray) -> np.ndarray:
    return CPU.load((MODEL / "model.onnx").read_bytes()).run({"hu": hu})["air"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda hu: np.full(hu.shape, np.nan, np.float32), "not finite"),
        (lambda hu: np.where(hu < -500, np.inf, 0).astype(np.float32), "not finite"),
        (lambda hu: np.zeros(hu.shape, np.uint8), "constant"),
        (lambda hu: (hu > -500).astype(np.uint8), "Dice"),
        (lambda hu: (hu < -820).astype(np.uint8), "Dice"),
        (lambda hu: np.roll(_normal(hu), 1, axis=3), "Dice"),
        (lambda hu: np.zeros((1, 1, 1, 1), np.uint8), "shape"),
    ],
)
def test_engine_that_computes_something_else_never_serves(
    function: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    engine = FakeEngine(function)
    report = golden_report(load_bundle(MODEL), engine)
    assert not report.passed
    assert message in " ".join(problem for case in report.cases for problem in case.problems)
    with pytest.raises(EngineError) as caught:
        open_model(MODEL, engine)
    assert caught.value.code == "GOLDEN_MISMATCH"
    assert engine.open_sessions == 0


def test_wrong_expected_measurement_fails_the_gate(tmp_path: Path) -> None:
    path = copy_bundle(tmp_path)
    edit_manifest(path, lambda m: m["golden"][0]["measurements"].update({"left_lung.volume_ml": 1.0}))
    report = golden_report(load_bundle(path), CPU)
    assert [bool(case.problems) for case in report.cases] == [True, False, False]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00v\x00{'descr'", b"PK\x03\x04"])
def test_golden_file_that_is_no_array(tmp_path: Path, content: bytes) -> None:
    path = copy_bundle(tmp_path)
    replace_file(path, "golden/apart.input.npy", content)
    with pytest.raises(BundleError, match=r"apart\.input"):
        golden_report(load_bundle(path), CPU)


def test_pickled_golden_file_is_never_loaded(tmp_path: Path) -> None:
    path = copy_bundle(tmp_path)
    np.save(tmp_path / "p.npy", np.array([[[{}]]], dtype=object), allow_pickle=True)
    replace_file(path, "golden/apart.input.npy", (tmp_path / "p.npy").read_bytes())
    with pytest.raises(BundleError):
        golden_report(load_bundle(path), CPU)


def test_versions_sort_by_semver(tmp_path: Path) -> None:
    for version in ("1.10.0", "1.9.0", "1.10.0-rc.1", "1.10.0-rc.10", "1.10.0-rc.2", "not-a-version", "v1.0.0"):
        (tmp_path / "m" / version).mkdir(parents=True)
    (tmp_path / "a" / "0.1.0-beta").mkdir(parents=True)
    folders = find_bundles(tmp_path)
    assert [(b.name, b.version) for b in folders] == [
        ("a", "0.1.0-beta"),
        ("m", "1.9.0"),
        ("m", "1.10.0-rc.1"),
        ("m", "1.10.0-rc.2"),
        ("m", "1.10.0-rc.10"),
        ("m", "1.10.0"),
    ]
    assert resolve(folders, "m", {}).version == "1.10.0"
    assert resolve(folders, "m@1.9.0", {}).version == "1.9.0"
    assert resolve(folders, "a", {}).version == "0.1.0-beta"
    with pytest.raises(BundleError, match="Present"):
        resolve(folders, "m@3.0.0", {})
    assert find_bundles(tmp_path / "absent") == []


VERSIONS = st.from_regex(r"\A[0-9]\.[0-9]\.[0-9](-(rc|[1-9]|a)(\.(1|b))?)?\Z").filter(lambda v: v.isascii())


@given(VERSIONS, VERSIONS, VERSIONS)
def test_version_order_is_total(a: str, b: str, c: str) -> None:
    assert compare_versions(a, b) == -compare_versions(b, a)
    assert (compare_versions(a, b) == 0) == (a == b)
    if compare_versions(a, b) <= 0 and compare_versions(b, c) <= 0:
        assert compare_versions(a, c) <= 0


def test_manifest_digest_covers_every_file() -> None:
    manifest = json.loads((MODEL / "manifest.json").read_text())
    files = {p.relative_to(MODEL).as_posix() for p in MODEL.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
