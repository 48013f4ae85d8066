"""De-identification in a child: the same bytes, errors come back, a dead child is replaced and told of."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode.deidentify import Departure
from dicomnode.errors import MalformedDataSet
from dicomnode.sync import aside as module
from dicomnode.sync.aside import Aside, ChildEnded, leave
from tests.sync.index_case import secondary_capture

KEY = b"k" * 32


def ends(path: Path, key: bytes, plain_slice: bool) -> Departure:
    """What the file says happens to the child."""
    what = path.read_text()
    if what.startswith("memory"):
        return Departure("1.2.3", bytes(300 << 20), {})
    if what == "who":
        return Departure(str(os.getpid()), b"", {})
    if what == "mmap":
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if what == "odd":
        raise ValueError(what)
    if what.startswith("hang"):
        threading.Event().wait()
    if what.startswith("once"):
        path.write_text("well")
        os.kill(os.getpid(), signal.SIGKILL)
    if what != "well":
        os.kill(os.getpid(), int(what))
    return Departure("1.2.3", b"", {})


@pytest.fixture(scope="module")
def aside() -> Iterator[Aside]:
    made = Aside()
    yield made
    made.close()


@pytest.fixture(scope="module")
def troubled() -> Iterator[Aside]:
    """Time is short for what hangs alone, which is known by its size; what is well has a busy machine's."""
    made = Aside(ends, lambda size: 1.0 if size == len("hangs") else 120.0)
    yield made
    made.close()


def test_the_child_does_the_same(aside: Aside, tmp_path: Path) -> None:
    path = tmp_path / "one.dcm"
    path.write_bytes(secondary_capture()[1])
    assert aside.leave(path, KEY) == leave(path, KEY)
    path.write_bytes(b"rubbish")
    with pytest.raises(MalformedDataSet, match="cannot be de-identified"):
        aside.leave(path, KEY)
    with pytest.raises(MalformedDataSet, match="cannot be read"):
        aside.leave(tmp_path / "none", KEY)


def test_a_dead_child_is_replaced(aside: Aside, tmp_path: Path) -> None:
    path = tmp_path / "one.dcm"
    path.write_bytes(secondary_capture()[1])
    before = aside.leave(path, KEY)
    [child] = aside._idle
    child._process.kill()
    assert aside.leave(path, KEY) == before
    assert aside._idle != [child]


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("9", "ended by signal 9, memory most likely"),
        ("11", "ended by signal 11"),
        ("memory", r"memory limit of \d+ MiB"),
        ("hangs", "no end after 1 s"),
    ],
)
def test_how_a_child_ended_is_told(troubled: Aside, tmp_path: Path, what: str, cause: str) -> None:
    path = tmp_path / "object"
    path.write_text(what)
    with pytest.raises(ChildEnded) as found:
        troubled.leave(path, KEY)
    assert re.search(cause, found.value.cause)
    path.write_text("once")
    assert troubled.leave(path, KEY).content == b"", "another child may do it"


@pytest.mark.parametrize(
    ("what", "cause"), [("memory", "memory limit"), ("mmap", "memory limit"), ("odd", r"failed \(ValueError\)")]
)
def test_a_child_that_failed_with_an_object_does_not_get_another(
    troubled: Aside, tmp_path: Path, what: str, cause: str
) -> None:
    """What it left behind in its memory, which is limited, would fail objects that are well."""
    path = tmp_path / "object"

    def who() -> str:
        path.write_text("who")
        return troubled.leave(path, KEY).sop_instance_uid

    before = who()
    assert who() == before, "one that is well is used again"
    path.write_text(what)
    with pytest.raises(ChildEnded, match=cause):
        troubled.leave(path, KEY)
    assert not Path(f"/proc/{before}").exists() and who() != before


def test_the_limit_of_memory_is_the_objects_own(troubled: Aside, tmp_path: Path) -> None:
    path = tmp_path / "object"
    with path.open("wb") as file:
        file.write(b"memory")
        file.truncate(100 << 20)
    assert len(troubled.leave(path, KEY).content) == 300 << 20


def test_closing_does_not_wait_for_one_that_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_text("hang")
    aside = Aside(ends, lambda _: 300.0)
    found: list[BaseException] = []

    def work() -> None:
        try:
            aside.leave(path, KEY)
        except MemoryError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not aside._busy:
        thread.join(0.01)
    aside.close()
    thread.join(60)
    assert [str(e) for e in found] == ["the de-identifier is closed"], "that speaks against no object"


def begins_badly(_: Path, __: bytes, ___: bool) -> Departure:
    raise AssertionError


def test_where_no_child_comes_up_no_object_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "object"
    path.write_text("well")
    monkeypatch.setattr(module, "BEGIN_SECONDS", 0.0)
    with pytest.raises(MemoryError, match="does not come up"):
        Aside(begins_badly).leave(path, KEY)
