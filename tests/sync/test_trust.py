"""Models from a signed repository that is attacked: nothing unsigned, old or broken serves, the old one goes on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tuf.api.metadata import Metadata, MetaFile

from dicomnode.errors import BundleError, OperatorError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events, Models
from dicomnode.index.trust import Offer, Trust
from dicomnode.settings import ModelPull
from dicomnode.sync import transfer
from dicomnode.sync.pull import ModelPuller
from dicomnode.sync.repository import ModelRepository, choose, clock_set_back
from dicomnode.sync.trust import offers_of, read_root
from tests.sync.cloud_fake import served
from tests.sync.index_case import FakeClock, make_settings
from tests.sync.test_archive import GOOD, tree
from tests.sync.tuf_case import Line, TufRepository, later

NAME = "ct-lung"


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


ARCHIVE = packed(GOOD)
TARGET = "ct-lung/2.0.0.tar.gz"


class Case:
    def __init__(self, tmp_path: Path, empty: Path) -> None:
        shutil.copytree(empty, tmp_path, dirs_exist_ok=True)
        self.clock = FakeClock(start=datetime.now(UTC))
        self.data_dir = tmp_path
        self.db = Database(tmp_path, clock=self.clock)
        self.repository = TufRepository()
        self.repository.add(TARGET, ARCHIVE)
        self.repository.publish()
        self.root_file = tmp_path / "root.json"
        self.root_file.write_bytes(self.repository.trusted_root)
        self.verdict: Exception | None = None
        self.timeout = 5.0
        self.entry: dict[str, Any] = {"name": NAME}
        Models(self.db).activate(NAME, "1.0.0")

    def verify(self, path: Path) -> None:
        assert (path.parent.name, tree(path)) == (NAME, GOOD)
        if self.verdict is not None:
            raise self.verdict

    def run(self, *, pulls: int = 1, refresh: bool = True, wait: float = 60.0) -> None:
        async def main() -> None:
            async with served(self.repository.handle, "/{path:.*}") as url:
                base = url.removesuffix("/{path:.*}")
                settings = make_settings(
                    self.data_dir,
                    cloud={
                        "models": [self.entry],
                        "timeout_seconds": self.timeout,
                        "repository": {"metadata_url": f"{base}/metadata", "root_file": self.root_file},
                    },
                )
                followed = ModelRepository(settings, self.db)
                followed._trust.repository = "here"  # the port changes from run to run
                puller = ModelPuller(settings, self.db, self.verify, followed.offered)
                puller.start()
                if refresh:
                    await followed.run_once()
                for _ in range(pulls):
                    await puller.run_once()
                    self.clock.now += wait

        asyncio.run(main())

    @property
    def trust(self) -> dict[str, Any]:
        row = Trust(self.db, "here").row()
        assert row is not None
        return row

    @property
    def pull(self) -> dict[str, Any] | None:
        rows = Models(self.db).pulls()
        return rows[0] if rows else None

    def old_one_serves(self) -> None:
        assert Models(self.db).active() == {NAME: "1.0.0"}
        assert not (self.data_dir / "models" / NAME / "2.0.0").exists()

    def activated(self, version: str = "2.0.0") -> None:
        assert Models(self.db).active() == {NAME: version}
        assert tree(self.data_dir / "models" / NAME / version) == GOOD


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with an index that is migrated already, which takes most of a test's time."""
    folder = tmp_path_factory.mktemp("empty")
    Database(folder).close()
    return folder


@pytest.fixture
def case(tmp_path: Path, empty: Path) -> Any:
    made = Case(tmp_path, empty)
    yield made
    made.db.close()


def test_a_signed_model_is_pulled_and_serves(case: Case) -> None:
    case.run()
    case.activated()
    assert case.trust["state"] == "current"
    assert case.trust["versions"] == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    assert [o.version for o in case.trust["offers"]] == ["2.0.0"]
    assert case.pull is not None
    assert (case.pull["source"], case.pull["length"]) == ("repository", len(ARCHIVE))
    assert not (case.data_dir / "staging" / "trust").exists()


def test_the_newest_is_taken_and_no_older_one_ever(case: Case) -> None:
    case.repository.add("ct-lung/10.0.0.tar.gz", ARCHIVE + b"x")
    case.repository.add("ct-lung/9.9.9.tar.gz", ARCHIVE + b"y")
    case.repository.publish()
    case.run()
    case.activated("10.0.0")
    del case.repository.targets.targets["ct-lung/10.0.0.tar.gz"]
    case.repository.publish()
    case.run()
    assert Models(case.db).active() == {NAME: "10.0.0"}, "withdrawn: what serves goes on, nothing older comes"


def test_keys_are_rotated(case: Case) -> None:
    case.run()
    for role in ("root", "timestamp", "snapshot", "targets", "root"):
        case.repository.rotate(role)
    case.repository.add("ct-lung/2.1.0.tar.gz", ARCHIVE + b"\0")
    case.repository.publish()
    case.run()
    case.activated("2.1.0")
    assert case.trust["versions"]["root"] == 6
    assert sorted(p.name for p in (case.data_dir / "trust" / "root_history").iterdir())[-1] == "6.root.json"


Attack = Callable[[TufRepository], None]


def old(role: str) -> Attack:
    """Bring back a former file of a role after the node has seen the newer one."""

    def attack(repository: TufRepository) -> None:
        document = getattr(repository, role)
        document.version = 1
        if role == "timestamp":
            repository.files["metadata/timestamp.json"] = repository.sign(repository.timestamp)
        elif role == "snapshot":
            repository.put(role, document)
            repository.publish_timestamp()
        else:
            repository.put(role, document)
            repository.publish_snapshot()

    return attack


def expired(role: str) -> Attack:
    def attack(repository: TufRepository) -> None:
        getattr(repository, role).expires = later(-1)
        if role == "root":
            repository.publish_root()
        repository.publish()

    return attack


def forged(role: str) -> Attack:
    """Signed by the key of another role."""

    def attack(repository: TufRepository) -> None:
        stranger = TufRepository().keys["targets"]
        repository.keys[role] = stranger
        if role == "root":
            repository.publish_root()
        repository.publish()

    return attack


def mixed(repository: TufRepository) -> None:
    """A snapshot of now with targets of then: mix and match."""
    repository.publish()
    newest = repository.targets.version
    repository.files[f"metadata/{newest}.targets.json"] = repository.files[f"metadata/{newest - 1}.targets.json"]


def changed(name: str) -> Attack:
    def attack(repository: TufRepository) -> None:
        repository.publish()
        path = max((p for p in repository.files if p.endswith(name)), key=lambda p: (len(p), p))
        repository.files[path] = (
            repository.files[path].replace(b'"version": ', b'"version":  ', 1).replace(b"2.0.0", b"2.0.1")
        )

    return attack


def garbage(data: bytes) -> Attack:
    def attack(repository: TufRepository) -> None:
        repository.files["metadata/timestamp.json"] = data

    return attack


def threshold(repository: TufRepository) -> None:
    """A root that asks for two signatures of targets, which have one."""
    other = TufRepository().keys["targets"][0]
    repository.root.add_key(other.public_key, "targets")
    repository.root.roles["targets"].threshold = 2
    repository.publish_root()
    repository.publish()


ATTACKS: dict[str, tuple[Attack, str]] = {
    **{f"expired {role}": (expired(role), "expired") for role in ("root", "timestamp", "snapshot", "targets")},
    **{f"rolled back {role}": (old(role), "refused") for role in ("timestamp", "snapshot", "targets")},
    **{f"forged {role}": (forged(role), "refused") for role in ("root", "timestamp", "snapshot", "targets")},
    "mix and match": (mixed, "refused"),
    "changed targets": (changed("targets.json"), "refused"),
    "too few signatures": (threshold, "refused"),
    "garbage": (garbage(b"{"), "refused"),
    "empty": (garbage(b""), "refused"),
    "nested": (garbage(b"[" * 10_000), "refused"),
    "no object": (garbage(b'{"signed": [], "signatures": 3}'), "refused"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_metadata_under_attack(case: Case, name: str) -> None:
    case.run(pulls=0)
    assert case.trust["state"] == "current"
    attack, state = ATTACKS[name]
    case.repository.add("ct-lung/3.0.0.tar.gz", ARCHIVE + b"\0")
    attack(case.repository)
    case.run()
    assert (case.trust["state"], bool(case.trust["reason"])) == (state, True)
    assert "3.0.0" not in {o.version for o in case.trust["offers"]}
    assert Models(case.db).active() == {NAME: "2.0.0"}, "what was vouched for before is still pulled"
    [event] = [e for e in Events(case.db).listing() if e["kind"] == f"model-repository-{state}"]
    assert "what serves goes on" in event["text"]


@pytest.mark.parametrize("name", [n for n in ATTACKS if not n.startswith("rolled back")])
def test_a_node_that_never_saw_better_takes_nothing(case: Case, name: str) -> None:
    attack, state = ATTACKS[name]
    attack(case.repository)
    case.run()
    case.old_one_serves()
    assert case.trust["state"] in (state, "refused")
    assert case.trust["offers"] == []


def test_a_roll_back_is_noticed_after_a_restart_and_while_the_new_one_is_refused(case: Case) -> None:
    """Each role that was accepted is kept, even when the next one of the same refresh is refused."""
    case.run(pulls=0)
    earlier = dict(case.repository.files)
    case.repository.publish()
    case.repository.put("targets", case.repository.targets, *TufRepository().keys["targets"])
    case.run(pulls=0)
    assert case.trust["state"] == "refused"
    case.repository.files = earlier
    case.run(pulls=0)
    assert case.trust["state"] == "refused"
    assert "timestamp" in case.trust["reason"]


def test_a_frozen_repository_runs_out_and_recovers(case: Case) -> None:
    case.repository.timestamp.expires = later(0.5)
    case.repository.publish_timestamp()
    case.run(pulls=0)
    assert case.trust["state"] == "current"
    case.clock.now += 86_400
    assert case.trust["state"] == "expired", "without a look: what is known has run out"
    case.run(refresh=False)
    case.old_one_serves()
    case.repository.timestamp.expires = later(30)
    case.repository.publish_timestamp()
    case.run()
    case.activated()


def test_a_dead_cloud_changes_nothing_and_what_is_known_is_pulled_on(case: Case) -> None:
    case.run(pulls=0)
    case.repository.script["metadata/"] = lambda request, data: web.Response(status=503)
    case.run()
    assert case.trust["state"] == "away"
    assert "503" in case.trust["reason"]
    case.activated()


@pytest.mark.parametrize("behaviour", ["endless", "drip", "cut"])
def test_metadata_over_a_bad_line(case: Case, behaviour: str) -> None:
    line = Line()
    case.timeout = 0.5
    case.repository.script["timestamp"] = line.cut(20) if behaviour == "cut" else getattr(line, behaviour)
    case.run()
    assert case.trust["state"] == ("refused" if behaviour == "endless" else "away")
    assert "timestamp" in case.trust["reason"] or "bytes came" in case.trust["reason"]
    case.old_one_serves()


def test_a_tampered_archive_is_not_believed_and_a_right_one_is_taken_later(case: Case) -> None:
    where = case.repository.where(TARGET)
    case.repository.files[where] = bytes(len(ARCHIVE))
    case.run(pulls=3)
    case.old_one_serves()
    assert case.pull is not None
    assert case.pull["state"] == "pending"
    assert "SHA-256" in case.pull["last_error"] and "it is fetched again" in case.pull["last_error"]
    case.repository.files[where] = ARCHIVE
    case.run(refresh=False)
    case.activated()


def test_a_truncated_archive_is_continued(case: Case) -> None:
    case.repository.script["2.0.0"] = Line().cut(len(ARCHIVE) // 2)
    case.run()
    case.old_one_serves()
    assert case.pull is not None
    assert case.pull["state"] == "pending"
    case.repository.script.clear()
    case.run(refresh=False)
    case.activated()


def test_an_archive_of_another_length_is_refused_before_it_is_read(case: Case) -> None:
    case.repository.files[case.repository.where(TARGET)] = ARCHIVE + b"more"
    case.run()
    case.old_one_serves()
    assert case.pull is not None
    assert "were announced" in case.pull["last_error"]
    assert not list((case.data_dir / "staging" / "models").glob("*.part"))


def test_an_endless_archive_stops_at_its_length(case: Case) -> None:
    case.repository.script["2.0.0"] = Line().endless
    case.run()
    case.old_one_serves()
    assert case.pull is not None
    assert "more than the announced" in case.pull["last_error"]
    sizes = [p.stat().st_size for p in (case.data_dir / "staging" / "models").iterdir()]
    assert max(sizes, default=0) <= len(ARCHIVE) + (1 << 18)


def test_a_slow_archive_does_not_hold_the_sidecar(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LEAST_BYTES_PER_SECOND", 1 << 20)
    case.timeout = 0.3
    case.repository.script["2.0.0"] = Line().drip
    case.run()
    case.old_one_serves()
    assert case.pull is not None
    assert "no end within" in case.pull["last_error"]
    kept = next((case.data_dir / "staging" / "models").glob("*.part")).stat().st_size
    assert 0 < kept < len(ARCHIVE), "what came is kept"


def test_a_bundle_that_fails_its_golden_case_is_for_good(case: Case) -> None:
    case.verdict = BundleError("verify bundle", "golden case 1 differs")
    case.run(pulls=2)
    case.old_one_serves()
    assert case.pull is not None
    assert (case.pull["state"], "golden case" in case.pull["last_error"]) == ("rejected", True)


def test_metadata_that_expires_before_the_archive_is_here(case: Case) -> None:
    case.run(pulls=0)
    case.clock.now += 31 * 86_400
    case.run(refresh=False)
    case.old_one_serves()
    assert case.pull is None


def test_a_root_that_is_none(case: Case, tmp_path: Path) -> None:
    for data in (b"", b"{}", case.repository.files["metadata/timestamp.json"], bytes(600_000)):
        case.root_file.write_bytes(data)
        with pytest.raises(OperatorError, match="root_file"):
            read_root(case.root_file)
    case.run()
    case.old_one_serves()
    assert "root_file" in case.trust["reason"]
    with pytest.raises(OperatorError, match="No such file"):
        read_root(tmp_path / "absent")


def test_a_root_changed_by_one_byte_is_none(case: Case) -> None:
    document = Metadata.from_bytes(case.repository.trusted_root)
    document.signed.version = 2
    case.root_file.write_bytes(document.to_bytes())
    with pytest.raises(OperatorError, match="no signed root"):
        read_root(case.root_file)


def test_torn_cache_is_loaded_anew(case: Case) -> None:
    case.run(pulls=0)
    for name in ("timestamp.json", "snapshot.json", "targets.json"):
        (case.data_dir / "trust" / name).write_bytes(b"")
    case.run()
    case.activated()


def test_a_clock_that_was_set_back(case: Case) -> None:
    case.run(pulls=0)
    case.clock.now -= 10 * 86_400
    case.run(pulls=0)
    assert (case.trust["state"], "set back" in case.trust["reason"]) == ("refused", True)
    assert not clock_set_back(None, datetime.now(UTC))


def test_offers_are_archives_of_models_only() -> None:
    repository = TufRepository()
    for path in ("ct-lung/1.0.0.tar.gz", "ct-lung/1.0.0.zip", "README", "../x/1.0.0.zip", "a/b/1.0.0.zip", "a/1.0.zip"):
        repository.add(path, b"data")
    found = offers_of(repository.targets.targets.values(), consistent=True)
    assert [(o.name, o.version, o.target[:8]) for o in found] == [("ct-lung", "1.0.0", "ct-lung/")] * 2


def offer(version: str) -> Offer:
    return Offer(NAME, version, f"{NAME}/{version}.zip", "0" * 64, 1)


@pytest.mark.parametrize(
    ("version", "active", "wanted"),
    [
        ("", None, "1.10.0"),
        ("", "1.9.0", "1.10.0"),
        ("", "1.10.0", "1.10.0"),
        ("", "2.0.0", None),
        ("1.2.0", "2.0.0", "1.2.0"),
        ("7.0.0", None, None),
    ],
)
def test_which_offer_is_wanted(version: str, active: str | None, wanted: str | None) -> None:
    offers = [offer("1.2.0"), offer("1.10.0"), offer("1.9.0")]
    found = choose(ModelPull(name=NAME, version=version), offers, active)
    assert (found.version if found else None) == wanted


def test_a_snapshot_that_hides_targets(case: Case) -> None:
    case.run(pulls=0)
    case.repository.snapshot.meta = {"other.json": MetaFile(version=1)}
    with contextlib.suppress(KeyError):
        case.repository.snapshot.version += 1
        case.repository.put("snapshot", case.repository.snapshot)
        case.repository.publish_timestamp()
    case.run()
    assert case.trust["state"] == "refused"
