"""Durable files with every step failing once: the right error, nothing half-written under a name."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode import durable
from dicomnode.durable import ObjectStore, SyncFailed, write_durable, write_synced
from dicomnode.errors import DiskFull, StorageError


class Failing:
    """Lets ``after`` calls through, then fails each one."""

    def __init__(self, call: Callable[..., Any], code: int, after: int = 0) -> None:
        self.call, self.code, self.after = call, code, after

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.after <= 0:
            raise OSError(self.code, os.strerror(self.code))
        self.after -= 1
        return self.call(*arguments, **named)


def fail(monkeypatch: pytest.MonkeyPatch, step: str, code: int, after: int = 0) -> None:
    monkeypatch.setattr(durable.Steps, step, Failing(getattr(durable.steps, step), code, after))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


FAULTS = [
    ("open", errno.ENOSPC, 0, DiskFull),
    ("open", errno.EDQUOT, 0, DiskFull),
    ("open", errno.EIO, 0, StorageError),
    ("open", errno.EROFS, 0, StorageError),
    ("write", errno.ENOSPC, 0, DiskFull),
    ("write", errno.EFBIG, 0, DiskFull),
    ("write", errno.EIO, 0, StorageError),
    ("fsync", errno.EIO, 0, SyncFailed),
    ("fsync", errno.ENOSPC, 0, DiskFull),
    ("rename", errno.EIO, 0, StorageError),
    ("rename", errno.ENOSPC, 0, DiskFull),
]


@pytest.mark.parametrize(("step", "code", "after", "error"), FAULTS)
def test_failed_step_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, after: int, error: type[Exception]
) -> None:
    target = tmp_path / "state.json"
    write_durable(target, b"old")
    with monkeypatch.context() as patch:
        fail(patch, step, code, after)
        with pytest.raises(StorageError) as caught:
            write_durable(target, b"new and longer")
    assert type(caught.value) is error
    assert caught.value.retryable is (error is DiskFull)
    assert contents(tmp_path) == {"state.json": b"old"}, "no partial file, no temporary one"


@pytest.mark.parametrize(("step", "after"), [("open", 1), ("fsync", 1)])
def test_directory_that_cannot_be_synced_is_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    durable.make_directory(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch, step, errno.EIO, after)
        with pytest.raises(SyncFailed):
            write_durable(tmp_path / "state.json", b"new")
    assert contents(tmp_path) == {"state.json": b"new"}


@pytest.mark.parametrize(("step", "code", "after", "error"), FAULTS)
def test_staging_an_object_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, after: int, error: type[Exception]
) -> None:
    store = ObjectStore(tmp_path)
    store.prepare()
    name = store.new_name("1.2.3")
    with monkeypatch.context() as patch:
        fail(patch, step, code, after)
        with pytest.raises(error):
            store.stage(name, [b"meta", b"data"])
    assert list(store.path(name).parent.iterdir()) == []


def test_fsync_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(durable.Steps, "fsync", staticmethod(fsync))
    with pytest.raises(SyncFailed):
        write_synced(tmp_path / "x", [b"1"])
    assert len(calls) == 1


@given(parts=st.lists(st.binary(max_size=50), max_size=12), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_short_writes_lose_no_byte(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("short") / "x"
    turn = iter(sizes * 200)

    def writev(fd: int, buffers: list[memoryview]) -> int:
        return os.write(fd, b"".join(bytes(b) for b in buffers)[: next(turn)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.Steps, "write", staticmethod(writev))
        write_synced(path, parts)
    assert path.read_bytes() == b"".join(parts)


def test_full_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    calls = []

    def writev(fd: int, buffers: list[memoryview]) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, [buffers[0][:3]])

    monkeypatch.setattr(durable.Steps, "write", staticmethod(writev))
    with pytest.raises(DiskFull):
        write_synced(tmp_path / "x", [b"0123456789"])
    assert contents(tmp_path) == {} and len(calls) == 2


def test_many_parts_exceed_iov_max(tmp_path: Path) -> None:
    parts = [bytes([n % 256]) for n in range(3000)]
    write_synced(tmp_path / "x", parts)
    assert (tmp_path / "x").read_bytes() == b"".join(parts)


def test_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    write_synced(tmp_path / "x", [b"1"])
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError):
        write_synced(tmp_path / "x", [b"2"])
    assert (tmp_path / "x").read_bytes() == b"1"


def test_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.remove(tmp_path / "absent")
    (tmp_path / "x").write_bytes(b"1")
    with monkeypatch.context() as patch:
        fail(patch, "unlink", errno.EIO)
        with pytest.raises(StorageError):
            durable.remove(tmp_path / "x")
    durable.remove(tmp_path / "x")
    assert contents(tmp_path) == {}


def test_order_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durable means: data synced before it has its name, the name synced before success."""
    durable.make_directory(tmp_path)
    seen: list[str] = []
    for name in ("open", "write", "fsync", "rename"):
        real = getattr(durable.steps, name)
        monkeypatch.setattr(
            durable.Steps, name, staticmethod(lambda *a, _n=name, _r=real: (seen.append(_n), _r(*a))[1])
        )
    write_durable(tmp_path / "x", b"1")
    assert seen == ["open", "write", "fsync", "rename", "open", "fsync"]


def test_a_directory_that_another_life_made_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it may have been killed before the fsync: then its name could still be lost."""
    opened: list[Path] = []
    real = durable.steps.open
    monkeypatch.setattr(
        durable.Steps, "open", staticmethod(lambda path, *a: (opened.append(Path(path)), real(path, *a))[1])
    )
    existing = tmp_path / "a" / "b"
    existing.mkdir(parents=True)
    durable.make_directory(existing)
    assert opened[-2:] == [tmp_path, tmp_path / "a"]
    opened.clear()
    durable.make_directory(existing)
    durable.make_directory(existing / "c")
    assert opened == [existing]
    (existing / "c").rmdir()
    durable.make_directory(existing / "c")
    assert opened == [existing, existing] and (existing / "c").is_dir()
    store = ObjectStore(tmp_path)
    store.prepare()
    opened.clear()
    store.prepare()
    assert opened == [store.root]


def test_object_names_are_ours(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    store.prepare()
    store.prepare()
    assert len([d for d in store.root.iterdir() if d.is_dir()]) == durable.FANOUT
    for hostile in ("../../etc/passwd", "/abs", "1.2\0", "x" * 70_000, "%2e%2e/"):
        name = store.new_name(hostile)
        assert store.path(name).resolve().parent.parent == store.root.resolve()
    assert store.new_name("1.2").split("/")[0] == store.new_name("1.2").split("/")[0]
    assert store.new_name("1.2") != store.new_name("1.2")


def test_die_ends_the_process_without_handlers() -> None:
    code = (
        "import atexit, sys\nfrom dicomnode import durable\natexit.register(print, 'handler ran')\n"
        "try:\n    durable.die(durable.SyncFailed('fsync file', 'Input/output error'))\n"
        "finally:\n    print('finally ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == durable.EXIT_STORAGE == 74
    assert done.stdout == "" and "fsync file: Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
