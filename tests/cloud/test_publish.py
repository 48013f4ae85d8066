"""Repositories that 'models publish' makes, read by python-tuf's own client and served by the reference endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import ClientSession
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface
from typer.testing import CliRunner

from dicomnode.cli import app
from dicomnode.cloud.publish import ROLES, Bundle, Publisher, pack
from dicomnode.errors import OperatorError
from tests.cloud.endpoint import endpoint

MODEL = Path(__file__).parents[2] / "models" / "ct-lung" / "1.0.0"


class Folder(FetcherInterface):
    """A file:// for python-tuf."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self.folder / url.removeprefix("file:///")
        if not path.exists():
            raise DownloadHTTPError("absent", 404)
        return iter((path.read_bytes(),))


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder / "repository", folder / "keys"
        self.bundle = folder / "m" / "1.0.0"
        self.bundle.mkdir(parents=True)
        (self.bundle / "manifest.json").write_text("{}")

    def publisher(self, **how: object) -> Publisher:
        return Publisher(self.folder, self.keys, **how)  # type: ignore[arg-type]

    def client(self, name: str, root: bytes) -> Updater:
        """python-tuf's client with its cache in ``name``, after a refresh."""
        folder = self.folder.parent / name
        (folder / "targets").mkdir(parents=True, exist_ok=True)
        updater = Updater(
            str(folder),
            "file:///metadata",
            str(folder / "targets"),
            "file:///targets",
            fetcher=Folder(self.folder),
            bootstrap=root,
        )
        updater.refresh()
        return updater


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_python_tuf_follows_it_through_every_change(case: Case) -> None:
    done = case.publisher().publish([Bundle("m", "1.0.0", case.bundle)])
    assert (done.added, done.versions) == (["m/1.0.0.tar.gz"], dict.fromkeys(ROLES, 1))
    root = (case.folder / "root.json").read_bytes()
    for step in (
        lambda: case.publisher().publish(),
        lambda: case.publisher().publish(rotate=["targets", "timestamp"]),
        lambda: case.publisher().publish(rotate=["root", "snapshot"]),
        lambda: case.publisher().publish(rotate=["root"]),
    ):
        step()
        updater = case.client("client", root)
        target = updater.get_targetinfo("m/1.0.0.tar.gz")
        assert target is not None
        assert Path(updater.download_target(target)).read_bytes() == pack(case.bundle)
    assert case.client("other", (case.folder / "root.json").read_bytes()).get_targetinfo("m/1.0.0.tar.gz")
    case.publisher().publish(withdraw=["m@1.0.0"])
    assert case.client("client", root).get_targetinfo("m/1.0.0.tar.gz") is None


def test_keys_are_for_their_owner_alone(case: Case) -> None:
    case.publisher().publish()
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in case.keys.iterdir()} == {
        f"{role}.pem": "0o600" for role in ROLES
    }
    (case.keys / "targets.pem").chmod(0o640)
    with pytest.raises(OperatorError, match="others may read it"):
        case.publisher().publish()


def test_the_root_key_may_lie_elsewhere(case: Case) -> None:
    case.publisher().publish()
    (case.keys / "root.pem").rename(case.keys.parent / "safe.pem")
    assert case.publisher().publish([Bundle("m", "1.0.0", case.bundle)]).versions["root"] == 1
    with pytest.raises(OperatorError, match=r"root\.pem"):
        case.publisher().publish(rotate=["targets"])
    later = datetime.now(UTC) + timedelta(days=350)
    assert case.publisher(now=later).publish().versions["root"] == 1, "it cannot be renewed without its key"
    (case.keys.parent / "safe.pem").rename(case.keys / "root.pem")
    assert case.publisher(now=later).publish().versions["root"] == 2


def test_a_rotation_that_was_cut_is_finished(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.publisher().publish()
    root = (case.folder / "root.json").read_bytes()
    with monkeypatch.context() as cut:
        cut.setattr(Publisher, "_take_new_keys", lambda self, root: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            case.publisher().publish(rotate=["root", "targets"])
    case.publisher().publish()
    case.client("client", root)
    assert not list(case.keys.glob("*.new"))


def test_what_was_published_does_not_change(case: Case) -> None:
    case.publisher().publish([Bundle("m", "1.0.0", case.bundle)])
    assert case.publisher().publish([Bundle("m", "1.0.0", case.bundle)]).added == []
    (case.bundle / "manifest.json").write_text("{ }")
    with pytest.raises(OperatorError, match="other content"):
        case.publisher().publish([Bundle("m", "1.0.0", case.bundle)])
    (case.bundle / "x").symlink_to("/etc/passwd")
    with pytest.raises(OperatorError, match="symbolic link"):
        pack(case.bundle)


def test_the_verb(case: Case) -> None:
    def run(*more: str) -> tuple[int, str]:
        where = ["--to", str(case.folder), "--keys", str(case.keys)]
        done = CliRunner().invoke(app, ["models", "publish", *where, *more])
        return done.exit_code, done.output

    code, text = run(str(MODEL), "--json")
    assert (code, json.loads(text)["added"]) == (0, ["ct-lung/1.0.0.tar.gz"])
    code, text = run("--withdraw", "ct-lung@1.0.0", "--days", "7")
    assert (code, "withdrawn: ct-lung/1.0.0.tar.gz" in text) == (0, True)
    assert run("--rotate", "everything")[0] != 0
    wrong = shutil.copytree(MODEL, case.folder.parent / "ct-lung" / "1.0.0")
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["golden"][0]["measurements"]["right_lung.volume_ml"] *= 2
    manifest["identity"]["version"] = "1.0.1"
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    wrong = wrong.rename(wrong.with_name("1.0.1"))
    code, text = run(str(wrong))
    assert code != 0, "its author still looks at it; nodes would refuse it"
    assert run(str(wrong), "--no-golden-cases")[0] == 0
    assert run(str(case.bundle))[0] != 0, "what is no bundle is not signed"


def test_the_endpoint_serves_the_repository_and_nothing_else(case: Case) -> None:
    case.publisher().publish([Bundle("m", "1.0.0", case.bundle)])
    data = pack(case.bundle)
    archive = f"/models/targets/m/{hashlib.sha256(data).hexdigest()}.1.0.0.tar.gz"

    async def main() -> None:
        async with (
            endpoint(case.folder.parent / "cloud", "0123456789abcdef", models=case.folder) as (url, _),
            ClientSession(url) as client,
        ):
            token = {"Authorization": "Bearer 0123456789abcdef"}
            async with client.get("/models/metadata/timestamp.json") as answer:
                assert answer.status == 401
            async with client.get("/models/metadata/timestamp.json", headers=token) as answer:
                assert await answer.read() == (case.folder / "metadata" / "timestamp.json").read_bytes()
            async with client.get(archive, headers={**token, "Range": "bytes=5-"}) as answer:
                assert (answer.status, await answer.read()) == (206, data[5:])
                assert answer.headers["Content-Range"] == f"bytes 5-{len(data) - 1}/{len(data)}"
                assert answer.headers["ETag"].startswith('"')
            for path in (
                "metadata/..%2f..%2fkeys%2froot.pem",
                "targets/m/..",
                "targets/..%2fx/a",
                "metadata/x",
                "root",
            ):
                async with client.get(f"/models/{path}", headers=token) as answer:
                    assert answer.status == 404, path

    asyncio.run(main())
