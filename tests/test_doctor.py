"""Each fault is found, said in words and comes with what to do."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode import doctor, durable
from dicomnode.doctor import Finding, Level, examine
from dicomnode.doctor_cloud import examine_cloud
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.settings import Settings
from tests import peers
from tests.infer.life_case import add_version
from tests.sync.cloud_fake import served
from tests.sync.tuf_case import TufRepository

ROOT = Path(__file__).resolve().parents[1]
RULE = {"name": "chest", "match": {"Modality": "CT"}, "models": ["ct-lung"], "send_to": ["pacs"]}
MODALITY = {"name": "ct1", "ae_title": "CT1", "host": "127.0.0.1", "allow": ["echo", "store"]}


@pytest.fixture
def free_port() -> int:
    return peers.free_port()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield int(sock.getsockname()[1])


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Settings]:
    data_dir = tmp_path / "node"
    data_dir.mkdir(mode=0o700)

    def build(**sections: Any) -> Settings:
        base: dict[str, Any] = {
            "node": {"data_dir": data_dir, "reserve_mb": 1},
            "dimse": {"host": "127.0.0.1", "port": 0},
            "http": {"port": 0},
            "inference": {"engine": "onnxruntime-cpu", "models_dir": ROOT / "models"},
            "peers": [MODALITY],
        }
        for name, value in sections.items():
            base[name] = {**base[name], **value} if isinstance(base.get(name), dict) else value
        return Settings(**base)

    return build


def one(findings: list[Finding], check: str, words: str = "") -> Finding:
    found = [f for f in findings if f.check == check and words in f.text]
    assert len(found) == 1, [f.as_dict() for f in findings]
    return found[0]


def test_sound_node_has_no_fault(make: Callable[..., Settings], free_port: int) -> None:
    found = examine(make(dimse={"port": free_port}))
    assert [f for f in found if f.level is Level.fault] == []
    assert one(found, "DICOM port").level is Level.ok
    assert one(found, "engine", "onnxruntime-cpu").level is Level.ok
    for row in (f.as_dict() for f in found):
        assert set(row) == {"level", "check", "text", "hint"}
        assert row["level"] in ("OK", "NOTE", "WARN", "FAULT")
    assert all(f.hint for f in found if f.level in (Level.warn, Level.fault))


def test_port_of_another_program(make: Callable[..., Settings], taken: int) -> None:
    found = one(examine(make(dimse={"port": taken})), "DICOM port")
    assert found.level is Level.fault
    assert "another program" in found.text
    assert "dimse.port" in found.hint


def test_port_of_our_own_node(make: Callable[..., Settings], taken: int) -> None:
    settings = make(dimse={"port": taken})
    folder = settings.node.data_dir / "run"
    folder.mkdir()
    with (folder / "receiver.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = one(examine(settings), "DICOM port")
    assert (found.level, "receiver" in found.text) == (Level.ok, True)


def test_address_of_another_box(make: Callable[..., Settings], free_port: int) -> None:
    found = one(examine(make(dimse={"host": "192.0.2.1", "port": free_port})), "DICOM port")
    assert found.level is Level.fault
    assert "dimse.host" in found.hint


def test_rule_names_a_missing_model(make: Callable[..., Settings]) -> None:
    rule = {**RULE, "models": ["brain-mri"], "send_to": []}
    found = one(examine(make(rules=[rule])), "models", "brain-mri")
    assert found.level is Level.fault
    assert "ct-lung" in found.hint


def test_good_and_changed_bundle(make: Callable[..., Settings], tmp_path: Path) -> None:
    rule = {**RULE, "send_to": []}
    assert one(examine(make(rules=[rule])), "models", "golden cases right").level is Level.ok
    shutil.copytree(ROOT / "models" / "ct-lung", tmp_path / "models" / "ct-lung")
    (network,) = (tmp_path / "models").glob("*/*/model.onnx")
    network.write_bytes(network.read_bytes() + b"\0")
    found = one(examine(make(rules=[rule], inference={"models_dir": tmp_path / "models"})), "models", "ct-lung")
    assert found.level is Level.fault
    assert found.hint


def test_the_version_that_serves_is_looked_at(make: Callable[..., Settings], tmp_path: Path) -> None:
    """Not a newer one that is only staged."""
    for version in ("1.0.0", "1.1.0"):
        add_version(tmp_path, version)
    settings = make(
        node={"data_dir": tmp_path / "data"},
        rules=[{**RULE, "send_to": []}],
        inference={"models_dir": tmp_path / "models"},
    )
    db = Database(tmp_path / "data")
    Life(db).stage("ct-lung", "1.1.0", who="me")
    db.close()
    (tmp_path / "models" / "ct-lung" / "1.1.0" / "model.onnx").write_bytes(b"damaged")
    assert one(examine(settings), "models", "golden cases right").level is Level.ok


def test_no_bundles_at_all(make: Callable[..., Settings], tmp_path: Path) -> None:
    rule = {**RULE, "send_to": []}
    found = one(examine(make(rules=[rule], inference={"models_dir": tmp_path / "none"})), "models")
    assert (found.level, "inference.models_dir" in found.hint) == (Level.fault, True)


@pytest.mark.parametrize(("rules", "level"), [([RULE], Level.fault), ([], Level.warn)])
def test_unreachable_peer(make: Callable[..., Settings], free_port: int, rules: list[Any], level: Level) -> None:
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": free_port}
    found = one(examine(make(peers=[MODALITY, pacs], rules=rules)), "peers", "'pacs'")
    assert found.level is level
    assert "does not answer" in found.text
    assert found.hint


def test_peer_that_answers(make: Callable[..., Settings]) -> None:
    from pynetdicom import AE
    from pynetdicom.sop_class import Verification

    ae = AE(ae_title="PACS")
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    try:
        port = server.socket.getsockname()[1]
        pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port}
        found = one(examine(make(peers=[MODALITY, pacs])), "peers", "C-ECHO")
    finally:
        server.shutdown()
    assert found.level is Level.ok


def test_peer_for_move_without_port(make: Callable[..., Settings]) -> None:
    viewer = {"name": "viewer", "ae_title": "VIEWER", "host": "127.0.0.1", "allow": ["move"]}
    found = one(examine(make(peers=[MODALITY, viewer])), "peers", "viewer")
    assert (found.level, "C-MOVE" in found.hint) == (Level.warn, True)


def test_nobody_may_store(make: Callable[..., Settings]) -> None:
    assert one(examine(make(peers=[])), "peers").level is Level.warn


def test_full_disk(make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda _: 500 << 20)
    found = one(examine(make(node={"reserve_mb": 1024})), "disk", "in reserve")
    assert (found.level, "0xA700" in found.hint) == (Level.fault, True)
    assert one(examine(make(node={"reserve_mb": 200})), "disk", "in reserve").level is Level.warn


def test_slow_disk(make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "fsync_seconds", lambda _: 0.045)
    found = one(examine(make()), "disk", "45.0 ms")
    assert found.level is Level.warn


def test_folder_open_to_others(make: Callable[..., Settings]) -> None:
    settings = make()
    settings.node.data_dir.chmod(0o755)
    found = one(examine(settings), "data folder")
    assert (found.level, "chmod 700" in found.hint) == (Level.warn, True)


def test_folder_that_is_a_file(make: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert one(examine(make(node={"data_dir": tmp_path / "file"})), "data folder").level is Level.fault
    assert one(examine(make(node={"data_dir": tmp_path / "new" / "node"})), "data folder").level is Level.note


@pytest.mark.parametrize(("synchronised", "level"), [(True, Level.ok), (False, Level.warn), (None, Level.note)])
def test_clock(
    make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, synchronised: bool | None, level: Level
) -> None:
    monkeypatch.setattr(doctor, "clock_synchronised", lambda: synchronised)
    assert one(examine(make()), "clock").level is level


def test_clock_of_1970(make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BUILT", 2100)
    assert one(examine(make()), "clock").level is Level.fault


def test_cloud(
    make: Callable[..., Settings], tmp_path: Path, free_port: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.doctor_cloud.ANSWER_SECONDS", 0.1)
    token = tmp_path / "token"
    token.write_text("secret-of-the-cloud")
    token.chmod(0o644)
    found = examine(make(cloud={"stow_url": f"http://127.0.0.1:{free_port}/studies", "token_file": token}))
    readable = one(found, "cloud", "cloud.token_file")
    assert (readable.level, "chmod 600" in readable.hint) == (Level.warn, True)
    assert one(found, "cloud", "cannot be reached").level is Level.warn
    assert "secret-of-the-cloud" not in str([f.as_dict() for f in found])
    token.chmod(0o600)
    found = examine(make(cloud={"stow_url": f"http://127.0.0.1:{taken}/studies", "token_file": token}))
    assert [f.level for f in found if f.check == "cloud"] == [Level.ok, Level.ok, Level.warn], "it never answers"
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o644)
    open_key = {"stow_url": f"http://127.0.0.1:{taken}/studies", "pseudonym_key_file": key}
    assert one(examine(make(cloud=open_key)), "cloud", "pseudonym key").level is Level.fault
    key.chmod(0o600)
    assert one(examine(make(cloud=open_key)), "cloud", "keep a copy").level is Level.ok
    missing = examine(make(cloud={"token_file": tmp_path / "none"}))
    assert one(missing, "cloud", "cloud.token_file").level is Level.fault


def test_the_root_of_the_model_repository(make: Callable[..., Settings], tmp_path: Path) -> None:
    root = tmp_path / "root.json"
    root.write_bytes(TufRepository().trusted_root)
    cloud = {"repository": {"metadata_url": "s3://models/metadata", "root_file": root}}
    assert one(examine(make(cloud=cloud)), "models", "signed root").level is Level.ok
    root.write_bytes(b"{}")
    wrong = one(examine(make(cloud=cloud)), "models", "no signed root")
    assert (wrong.level, "root.json" in wrong.hint) == (Level.fault, True)


def test_the_signed_metadata_is_asked_for(make: Callable[..., Settings], tmp_path: Path) -> None:
    repository = TufRepository()
    root = tmp_path / "root.json"
    root.write_bytes(repository.trusted_root)

    async def found() -> Finding:
        async with served(repository.handle, "/{path:.*}") as url:
            base = url.removesuffix("/{path:.*}")
            where = {"metadata_url": f"{base}/metadata", "root_file": root}
            settings = make(cloud={"repository": where})
            # No further: the look at the port comes after it, and its connection would be open when the server ends.
            findings = (f for f in examine_cloud(settings) if "metadata_url: " in f.text)
            [metadata] = await asyncio.to_thread(lambda: list(itertools.islice(findings, 1)))
            return metadata

    well = asyncio.run(found())
    assert (well.level, "0 archives are signed, until " in well.text) == (Level.ok, True)
    repository.files["metadata/timestamp.json"] = b"{}"
    assert asyncio.run(found()).level is Level.fault
    repository.files.clear()
    missing = asyncio.run(found())
    assert (missing.level, "404" in missing.text) == (Level.warn, True)


def test_named_gpu_engine_without_gpu(make: Callable[..., Settings]) -> None:
    found = examine(make(inference={"engine": "tensorrt"}))
    assert one(found, "engine").level is Level.fault
    assert one(found, "rules").level is Level.warn  # the checks after it still ran


def test_broken_check_hides_no_other(make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(_: Path) -> int:
        raise RuntimeError("NAME OF A PATIENT")

    monkeypatch.setattr(durable, "free_bytes", burst)
    found = examine(make())
    broken = one(found, "disk")
    assert (broken.level, "RuntimeError" in broken.text) == (Level.warn, True)
    assert "PATIENT" not in broken.text
    assert one(found, "cloud").level is Level.note
